"""The two answer rules and the overlong penalty, against published verdicts and by hand."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.rewards import Graded, GraderPool, overlong_penalty, rules

# (answer as written, reference answer, math-verify on \boxed{answer}, DAPO's rule on "Answer: answer")
# The verdicts were checked against the published functions; oddities are theirs and on purpose.
CORPUS = [
    ("42", "42", True, True),
    ("43", "42", False, False),
    ("-7", "-7", True, True),
    ("7", "-7", False, False),
    ("+7", "7", True, False),
    ("0", "0", True, True),
    ("-0", "0", True, False),
    # fractions and decimals
    (r"\frac{1}{2}", r"\frac{1}{2}", True, True),
    (r"\frac12", r"\frac{1}{2}", True, True),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", True, False),
    (r"\tfrac{1}{2}", r"\frac{1}{2}", True, False),
    ("1/2", r"\frac{1}{2}", True, False),
    ("0.5", r"\frac{1}{2}", True, False),
    (".5", "0.5", True, False),
    (r"-\frac{3}{4}", r"\frac{-3}{4}", True, False),
    (r"\frac{2}{4}", r"\frac{1}{2}", True, False),
    ("0.333333", r"\frac{1}{3}", True, False),
    ("0.33", r"\frac{1}{3}", False, False),
    (r"2\frac{1}{2}", "2.5", True, False),
    # roots, powers, constants
    (r"\sqrt{8}", r"2\sqrt{2}", True, False),
    (r"\sqrt2", r"\sqrt{2}", True, True),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True, False),
    (r"\sqrt[3]{8}", "2", True, False),
    ("2^{10}", "1024", True, False),
    (r"\pi/4", r"\frac{\pi}{4}", True, False),
    ("3.14159", r"\pi", False, False),
    (r"\infty", r"\infty", True, True),
    ("x^2+2x+1", "(x+1)^2", True, False),
    ("x+1", "y+1", False, False),
    ("x = 5", "5", True, True),
    ("5", "x=5", True, True),
    ("a=1", "b=1", False, True),
    # sets, lists, points, intervals, matrices
    (r"\{1,2,3\}", r"\{3,2,1\}", True, False),
    ("1,2,3", "1,2,3", True, True),
    ("1,1,1", "1", True, False),
    ("1, 2", "2, 1", True, False),
    ("(1,2)", "(1,2)", True, True),
    ("(1,2)", "(2,1)", False, False),
    ("[1,2)", "[1,2)", True, True),
    ("[1,2)", "(1,2]", False, False),
    (r"(-\infty, 3]", r"(-\infty,3]", True, True),
    (r"[0,1] \cup [2,3]", r"[2,3]\cup[0,1]", True, False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, True),
    ("1 < x < 2", "1<x<2", True, True),
    # percent, units, money, text
    (r"50\%", "50", True, False),
    (r"50\%", "0.5", True, False),
    (r"5\text{ cm}", "5", True, True),
    ("5 cm", "5", True, True),
    (r"90^\circ", "90", True, True),
    (r"\$18.90", "18.90", True, True),
    (r"\text{Evelyn}", r"\text{Evelyn}", True, True),
    (r"\text{(A)}", r"\text{(B)}", False, False),
    ("12 square units", "12", True, True),
    ("3 dollars", "3", False, True),
    # separators and zeros
    ("1,000", "1000", True, True),
    ("1{,}000", "1000", True, True),
    ("1,234,567", "1234567", True, True),
    (r"10,\!000", "10000", True, True),
    ("068", "68", True, False),
    ("68", "068", True, False),
    ("3.0", "3", True, False),
    ("1.50", "1.5", True, False),
    ("1e3", "1000", False, False),
    # unicode
    ("½", r"\frac{1}{2}", False, False),
    ("３", "3", False, False),
    ("−5", "-5", True, False),
    ("√2", r"\sqrt{2}", False, False),
    ("日本", "日本", True, True),
    ("é", "e", False, False),
    ("42\u200b", "42", True, False),
]


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=1, timeout_s=20.0) as pool:
        yield pool


def boxed(text):
    return f"So the answer is $\\boxed{{{text}}}$."


def test_corpus(pool):
    assert len(CORPUS) >= 60
    answers = [answer for _, answer, _, _ in CORPUS]
    by_box = pool.grade("math_verify", [boxed(text) for text, *_ in CORPUS], answers)
    by_line = pool.grade("dapo_answer", [f"Thus.\nAnswer: {text}" for text, *_ in CORPUS], answers)
    wrong = [
        (text, answer, graded, line)
        for (text, answer, box_expected, line_expected), graded, line in zip(CORPUS, by_box, by_line, strict=True)
        if (graded.correct, line.correct) != (box_expected, line_expected) or graded.prediction != text
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("response", "prediction", "correct"),
    [
        (r"\boxed{41} no, \boxed{42}", "42", True),
        (r"\boxed{42} no, \boxed{41}", "41", False),
        (r"first \boxed{42}, then \boxed{4", None, False),
        (r"first \boxed{42}, then \boxed 42", None, False),
        (r"\boxed{\boxed{42}}", "42", True),
        (r"\boxed{}", "", False),
        (r"\boxed{ 42 }", " 42 ", True),
        (r"\boxed{{{42}}}", "{{42}}", True),
        (r"\fbox{42}", None, False),
        ("{42}", None, False),
        ("The answer is 42.", None, False),
        ("Answer: 42", None, False),
        ("", None, False),
        ("\\boxed{\n42\n}", "\n42\n", True),
        (r"\boxed{42}" + "\ntext" * 10_000, "42", True),
    ],
)
def test_the_last_box_is_read(pool, response, prediction, correct):
    assert pool.grade("math_verify", [response], ["42"]) == [Graded(correct, prediction, None)]


@pytest.mark.parametrize(
    ("response", "answer", "prediction", "correct"),
    [
        ("Answer: 41\nAnswer: 42", "42", "42", True),
        ("Answer: 42\nAnswer: 41", "42", "41", False),
        ("answer:42", "42", "42", True),
        ("ANSWER :\n\n 42", "42", "42", True),
        ("The final answer: $42$.", "42", "42", True),
        ("Answer: $\\frac12$ or so $3$", r"\frac{1}{2}", r"\frac{1}{2}", True),
        ("Answer: \\boxed{42}", "42", "42", True),
        ("\\boxed{42}", "42", None, False),
        ("**Answer**: 42", "42", None, False),
        ("**Answer:** 42", "42", "**42", False),
        ("Answer: 42<|im_end|>", "42", "42<|im_end|>", False),
        ("Answer: n = 42", "42", "42", True),
        ("Answer: 42" + " " * 290, "42", "42", True),
        ("Answer: 42" + " " * 300, "42", None, False),
        ("no idea", "[INVALID]", None, True),  # the published fault
        ("no idea", "42", None, False),
    ],
)
def test_the_answer_line_is_read(pool, response, answer, prediction, correct):
    assert pool.grade("dapo_answer", [response], [answer]) == [Graded(correct, prediction, None)]


def test_normal_forms_by_hand():
    forms = {
        "a = an apple": "apple",
        "10 square units": "10",
        r"\text{m}^2": "",
        r"x$y$z$w": "y",
        "1,2,3": "123",  # read as thousands
        "1,2,x": "1,2,x",
        r"\frac{1}2": r"\frac{1}2",
        r"\frac1{2}": r"\frac{1}{{}2}",
        r"\overline{AB}": "AB",
        r"\boxed{{1}}": "{1}",
        "5^{\\circ}": "5",
        "12.$": "12",
    }
    assert {text: rules.dapo_normalize(text) for text in forms} == forms


def test_last_boxed_agrees_with_a_plain_scan():
    def scan(text):
        text = text.split("\\boxed")[-1]
        depth = 0
        for i, character in enumerate(text):
            depth += (character == "{") - (character == "}")
            if depth <= 0:
                return text[1:i] if i and depth == 0 else None
        return None

    rng = random.Random(0)
    parts = ["\\boxed", "{", "}", "{", "}", "1", "\\boxed{2}", " "]
    for _ in range(20_000):
        text = "\\boxed" + "".join(rng.choice(parts) for _ in range(rng.randint(0, 10)))
        assert rules.last_boxed(text) == (scan(text), None)
    assert rules.last_boxed("\\boxed{" + "x" * 2000 + "}")[0] == "x" * 2000
    content, error = rules.last_boxed("\\boxed{" + "x" * 2001 + "}")
    assert content is None
    assert "2000" in error


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["no jit", "jit"])
def test_overlong_penalty_by_hand(wrap):
    penalty = wrap(lambda length_B: overlong_penalty(length_B, max_response=20, buffer=8, factor=0.5))
    lengths = np.array([0, 1, 11, 12, 13, 16, 19, 20, 25])
    expected = [0, 0, 0, 0, -0.0625, -0.25, -0.4375, -0.5, -0.5]
    np.testing.assert_allclose(penalty(lengths), expected, atol=1e-7)
    np.testing.assert_allclose(penalty(jnp.asarray(lengths)), expected, atol=1e-7)


def test_overlong_penalty_matches_the_published_formula_in_range():
    lengths = np.arange(0, 20481, 7)
    expected = np.minimum(-(lengths - (20480 - 4096)) / 4096 * 1.0, 0)
    np.testing.assert_allclose(overlong_penalty(lengths, max_response=20480, buffer=4096), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"max_response": 10, "buffer": 11}, "buffer=11"),
        ({"max_response": 10, "buffer": 0}, "buffer=0"),
        ({"max_response": 10, "buffer": -1}, "buffer=-1"),
        ({"max_response": 10, "buffer": 5, "factor": -1.0}, "factor=-1.0"),
    ],
)
def test_overlong_penalty_refuses(arguments, part):
    with pytest.raises(ValueError, match=part):
        overlong_penalty(np.array([1]), **arguments)
