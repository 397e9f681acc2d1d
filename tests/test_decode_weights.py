"""The prepared form of the parameters: the same numbers as the parameters as they were loaded, and the form itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.generation import language_model
from rlvr_jax.models import decode_weights, layers, qwen
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.sharding.rules import DEFAULT_RULES, make_mesh

B, V = 3, 96


def model_of(model_type: str, tied: bool) -> tuple[QwenConfig, dict]:
    """Sizes that all differ, so that no two axes can be confused; biases and norms that do something."""
    config = QwenConfig(
        model_type=model_type,
        vocab_size=V,
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        dtype="float32",
    )
    params = qwen.init_params(config, jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return config, jax.tree.unflatten(structure, noisy)


def hidden_and_logits(config: QwenConfig, params: dict, T: int) -> list[np.ndarray]:
    """A prompt of T tokens from an empty cache, then one token more: both parts' hidden states and logits."""
    model = language_model(config)
    tokens = jax.random.randint(jax.random.key(T), (B, T + 1), 0, V)
    positions = jnp.broadcast_to(jnp.arange(T + 1), tokens.shape)

    @jax.jit
    def run(params: dict) -> tuple:
        first, cache = model.forward(params, tokens[:, :T], positions[:, :T], model.init_cache(B, T + 1))
        last, _ = model.forward(params, tokens[:, T:], positions[:, T:], cache)
        return first, model.logits(params, first), last, model.logits(params, last[:, 0])

    return [np.asarray(x) for x in run(params)]


CASES = [("qwen2", True, 1), ("qwen3", False, 1), ("qwen2", False, 8), ("qwen3", True, 8), ("qwen2", True, 64)]


@pytest.mark.parametrize(("model_type", "tied", "T"), [*CASES, ("qwen3", False, 64), ("qwen3", True, 100)])
def test_the_numbers_are_those_of_the_parameters_given(model_type, tied, T):
    """Up to 300 rows: on both sides of the swap of operands."""
    config, params = model_of(model_type, tied)
    assert B * 64 < layers._FEW_ROWS < B * 100
    prepared = decode_weights.prepare(config, params)
    assert "qkv" in prepared["layers"][0]
    for expected, actual in zip(
        hidden_and_logits(config, params, T), hidden_and_logits(config, prepared, T), strict=True
    ):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_form_holds_each_matrix_once(tied):
    config, params = model_of("qwen3", tied)
    prepared = decode_weights.prepare(config, params)
    assert decode_weights.prepare(config, prepared) is prepared
    assert prepared["embed"] is params["embed"], "nothing to cast, nothing to copy"
    assert sum(x.size for x in jax.tree.leaves(prepared)) == sum(x.size for x in jax.tree.leaves(params))
    np.testing.assert_array_equal(qwen.unembedding(config, prepared), qwen.unembedding(config, params))
    shapes = {name: x.shape for name, x in prepared["layers"][1].items() if "norm" not in name}
    assert shapes == {"qkv": (160, 48), "attn_out": (48, 96), "gate_up": (160, 48), "mlp_out": (48, 80)}


def test_stored_precision_is_cast_once_and_norms_keep_theirs():
    config, params = model_of("qwen2", tied=True)
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    prepared = decode_weights.prepare(config, stored)
    assert prepared["embed"].dtype == prepared["layers"][1]["qkv"].dtype == jnp.float32
    assert prepared["final_norm"].dtype == prepared["layers"][1]["mlp_norm"].dtype == jnp.bfloat16
    for expected, actual in zip(
        hidden_and_logits(config, stored, 5), hidden_and_logits(config, prepared, 5), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_bfloat16_keeps_the_matrices_apart():
    config, params = model_of("qwen3", tied=False)
    prepared = decode_weights.prepare(dataclasses.replace(config, dtype="bfloat16"), params)
    assert prepared["layers"][0]["q_proj"].dtype == prepared["unembed"].dtype == jnp.bfloat16


@pytest.mark.parametrize("ambient", [True, False])
def test_several_devices_keep_the_matrices_apart_and_split(ambient):
    """(1, 2, 2): tensor parallelism and FSDP, the mesh ambient or known only by where the parameters lie."""
    config, params = model_of("qwen3", tied=False)
    expected = hidden_and_logits(config, params, 8)
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    placed = jax.tree.map(
        lambda x, axes: jax.device_put(x, DEFAULT_RULES.sharding(mesh, axes, x.shape)), params, qwen.param_axes(config)
    )
    if not ambient:
        assert "q_proj" in decode_weights.prepare(config, placed)["layers"][0]
        return
    with jax.set_mesh(mesh):
        prepared = decode_weights.prepare(config, placed)
        actual = hidden_and_logits(config, prepared, 8)
        unplaced = hidden_and_logits(config, decode_weights.prepare(config, params), 8)
    shard = prepared["layers"][0]["up_proj"].sharding.shard_shape((48, 80))
    assert shard == (48, 40), "whole along the model dimension"
    for numbers in (actual, unplaced):
        for one, other in zip(expected, numbers, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max(), rtol=0)


def test_joined_parameters_also_compute_on_a_mesh():
    """Prepared with no mesh, decoded on one: slower than it could be, but right."""
    config, params = model_of("qwen2", tied=True)
    prepared = decode_weights.prepare(config, params)
    expected = hidden_and_logits(config, params, 8)
    with jax.set_mesh(make_mesh(1, 2, 2, devices=jax.devices()[:4])):
        actual = hidden_and_logits(config, prepared, 8)
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max(), rtol=0)


def test_the_weight_is_the_left_operand_of_a_decode_step():
    """What the form is for: read off the program, since a compiler that swaps operands back would only be slow."""
    config, params = model_of("qwen3", tied=True)
    prepared = decode_weights.prepare(config, params)
    model = language_model(config)
    tokens, positions = jnp.zeros((B, 1), jnp.int32), jnp.zeros((B, 1), jnp.int32)

    def step(params: dict) -> tuple:
        hidden, cache = model.forward(params, tokens, positions, model.init_cache(B, 16))
        return model.logits(params, hidden[:, 0]), cache

    def products(params: dict, *results: str) -> int:
        lines = str(jax.jit(step).lower(params).compile().as_text()).splitlines()
        return sum(" dot(" in line and any(f" f32[{r}]" in line.split(" dot(")[0] for r in results) for line in lines)

    # qkv and gate_up happen to be of one height here: 2 x 2 layers, 2 x 2 outputs, 1 vocabulary.
    left = products(prepared, f"160,{B}", f"48,{B}", f"{V},{B}")
    assert left == 9
    assert products(prepared, f"{B},160", f"{B},48", f"{B},{V}") == 0
