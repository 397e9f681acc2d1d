"""The guarded grading workers: hostile text, limits, replacement, throughput."""

import inspect
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlvr_jax.rewards import Graded, GraderPool, dapo_answer_reward, math_verify_reward, rules

GRADERS = """
import os, sys, time

def length(response, answer):
    return len(response) == int(answer), response[:1]

def modules(response, answer):
    return "jax" not in sys.modules and "rlvr_jax" not in sys.modules and "numpy" not in sys.modules

def hostile(response, answer):
    print("noise on stdout", flush=True)
    os.write(1, b"more noise")
    if response == "sleep":
        time.sleep(3600)
    if response == "memory":
        return len(b"x" * 2**32) > 0
    if response == "grow":
        kept = b"x" * (120 * 2**20)
        return len(kept) > 0, str(os.getpid())
    if response == "segfault":
        os.kill(os.getpid(), 11)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "exit":
        sys.exit(3)
    if response == "mark":
        return "A"
    return response == answer, str(os.getpid())
"""


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=1, timeout_s=20.0) as pool:
        yield pool


@pytest.fixture
def graders(tmp_path, monkeypatch):
    (tmp_path / "own_graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_graders"


def boxed(text):
    return f"So the answer is $\\boxed{{{text}}}$."


HOSTILE = [
    "9^{9^{9^9}}",
    r"2^{2^{2^{2^{2^{2^2}}}}}",
    "10^9!",
    r"\prod_{n=1}^{10000000} n",
    "(x+1)^{1000000}",
    "{" * 900 + "}" * 900,
    "(" * 990,
]
HARMLESS = [
    r"\sqrt" * 300,
    r"\frac" * 300,
    r"\text{" * 300,
    "$" * 1500,
    "\0",
    "4\0002",
    "\ud800\udfff",
    "\udcff",
    "\u202e24",
    "٤٢",
    "\U0001f600" * 500,
    "\\",
    "}" * 2000,
    "%d %s {0} ${x}",
    "__import__('os').system('exit 3')",
    "nan",
    r"\frac{1}{0}",
    "1e999999999",
    "1" * 1990,
]
GIANT = [
    "\\boxed{" + "{" * 3_000_000 + "}" * 3_000_000 + "}",
    "\\boxed{" * 500_000,
    "\\boxed" * 500_000 + "{",
    "\\boxed{" + "x" * 5_000_000 + "}",
    "Answer:" * 500_000,
    "Answer: " + "$" * 3_000_000,
    "Answer" + " " * 3_000_000,
    "{" * 3_000_000,
]


def test_hostile_answers_cost_at_most_their_time_and_the_next_grade_is_right():
    with GraderPool(workers=2, timeout_s=1.0, memory_mb=1024) as pool:
        assert pool.grade("math_verify", [boxed("42")], ["42"])[0].correct
        start = time.monotonic()
        graded = pool.grade("math_verify", [boxed(text) for text in HOSTILE] * 3, ["42"] * 3 * len(HOSTILE))
        assert time.monotonic() - start < 40
        assert not any(g.correct for g in graded)
        assert all(g.error and "time limit of 1 s" in g.error for g in graded[:2])
        assert graded[: len(HOSTILE)] == graded[len(HOSTILE) : 2 * len(HOSTILE)]
        assert pool.grade("math_verify", [boxed("42")], ["6\\cdot 7"]) == [Graded(True, "42", None)]


def test_odd_text_gets_a_verdict(pool):
    graded = pool.grade("math_verify", [boxed(text) for text in HARMLESS], ["42"] * len(HARMLESS))
    # math-verify drops a null byte as it does other unknown characters
    assert [text for text, g in zip(HARMLESS, graded, strict=True) if g.correct] == []
    assert all("time limit" not in (g.error or "") for g in graded)
    same = pool.grade("dapo_answer", [f"Answer: {text}" for text in HARMLESS], HARMLESS)
    assert len(same) == len(HARMLESS)


@pytest.mark.parametrize("rule", ["math_verify", "dapo_answer"])
def test_megabytes_take_milliseconds(pool, rule):
    pool.grade(rule, [boxed("1")], ["1"])
    start = time.monotonic()
    graded = pool.grade(rule, GIANT, ["42"] * len(GIANT))
    assert time.monotonic() - start < 1.0
    assert not any(g.correct for g in graded)
    if rule == "math_verify":
        assert "2000 characters" in graded[0].error


def test_reference_answers_may_be_hostile_too(pool):
    answers = ["\\text{" * 100_000, "$" * 100_000, "=" * 100_000, "\0", "", "\ud800", "7" * 250 + " units" * 1000]
    responses = ["Answer: 42"] * 6 + ["Answer: " + "7" * 250]
    with GraderPool(workers=2, timeout_s=1.0) as short:
        graded = short.grade("dapo_answer", responses, answers)
    assert graded[0].error == "exceeded the time limit of 1 s"
    assert [g.correct for g in graded] == [False] * 6 + [True]
    graded = pool.grade("math_verify", [boxed("42")], [""])
    assert graded == [Graded(False, "42", "no answer can be read from the reference answer")]


def test_the_longest_text_graded_in_this_process_is_quick(pool):
    for part in ("\\text{", "$", "x", "\\boxed{", "frac", "sqrt", "=", " ", "a ", ","):
        answer = (part * 2000)[:2000]
        start = time.monotonic()
        pool.grade("dapo_answer", ["Answer: " + part * 300], [answer])
        assert time.monotonic() - start < 0.5  # 0.03 s on a quiet machine


def test_workers_are_killed_and_replaced(graders):
    rule = f"{graders}:hostile"
    with GraderPool(workers=1, timeout_s=1.0, memory_mb=512) as pool:
        (first,) = pool.grade(rule, ["fine"], ["fine"])
        assert first.correct
        (again,) = pool.grade(rule, ["fine"], ["fine"])
        assert again.prediction == first.prediction  # the same process
        start = time.monotonic()
        slept, after = pool.grade(rule, ["sleep", "fine"], ["", "fine"])
        assert 1.0 <= time.monotonic() - start < 10
        assert slept == Graded(False, None, "exceeded the time limit of 1 s")
        assert after.correct
        assert after.prediction != first.prediction  # another process
        with pytest.raises(ProcessLookupError):
            os.kill(int(first.prediction), 0)

        names = ["segfault", "memory", "raise", "exit", "mark", "fine"]
        by_name = dict(zip(names, pool.grade(rule, names, ["fine"] * len(names)), strict=True))
        assert by_name["segfault"].error == "the grading worker died (SIGSEGV)"
        assert by_name["raise"].error == "KeyError: 'no such thing'"
        assert by_name["exit"].error == "SystemExit: 3"
        assert "expected a bool" in by_name["mark"].error
        assert by_name["fine"].correct
        if sys.platform == "linux":
            assert by_name["memory"].error == "MemoryError"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_worker_that_grew_is_replaced_after_its_verdict(graders):
    rule = f"{graders}:hostile"
    with GraderPool(workers=1, memory_mb=190) as pool:
        grown, after = pool.grade(rule, ["grow", "fine"], ["", "fine"])
    assert grown.correct
    assert after.correct
    assert grown.prediction != after.prediction


def test_module_function_rule(graders, monkeypatch):
    with GraderPool() as pool:
        assert pool.grade(f"{graders}:length", ["abc", "é\n\ud800"], ["3", "4"]) == [
            Graded(True, "a", None),
            Graded(False, "é", None),
        ]
        assert pool.grade(f"{graders}:modules", ["x"], ["x"])[0].correct
        long = "x" * 3_000_000  # more than a pipe holds
        assert pool.grade(f"{graders}:length", [long] * 3, ["3000000"] * 3) == [Graded(True, "x", None)] * 3
        assert pool.grade(f"{graders}:length", [], []) == []
        for rule, part in [("no_such_module:f", "no_such_module"), (f"{graders}:absent", "absent")]:
            with pytest.raises(ValueError, match=part):
                pool.grade(rule, ["x"], ["x"])
        assert pool.grade(f"{graders}:length", ["ab"], ["2"])[0].correct


def test_verdicts_are_remembered_but_first_overruns_are_not(monkeypatch):
    with GraderPool(workers=1, timeout_s=0.5) as pool:
        assert pool.grade("math_verify", [boxed("3")] * 5, ["3"] * 5) == [Graded(True, "3", None)] * 5
        calls = []
        run = pool._run
        monkeypatch.setattr(pool, "_run", lambda rule, jobs: (calls.append(list(jobs)), run(rule, jobs))[1])
        pool.grade("math_verify", ["else \\boxed{3}", "\\boxed{3}", "\\boxed{4}"], ["3", "4", "4"])
        assert calls.pop() == [("3", "4"), ("4", "4")]
        for expected in ([("9^{9^{9^9}}", "1")], [("9^{9^{9^9}}", "1")], []):
            (graded,) = pool.grade("math_verify", [boxed("9^{9^{9^9}}")], ["1"])
            assert calls.pop() == expected
            assert graded == Graded(False, "9^{9^{9^9}}", "exceeded the time limit of 0.5 s")
        long = "7" * 1900
        for _ in range(2):
            assert pool.grade("math_verify", [boxed(long)], ["1"]) == [Graded(False, long, None)]
        assert calls == [[(long, "1")], []]
        assert "777" not in repr(pool._memo)  # 2^17 of them would fill gigabytes


def test_throughput_once_warm(pool):
    pool.grade("math_verify", [boxed("1")], ["1"])
    responses = [boxed(i % 16) for i in range(256)]
    for rule, texts in (("math_verify", responses), ("dapo_answer", [f"Answer: {i % 16}" for i in range(256)])):
        start = time.monotonic()
        graded = pool.grade(rule, texts, ["3"] * 256)
        assert time.monotonic() - start < 0.6  # 0.03 s on a quiet machine
        assert sum(g.correct for g in graded) == 16


def test_it_says_when_every_grading_failed(pool, caplog):
    with GraderPool(workers=1) as own:
        own.grade("tests.tiny_rules:failing", ["a", "b"], ["x", "x"])
        own.grade("tests.tiny_rules:contains", ["a", "b"], ["x", "x"])
    rule = "tests.tiny_rules:failing"
    assert [record.message for record in caplog.records] == [
        f"all 2 gradings failed: {rule} returned the score nan (2 times) by {rule}"
    ]


def test_threads_take_turns(pool):
    found = {}

    def grade(i):
        found[i] = pool.grade("math_verify", [boxed(f"{i}+{j}") for j in range(8)], [str(2 * i)] * 8)

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: [g.correct for g in graded] for i, graded in found.items()} == {
        i: [i + j == 2 * i for j in range(8)] for i in range(4)
    }


def test_an_interrupted_call_leaves_nothing_behind(graders):
    rule = f"{graders}:hostile"
    with GraderPool(workers=1, timeout_s=30) as pool:
        pool.grade(rule, ["fine"], ["fine"])
        previous = signal_after(0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                pool.grade(rule, ["sleep"], ["x"])
        finally:
            previous()
        assert pool.grade(rule, ["a", "b"], ["a", "a"])[1].correct is False
        assert pool.grade(rule, ["a"], ["a"])[0].correct


def signal_after(seconds):
    import signal

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)

    def restore():
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    return restore


def test_public_functions_share_workers_and_leave_none(tmp_path):
    source = f"""
import dataclasses, json, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from rlvr_jax.rewards import dapo_answer_reward, math_verify_reward
from rlvr_jax.rewards import grading
print(json.dumps([
    math_verify_reward([{boxed("0.5")!r}, "none"], ["\\\\frac12", "1"]),
    dapo_answer_reward(["Answer: 5", "Answer: 6"], ["5", "5"]),
    [worker.process.pid for team in grading._shared_pool()._teams.values() for worker in team],
], default=dataclasses.astuple))
"""
    program = tmp_path / "program.py"
    program.write_text(source)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=True)
    by_box, by_line, workers = json.loads(done.stdout)
    assert by_box == [[True, "0.5", None, None], [False, None, None, None]]
    assert by_line == [[True, "5", None, None], [False, "6", None, None]]
    assert workers
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_worker_and_rules_import_the_standard_library_alone():
    from rlvr_jax.rewards import worker

    for module in (rules, worker):
        tops = {
            line.split()[1].split(".")[0]
            for line in inspect.getsource(module).splitlines()
            if line.startswith(("import ", "from "))
        }
        assert tops <= set(sys.stdlib_module_names)


def test_bad_arguments_are_named(pool):
    with pytest.raises(ValueError, match="2 responses but 1 answers"):
        math_verify_reward(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="expected one of math_verify, dapo_answer, reasoning_gym, or module:name"):
        pool.grade("mathverify", ["a"], ["a"])
    with pytest.raises(ValueError, match="module:name"):
        pool.grade(":f", ["a"], ["a"])
    with pytest.raises(ValueError, match="workers = 0"):
        GraderPool(workers=0)
    with pytest.raises(ValueError, match="timeout_s = -1"):
        GraderPool(timeout_s=-1.0)
    with pytest.raises(ValueError, match="memory_mb = 0"):
        GraderPool(memory_mb=0)
    assert math_verify_reward([], []) == dapo_answer_reward([], []) == []
