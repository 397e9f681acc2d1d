"""What scorers may evaluate: constants and formulas. A stand-in for reasoning-gym, whose scorers call `eval`."""

import ast
import hashlib
import json
import sys

import pytest

from rlvr_jax.rewards import Graded, GraderPool, guard

DATA = [
    "[[0, 1], [1, 0]]",
    "['Q', '_']",
    "  (1, -2.5)",
    "{1: {2}}",
    "0x1f ^ (3 << 2)",
    "None",
    "this is no Python",
    "word",
    "[Q, word]",
    "1 +",
    "\0",
    "",
]
CODE = {
    "entry['answer']": "Subscript",
    "oracle_answer": "the name oracle_answer",
    "__import__('os').system('x')": "Call",
    "().__class__": "Attribute",
    "[x for x in ()]": "ListComp",
    "lambda: 1": "Lambda",
    "(x := 1)": "NamedExpr",
    "f'{1}'": "JoinedStr",
    "import os": "Import",
    " \t__import__": "the name __import__",
    "# coding: utf-7\n+AF8AXw-import+AF8AXw-": "an encoding",
    "[1][0]": "Subscript",
    "*a": "Starred",
}
FORMULAS = [
    "Integer (3 )*Symbol ('x' )**Integer (2 )/Float ('0.5' )+C ",
    "exp (x )*sin (Integer (2 )*x )+log (Abs (x ))+sqrt (pi )*erf (x )",
    "Function ('f' )(x )",
    "Integral (x ,x )",
    "Piecewise ((x ,x >Integer (0 )),(-x ,True ))",
    "Symbol ('x' ,real =True )",
    "from sympy import *",
    "abs (-E )",
]
MORE_THAN_FORMULAS = {
    "eval (x )": "the name eval",
    "Symbol (open )": "the name open",
    "sympify ('x' )": "the name sympify",
    "lambdify (x ,x )": "the name lambdify",
    "preview (x )": "the name preview",
    "S ('x' )": "the name S",
    "core": "the name core",
    "getattr (x ,'y' )": "the name getattr",
    "x .subs": "Attribute",
    "Symbol ('x' ,**{})": "a keyword",
    "Function ('f' ,eval =x )": "a keyword",
    "__builtins__": "the name __builtins__",
    "a__b": "the name a__b",
    "from os import *": "ImportFrom",
}


def unknown(name):
    return name not in ("oracle_answer", "entry", "__import__")


@pytest.mark.parametrize("text", DATA)
def test_data_may_be_evaluated(text):
    assert guard._objection(text, guard._DATA, unknown) is None
    assert guard._objection(text.encode(), guard._DATA, unknown) is None


@pytest.mark.parametrize(("text", "reason"), CODE.items())
def test_more_than_data_may_not(text, reason):
    assert guard._objection(text.encode(), guard._DATA, unknown) == reason


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_may_be_evaluated_by_sympy(text):
    assert guard._objection(text.encode(), guard._FORMULA, guard._of_mathematics) is None
    if "import" not in text:
        assert guard._objection(ast.parse(text, mode="eval"), guard._FORMULA, guard._of_mathematics) is None


@pytest.mark.parametrize(("text", "reason"), MORE_THAN_FORMULAS.items())
def test_more_than_formulas_may_not(text, reason):
    assert guard._objection(text.encode(), guard._FORMULA, guard._of_mathematics) == reason


def test_odd_text_is_refused():
    assert guard._objection(b"\xff", guard._DATA, unknown) == "bytes that are no text"
    assert guard._objection("(" * 150 + ")" * 150, guard._DATA, unknown) is None  # an empty tuple
    assert guard._objection("-" * 100_000 + "1", guard._DATA, unknown) == "text nested too deeply"


# Two tasks that evaluate as published ones do, one that does not evaluate.
GYM = """
import dataclasses, json, sympy

class Task:
    def __init__(self, name, size=500, seed=0):
        self.name = name

    def __getitem__(self, index):
        return {"question": f"{self.name} {index}", "answer": "[4, 2]" if self.name == "spiral_matrix" else "42"}

    def score_answer(self, answer, entry):
        oracle_answer = entry["answer"]
        try:
            if self.name == "spiral_matrix":
                return 1.0 if eval(answer) == eval(oracle_answer) else 0.1
            if self.name == "countdown":
                return 1.0 if sympy.parse_expr(answer) == 42 else 0.05
            return 1.0 if answer == oracle_answer else 0.0
        except Exception:
            return 0.01

def create_dataset(name, **config):
    return Task(name, **config)
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gym")
    (folder / "reasoning_gym").mkdir()
    (folder / "reasoning_gym" / "__init__.py").write_text(GYM)
    sys.path.insert(0, str(folder))
    try:
        with GraderPool(workers=1, timeout_s=20) as pool:
            yield pool
    finally:
        sys.path.remove(str(folder))


def reference(task):
    digest = hashlib.sha256(f"{task} 0".encode()).hexdigest()[:16]
    return json.dumps({"task": task, "index": 0, "config": {}, "question_sha256": digest})


def test_scorers_evaluate_data_and_refuse_code(pool, tmp_path):
    file = tmp_path / "made"
    answers = {
        "spiral_matrix": {
            "[4, 2]": (1.0, None),
            "[4, 1 + 1]": (1.0, None),
            "[4]": (0.1, None),
            "four": (0.01, None),
            "oracle_answer": (0.01, "the name oracle_answer"),
            "len": (0.01, "the name len"),
            "four two": (0.01, None),
            "eval(oracle_answer)": (0.01, "Call"),
            f"open({str(file)!r}, 'w') or [4, 2]": (0.01, "BoolOp"),
        },
        "countdown": {
            "6*7": (1.0, None),
            "sqrt(1764)": (1.0, None),
            "6*x": (0.05, None),
            "6 times 7": (0.01, None),
            f"open({str(file)!r}, 'w')": (0.01, "the name open"),
            "sin(\"__import__('os')\") and 42": (0.01, "BoolOp"),
            "cos(\"__import__('os')\")*0+42": (0.01, "the name __import__"),
        },
        "leg_counting": {"42": (1.0, None), "eval('42')": (0.0, None)},
    }
    for task, expected in answers.items():
        responses = [f"<answer>{text}</answer>" for text in expected]
        graded = pool.grade("reasoning_gym", responses, [reference(task)] * len(expected))
        for verdict, (text, (score, refused)) in zip(graded, expected.items(), strict=True):
            error = refused and (
                f"{task} evaluates the answer, which has more than constants and formulas in it: {refused}"
            )
            assert verdict == Graded(score == 1, text, error, score)
    assert list(tmp_path.iterdir()) == []
