"""Targets outside the vocabulary: -100 gives exactly 0 and no gradient, others raise, or NaN where they are traced."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.dapo import sequence_logprobs
from rlvr_jax.models.qwen import init_params, model_apply
from rlvr_jax.objectives.logprobs import chunked_logprobs, token_logprobs
from rlvr_jax.objectives.policy import aggregate
from rlvr_jax.sharding.rules import make_mesh
from tests.tiny import tiny_config

V = 6
RNG = np.random.default_rng(0)
HIDDEN, UNEMBED = RNG.normal(size=(4, 3, 8)).astype(np.float32), RNG.normal(size=(8, V)).astype(np.float32)
INSIDE = RNG.integers(V, size=(4, 3))
IGNORED = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]], bool)


def full(hidden, unembed, targets):
    known = ~jnp.isnan(hidden).any(axis=-1, keepdims=True)
    return token_logprobs(jnp.where(known, jnp.where(known, hidden, 0) @ unembed, jnp.nan), targets)


def chunked(hidden, unembed, targets):
    return chunked_logprobs(hidden, unembed, targets, chunk=5)


def with_entropy(hidden, unembed, targets):
    return sum(chunked_logprobs(hidden, unembed, targets, chunk=100, entropy=True))


# 4 devices do not divide the 6 tokens of the vocabulary, which is then padded to 8: 6 and 7 are no tokens there either.
WAYS = [(full, None), (chunked, None), (with_entropy, None), (with_entropy, (1, 2, 4))]


@pytest.mark.parametrize(("logprobs", "mesh_sizes"), WAYS)
def test_ignored_targets_give_zero_and_no_gradient(logprobs, mesh_sizes):
    targets = np.where(IGNORED, -100, INSIDE)
    junk = np.where(IGNORED[..., None], np.nan, HIDDEN)  # what stands there does not matter

    @jax.jit
    def run(hidden, targets):
        def loss(hidden, unembed):
            logp = logprobs(hidden, unembed, targets)
            return jnp.sum(logp), logp

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, UNEMBED)

    with contextlib.nullcontext() if mesh_sizes is None else jax.set_mesh(make_mesh(*mesh_sizes)):
        (d_hidden, d_unembed), logp = run(junk, targets)
        (wanted_hidden, _), wanted = run(HIDDEN, INSIDE)
        outside = np.where(IGNORED, np.array([-1, -101, V]), INSIDE)
        (_, finite), nan = run(HIDDEN, outside)
    np.testing.assert_array_equal(np.asarray(logp)[IGNORED], 0)
    np.testing.assert_allclose(np.asarray(logp)[~IGNORED], np.asarray(wanted)[~IGNORED], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(d_hidden)[IGNORED], 0)
    np.testing.assert_allclose(np.asarray(d_hidden)[~IGNORED], np.asarray(wanted_hidden)[~IGNORED], atol=1e-6)
    rest = np.where(IGNORED[..., None], 0, HIDDEN)
    expected = jax.grad(lambda u: jnp.sum(jnp.where(IGNORED, 0, logprobs(rest, u, INSIDE))))(UNEMBED)
    np.testing.assert_allclose(d_unembed, expected, atol=1e-5)
    # Traced, others give NaN, and so does nothing else.
    np.testing.assert_array_equal(np.isnan(nan), IGNORED)
    np.testing.assert_allclose(np.asarray(nan)[~IGNORED], np.asarray(wanted)[~IGNORED], rtol=1e-6)
    assert np.isfinite(finite).all()


def test_logits_of_an_ignored_target_get_no_gradient_whatever_they_are():
    for junk in (np.nan, np.inf, -np.inf):
        logits = np.where(IGNORED[..., None], junk, HIDDEN @ UNEMBED).astype(np.float32)
        gradient = jax.grad(lambda x: jnp.sum(token_logprobs(x, np.where(IGNORED, -100, INSIDE))))(logits)
        np.testing.assert_array_equal(np.asarray(gradient)[IGNORED], 0)
        assert (np.abs(np.asarray(gradient)[~IGNORED]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("logprobs", [full, chunked, with_entropy])
def test_targets_that_can_be_seen_raise(logprobs):
    for wrong in (-1, V, -101, 2**31 - 1):
        targets = INSIDE.copy()
        targets[2, 1] = wrong
        for given in (targets, jnp.asarray(targets)):
            with pytest.raises(ValueError, match=rf"targets_BT has {wrong}: expected token ids from 0 to 5, or -100"):
                logprobs(HIDDEN, UNEMBED, given)
        with pytest.raises(ValueError, match="targets_BT has"):  # a constant of a traced function is seen as well
            jax.jit(lambda h, targets=targets: logprobs(h, UNEMBED, targets))(HIDDEN)
    some = np.where(IGNORED, -100, INSIDE)
    for dtype in (np.int8, np.int64):
        np.testing.assert_array_equal(np.asarray(logprobs(HIDDEN, UNEMBED, some.astype(dtype)))[IGNORED], 0)
    assert np.isfinite(logprobs(HIDDEN, UNEMBED, INSIDE.astype(np.uint8))).all()


@pytest.mark.parametrize("padding", [-100, -1, 10_000])
def test_a_scorers_padding_may_hold_any_id(padding):
    """The embedding clips ids, and a mask leaves out what stands behind them."""
    config = tiny_config(num_layers=1)
    params = init_params(config, jax.random.key(0))
    tokens, mask = RNG.integers(48, size=(2, 8)).astype(np.int32), np.ones((2, 8), np.int32)
    mask[:, 5:] = 0

    @jax.jit
    def run(tokens):
        def loss(params):
            logp = sequence_logprobs(model_apply(config), params, tokens, mask, chunk=8)
            return aggregate(logp, mask)[0], logp

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, logp), gradient = run(np.where(mask, tokens, padding))
    (expected, wanted), expected_gradient = run(tokens)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(logp[:, :5], wanted[:, :5], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, expected_gradient)
