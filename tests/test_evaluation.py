"""Avg@k, Pass@k, maj@k and the bootstrap: hand cases, brute force over subsets, exact arithmetic."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from rlvr_jax.evaluation import (
    avg_at_k,
    avg_per_problem,
    bootstrap_interval,
    maj_at_k,
    maj_per_problem,
    pass_at_k,
    pass_per_problem,
)

CORRECT = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)


def test_avg_by_hand():
    assert avg_at_k(CORRECT, 4) == pytest.approx(0.5)
    assert avg_at_k(CORRECT.tolist(), 1) == pytest.approx(2 / 3)  # the first sample of each
    np.testing.assert_allclose(avg_per_problem(CORRECT, 2), [0.5, 0, 1])


def test_pass_by_hand():
    # c = 2 of n = 4: 1 - C(2, k) / C(4, k) = 1/2, 5/6, 1, 1.
    for k, first in zip((1, 2, 3, 4), (1 / 2, 5 / 6, 1, 1), strict=True):
        np.testing.assert_allclose(pass_per_problem(CORRECT, k), [first, 0, 1], rtol=1e-12)
        assert pass_at_k(CORRECT, k) == pytest.approx((first + 1) / 3)


def test_pass_is_the_mean_over_all_subsets():
    correct = np.random.default_rng(0).integers(2, size=(5, 7))
    for k in range(1, 8):
        brute = [np.mean([row[list(s)].any() for s in itertools.combinations(range(7), k)]) for row in correct]
        np.testing.assert_allclose(pass_per_problem(correct, k), brute, rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1024, 1, 1), (1024, 3, 512), (4096, 2000, 16), (100_000, 1, 2), (2000, 5, 1996)]
)
def test_pass_of_many_samples_is_exact(n, c, k):
    row = np.zeros((1, n), int)
    row[0, :c] = 1
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(row, k) == pytest.approx(float(exact), rel=1e-12)


def test_maj_by_hand():
    answers = [["7", "8", "9", "7"], ["1", "2", "2", None], ["3", "3", "3", "3"]]
    np.testing.assert_allclose(maj_per_problem(CORRECT, answers, 4), [1, 0, 1])
    assert maj_at_k(CORRECT, answers, 4) == pytest.approx(2 / 3)
    # k = 1 is the mean accuracy when every answer is present.
    assert maj_per_problem(CORRECT, answers, 1)[0] == pytest.approx(0.5)


def test_ties_are_shared_and_a_missing_answer_never_wins():
    correct = [[1, 0, 0, 0]]
    assert maj_at_k(correct, [["a", "b", None, None]], 4) == pytest.approx(1 / 2)
    assert maj_at_k(correct, [["a", "b", "c", None]], 4) == pytest.approx(1 / 3)
    assert maj_at_k(correct, [["a", None, None, None]], 4) == 1
    assert maj_at_k([[0, 0, 0, 0]], [[None] * 4], 4) == 0
    # Two samples of four where only the first has an answer: it is drawn in half of the pairs.
    assert maj_at_k(correct, [["a", None, None, None]], 2) == pytest.approx(1 / 2)
    # One answer graded both ways counts by its mean.
    assert maj_at_k([[1, 0, 0, 0]], [["a", "a", "b", None]], 4) == pytest.approx(1 / 2)


def brute_majority(correct, answers, k):
    total, subsets = 0.0, list(itertools.combinations(range(len(answers)), k))
    for subset in subsets:
        votes = Counter(answers[s] for s in subset if answers[s] is not None)
        winners = [a for a, count in votes.items() if count == max(votes.values())]
        right = {answers[s]: correct[s] for s in range(len(answers))}
        total += sum(right[a] for a in winners) / max(len(winners), 1)
    return total / len(subsets)


def test_maj_is_the_mean_over_all_subsets_or_near_it():
    rng = np.random.default_rng(1)
    answers = [[None if a == "0" else a for a in row] for row in rng.integers(5, size=(6, 9)).astype(str).tolist()]
    correct = np.array([[a == "1" for a in row] for row in answers])
    for k in (1, 2, 5, 9):
        brute = [brute_majority(c, a, k) for c, a in zip(correct, answers, strict=True)]
        np.testing.assert_allclose(maj_per_problem(correct, answers, k), brute, rtol=1e-12)
        near = maj_per_problem(correct, answers, k, resamples=3000 if k in (1, 9) else 100, seed=3)
        np.testing.assert_allclose(near, brute, atol=0.25)
    sampled = [maj_at_k(correct, answers, 5, resamples=120, seed=s) for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    brute = np.mean([brute_majority(c, a, 5) for c, a in zip(correct, answers, strict=True)])
    assert sampled[0] == pytest.approx(brute, abs=0.05)


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(0.5, 0.3, size=400)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values, seed=1) == (low, high)
    narrow = bootstrap_interval(values, seed=1, confidence=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert bootstrap_interval(avg_per_problem(CORRECT, 4))[0] >= 0
    largest = bootstrap_interval([1.0, 2.0, 3.0], statistic=lambda drawn: drawn.max(axis=-1))
    assert largest[1] == 3


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_outside_the_samples(k):
    for call in (avg_at_k, pass_at_k, lambda c, k: maj_at_k(c, [["1"] * 4] * 3, k)):
        with pytest.raises(ValueError, match=f"k={k}: expected 1 to 4"):
            call(CORRECT, k)


@pytest.mark.parametrize("correct", [[], [[]], [1, 0], [[1, 0], [1]], [[0.5, 1.0]], [[None, 1]], [[np.nan, 1.0]]])
def test_bad_correct(correct):
    with pytest.raises(ValueError, match="correct"):
        pass_at_k(correct, 1)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="answers has 3 rows of lengths"):
        maj_at_k(CORRECT, [["1"] * 4, ["1"] * 4, ["1"] * 3], 2)
    with pytest.raises(ValueError, match="answers has 1 rows"):
        maj_at_k(CORRECT, [["1"] * 4], 2)
    for values, options in (
        ([], {}),
        ([[1.0]], {}),
        ([np.nan], {}),
        ([1.0], {"confidence": 1.0}),
        ([1.0], {"resamples": 0}),
    ):
        with pytest.raises(ValueError, match="expected"):
            bootstrap_interval(values, **options)
