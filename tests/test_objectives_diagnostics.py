"""Gradient by probability and statistics of weights: hand numbers, and the gradient of a softmax by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.objectives.diagnostics import (
    PROBABILITY_EDGES,
    logit_gradient_l1,
    shares_by_probability,
    token_weights,
    weight_statistics,
)
from rlvr_jax.objectives.policy import policy_loss


@pytest.mark.parametrize("moved", [0.0, 0.05])
def test_the_size_is_that_of_the_gradient_in_the_logits(moved):
    """Sum of |d loss / d logits| of each token, from autodiff through the clipped objective (nothing is clipped)."""
    B, T, V = 2, 5, 7
    rng = np.random.default_rng(0)
    old = 2 * rng.normal(size=(B, T, V)).astype(np.float32)
    logits = old + moved * rng.normal(size=(B, T, V)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T))
    A = rng.normal(size=(B, T)).astype(np.float32)

    @jax.jit
    def logp(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]

    def total(logits, old_logp):
        return policy_loss(logp(logits), old_logp, A, np.ones((B, T), np.float32), clip_dual=None)[0].sum()

    old_logp = np.asarray(logp(old))
    expected = np.abs(jax.jit(jax.grad(total))(logits, old_logp)).sum(-1)
    got = logit_gradient_l1(A, np.asarray(logp(logits)), *(() if moved == 0 else (old_logp,)))
    assert (expected > 1e-4).all()
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_sizes_by_hand_and_near_probability_one():
    p = np.array([[0.5, 0.25, 1.0]])
    np.testing.assert_allclose(logit_gradient_l1(np.array([[1.0, -2.0, 3.0]]), np.log(p)), [[1.0, 3.0, 0.0]])
    near = logit_gradient_l1(np.ones((1, 2), np.float32), np.array([[-1e-9, 1e-7]], np.float32))
    np.testing.assert_allclose(near, [[2e-9, 0.0]], rtol=1e-6)
    both = logit_gradient_l1(np.ones((1, 1)), np.log([[0.5]]), np.log([[0.4]]))
    np.testing.assert_allclose(both, [[1.25]])


def test_shares_by_hand():
    edges = (0.0, 0.25, 0.5, 1.0)
    logp = np.log([[0.1, 0.25, 0.3], [1.0, 0.9, 0.2]])
    values = np.array([[4.0, 1.0, 2.0], [3.0, 100.0, np.nan]])
    mask = np.array([[1, 1, 1], [1, 0, 0]])
    value_shares, token_shares = shares_by_probability(values, logp, mask, edges=edges)
    np.testing.assert_allclose(value_shares, [0.4, 0.3, 0.3])
    np.testing.assert_allclose(token_shares, [0.25, 0.5, 0.25])
    # a token of weight 2 counts as two
    value_shares, token_shares = shares_by_probability(
        values, logp, mask * np.array([[2.0, 1, 1], [1, 1, 1]]), edges=edges
    )
    np.testing.assert_allclose(value_shares, np.array([8, 3, 3]) / 14)
    np.testing.assert_allclose(token_shares, [0.4, 0.4, 0.2])


def test_shares_of_a_uniform_spread_are_the_widths_of_the_bins():
    p = (np.arange(100_000) + 0.5) / 100_000
    logp = np.log(p)[None].astype(np.float32)
    values, tokens = shares_by_probability(logit_gradient_l1(np.ones_like(logp), logp), logp, np.ones_like(logp))
    edges = np.array(PROBABILITY_EDGES)
    np.testing.assert_allclose(tokens, np.diff(edges), atol=1e-4)
    np.testing.assert_allclose(values, np.diff(2 * edges - edges**2), atol=1e-4)  # the integral of 2 (1 - p)


def test_nothing_to_share_and_numbers_that_are_not_finite():
    logp = np.log(np.full((1, 3), 0.3))
    for values, mask in ((np.ones((1, 3)), np.zeros((1, 3))), (np.zeros((1, 3)), np.ones((1, 3)))):
        assert np.isnan(shares_by_probability(values, logp, mask)[0]).all()
    values, tokens = shares_by_probability(
        np.array([[1.0, np.inf, 1.0]]), np.array([[np.nan, -1.0, -0.01]]), np.ones((1, 3))
    )
    assert values.tolist() == tokens.tolist() == [0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("edges", [(0.5,), (0.0, 0.5, 0.5, 1.0), (0.4, 1.0), (0.0, 0.2)])
def test_edges_that_do_not_cover_are_refused(edges):
    with pytest.raises(ValueError, match=r"^edges=\("):
        shares_by_probability(np.ones((1, 1)), np.log([[0.3]]), np.ones((1, 1)), edges=edges)


def test_weights_and_their_statistics():
    plain = np.array([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]], np.float32)
    reweighted = np.array([[2.0, 3.0, 9.0], [0.0, 0.0, 0.0], [-0.5, -1.0, -1.0]], np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    weights = token_weights(reweighted, plain, mask)
    np.testing.assert_array_equal(weights, [[1, 1.5, np.nan], [np.nan] * 3, [0.5, 1, 1]])
    got = weight_statistics(weights)
    assert got == pytest.approx({"mean": 1.0, "std": np.sqrt(0.1), "min": 0.5, "max": 1.5, "change": 0.2})
    none = weight_statistics(token_weights(reweighted, plain * 0, mask))
    assert none == {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0, "change": 0.0}


def test_the_gradient_of_a_token_that_is_nearly_certain():
    got = logit_gradient_l1(np.full((1, 1), 3.0, np.float32), np.full((1, 1), -1e-9, np.float32))
    np.testing.assert_allclose(got, 6e-9, rtol=1e-5)
