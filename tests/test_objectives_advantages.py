"""Group advantages: hand values, float64, and the groups that go wrong elsewhere (constant, of one, padded)."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.objectives.advantages import group_advantages


@pytest.fixture(params=["jit", "eager"])
def run(request):
    def call(scores, group, **options):
        function = lambda s, g: group_advantages(s, g, **options)  # noqa: E731
        return np.asarray((jax.jit(function) if request.param == "jit" else function)(scores, group))

    return call


def reference(scores, group, normalize=True, epsilon=1e-6):
    out = np.zeros(len(scores))
    for g in set(group):
        rows = [i for i, other in enumerate(group) if other == g]
        values = [float(scores[i]) for i in rows]
        mean, std = 0.0, 1.0
        if len(values) > 1:
            mean = sum(values) / len(values)
            std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        for i in rows:
            out[i] = (scores[i] - mean) / (std + epsilon if normalize else 1)
    return out


@pytest.mark.parametrize("num_groups", [None, 3])
def test_hand_values(run, num_groups):
    # Group 0: 1, -1, -1, 1 (mean 0, std sqrt(4/3)); group 1: 3, 0 (mean 1.5, std 3 / sqrt 2); group 2: alone.
    scores = np.array([1, 3, -1, -1, 0, 1, -1], np.float32)
    group = np.array([0, 1, 0, 0, 1, 0, 2])
    a, b = np.sqrt(3) / 2, np.sqrt(0.5)
    np.testing.assert_allclose(run(scores, group, num_groups=num_groups), [a, b, -a, -a, -b, a, -1], rtol=3e-6)
    np.testing.assert_allclose(
        run(scores, group, num_groups=num_groups, normalize_by_std=False), [1, 1.5, -1, -1, -1.5, 1, -1], rtol=1e-6
    )


def test_against_float64_with_any_ids():
    rng = np.random.default_rng(0)
    group = rng.choice([5, 17_000, 123_456_789, 0], size=64)
    scores = rng.normal(size=64)
    with jax.enable_x64(True):
        np.testing.assert_allclose(group_advantages(scores, group), reference(scores, group), rtol=1e-10)
        np.testing.assert_allclose(
            group_advantages(scores, group, epsilon=0.5), reference(scores, group, epsilon=0.5), rtol=1e-10
        )


@pytest.mark.parametrize("num_groups", [None, 21])
def test_constant_groups_are_exactly_zero(run, num_groups):
    """The float32 mean of equal numbers need not equal them, and the difference would be divided by 1e-6."""
    cases = [(value, size) for value in (0.1, 1 / 3, -0.7, 1e6 + 0.1, 1e-30) for size in (2, 3, 7, 16)]
    scores = np.concatenate([np.full(size, value, np.float32) for value, size in cases] + [[0.1, 0.2]])
    group = np.repeat(np.arange(len(cases) + 1), [size for _, size in cases] + [2])
    got = run(scores.astype(np.float32), group, num_groups=num_groups)
    np.testing.assert_array_equal(got[:-2], 0)
    np.testing.assert_allclose(got[-2:], [-np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-4)


def test_small_spread_on_a_large_offset_is_kept(run):
    scores = (1000 + np.array([0.25, 0.5, 0.75, 1.0])).astype(np.float32)
    np.testing.assert_allclose(run(scores, np.zeros(4, int)), reference(scores, [0] * 4), rtol=1e-5)


def test_the_mean_of_large_scores_is_not_rounded(run):
    """float32 holds these scores, but not their mean: half a unit in its last place is a twentieth of their spread."""
    rng = np.random.default_rng(3)
    for size in (3, 7, 11):
        scores = (3e5 + rng.integers(16, size=size) / 32).astype(np.float32)
        np.testing.assert_allclose(
            run(scores, np.zeros(size, int)), reference(np.float64(scores), [0] * size), atol=2e-5
        )


def test_padding_rows_belong_to_no_group(run):
    scores = np.array([1, -1, 1, 99, np.nan], np.float32)
    group = np.array([0, 0, 0, -1, -1])
    for num_groups in (None, 1):
        got = run(scores, group, num_groups=num_groups)
        np.testing.assert_allclose(got[:3], reference(scores[:3], group[:3]), rtol=1e-5)
        np.testing.assert_array_equal(got[3:], 0)


def test_order_of_rows_does_not_matter_and_ids_out_of_range_show(run):
    rng = np.random.default_rng(1)
    scores, group = rng.choice([-1, 1], size=32).astype(np.float32), rng.integers(4, size=32)
    order = rng.permutation(32)
    np.testing.assert_allclose(run(scores, group)[order], run(scores[order], group[order]), rtol=1e-6)
    got = run(scores[:3], np.array([0, 0, 2]), num_groups=2)
    np.testing.assert_array_equal(np.isnan(got), [False, False, True])
    got = run(scores[:3], np.array([0, 0, 7]), num_groups=2)
    np.testing.assert_array_equal(np.isnan(got), [False, False, True])


def test_ids_that_would_be_cut_to_32_bits_are_refused():
    with pytest.raises(ValueError, match="group_B holds ids up to 4294967296"):
        group_advantages(np.ones(2, np.float32), np.array([0, 2**32]))


@pytest.mark.parametrize(("dtype", "num_groups"), [("uint8", 256), ("int8", 127), ("uint16", 65_536)])
def test_ids_of_few_bits_and_as_many_groups_as_they_name(dtype, num_groups):
    got = group_advantages(np.array([1.0, 0, 1, 1]), np.array([0, 0, 5, 5], dtype), num_groups=num_groups)
    np.testing.assert_allclose(got, [0.5**0.5, -(0.5**0.5), 0, 0], rtol=1e-5)
    high = group_advantages(np.array([1.0, 0, 1, 1]), np.array([1, 1, 0, 0], np.uint32) + np.uint32(2**31))
    np.testing.assert_array_equal(high, group_advantages(np.array([1.0, 0, 1, 1]), np.array([1, 1, 0, 0])))


@pytest.mark.parametrize("ids", [np.array(["a", "b"]), np.array([0.5, 0.7]), np.array([0, 1], object)])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(ValueError, match=r"group_B has dtype .* expected integers"):
        inspect.unwrap(group_advantages)(np.ones(2, np.float32), ids)


def test_integer_scores_no_scores_and_shape_mismatch():
    assert group_advantages(np.zeros(0, np.float32), np.zeros(0, int)).shape == (0,)
    assert group_advantages(jnp.array([1, 0]), jnp.array([3, 3])).dtype == jnp.float32
    with pytest.raises(ValueError, match="shapes differ: scores_B"):
        inspect.unwrap(group_advantages)(np.zeros(3, np.float32), np.zeros(2, int))
