"""The sandbox of the graders: what an answer that is run as code can do (nothing), and what its verdict can be."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlvr_jax.rewards import Graded, GraderPool, sandbox, worker
from rlvr_jax.rewards.process import from_outside

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

# A rule that runs what the model wrote, as some published scorers do.
RULES = """
import ctypes, json, os, signal, socket, subprocess, sys, time

def scorer(value, answer):
    return value == int(answer)

def evaluates(response, answer):
    return scorer(eval(response), answer)

def waits(response, answer):
    with open(answer, "a") as file:
        file.write("x")
    if os.path.getsize(answer) == 1:
        time.sleep(3600)
    return True
"""
THIS = "sys.modules[__name__]"
# Each is an answer to the question whose right answer is 42. {file} is a path that must never come to be.
ATTEMPTS = {
    "write a file": "open({file!r}, 'w')",
    "write by a raw call": "os.open({file!r}, os.O_WRONLY | os.O_CREAT)",
    "make a folder": "os.mkdir({file!r})",
    "read a file": "open('/etc/passwd').read()",
    "list a folder": "os.listdir('/')",
    "run a shell": "os.system('touch ' + {file!r}) or 42",
    "run a program": "subprocess.run(['touch', {file!r}])",
    "become a program": "os.execv('/bin/touch', ['touch', {file!r}])",
    "fork": "os.fork()",
    "open a socket": "socket.create_connection(('127.0.0.1', 9))",
    "open a local socket": "socket.socket(socket.AF_UNIX)",
    "kill its parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "kill its group": "os.killpg(0, signal.SIGKILL)",
    "raw system calls": "ctypes.CDLL(None).syscall(2, {file!r}.encode(), 65) == -1 and 7",
    "map a file": "__import__('mmap').mmap(os.open('/dev/zero', 0), 4096)",
    "start a thread": "__import__('threading').Thread(target=print).start()",
    "read what is sent to the worker": "os.read(0, 100)",
    "read the pipe": "os.read(3, 100)",
}


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    (folder / "running_rules.py").write_text(RULES)
    sys.path.insert(0, str(folder))
    yield "running_rules:evaluates"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool():
    os.environ["A_SECRET"] = "do-not-tell"
    try:
        with GraderPool(workers=1, timeout_s=1.5, memory_mb=256, sandbox=True) as pool:
            yield pool
    finally:
        del os.environ["A_SECRET"]


def test_the_sandbox_holds_on_this_machine():
    assert sandbox.unavailable() is None


def test_the_sandbox_holds_for_an_ordinary_user():
    if os.getuid():
        pytest.skip("this is an ordinary user already")
    program = f"""
import os, runpy
failing = runpy.run_path({sandbox.__file__!r})["failing"]
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
print(failing())
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_a_confined_function_returns_data_or_the_reason_why_not():
    program = f"""
import json, os, runpy, signal, sys, time
apart = runpy.run_path({sandbox.__file__!r})["apart"]
cases = [
    lambda: {{"a": [1, "\\ud800"]}},
    lambda: os.write(3, b"[" * 100_000) and os._exit(0),
    lambda: os.write(3, b"1,") and 2,
    lambda: "x" * 5_000_000,
    lambda: time.sleep(60),
    lambda: os._exit(7),
    lambda: print("never seen", flush=True),
    lambda: object(),
    lambda: dict(os.environ),
    lambda: (lambda f: f(f))(lambda f: f(f)),
]
print(json.dumps([apart(case, 0.5)[:3] for case in cases]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    died = "the grading process died (exit status {})"
    assert json.loads(done.stdout) == [
        [{"a": [1, "\ud800"]}, None, 0],
        [None, died.format(0), 0],
        [None, died.format(0), 0],
        [None, "the verdict has more than 4194304 bytes", 0],
        [None, "exceeded the time limit of 0.5 s", 0],
        [None, died.format(7), 0],
        [None, None, 0],
        [None, died.format(1), 0],
        [{}, None, 0],
        [None, died.format(1), 0],
    ]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_answer_that_is_run_can_do_nothing(pool, rule, tmp_path, attempt):
    file = tmp_path / "made"
    text = ATTEMPTS[attempt].format(file=str(file))
    bad, good = pool.grade(rule, [text, "42"], ["42", "42"])
    assert not bad.correct
    assert bad.error is not None or attempt in ("run a shell", "raw system calls")  # these report failure by a number
    assert good == Graded(True, None, None)
    assert list(tmp_path.iterdir()) == []


def test_no_answer_reaches_the_next_one(pool, rule):
    for patch in (
        f"setattr({THIS}, 'scorer', lambda *_: True)",
        f"{THIS}.__dict__.update(scorer=lambda *_: True)",
        "__builtins__.update(int=lambda x: 0)",
    ):
        patched, wrong, right = pool.grade(rule, [f"({patch}, 7)[1]", "7", "42"], ["42"] * 3)
        assert not patched.correct or "scorer" in patch  # code that is run decides its own verdict
        assert wrong == Graded(False, None, None)
        assert right == Graded(True, None, None)


def test_what_a_confined_process_says_is_a_verdict_or_an_error(pool, rule):
    whole = {"correct": True, "prediction": None, "error": None, "score": 1e9}
    said = [
        whole | {"last": True},
        whole | {"correct": 1},
        whole | {"prediction": ["x"]},
        whole | {"score": float("nan")},
        {"correct": True},
        [1],
    ]
    forged = [f"(os.write(3, {json.dumps(x)!r}.encode()), os._exit(0))" for x in said]
    graded = pool.grade(rule, [*forged, "42"], ["42"] * (len(said) + 1))
    expected = "the grading process sent something that is no verdict"
    assert [(g.correct, g.error) for g in graded] == [(False, expected)] * len(said) + [(True, None)]


def test_limits_in_the_sandbox(pool, rule):
    texts = ["time.sleep(60)", "9**9**9", "len(b'x' * 2**30)", "ctypes.string_at(1)", "os._exit(3)", "42"]
    slept, computed, grew, crashed, left, good = pool.grade(rule, texts, ["42"] * len(texts))
    assert slept.error == computed.error == "exceeded the time limit of 1.5 s"
    assert grew.error == "MemoryError"
    assert crashed.error == "the grading process died (SIGSEGV)"
    assert left.error == "the grading process died (exit status 3)"
    assert good.correct


def test_the_environment_s_secrets_are_not_in_reach(pool, rule):
    texts = [
        "(_ for _ in ()).throw(ValueError(repr(dict(os.environ))))",
        "(_ for _ in ()).throw(ValueError(str(ctypes.CDLL(None).getenv(b'A_SECRET'))))",
        "open('/proc/self/environ').read()",
        "open(f'/proc/{os.getppid()}/environ').read()",
    ]
    graded = pool.grade(rule, texts, ["42"] * 4)
    assert [g.error for g in graded[:2]] == ["ValueError: {}", "ValueError: 0"]
    assert all(g.error.startswith("PermissionError") for g in graded[2:])
    (zygote,) = pool._teams[rule]
    assert b"A_SECRET" not in Path(f"/proc/{zygote.process.pid}/environ").read_bytes()


def test_published_rules_give_the_same_verdicts_in_the_sandbox():
    # sympy imports more when it compares the last three.
    predictions = ["\\frac{1}{2}", "0.5", "1,1", "\\text{x", "x=5", "(x)\\in(1,2)", "[1,2)", "\\prod_{i=1}^3 i"]
    answers = ["0.5", "\\frac12", "1", "2", "5", "x\\in(1,2)", "[1,2]\\cap[0,1]", "6"]
    responses = [f"\\boxed{{{x}}}" for x in predictions]
    with (
        GraderPool(workers=1, timeout_s=20) as plain,
        GraderPool(workers=1, timeout_s=20, sandbox=True) as confined,
    ):
        assert confined.grade("math_verify", responses, answers) == plain.grade("math_verify", responses, answers)


LATE = """
import ast, contextlib, importlib, pathlib, runpy, sys
import math_verify
for name in runpy.run_path(sys.argv[1], run_name="worker")["_SYMPY_LATE"]:
    with contextlib.suppress(ImportError):
        importlib.import_module(f"sympy.{name}")
aside = ("plotting", "printing", "testing", "interactive", "external", "utilities", "physics", "parsing")
late = set()
for name, module in list(sys.modules.items()):
    if not name.startswith("sympy.") or name.split(".")[1] in aside:
        continue
    path = pathlib.Path(module.__file__)
    package = name.split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            late.update([base, *(f"{base}.{x.name}" for x in node.names)])
root = pathlib.Path(sys.modules["sympy"].__file__).parent.parent
for name in sorted(late - sys.modules.keys()):
    path = root.joinpath(*name.split("."))
    if name.startswith("sympy.") and name.split(".")[1] not in aside:
        if path.with_suffix(".py").exists() or path.is_dir():
            print(name)
"""


@pytest.mark.slow
def test_the_worker_imports_first_what_sympy_imports_late():
    done = subprocess.run([sys.executable, "-c", LATE, worker.__file__], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_without_a_sandbox_grading_is_refused_unless_it_is_allowed(monkeypatch):
    fake = type("Sandbox", (), {"failing": staticmethod(lambda: "no seccomp")})
    monkeypatch.setattr(worker, "_beside", lambda name: fake)
    config = {"apart": True, "rule": "m:f", "unsafe_evaluation": False}
    with pytest.raises(RuntimeError, match="no sandbox here: no seccomp"):
        worker._sandbox(config)
    config["rule"] = "reasoning_gym"
    assert worker._sandbox(config) == (None, "refused, since there is no sandbox here: no seccomp")
    assert worker._sandbox(config | {"unsafe_evaluation": True}) == (None, None)
    assert worker._sandbox(config | {"apart": False}) == (None, None)


def test_the_self_test_sees_what_gets_through(monkeypatch):
    monkeypatch.setattr(sandbox, "apart", lambda f, s: sandbox.Outcome(["open a socket"], None, 0, 0.0))
    assert sandbox.failing() == "a confined process could open a socket"
    monkeypatch.setattr(sandbox, "apart", lambda f, s: sandbox.Outcome(None, "died", 0, 0.0))
    assert sandbox.failing() == "a process cannot be confined by seccomp: died"
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "vax")
    assert "needs Linux on x86-64 or arm64, this is linux on vax" in sandbox.failing()


def test_every_attempt_of_the_self_test_would_be_seen():
    """Outside, each attempt succeeds or fails for another reason than EPERM; the harmful ones are not tried."""
    harmful = {"run a program", "start a process", "trace its parent", "change a limit", "signal its parent"}
    for name in sandbox._ATTEMPTS.keys() - harmful:
        assert sandbox._succeeds(sandbox._ATTEMPTS[name]), name


def test_a_killed_grading_is_tried_again(rule, tmp_path):
    """The first try never ends; its worker is killed, as the kernel does when memory runs out."""
    with GraderPool(workers=1, timeout_s=60) as pool:
        mark = tmp_path / "tries"
        killer = threading.Thread(target=_kill_once_begun, args=(pool, mark))
        killer.start()
        graded = pool.grade("running_rules:waits", ["x"], [str(mark)])
        killer.join()
    assert graded == [Graded(True, None, None)]
    assert mark.read_text() == "xx"


def _kill_once_begun(pool, mark):
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    for team in list(pool._teams.values()):
        for one in list(team):
            os.kill(one.process.pid, signal.SIGKILL)


def test_a_killed_process_in_the_sandbox_is_tried_again(pool, rule):
    pool.grade(rule, ["42"], ["42"])
    (zygote,) = pool._teams[rule]
    children = Path(f"/proc/{zygote.process.pid}/task/{zygote.process.pid}/children")
    killed = []

    def kill_first():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for child in children.read_text().split():
                killed.append(int(child))
                os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_first)
    killer.start()
    graded = pool.grade(rule, ["time.sleep(0.5) or 42"], ["42"])
    killer.join()
    assert killed
    assert graded == [Graded(True, None, None)]


def test_an_import_that_comes_too_late_is_named(pool, rule):
    graded, after = pool.grade(rule, ["__import__('sqlite3')", "42"], ["42"] * 2)
    assert after.correct
    assert not graded.correct
    assert graded.error == (
        "the grading imports sqlite3, which the sandbox allows only before it: "
        "ModuleNotFoundError: No module named 'sqlite3'"
    )


def test_a_machine_that_cannot_start_a_process_is_no_fault_of_an_answer(monkeypatch):
    def fails():
        raise BlockingIOError(11, "no process left")

    monkeypatch.setattr(sandbox.os, "fork", fails)
    before = sorted(os.listdir("/proc/self/fd"))
    grader = worker.Grader(lambda text, answer: (True, None, None, None))
    message = worker._verdict_apart(sandbox, grader, {"text": "x", "answer": "y"}, 1.0)
    assert message["error"].startswith("no process can be started to grade in: ")
    assert from_outside(message)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_grading_that_is_always_killed_ends():
    with GraderPool(workers=1, timeout_s=60) as pool:
        (graded,) = pool.grade("tests.tiny_rules:killed", ["x"], ["y"])
    assert graded == Graded(False, None, "the grading worker died (SIGKILL)")
    assert from_outside({"signal": signal.SIGKILL})
    assert not from_outside({"signal": signal.SIGSEGV})
    assert not from_outside({"correct": True})
