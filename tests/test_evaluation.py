"""Avg@k, Pass@k, maj@k and the intervals: hand cases, brute force over subsets, exact arithmetic."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from rlvr_jax.evaluation import (
    avg_at_k,
    avg_per_problem,
    bracketed,
    maj_at_k,
    maj_per_problem,
    mean_interval,
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
    ("n", "c", "k"), [(1024, 1, 1), (1024, 3, 512), (4096, 2000, 16), (100_000, 1, 2), (999_983, 1, 1), (2000, 5, 1996)]
)
def test_pass_of_many_samples_is_exact(n, c, k):
    row = np.zeros((1, n), int)
    row[0, :c] = 1
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(row, k) == pytest.approx(float(exact), rel=1e-12, abs=0)


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


def test_random_subsets_hold_every_sample_at_most_once():
    """11 of 20 samples say "a", so of any 19 different ones at least 10 do. With replacement "b" might win."""
    answers = [["a"] * 11 + ["b"] * 9] * 6
    correct = np.array([[1] * 11 + [0] * 9] * 6)
    np.testing.assert_array_equal(maj_per_problem(correct, answers, 19, resamples=15), 1)


def test_random_subsets_are_drawn_anew_for_every_problem():
    """One sample of 20 is right, the first: of 7 draws of one sample few find it, and not in each problem alike."""
    correct = np.array([[1] + [0] * 19] * 40)
    answers = [["a"] + ["b"] * 19] * 40
    found = maj_per_problem(correct, answers, 1, resamples=7)
    assert found.mean() == pytest.approx(1 / 20, abs=0.05)
    assert len(set(found)) > 1
    np.testing.assert_array_equal(found, maj_per_problem(correct, answers, 1, resamples=7))
    assert not np.array_equal(found, maj_per_problem(correct, answers, 1, resamples=7, seed=1))


def test_an_interval_solves_wilsons_equation():
    """Its ends are where the mean is t standard errors away, the variance taken at the ends."""
    values = np.array([0, 0, 0.25, 0.5, 1, 1, 1, 0.75])
    for shift, scale, bounds in ((0, 1, (0.0, 1.0)), (-1, 2, (-1.0, 1.0))):
        x = shift + scale * values
        value, *ends = mean_interval(x, bounds=bounds)
        t, v = stats.t.ppf(0.975, 7), x.var(ddof=1) / 8
        spread = [(mu - bounds[0]) * (bounds[1] - mu) for mu in (value, *ends)]
        assert value == pytest.approx(x.mean())
        for mu, here in zip(ends, spread[1:], strict=True):
            assert (value - mu) ** 2 == pytest.approx(t**2 * v * here / spread[0])
        assert bounds[0] < ends[0] < value < ends[1] < bounds[1]
    # Right and wrong of many problems: Wilson's score interval.
    right = np.arange(2000) < 60
    exact = stats.binomtest(60, 2000).proportion_ci(method="wilson")
    assert mean_interval(right)[1:] == pytest.approx((exact.low, exact.high), rel=2e-3)
    narrow = mean_interval(values, confidence=0.5)
    assert ends[0] < narrow.low < narrow.value < narrow.high


def test_an_interval_without_bounds_is_students():
    values = np.random.default_rng(0).normal(3, 2, size=12)
    found = mean_interval(values, bounds=None)
    assert found[1:] == pytest.approx(stats.t.interval(0.95, 11, values.mean(), values.std(ddof=1) / np.sqrt(12)))


def test_weights_are_a_jackknife_over_problems():
    sums, tokens = np.array([3.0, 10.0, 0.0, 1.0]), np.array([10.0, 12.0, 5.0, 1.0])
    without = [(sums.sum() - x) / (tokens.sum() - n) for x, n in zip(sums, tokens, strict=True)]
    v = 3 / 4 * ((without - sums.sum() / tokens.sum()) ** 2).sum()
    found = mean_interval(sums, tokens, bounds=None)
    assert found.value == pytest.approx(14 / 28)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 3) * np.sqrt(v))
    assert mean_interval([*sums, 0], [*tokens, 0]) == mean_interval(sums, tokens)  # a problem without tokens


def test_intervals_hold_at_the_ends():
    """None right of 32 is no certainty: up to 10.9% may be right (Clopper and Pearson)."""
    exact = stats.binomtest(0, 32).proportion_ci(method="exact")
    assert mean_interval(np.zeros(32)) == (0, 0, pytest.approx(exact.high))
    assert mean_interval(np.ones(32)) == (1, pytest.approx(1 - exact.high), 1)
    low, high = mean_interval(np.zeros(32), bounds=(-1.0, 1.0)).ends
    assert (low, high) == pytest.approx((-exact.high, exact.high))
    assert mean_interval([0.3] * 5)[1:] == pytest.approx((0.3 * 0.025**0.2, 1 - 0.7 * 0.025**0.2))


def test_one_problem_has_no_interval():
    for found in (mean_interval([0.25]), mean_interval([3, 0], [4, 0]), mean_interval([1.0], bounds=None)):
        assert np.isnan([found.low, found.high]).all()
        assert found.ends is None
    assert np.isnan(mean_interval([0, 0], [0, 0])).all()
    assert bracketed(*mean_interval([0.25])[1:], ".3f") == bracketed(None, None, ".3f") == "[not known]"
    assert bracketed(0.25, 0.5, ".3f") == "[0.250, 0.500]"


# How a problem's chance of a right answer is drawn, and its mean.
CHANCES = {
    "rare": (lambda rng, size: np.full(size, 0.02), 0.02),
    "hard": (lambda rng, size: rng.beta(0.1, 0.9, size), 0.1),
    "either way": (lambda rng, size: rng.beta(0.5, 0.5, size), 0.5),
    "easy": (lambda rng, size: rng.beta(5, 1, size), 5 / 6),
    "nearly all": (lambda rng, size: np.full(size, 0.98), 0.98),
}


@pytest.mark.parametrize("name", CHANCES)
@pytest.mark.parametrize(("problems", "k"), [(2, 4), (5, 8), (30, 1), (30, 32), (100, 4)])
def test_intervals_cover_what_they_say(name, problems, k):
    rng = np.random.default_rng(0)
    chances, mean = CHANCES[name]
    trials = 600
    values = rng.binomial(k, chances(rng, (trials, problems))) / k
    found = np.array([mean_interval(x)[1:] for x in values])
    covered = ((found[:, 0] <= mean) & (mean <= found[:, 1])).mean()
    assert covered > 0.93 - 2 * np.sqrt(0.95 * 0.05 / trials)


def test_intervals_of_differences_cover_what_they_say():
    rng = np.random.default_rng(0)
    trials, k = 600, 4
    for problems in (2, 5, 30, 100):
        chances = rng.beta(0.3, 0.5, (2, trials, problems))
        chances[1] = chances[0]  # two models that are alike: the difference is 0
        values = np.subtract(*(rng.binomial(k, x) / k for x in chances))
        found = np.array([mean_interval(x, bounds=(-1.0, 1.0))[1:] for x in values])
        assert ((found[:, 0] <= 0) & (found[:, 1] >= 0)).mean() > 0.93 - 2 * np.sqrt(0.95 * 0.05 / trials)
        assert (found[:, 0] < found[:, 1]).all()


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
    for values, options, message in (
        ([], {}, "one finite number per problem"),
        ([[1.0]], {}, "one finite number per problem"),
        ([np.nan], {}, "one finite number per problem"),
        ([1.0], {"confidence": 1.0}, "confidence=1"),
        ([1.5, 0.0], {}, r"within \(0\.0, 1\.0\)"),
        ([1.0, 0.0], {"weights": [0.5, 1.0]}, r"within \(0\.0, 1\.0\)"),
        ([1.0, 0.0], {"weights": [-1.0, 1.0]}, "at least 0"),
        ([1.0, 0.0], {"weights": [1.0]}, "expected 2 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            mean_interval(values, **options)
