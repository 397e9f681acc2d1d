"""One (config, params) computes in one dtype, whoever asks: forward, decode, selective decode, scoring, training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax import Qwen, chunked_logprobs, delta_logp, generate, generate_selective, token_logprobs
from rlvr_jax.generation import language_model
from rlvr_jax.models.qwen import hidden_states, unembedding
from rlvr_jax.scoring import criterion_values
from tests.decoding_tools import tiny_qwen

PROMPT = [1, 2, 3]
NEW = 10


def stored_as(dtype, seed):
    config, params = tiny_qwen(seed=seed)
    assert config.dtype is None
    return config, jax.tree.map(lambda x: x.astype(dtype), params)


def applied(config, params, response) -> np.ndarray:
    """Log-probabilities of a response by the public forward."""
    text_1T = jnp.array([PROMPT + list(response)])
    logp_1T = token_logprobs(Qwen(config).apply({"params": params}, text_1T)[:, :-1], text_1T[:, 1:])
    return np.asarray(logp_1T)[0, len(PROMPT) - 1 :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler_and_trainer_see_the_same_numbers(dtype):
    """With bfloat16 parameters and no dtype given these used to differ by 0.04 nats on CPU."""
    base, rl = stored_as(dtype, 0), stored_as(dtype, 1)
    drawn = generate(*base, [PROMPT], max_new_tokens=NEW)
    expected = applied(*base, drawn.tokens[0])
    np.testing.assert_allclose(drawn.logp[0], expected, atol=2e-5)

    config, params = base
    text_1T = jnp.array([PROMPT + drawn.tokens[0].tolist()])
    hidden = hidden_states(config, params, text_1T)
    chunked = chunked_logprobs(hidden[:, :-1], unembedding(config, params), text_1T[:, 1:])
    np.testing.assert_allclose(np.asarray(chunked)[0, len(PROMPT) - 1 :], expected, atol=2e-5)

    both = generate_selective(*base, *rl, [PROMPT], criterion="none", tau=None, gamma=0.0, max_new_tokens=NEW, block=4)
    delta = delta_logp(applied(*base, both.tokens[0]), applied(*rl, both.tokens[0]))
    np.testing.assert_allclose(both.delta_logp[0], delta, atol=4e-5)
    scored = criterion_values(*base, *rl, [PROMPT], [both.tokens[0].tolist()], ["delta_logp"])["delta_logp"][0]
    np.testing.assert_allclose(scored, delta, atol=4e-5)


def test_bfloat16_computes_in_float32_but_on_a_tpu_and_a_given_dtype_wins(monkeypatch):
    config, params = stored_as("bfloat16", 0)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    given = dataclasses.replace(config, dtype="float16")
    assert [x.with_dtype(p).dtype for x in (config, given) for p in (params, wide)] == [
        "float32", "float32", "float16", "float16",
    ]  # fmt: skip
    prepared = language_model(config).prepare(params)
    assert prepared["embed"].dtype == jnp.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert [config.with_dtype(p).dtype for p in (params, wide)] == ["bfloat16", "float32"]
