"""The KL penalty and the truncated importance weights, against hand numbers and exact expectations."""

import jax
import numpy as np
import pytest

from rlvr_jax.objectives.correction import importance_weights, kl_penalty


@pytest.fixture(params=["jit", "eager"])
def wrap(request):
    return jax.jit if request.param == "jit" else lambda f: f


def test_a_small_difference_is_not_lost_to_rounding():
    """exp(d) - d - 1 is d^2 / 2 near 0; 1 + d + d^2 / 2 would lose it in float32."""
    ones = np.ones((1, 1), np.float32)
    for d in (1e-3, -1e-3, 1e-4):
        got = kl_penalty(-np.float32(d) * ones, 0 * ones, ones)
        np.testing.assert_allclose(got, d**2 / 2, rtol=2e-3)


def test_kl_penalty_by_hand(wrap):
    d = np.array([[0.0, np.log(2), -np.log(4), 25.0, 1.0]])
    logp, mask = np.full_like(d, -30.0), np.array([[1, 1, 1, 1, 0]])
    expected = [[0, 1 - np.log(2), 0.25 + np.log(4) - 1, np.exp(20) - 21, 0]]
    slope = [[0, 1 - 2, 1 - 0.25, 0, 0]]  # (1 - exp(d)); beyond 20 none
    with jax.enable_x64(True):
        np.testing.assert_allclose(wrap(kl_penalty)(logp, logp + d, mask), expected, rtol=1e-12, atol=1e-12)
        slopes = wrap(jax.grad(lambda a, b: kl_penalty(a, b, mask).sum(), argnums=(0, 1)))(logp, logp + d)
        np.testing.assert_allclose(slopes[0], slope, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(slopes[1], 0)


def test_kl_penalty_is_unbiased_and_not_negative():
    """Its expectation over the policy's tokens is KL(policy ‖ reference), exactly."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(9), 4), rng.dirichlet(np.ones(9), 4)
    with jax.enable_x64(True):
        each = np.asarray(kl_penalty(np.log(p), np.log(q), np.ones_like(p)))
    assert (each >= 0).all()
    np.testing.assert_allclose((p * each).sum(-1), (p * np.log(p / q)).sum(-1), rtol=1e-10)


def test_kl_penalty_keeps_small_differences_in_float32():
    d = np.array([[1e-3, -1e-3]], np.float32)
    got = kl_penalty(np.zeros_like(d), d, np.ones_like(d))
    np.testing.assert_allclose(got, np.float64(d) ** 2 / 2, rtol=2e-3)


GAP = np.log(np.array([[1.5, 0.5, 3.0, 9.0], [2.0, 2.0, 1.0, 9.0], [0.5, 0.5, 9.0, 9.0]]))
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", MASK),
        ("token", [[1.5, 0.5, 2, 0], [2, 2, 1, 0], [0.5, 0.5, 0, 0]]),
        ("sequence", [[2, 2, 2, 0], [2, 2, 2, 0], [0.25, 0.25, 0, 0]]),  # products 2.25, 4 and 1/4
    ],
)
def test_importance_weights_by_hand(kind, expected, wrap):
    rollout = np.full_like(GAP, -3.0)
    run = wrap(lambda a, b: importance_weights(a, b, MASK, kind=kind, cap=2.0))
    with jax.enable_x64(True):
        np.testing.assert_allclose(run(rollout + GAP, rollout), expected, rtol=1e-12)
        slopes = jax.grad(lambda *x: importance_weights(*x, MASK, kind=kind).sum(), argnums=(0, 1))
        for slope in slopes(rollout + GAP, rollout):
            np.testing.assert_array_equal(slope, 0)
        higher = importance_weights(rollout + GAP, rollout, MASK, kind="sequence", cap=3.0)
        np.testing.assert_allclose(higher[:, 0], [2.25, 3.0, 0.25], rtol=1e-12)


def test_importance_weights_hold_against_infinities_and_name_bad_arguments():
    old, rollout = np.array([[-400.0, np.nan]]), np.array([[-1.0, np.inf]])
    got = importance_weights(old, rollout, np.array([[1, 0]]), kind="token")
    np.testing.assert_allclose(got, [[np.exp(-20), 0]], rtol=1e-5)
    with pytest.raises(ValueError, match="kind='tokens': expected one of none, token, sequence"):
        importance_weights(old, rollout, np.array([[1, 0]]), kind="tokens")
    with pytest.raises(ValueError, match="cap=0"):
        importance_weights(old, rollout, np.array([[1, 0]]), cap=0)
