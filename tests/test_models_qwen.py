"""The decoder's invariances: padding, causality, the cache, rematerialisation, mesh, dtype."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.models import layers, qwen
from rlvr_jax.models.cache import KVCache, grow_cache, init_cache, insert_cache, write_cache
from rlvr_jax.models.config import QwenConfig, YarnConfig
from rlvr_jax.sharding.rules import ShardingRules, make_mesh

QWEN2 = QwenConfig("qwen2", 50, 32, 48, 2, 4, 2, 8, qkv_bias=True, tie_word_embeddings=True)
QWEN3 = QwenConfig("qwen3", 50, 32, 48, 2, 4, 1, 12, qk_norm=True, rope_scaling=YarnConfig(4.0, 16))
both = pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])


@functools.cache
def params_of(config):
    random = np.random.default_rng(1)

    def leaf(spec):
        centre = 1.0 if spec.init == "ones" else 0.0
        return jnp.asarray(centre + 0.2 * random.normal(size=spec.shape), jnp.float32)

    return jax.tree.map(leaf, qwen.param_specs(config), is_leaf=lambda x: isinstance(x, qwen.ParamSpec))


@functools.cache
def forward(config):
    return jax.jit(lambda params, *args: qwen.Qwen(config).apply({"params": params}, *args))


@functools.cache
def cached(config):
    def step(params, tokens, positions, cache):
        hidden, cache = qwen.cached_hidden_states(config, params, tokens, positions, cache)
        return qwen.logits(config, params, hidden), cache

    return jax.jit(step, donate_argnums=3)


TOKENS = np.random.default_rng(0).integers(0, 50, (3, 12))


@both
def test_trees_agree(config):
    params = params_of(config)
    of_flax = jax.eval_shape(qwen.Qwen(config).init, jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, of_flax)
    axes = jax.tree.leaves(qwen.param_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(a) for a in axes] == [x.ndim for x in jax.tree.leaves(params)]
    assert {name for a in axes for name in a if name} <= set(ShardingRules.__dataclass_fields__)


def test_init_params():
    config = dataclasses.replace(QWEN2, vocab_size=4000, initializer_range=0.03)
    params = jax.jit(qwen.init_params, static_argnums=(0, 2))(config, jax.random.key(0), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.std(np.asarray(params["embed"], np.float32)) == pytest.approx(0.03, rel=0.02)
    assert (params["layers"]["attn_norm"] == 1).all()
    assert (params["layers"]["q_bias"] == 0).all()
    assert not np.array_equal(params["layers"]["gate_proj"][0], params["layers"]["gate_proj"][1])


@both
def test_causal(config):
    changed = TOKENS.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    a, b = forward(config)(params_of(config), TOKENS), forward(config)(params_of(config), changed)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(a - b)[:, 7:].max() > 0.1


@both
def test_padding_changes_nothing(config):
    """Neither the padding nor what stands in it moves the logits of the real tokens; masks of any type."""
    plain = forward(config)(params_of(config), TOKENS)
    for side, filler, seen in (
        ("left", 0, np.int32(1)),
        ("left", 17, True),
        ("right", 0, np.float32(0.5)),
        ("right", 3, 3),
    ):
        pad = ((0, 0), (5, 0)) if side == "left" else ((0, 0), (0, 5))
        keep = np.s_[:, 5:] if side == "left" else np.s_[:, :12]
        mask = np.pad(np.full_like(TOKENS, seen, dtype=type(seen)), pad)
        logits = forward(config)(params_of(config), np.pad(TOKENS, pad, constant_values=filler), None, mask)
        np.testing.assert_allclose(logits[keep], plain, atol=1e-5, rtol=0)


def test_default_positions():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0]]
    assert qwen.default_positions(mask, mask).tolist() == expected
    assert qwen.default_positions(mask, None).tolist() == [[0, 1, 2, 3, 4]] * 3


@both
def test_rotary_positions_are_relative(config):
    """Shifting all positions alike changes nothing; stretching them does."""
    plain = forward(config)(params_of(config), TOKENS)
    positions = np.broadcast_to(np.arange(12), TOKENS.shape)
    shifted = forward(config)(params_of(config), TOKENS, positions + 100)
    np.testing.assert_allclose(shifted, plain, atol=5e-5, rtol=0)
    assert np.abs(forward(config)(params_of(config), TOKENS, positions * 2) - plain).max() > 1e-3


@both
def test_rows_without_any_token_stay_finite(config):
    mask = np.ones_like(TOKENS)
    mask[1] = 0
    mask[2, :4] = 0

    def total(params):
        hidden = qwen.hidden_states(config, params, TOKENS, None, mask)
        return jnp.sum(hidden[0]), hidden

    grads, hidden = jax.jit(jax.grad(total, has_aux=True))(params_of(config))
    assert np.isfinite(hidden).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_attention_against_float64():
    """Each query head against its own kv head, n // (N / K), in plain numpy float64."""
    random = np.random.default_rng(0)
    q, k, v = random.normal(size=(2, 3, 6, 4)), random.normal(size=(2, 2, 5, 4)), random.normal(size=(2, 2, 5, 4))
    mask = random.random((2, 3, 5)) < 0.6
    mask[..., 0] = True
    expected = np.empty_like(q)
    for b, t, n in np.ndindex(2, 3, 6):
        scores = np.where(mask[b, t], k[b, n // 3] @ q[b, t, n] / 2, -np.inf)
        weights = np.exp(scores - scores.max())
        expected[b, t, n] = weights / weights.sum() @ v[b, n // 3]
    arrays = [x.astype(np.float32) for x in (q, k, v)]
    for attention in (layers.attention, jax.jit(layers.attention)):
        np.testing.assert_allclose(attention(*arrays, mask), expected, atol=1e-6)
    single = layers.attention(arrays[0][:, 1:2], *arrays[1:], mask[:, 1:2])  # T = 1 takes another path
    np.testing.assert_allclose(single, expected[:, 1:2], atol=1e-6)


@pytest.mark.parametrize(("config", "stacked"), [(QWEN2, True), (QWEN3, False)], ids=["qwen2", "qwen3"])
def test_cache_equals_full_forward(config, stacked):
    """Right-padded prompts of different lengths, then rows at different positions, one and three tokens at a time."""
    params = params_of(config)
    given = params if stacked else qwen.unstack_layers(config, params)
    full = forward(config)(params, TOKENS)
    lengths = np.array([5, 3, 1])
    prompt = np.where(np.arange(5) < lengths[:, None], TOKENS[:, :5], 49)
    logits, cache = cached(config)(given, prompt, np.broadcast_to(np.arange(5), (3, 5)), init_cache(config, 3, 12))
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(logits[b, :n], full[b, :n], atol=1e-5, rtol=0)
    for width in (1, 3, 1, 1, 1):
        positions = lengths[:, None] + np.arange(width)
        tokens = np.take_along_axis(TOKENS, positions, 1)
        logits, cache = cached(config)(given, tokens, positions, cache)
        expected = np.take_along_axis(np.asarray(full), positions[..., None], 1)
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
        lengths = lengths + width


def test_cache_grows_and_takes_in_prompts():
    params = params_of(QWEN3)
    full = forward(QWEN3)(params, TOKENS)
    positions = np.broadcast_to(np.arange(6), (3, 6))
    _, cache = cached(QWEN3)(params, TOKENS[:, :6], positions, init_cache(QWEN3, 3, 6))
    source = np.array([2, -1, 0, 0])
    rows = insert_cache(grow_cache(init_cache(QWEN3, 4, 7), 10), cache, source)
    assert rows.length == 10
    assert not any(x[1].any() for x in jax.tree.leaves(rows)), "a negative source leaves the row as it was"
    logits, _ = cached(QWEN3)(params, TOKENS[source, 6:7], np.full((4, 1), 6), rows)
    np.testing.assert_allclose(logits[[0, 2, 3], 0], full[source[[0, 2, 3]], 6], atol=1e-5, rtol=0)
    cache = init_cache(QWEN3, 1, 4)
    assert grow_cache(cache, 4) is cache
    with pytest.raises(ValueError, match="below the present capacity 4"):
        grow_cache(cache, 3)
    with pytest.raises(ValueError, match="length 5 into a cache of length 4"):
        insert_cache(cache, init_cache(QWEN3, 1, 5), np.zeros(1, int))
    with pytest.raises(ValueError, match="length 0"):
        init_cache(QWEN3, 1, 0)


def test_cache_writes_by_position_and_drops_the_rest():
    cache = np.zeros((2, 1, 4, 1), np.float32)
    new = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1, 1)
    for write in (write_cache, jax.jit(write_cache)):
        out = write(cache, new, np.array([[3, 0, 4], [-1, 2, 100]]))
        assert out[..., 0].tolist() == [[[2, 0, 0, 1]], [[0, 0, 5, 0]]]
    single = write_cache(cache, new[:, :1], np.array([[-4], [3]]))  # T = 1 takes another path
    assert single[..., 0].tolist() == [[[0, 0, 0, 0]], [[0, 0, 0, 4]]]


def test_cache_dtype():
    cache = init_cache(dataclasses.replace(QWEN3, dtype="bfloat16"), 2, 8)
    assert isinstance(cache, KVCache)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert init_cache(QWEN3, 2, 8).k[0].dtype == jnp.float32
    assert init_cache(QWEN3, 2, 8, jnp.float16).v[1].dtype == jnp.float16
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)}
    assert len(pointers) == 4  # one buffer each, so that all can be donated


def test_remat_policies_do_not_change_numbers():
    def gradient(remat):
        changed = dataclasses.replace(QWEN2, remat=remat)
        loss = lambda p: jnp.mean(jnp.sin(qwen.hidden_states(changed, p, TOKENS)))  # noqa: E731
        traced = jax.jit(jax.grad(loss)).trace(params_of(QWEN2))
        grads = traced.lower().compile()(params_of(QWEN2))
        return grads, str(traced.jaxpr).count("dot_general")

    plain, dots_of_plain = gradient("none")
    counts = [dots_of_plain]
    for remat in ("dots", "full"):
        other, dots = gradient(remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, other)
        counts.append(dots)
    assert counts[0] < counts[1] < counts[2]  # more and more is computed again


@both
def test_mesh_equals_one_device(config):
    params, tokens = params_of(config), np.tile(TOKENS, (2, 1))[:4]
    mask = np.ones_like(tokens)
    mask[:, :3] = 0

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(params):
        logits = qwen.Qwen(config).apply({"params": params}, tokens, None, mask)
        return jnp.mean(jnp.sin(logits)), logits

    grads, logits = run(params)
    mesh, rules = make_mesh(2, 2, 2), ShardingRules()
    place = lambda axes, x: jax.device_put(x, rules.sharding(mesh, axes, x.shape))  # noqa: E731
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(place, qwen.param_axes(config), params, is_leaf=lambda x: isinstance(x, tuple))
        sharded_grads, sharded_logits = run(sharded)
    np.testing.assert_allclose(sharded_logits, logits, atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), sharded_grads, grads)


def test_bfloat16():
    """bf16 compute, over fp32 and over bf16 parameters, gives bf16 hidden states and logits near fp32's."""
    config = QWEN3
    params = params_of(config)
    exact = forward(config)(params, TOKENS)
    mixed = dataclasses.replace(config, dtype="bfloat16")
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for some_config, some_params in ((mixed, params), (mixed, stored)):
        hidden = jax.eval_shape(functools.partial(qwen.hidden_states, some_config), some_params, TOKENS)
        assert hidden.dtype == jnp.bfloat16
        logits = forward(some_config)(some_params, TOKENS)
        assert logits.dtype == jnp.float32
        error = np.abs(np.asarray(logits) - exact)
        assert 1e-4 < error.max() < 0.05 * np.abs(exact).max()


def test_unembedding_gives_the_logits():
    for config in (QWEN2, QWEN3):
        params = params_of(config)
        hidden = jax.jit(functools.partial(qwen.hidden_states, config))(params, TOKENS)
        expected = np.asarray(hidden) @ np.asarray(qwen.unembedding(config, params))
        np.testing.assert_allclose(qwen.logits(config, params, hidden), expected, atol=1e-5)
        np.testing.assert_allclose(forward(config)(params, TOKENS), expected, atol=1e-5)
        np.testing.assert_allclose(qwen.logits(config, params, hidden[0, 3]), expected[0, 3], atol=1e-5)


def test_declared_length_is_only_declared():
    longer = dataclasses.replace(QWEN3, max_position_embeddings=2**20)
    np.testing.assert_array_equal(forward(longer)(params_of(QWEN3), TOKENS), forward(QWEN3)(params_of(QWEN3), TOKENS))


def test_wrong_mask_shape():
    with pytest.raises(ValueError, match=r"mask_BT has shape \(3, 5\)"):
        qwen.hidden_states(QWEN2, params_of(QWEN2), TOKENS, None, np.ones((3, 5)))
