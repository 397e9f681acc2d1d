"""The public functions with 64-bit jax switched on, and inside a `shard_map`: the values that they have without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import rlvr_jax as rj
from rlvr_jax.criteria import CRITERIA
from rlvr_jax.decoding.generate import decode
from rlvr_jax.generation import language_model
from rlvr_jax.models.qwen import hidden_states, unembedding
from rlvr_jax.scoring import criterion_values
from tests.decoding_tools import assert_same, tiny_qwen

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(8, 50)).astype(np.float32) * 2
BASE, RL = (np.asarray(jax.nn.log_softmax(RNG.normal(size=(8, 50)).astype(np.float32))) for _ in range(2))
TOKENS = RNG.integers(0, 50, 8).astype(np.int32)
KEYS = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), 8)))
ONES, NARROW, FEW = np.ones(8, np.float32), np.linspace(0.1, 1, 8, dtype=np.float32), np.arange(8, dtype=np.int32)


def per_row(logits, base, rl, tokens, keys, temperature, top_p, top_k, tau):
    """Every public function that takes one row for each token, as arrays [B, ...]."""
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    out = {
        "sample": rj.sample(logits, keys, **settings),
        "sample alone": rj.sample(logits, keys, temperature=1.0),
        "filtered": rj.filtered_logprobs(logits, **settings),
        "extrapolate": rj.extrapolate(base, rl, tau),
        "token_logprobs": rj.token_logprobs(logits[:, None], tokens[:, None], temperature=0.7),
        "entropy": rj.entropy(base),
        "js": rj.js_divergence(base, rl),
    }
    fired = {name: rj.fires(name, base, rl, tokens, tau, keys) for name in CRITERIA}
    listed = {f"{n} of 5": rj.fires(n, base, rl, tokens, tau, keys, top_logprobs=5) for n in ("kl", "delta_logp")}
    return out | fired | listed


ARGUMENTS = (LOGITS, BASE, RL, TOKENS, KEYS, ONES, NARROW, FEW, NARROW)


@pytest.fixture(scope="module")
def plain():
    return jax.tree.map(np.asarray, jax.jit(per_row)(*ARGUMENTS))


def test_functions_of_rows_with_x64(plain):
    with jax.enable_x64(True):
        assert_same(plain, jax.jit(per_row)(*ARGUMENTS))


@pytest.mark.parametrize("replicated", [(), (0,), (4, 5, 6, 7)])
def test_functions_of_rows_inside_shard_map(plain, replicated):
    """On 8 devices, a row each; some arguments may be the same on all devices, of one row each."""
    mesh, rows = rj.make_mesh(data=8), PartitionSpec("data")
    arguments = [x[:1] if i in replicated else x for i, x in enumerate(ARGUMENTS)]
    specs = tuple(PartitionSpec() if i in replicated else rows for i in range(len(arguments)))
    if replicated:
        whole = [np.repeat(x, 8, axis=0) if i in replicated else x for i, x in enumerate(arguments)]
        names = ("sample", "sample alone", "filtered")
        function = lambda *x: {name: value for name, value in per_row(*x).items() if name in names}  # noqa: E731
        expected = jax.jit(function)(*whole)
    else:
        function, expected = per_row, plain
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=rows)
    assert_same(expected, jax.jit(mapped)(*arguments))


def test_decoding_and_scoring_with_x64():
    base, rl = tiny_qwen(), tiny_qwen(seed=1)
    prompts = [[1, 2], [3]]

    def everything():
        drawn = rj.generate(*base, prompts, max_new_tokens=6, top_p=0.9, n=2)
        selected = rj.generate_selective(
            *base, *rl, prompts, criterion="random", tau=0.5, gamma=0.3, max_new_tokens=6, block=2
        )
        return drawn, selected, criterion_values(*base, *rl, prompts, [[4, 5], [6]], ["kl", "delta_logp"])

    expected = everything()
    with jax.enable_x64(True):
        assert_same(expected, everything())


def test_a_long_prompt_with_x64():
    """Its cache is read in chunks."""
    config, params = tiny_qwen()
    model = language_model(dataclasses.replace(config, dtype="float32"), "int8")
    prompts = [RNG.integers(0, 64, 600)]
    expected = decode(model, params, prompts, max_new_tokens=2)
    with jax.enable_x64(True):
        assert_same(expected, decode(model, params, prompts, max_new_tokens=2))


def test_a_train_step_with_x64():
    config, params = tiny_qwen(attention="chunked")
    batch = {
        "tokens": RNG.integers(0, 64, (4, 24)).astype(np.int32),
        "mask": (RNG.random((4, 23)) < 0.8).astype(np.float32),
        "scores": np.array([1, 0, 1, 1], np.float32),
    }

    def loss(apply, params, batch):
        hidden, unembed = apply(params, batch["tokens"])
        logp, entropy = rj.chunked_logprobs(hidden[:, :-1], unembed, batch["tokens"][:, 1:], chunk=16, entropy=True)
        old, mask = jax.lax.stop_gradient(logp) - 0.1, batch["mask"]
        advantages = rj.reweight("low_prob", batch["scores"][:, None] * jnp.ones_like(logp), old, mask, alpha=0.2)
        loss, _ = rj.policy_loss(logp, old, advantages, mask)
        return rj.aggregate(loss, mask), {"entropy": rj.aggregate(entropy, mask)}

    def updated():
        optimizer = optax.adamw(1e-3)
        state = rj.TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
        apply = lambda p, t: (hidden_states(config, p, t), unembedding(config, p))  # noqa: E731
        state, metrics = rj.make_train_step(apply, optimizer, loss, micro_batches=2)(state, batch)
        return state.params, metrics

    expected = updated()
    with jax.enable_x64(True):
        assert_same(expected, updated())
