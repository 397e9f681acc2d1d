"""Graded rewards: a researcher's own function with floats, what counts as right, what is an error."""

import dataclasses
import pickle

import pytest

from rlvr_jax.rewards import Graded, GraderPool, rules, worker

GRADERS = """
import numpy, time

VALUES = {
    "true": True, "false": False, "one": 1, "zero": 0, "numpy true": numpy.bool_(True), "numpy one": numpy.int64(1),
    "half": 0.5, "0.0": 0.0, "-0.25": -0.25, "1.0": 1.0, "numpy": numpy.float32(0.75), "array": numpy.array(2.5),
    "pair": (0.25, "seen"), "bool pair": (True, "seen"), "none pair": (0.5, None),
    "nan": float("nan"), "inf": (float("inf"), "seen"), "two": 2, "text": "A", "none": None, "bad pair": (0.5, 3),
    "triple": (1.0, "a", "b"), "large": -1e18, "huge": 1e19, "huger": 1e300,
}

def score(response, answer):
    if response == "sleep":
        time.sleep(60)
    return VALUES[response]
"""

SHAPES = """
import functools

def alone(response): ...
def three(response, answer, extra): ...
def named(*, response, answer): ...
async def later(response, answer): ...
def steps(response, answer): yield True
class Kind:
    def __init__(self, response, answer): ...
class Waits:
    async def __call__(self, response, answer): ...
waits, later_too, number = Waits(), functools.partial(later), 3

def more(response, answer, extra=1): return True
def all(*words): return True
class Calls:
    def __call__(self, response, answer): return True
    @staticmethod
    def inside(a, b): return True
calls, bound = Calls(), functools.partial(three, extra=1)
"""


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graders")
    (folder / "scored_graders.py").write_text(GRADERS)
    (folder / "shaped_graders.py").write_text(SHAPES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "scored_graders:score"


def test_what_an_own_function_may_return(rule):
    expected = {
        "true": Graded(True, None, None),
        "false": Graded(False, None, None),
        "one": Graded(True, None, None),
        "zero": Graded(False, None, None),
        "numpy true": Graded(True, None, None),
        "numpy one": Graded(True, None, None),
        "half": Graded(True, None, None, 0.5),
        "0.0": Graded(False, None, None, 0.0),
        "-0.25": Graded(False, None, None, -0.25),
        "1.0": Graded(True, None, None, 1.0),
        "numpy": Graded(True, None, None, 0.75),
        "array": Graded(True, None, None, 2.5),
        "pair": Graded(True, "seen", None, 0.25),
        "bool pair": Graded(True, "seen", None),
        "none pair": Graded(True, None, None, 0.5),
        "nan": Graded(False, None, f"{rule} returned the score nan"),
        "inf": Graded(False, "seen", f"{rule} returned the score inf"),
        "large": Graded(False, None, None, -1e18),
        "huge": Graded(False, None, f"{rule} returned the score 1e+19"),
        "huger": Graded(False, None, f"{rule} returned the score 1e+300"),
    }
    refused = ["two", "text", "none", "bad pair", "triple"]
    names = [*expected, *refused]
    with GraderPool(workers=1, timeout_s=20.0) as pool:
        graded = dict(zip(names, pool.grade(rule, names, [""] * len(names)), strict=True))
    assert {name: graded[name] for name in expected} == expected
    for name in refused:
        assert not graded[name].correct
        assert graded[name].error.startswith("TypeError: scored_graders:score returned")
        assert "a float" in graded[name].error


def test_an_own_function_takes_a_response_and_an_answer(rule):
    for name in ("more", "all", "calls", "bound", "Calls.inside"):
        worker._function(f"shaped_graders:{name}")
    for name, reason in {
        "alone": r"takes \(response\), expected \(response, answer\): too many",
        "three": r"takes \(response, answer, extra\), expected .*: missing a required argument: 'extra'",
        "named": r"takes \(\*, response, answer\), expected",
        "later": "is async or a generator",
        "later_too": "is async or a generator",
        "waits": "is async or a generator",
        "steps": "is async or a generator",
        "Kind": "is a class: expected a function",
        "number": "is of type int: expected a function",
    }.items():
        with pytest.raises(TypeError, match=f"^shaped_graders:{name} {reason}"):
            worker._function(f"shaped_graders:{name}")
    with (
        GraderPool(workers=1, timeout_s=20.0) as pool,
        pytest.raises(
            ValueError, match=r"^rule='shaped_graders:alone' cannot be used: TypeError: shaped_graders:alone"
        ),
    ):
        pool.grade("shaped_graders:alone", ["1"], ["1"])


def test_an_overrun_counts_as_wrong(rule):
    with GraderPool(workers=1, timeout_s=0.5) as pool:
        (graded,) = pool.grade(rule, ["sleep"], [""])
    assert graded == Graded(False, None, "exceeded the time limit of 0.5 s", None)
    assert graded.reward == -1


def test_the_reward_of_a_verdict():
    assert Graded(True, "1", None).reward == 1
    assert Graded(False, "1", None).reward == -1
    assert Graded(False, None, None, 0.0).reward == 0
    assert Graded(True, None, None, 0.25).reward == 0.25
    assert Graded(True, None, None).score is None


def test_a_verdict_is_a_plain_value():
    verdict = Graded(True, "2", None, 0.5)
    assert dataclasses.astuple(verdict) == (True, "2", None, 0.5)
    assert verdict != Graded(True, "2", None)  # the score is a part of it
    assert pickle.loads(pickle.dumps(verdict)) == verdict
    assert len({verdict, dataclasses.replace(verdict)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.correct = False


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("<answer>1</answer> <answer> 2 </answer> \\boxed{3}\nAnswer: 4", "2"),
        ("<answer>1</answer> and <answer>2", "1"),
        ("<answer></answer> \\boxed{3}", ""),
        ("<answer>a\nb</answer>", "a\nb"),
        ("</answer> \\boxed{3}\nAnswer: 4", "3"),
        ("\\boxed{3} \\boxed{4\nAnswer: 5", None),
        ("first \\boxed{1}, then \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("Answer: 4\nso the answer: 5 \nend", "5"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found_in_this_order(response, found):
    assert rules.final_answer(response) == (found, None)


def test_a_final_answer_has_a_longest_length():
    for response in ("<answer>" + "x" * 101 + "</answer>", "Answer: " + "x" * 101, "\\boxed{" + "x" * 101 + "}"):
        found, error = rules.final_answer(response, limit=100)
        assert found is None
        assert "100 characters" in error
    assert rules.final_answer("<answer>" + "x" * 100 + "</answer>", limit=100) == ("x" * 100, None)
