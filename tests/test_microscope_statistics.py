"""Histograms, overlaps, tails, intervals and agreements, against numbers worked out by hand."""

import numpy as np
import pytest

from rlvr_jax.microscope.statistics import (
    agreement,
    bootstrap,
    gradient_by_probability,
    histogram,
    overlap,
    overlap_if_alike,
    select_share,
    sum_by_group,
    tail_mass,
)


def test_histograms_lose_nothing():
    values = [-9.0, 0.0, 0.5, 1.0, 1.5, 2.0, 7.0]
    assert histogram(values, [0, 1, 2]).tolist() == [3, 4]
    assert histogram(values, [0, 1, 2], weights=range(7)).tolist() == [3, 18]
    grouped = histogram(values, [0, 1, 2], groups=[0, 0, 2, 2, 2, 2, 2])
    assert grouped.tolist() == [[2, 0], [0, 0], [1, 4]]
    inside = np.random.default_rng(0).normal(size=1000)
    edges = np.linspace(inside.min(), inside.max(), 20)
    assert histogram(inside, edges).tolist() == np.histogram(inside, edges)[0].tolist()


def test_shared_mass():
    assert overlap([1, 1, 0], [0, 2, 2]) == 0.5  # (1/2, 1/2, 0) and (0, 1/2, 1/2)
    assert overlap([5, 5], [1, 1]) == 1
    assert overlap([[1, 0], [1, 1]], [[0, 1], [1, 3]]).tolist() == [0, 0.75]
    assert np.isnan(overlap([0, 0], [1, 1]))


def test_tails():
    assert tail_mass([-1, 0, 1, 2], 1.0) == 0.5
    assert tail_mass([-1, 0, 1, 2], -1.0, side="below") == 0.25


def test_sums_by_group():
    assert sum_by_group([[1, 2], [3, 4], [5, 6]], [2, 0, 2], 4).tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]


def test_resampling_problems_not_tokens():
    """A problem of many alike tokens is one draw: the interval is that of the problems' means, not of the tokens."""
    rng = np.random.default_rng(1)
    means = rng.normal(size=40)
    tokens = np.repeat(means, 500)
    groups = np.repeat(np.arange(40), 500)
    found = bootstrap(np.divide, sum_by_group(tokens, groups, 40), np.full(40, 500.0), resamples=4000)
    drawn = np.random.default_rng(0).integers(40, size=(4000, 40))
    assert found.value == pytest.approx(means.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means[drawn].mean(1), [0.025, 0.975]), abs=0.02)
    assert found.high - found.low == pytest.approx(2 * 1.96 * means.std() / np.sqrt(40), rel=0.1)
    assert bootstrap(np.divide, means, np.ones(40), seed=3) == bootstrap(np.divide, means, np.ones(40), seed=3)


def test_an_interval_of_many_numbers():
    sums = np.random.default_rng(0).uniform(size=(30, 2, 3))
    found = bootstrap(lambda x: x / x.sum((1, 2), keepdims=True), sums, resamples=500)
    assert found.value.shape == found.low.shape == (2, 3)
    assert (found.low < found.value).all()
    assert (found.value < found.high).all()
    one = bootstrap(lambda x: x[:, 1, 2] / x.sum((1, 2)), sums, resamples=500)
    assert one == (found.value[1, 2], found.low[1, 2], found.high[1, 2])


@pytest.mark.parametrize(
    ("above", "below"),
    [([3.0], [4.0]), ([3.0, 0.0], [4.0, 0.0]), ([0.0, 0.0, 3.0], [0.0, 0.0, 4.0])],
)
def test_one_problem_says_nothing_of_others(above, below):
    """Whether it is the only one there or the only one that has such tokens."""
    value, *ends = bootstrap(np.divide, above, below)
    assert value == 0.75
    assert np.isnan(ends).all()


def test_each_entry_has_problems_of_its_own():
    """The second bin has the tokens of a single problem, the third has none."""
    counts = np.array([[2.0, 3, 0], [1, 0, 0], [4, 0, 0]])
    found = bootstrap(np.divide, [[1.0, 1, 0], [1, 0, 0], [0, 0, 0]], counts, resamples=200)
    assert found.value[:2] == pytest.approx([2 / 7, 1 / 3])
    assert np.isnan([*found.low[1:], *found.high[1:], found.value[2]]).all()
    assert found.low[0] < found.value[0] < found.high[0]
    # One side of an overlap from a single problem: not known either, though the other side has three.
    assert np.isnan(bootstrap(overlap, np.eye(3)[:, :2], [[1, 1], [0, 0], [0, 0]], resamples=50)[1:]).all()


def test_overlap_of_few_tokens_is_read_beside_that_of_alike_ones():
    rng = np.random.default_rng(0)
    a_PK, b_PK = rng.multinomial(20, np.full(30, 1 / 30), size=(2, 40))
    plain = overlap(a_PK.sum(0), b_PK.sum(0))
    assert plain < 0.95  # though both are drawn from one distribution
    alike = overlap_if_alike(a_PK, b_PK)
    assert alike.low <= plain <= alike.high
    far_PK = np.zeros_like(b_PK)
    far_PK[:, 0] = 20
    alike = overlap_if_alike(a_PK, far_PK)
    assert overlap(a_PK.sum(0), far_PK.sum(0)) < 0.1 < alike.low
    assert np.isnan(overlap_if_alike(np.zeros((3, 4)), b_PK[:3, :4]).value)
    # Of two problems none, one or both are swapped: the sides share nothing, everything, nothing.
    two = overlap_if_alike([[2, 0], [2, 0]], [[0, 2], [0, 2]], draws=2000)
    assert (two.value, two.low, two.high) == (pytest.approx(0.5, abs=0.05), 0, 1)
    assert np.isnan(overlap_if_alike([[1, 2], [0, 0]], [[2, 1], [0, 0]])).all()  # of one problem


def test_a_resample_without_the_tokens_is_left_out():
    """One of three problems has none: a resample of it alone says nothing, all the others say 2."""
    assert bootstrap(np.divide, [4.0, 0.0, 2.0], [2.0, 0.0, 1.0]) == (2, 2, 2)


def test_gradient_mass_is_lemma_3_1():
    """The l1 norm of d log softmax(z)[y] / dz is 2 (1 - p)."""
    z = np.array([0.3, -1.0, 2.0, 0.1])
    p = np.exp(z) / np.exp(z).sum()
    for y in range(4):
        gradient = np.eye(4)[y] - p
        tokens, mass = gradient_by_probability([np.log(p[y])], [0, 1])
        assert tokens.tolist() == [1]
        assert 2 * mass[0] == pytest.approx(np.abs(gradient).sum())
    tokens, mass = gradient_by_probability(np.log([0.1, 0.2, 0.9]), [0, 0.5, 1], groups=[0, 1, 1])
    assert tokens.tolist() == [[1, 0], [1, 1]]
    np.testing.assert_allclose(mass, [[0.9, 0], [0.8, 0.1]])


def test_a_probability_above_1_by_rounding_has_no_negative_mass():
    tokens, mass = gradient_by_probability([1e-6, 0.0], [0, 0.5, 1])
    assert (tokens.tolist(), mass.tolist()) == ([0, 2], [0, 0])


def test_selection_at_a_share():
    values = np.arange(10.0)
    below, above = select_share("delta_logp", values, 0.2), select_share("kl", values, 0.2)
    assert below.selected.nonzero()[0].tolist() == [0, 1]
    assert above.selected.nonzero()[0].tolist() == [8, 9]
    assert (below.tau, above.tau, above.share) == (1.5, 7.5, 0.2)


def test_agreement_of_criteria():
    a, b, c = [1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]
    both, either = agreement([a, b, c], [0, 0, 1, 1, 1], 3)
    assert both[:, 0, 1].tolist() == [1, 1, 0]
    assert either[:, 0, 1].tolist() == [2, 2, 0]
    assert both.sum(0).tolist() == [[3, 2, 0], [2, 3, 0], [0, 0, 0]]
    assert either.sum(0).tolist() == [[3, 4, 3], [4, 3, 3], [3, 3, 0]]


def test_what_is_wrong_is_named():
    for call, message in [
        (lambda: histogram([np.nan], [0, 1]), "1 NaN"),
        (lambda: histogram([1.0], [1, 1]), "edges"),
        (lambda: tail_mass([], 1.0), "values is empty"),
        (lambda: tail_mass([1], 1.0, side="left"), "side='left'"),
        (lambda: bootstrap(np.divide, [1.0], [1.0, 2.0]), r"\[1, 2\] problems"),
        (lambda: bootstrap(np.divide, [1.0], [1.0], confidence=1.0), "confidence=1"),
        (lambda: bootstrap(np.divide, [1.0], [1.0], resamples=0), "resamples=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
