"""Attention over the cache in chunks: as the plain form, blind to what is not live, uncopied, sharded, in int8."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.generation import language_model
from rlvr_jax.models import layers, qwen
from rlvr_jax.models.cache import KVCache, LayerCache, cache_bytes, grow_cache, init_cache, insert_cache, write_layer
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.kernels.cached_attention import CHUNK, _scores_cuda, cached_attention, live_chunks
from rlvr_jax.sharding.decode_layout import decode_mesh
from rlvr_jax.sharding.rules import make_mesh

TINY = QwenConfig("qwen2", 50, 32, 48, 2, 4, 2, 8, qkv_bias=True, tie_word_embeddings=True, initializer_range=0.2)
ONE_LAYER = dataclasses.replace(TINY, num_layers=1)
S = 40  # in chunks of 16 the last one reaches back into the one before


def qkv(width, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    shapes = (4, width, 6, 8), (4, 2, S, 8), (4, 2, S, 8)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def in_chunks(q, layer, positions, chunk=16):
    return cached_attention(q, layer, positions, live_chunks(positions, layer.k.shape[2], chunk), chunk)


def plain(q, k, v, positions):
    return layers.attention(q, k, v, jnp.arange(k.shape[2]) <= positions[:, :, None])


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_chunks_equal_the_plain_form(width):
    """Rows at different places, the first and the last position among them."""
    q, k, v = qkv(width)
    run = jax.jit(in_chunks, static_argnames="chunk")
    for starts in ([0, 3, 14, 16], [S - width, 0, 30 - width, 15]):
        positions = np.array(starts)[:, None] + np.arange(width)
        expected = plain(q, k, v, positions)
        for chunk in (16, S // 2):
            out = run(q, LayerCache(k, v, None, None), positions, chunk=chunk)
            np.testing.assert_allclose(out, expected, atol=2e-6, rtol=0)
            np.testing.assert_array_equal(out, run(q, LayerCache(k, v, None, None), positions, chunk=chunk))


def test_scores_of_any_size():
    """Weights that underflow in one chunk beside the largest in another."""
    q, k, v = qkv(1)
    for scale in (30.0, -30.0):
        growing = k * scale * (1 + jnp.arange(S)[:, None])
        out = in_chunks(q, LayerCache(growing, v, None, None), np.full((4, 1), S - 1))
        np.testing.assert_allclose(out, plain(q, growing, v, np.full((4, 1), S - 1)), atol=2e-6)


def test_only_live_chunks_count():
    q, k, v = qkv(1)
    poison = jnp.where(jnp.arange(S)[:, None] < 16, k, jnp.nan)  # whoever reads the second chunk sees NaN
    positions = np.array([[3], [15], [S], [-1]])
    assert live_chunks(positions, S, 16) == 1
    assert live_chunks(np.array([[16], [-1], [S], [1 << 30]]), S, 16) == 2
    assert live_chunks(np.full((4, 1), S), S, 16) == 0
    out = in_chunks(q, LayerCache(poison, v, None, None), positions)
    np.testing.assert_allclose(out[:2], plain(q, k, v, positions)[:2], atol=2e-6)
    assert np.isfinite(out).all()  # for the rows that are not live too
    assert np.isfinite(in_chunks(q, LayerCache(poison, v, None, None), np.full((4, 1), S))).all()


@functools.cache
def params(config=TINY):
    return qwen.init_params(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, positions, cache):
    hidden, cache = model.forward(params, tokens, positions, cache)
    return jax.nn.log_softmax(model.logits(params, hidden)), cache


LONG = 2 * CHUNK + 40
TOKENS = np.random.default_rng(0).integers(0, 50, (2, LONG))


@functools.cache
def full():
    return jax.nn.log_softmax(qwen.Qwen(TINY).apply({"params": params()}, TOKENS))


@pytest.mark.parametrize(("dtype", "error"), [(None, 2e-5), ("bfloat16", 0.06), ("int8", 0.06)])
def test_a_model_over_several_chunks(dtype, error):
    """Prefilled in pieces, then one and eight tokens at a time, against the forward without a cache."""
    model = language_model(TINY, dtype)
    cache = model.init_cache(2, LONG + 8)
    lengths, worst = np.array([2 * CHUNK - 5, CHUNK - 3]), 0.0
    for begin, end in ((0, CHUNK), (CHUNK, 2 * CHUNK)):
        positions = np.broadcast_to(np.arange(begin, end), (2, end - begin))
        _, cache = run(model, params(), TOKENS[:, begin:end], positions, cache)
    for width in (1, 8, 1, 8):
        positions = lengths[:, None] + np.arange(width)
        logp, cache = run(model, params(), np.take_along_axis(TOKENS, positions, 1), positions, cache)
        expected = np.take_along_axis(np.asarray(full()), positions[..., None], 1)
        worst = max(worst, np.abs(logp - expected).max())
        lengths = lengths + width
    assert worst < error
    assert dtype is None or worst > 1e-5


def test_int8_moves_log_probs_little():
    """Of the tokens of a text, 256 positions, decoded one by one: mean and largest change."""
    logps = []
    for dtype in (None, "int8"):
        model = language_model(TINY, dtype)

        @jax.jit
        def text(params, tokens, model=model):
            def step(cache, x):
                token, following, place = x
                hidden, cache = model.forward(params, token[:, None], jnp.full((2, 1), place), cache)
                logp = jax.nn.log_softmax(model.logits(params, hidden[:, 0]))
                return cache, jnp.take_along_axis(logp, following[:, None], 1)[:, 0]

            xs = (tokens.T[:256], tokens.T[1:257], jnp.arange(256))
            return jax.lax.scan(step, model.init_cache(2, CHUNK + 1), xs)[1]

        logps.append(np.asarray(text(params(), TOKENS)))
    change = np.abs(logps[1] - logps[0])
    assert 1e-5 < change.mean() < 0.01
    assert change.max() < 0.06
    expected = np.take_along_axis(np.asarray(full())[:, :256], TOKENS[:, 1:257, None], 2)[..., 0].T
    np.testing.assert_allclose(logps[0], expected, atol=2e-5)


def test_what_int8_keeps():
    random = np.random.default_rng(0)
    empty = init_cache(TINY, 2, 6, "int8").layers()[0]
    sizes = np.array([1e-3, 1.0, 1e3])[:, None, None]
    k = (random.normal(size=(2, 3, 2, 8)) * sizes).astype(np.float32)
    k[1, 1] = 0
    layer = write_layer(empty, k, -k, np.array([[0, 5, 6], [3, 2, 1]]))
    assert layer.k.dtype == layer.v.dtype == jnp.int8
    for written, scale, sign in ((layer.k, layer.k_scale, 1), (layer.v, layer.v_scale, -1)):
        restored = np.asarray(written, np.float32) * np.asarray(scale)[..., None]
        for b, t, place in ((0, 0, 0), (0, 1, 5), (1, 0, 3), (1, 1, 2), (1, 2, 1)):
            largest = np.abs(k[b, t]).max(-1, keepdims=True)
            assert (np.abs(restored[b, :, place] - sign * k[b, t]) <= largest / 254 + 1e-9).all()
        assert np.count_nonzero(restored[0, :, 1:5]) == np.count_nonzero(restored[1, :, 4:]) == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_poisoned_row_leaves_nothing_behind(dtype):
    """NaN and infinities are not written, so the next user of the row reads numbers."""
    model = language_model(ONE_LAYER, dtype)
    params_1 = params(ONE_LAYER)
    spoiled = {**params_1, "embed": params_1["embed"].at[7].set(jnp.nan)}
    tokens, positions = np.full((2, 4), 7), np.broadcast_to(np.arange(4), (2, 4))
    logp, cache = run(model, spoiled, tokens, positions, model.init_cache(2, 12))
    assert np.isnan(logp).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(cache))
    wanted, _ = run(model, params_1, TOKENS[:, :4], positions, model.init_cache(2, 12))
    logp, cache = run(model, params_1, TOKENS[:, :4], positions, cache)
    np.testing.assert_array_equal(logp, wanted)
    layer = init_cache(TINY, 1, 2, dtype).layers()[0]
    huge = np.full((1, 1, 2, 8), 1e30, np.float32)
    huge[..., 0] = np.inf
    for x in jax.tree.leaves(write_layer(layer, huge, -huge, np.zeros((1, 1), int))):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_cache_bytes_grow_and_insert(dtype):
    cache = init_cache(TINY, 2, 6, dtype)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == cache_bytes(TINY, 2, 6, dtype)
    assert all(x.shape[0] == 2 and x.shape[2] == 6 for x in jax.tree.leaves(cache))
    assert jax.tree.structure(KVCache.of_layers(cache.layers())) == jax.tree.structure(cache)
    filled = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), cache)
    kept = jax.tree.map(np.asarray, filled)
    longer = grow_cache(filled, 9)
    assert all(x.is_deleted() for x in jax.tree.leaves(filled))
    assert longer.length == 9
    rows = insert_cache(init_cache(TINY, 3, 12, dtype), longer, jnp.array([1, -1, 0]))
    for x, y, z in zip(*map(jax.tree.leaves, (kept, longer, rows)), strict=True):
        np.testing.assert_array_equal(x, y[:, :, :6])
        assert not np.asarray(y[:, :, 6:]).any()
        np.testing.assert_array_equal(np.asarray(y)[[1, 0]], np.asarray(z)[[0, 2], :, :9])
        assert not np.asarray(z[1]).any()
    inside = jax.jit(grow_cache, static_argnums=1)(longer, 11)
    assert inside.length == 11
    assert not longer.k[0].is_deleted()


def test_arguments():
    assert language_model(TINY) is language_model(dataclasses.replace(TINY), cache_dtype=None)
    assert language_model(TINY) is not language_model(TINY, "int8")
    with pytest.raises(ValueError, match="cache dtype 'int32': expected a float type or int8"):
        language_model(TINY, "int32")


def compiled_loop(model, width, rows, capacity, steps=4):
    """The program that a decoder's chunk is: steps in a loop whose state, donated, holds the cache."""

    def body(carry):
        step, position_B, cache = carry
        positions = position_B[:, None] + jnp.arange(width)
        hidden, cache = model.forward(params(), jnp.zeros((rows, width), jnp.int32), positions, cache)
        moved_B = position_B + 1 + (hidden[:, 0, 0] > 1e9)
        return step + 1, moved_B, cache

    loop = jax.jit(lambda *x: jax.lax.while_loop(lambda c: c[0] < steps, body, (0, *x)), donate_argnums=1)
    cache = jax.eval_shape(lambda: model.init_cache(rows, capacity))
    return loop.lower(jax.ShapeDtypeStruct((rows,), jnp.int32), cache).compile(), cache


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_program_copies_no_cache(width, dtype):
    """Nothing as large as one layer's keys is copied, converted or held beside the cache."""
    capacity = 128 * CHUNK
    compiled, cache = compiled_loop(language_model(TINY, dtype), width, 3, capacity)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.temp_size_in_bytes < cache.k[0].size * cache.k[0].dtype.itemsize / 4
    large = (f"[3,2,{capacity},8]", f"[3,2,{capacity}]")
    for line in compiled.as_text().splitlines():
        _, _, operation = line.partition(" = ")
        if operation.split("{")[0].endswith(large):
            assert not any(f" {word}(" in operation for word in ("copy", "convert", "multiply", "transpose")), line


def test_scores_do_not_depend_on_which_operand_the_keys_are():
    q, k = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 5, 4, 8), (2, 3, 7, 8)]))
    np.testing.assert_allclose(_scores_cuda(q, k), layers.attention_scores(q, k), atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "dtype", "width"),
    [((2, 1, 2), None, 1), ((2, 1, 2), "int8", 8), ((1, 2, 4), "int8", 1), ((1, 2, 4), None, 8)],
)
def test_mesh_equals_one_device(axes, dtype, width):
    """Rows over data and fsdp; 2 kv heads over tensor, and more rows where tensor has 4 shards."""
    model, capacity = language_model(ONE_LAYER, dtype), 3 * CHUNK
    place = np.array([CHUNK + 3, 2, 2 * CHUNK - 1, 0])
    random = np.random.default_rng(1)
    shape = model.init_cache(4, capacity)
    filled = jax.tree.map(lambda x: jnp.asarray(random.integers(-9, 9, x.shape) / 10, jnp.float32), shape)
    if dtype == "int8":
        scales = jax.tree.map(lambda x: jnp.abs(x) / 20, (filled.k_scale, filled.v_scale))
        filled = KVCache(*jax.tree.map(lambda x: (x * 100).astype(jnp.int8), (filled.k, filled.v)), *scales)
    positions = place[:, None] + np.arange(width)
    tokens = np.take_along_axis(np.tile(TOKENS, (2, 1)), positions % 50, 1)
    wanted, _ = run(model, params(ONE_LAYER), tokens, positions, filled)
    mesh = decode_mesh(make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))]), [2])
    with jax.set_mesh(mesh):
        sharded = jax.jit(lambda x: model.insert_cache(model.init_cache(4, capacity), x, jnp.arange(4)))(filled)
        assert sharded.k[0].sharding.shard_shape(sharded.k[0].shape)[:2] == (8 // mesh.size, 1), "no part lies twice"
        program = run.lower(model, params(ONE_LAYER), tokens, positions, sharded).compile()
        got, _ = program(params(ONE_LAYER), tokens, positions, sharded)
        text = program.as_text()
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    gathered = [line for line in text.splitlines() if "all-gather(" in line or "all-to-all(" in line]
    assert not [line for line in gathered if f",{capacity}," in line.split("all-")[0]], "the cache is gathered"
