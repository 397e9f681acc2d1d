"""Answers that try to act, for every scorer: each task of reasoning-gym (skipped without it), and math-verify.

Nothing they try may happen, and the next right answer must be right.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from rlvr_jax.data import sources
from rlvr_jax.data.sources import check_source, load_problems
from rlvr_jax.rewards import GraderPool
from rlvr_jax.rewards.rules import EVALUATING_TASKS

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is an optional dependency"
)
SHELL = "__import__('os').system('touch ' + {file!r})"
ACTS = [
    SHELL,
    "open({file!r}, 'w')",
    "[open({file!r}, 'w')]",
    "[[__import__('pathlib').Path({file!r}).touch()]]",
    "__import__('socket').create_connection(('127.0.0.1', {port}))",
    "setattr(type(self), 'score_answer', lambda *_: 1.0)",
    "__import__('sympy').parsing.sympy_parser.__dict__.update(eval_expr=lambda *_: 1/0) or " + SHELL,
    "entry.update(answer='7') or [" + SHELL + "]",
    'sympify("' + "__import__(chr(111)+chr(115))" + '")',
    'sin("' + "open({text!r}, chr(119))" + '")',
    "Function('f', eval=open)({text!r}, 'w')",
    '{{"a": ' + SHELL + "}}",
]


def acts(tmp_path, port=9):
    """The texts, alone and after something that a scorer may read first."""
    file = str(tmp_path / "made")
    made = [act.format(file=file, text=file, port=port) for act in ACTS]
    return made + [f"1 + {text}" for text in made[:2]] + [f"1\n{made[0]}", f"x*{made[0]}"]


def wrong_after_acts(pool, problem, tmp_path):
    """What was not as it should be when a problem's scorer was shown all texts and then its own answer."""
    own = json.loads(problem.answer)["answer"]
    texts = ["no answer", *acts(tmp_path), own or ""]  # some scorers take any text for a no
    graded = pool.grade("reasoning_gym", [f"<answer>{text}</answer>" for text in texts], [problem.answer] * len(texts))
    found = [
        (problem.id, text, verdict)
        for text, verdict in zip(texts, graded[:-1], strict=False)
        if verdict.correct and not graded[0].correct
    ]
    if own and graded[-1].score != 1:
        found.append((problem.id, own, graded[-1]))
    return found + [str(path) for path in tmp_path.iterdir()]


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=1, timeout_s=30) as pool:
        yield pool


def problems_of(names):
    return load_problems(f"reasoning_gym:{','.join(sorted(names))}?size=1&seed=7")


@needs_gym
def test_the_tasks_that_evaluate(pool, tmp_path):
    for problem in problems_of(EVALUATING_TASKS):
        assert wrong_after_acts(pool, problem, tmp_path) == []


@needs_gym
@pytest.mark.slow
def test_every_other_task(pool, tmp_path):
    import reasoning_gym

    for problem in problems_of(reasoning_gym.factory.DATASETS.keys() - EVALUATING_TASKS - {"composite"}):
        assert wrong_after_acts(pool, problem, tmp_path) == []


FIND = """
import random, sys
import reasoning_gym
from rlvr_jax.rewards.rules import EVALUATING_TASKS
MARK = "4127"
found, task = set(), None

def hook(event, arguments):
    if event == "compile" and task is not None and MARK in str(arguments[0]):
        found.add(task)

sys.addaudithook(hook)
for name in sorted(reasoning_gym.factory.DATASETS.keys() - {"composite"}):
    random.seed(0)
    dataset = reasoning_gym.create_dataset(name, size=1, seed=7)
    entry = dataset[0]
    task = name
    for text in (MARK, f"[{MARK}]", f"[[{MARK}]]", f"{MARK} + 1", f"({MARK})", f'["{MARK}"]', f"<{MARK}>"):
        try:
            dataset.score_answer(text, entry)
        except Exception:
            pass
    task = None
assert found == EVALUATING_TASKS, (found - EVALUATING_TASKS, EVALUATING_TASKS - found)
"""


@needs_gym
@pytest.mark.slow
def test_no_other_task_evaluates_the_text_of_an_answer():
    subprocess.run([sys.executable, "-c", FIND], check=True)


@needs_gym
def test_without_a_sandbox_the_tasks_that_evaluate_are_refused(monkeypatch, caplog):
    monkeypatch.setattr(sources.sandbox, "unavailable", lambda: "no seccomp")
    source = "reasoning_gym:leg_counting,countdown,n_queens"
    with pytest.raises(
        ValueError, match=r"scorers of countdown, n_queens evaluate .*\(no seccomp\).*unsafe_evaluation"
    ):
        check_source(source, rule="reasoning_gym")
    check_source(source, rule="my_module:function")
    check_source("reasoning_gym:leg_counting", rule="reasoning_gym")
    check_source(source, rule="reasoning_gym", unsafe_evaluation=True)
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "the tasks score answers without a sandbox (no seccomp)",
        "countdown, n_queens evaluate the text of answers without a sandbox (no seccomp)",
    ]


def test_math_verify_evaluates_no_text(tmp_path):
    shapes = ["{}", r"\text{{{}}}", r"\mathrm{{{}}}", r"\operatorname{{{}}}(1)", r"\sin({})", r"\frac{{{}}}{{2}}"]
    shapes += [
        "x_{{{}}}",
        "x={}",
        "1+{}",
        r"\sum_{{i=1}}^{{{}}} i",
        r"\begin{{pmatrix}}{}\end{{pmatrix}}",
        "f({})",
        "1/2 {}",
        "'{}'",
    ]
    texts = [shape.format(text) for text in acts(tmp_path)[:8] for shape in shapes]
    with GraderPool(workers=1, timeout_s=10) as pool:
        graded = pool.grade("math_verify", [f"\\boxed{{{text}}}" for text in [*texts, "42"]], ["42"] * (len(texts) + 1))
    assert graded[-1].correct
    assert not any(verdict.correct for verdict in graded[:-1])
    assert not any("Refused" in (verdict.error or "") for verdict in graded)
    assert list(tmp_path.iterdir()) == []
