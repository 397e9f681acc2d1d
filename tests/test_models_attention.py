import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.models import qwen
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.kernels import attention
from rlvr_jax.models.kernels.attention import resolved_attention, self_attention
from rlvr_jax.models.kernels.embedding import embed_tokens
from rlvr_jax.models.tokens import TokenLayout
from rlvr_jax.objectives.logprobs import chunked_logprobs
from rlvr_jax.sharding.rules import DEFAULT_RULES, make_mesh


def inputs(rows, length, heads, kv_heads, width, seed=0):
    """q, k, v, segments with padding at the end, and weights of a sum over real tokens."""
    rng = np.random.default_rng(seed)
    q, k, v, w = (
        jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32) for n in (heads, kv_heads, kv_heads, heads)
    )
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1) * (np.arange(length) < length - 3)
    return q, k, v, jnp.asarray(segments, jnp.int32), w * (segments > 0)[..., None, None]


def value_and_gradients(kind, q, k, v, segments, w):
    def total(q, k, v):
        layout = TokenLayout.of(*q.shape[:2])
        flat = (layout.flat(x) for x in (q, k, v))
        return jnp.sum(layout.apart(self_attention(*flat, segments, layout, kind=kind)) * w)

    return jax.device_get(jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v))


def assert_same(got, expected, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("length", [24, 29])
def test_blocks_give_what_the_plain_form_gives(monkeypatch, length, packed):
    monkeypatch.setattr(attention, "_BLOCK", 8)
    q, k, v, segments, w = inputs(2, length, 6, 2, 16)
    segments = segments if packed else None
    assert_same(
        value_and_gradients("chunked", q, k, v, segments, w), value_and_gradients("plain", q, k, v, segments, w)
    )


def test_the_tpu_kernels_interpreted():
    q, k, v, segments, w = inputs(1, 140, 2, 1, 128)
    plain = value_and_gradients("plain", q, k, v, segments, w)
    assert_same(value_and_gradients("splash", q, k, v, segments, w), plain, rtol=1e-4)


@pytest.mark.parametrize("padded", [True, False])
def test_the_fused_form_of_one_sequence_a_row(monkeypatch, padded):
    monkeypatch.setattr(attention, "_FUSED", "xla")  # the same call, computed by XLA
    q, k, v, segments, w = inputs(3, 16, 6, 2, 16)
    segments = jnp.minimum(segments, 1) if padded else None
    if padded:
        segments, w = segments.at[2].set(0), w.at[2].set(0)  # a row of padding alone
    fused, plain = (value_and_gradients(kind, q, k, v, segments, w) for kind in ("cudnn", "plain"))
    assert_same(fused, plain)


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 2, "sequence": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"fsdp": 1, "sequence": 8}], ids=str
)
def test_heads_over_more_devices_than_there_are(mesh):
    q, k, v, segments, w = inputs(4, 24, 6, 2, 16)
    alone = value_and_gradients("plain", q, k, v, segments, w)
    with jax.set_mesh(make_mesh(**mesh)):
        assert_same(value_and_gradients("chunked", q, k, v, segments, w), alone)


def test_how_heads_are_split():
    assert attention._split_heads(32, 8, 4) == (4, 1)
    assert attention._split_heads(32, 8, 16) == (4, 2)
    assert attention._split_heads(28, 4, 4) == (7, 1)
    assert attention._split_heads(28, 4, 8) == (8, 2)
    assert attention._split_heads(40, 8, 16) == (6, 2)


def test_what_auto_stands_for():
    options = {"tokens": 2048, "head_dim": 128, "dtype": "bfloat16"}
    assert resolved_attention("auto", "tpu", **options) == "splash"
    assert resolved_attention("auto", "tpu", **options | {"head_dim": 64}) == "chunked"
    assert resolved_attention("auto", "gpu", **options) == "chunked"
    assert resolved_attention("auto", "gpu", **options, packed=False) == "cudnn"
    assert resolved_attention("auto", "cpu", **options) == "chunked"
    assert resolved_attention("auto", "cpu", **options | {"tokens": 192}) == "plain"
    assert resolved_attention("plain", "tpu", **options) == "plain"


def test_what_is_refused():
    q, k, v, segments, w = inputs(1, 8, 2, 1, 8)
    with pytest.raises(ValueError, match="'flash': expected one of auto, plain"):
        value_and_gradients("flash", q, k, v, segments, w)


QWEN3 = QwenConfig("qwen3", 96, 64, 96, 3, 8, 2, 16, qk_norm=True)
QWEN2 = QwenConfig("qwen2", 101, 48, 96, 2, 6, 3, 8, qkv_bias=True, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("model", "mesh", "remat"),
    [
        (QWEN3, {"fsdp": 2, "sequence": 2, "tensor": 2}, "attention"),
        (QWEN3, {"data": 2, "fsdp": 2, "tensor": 2}, "full"),
        (QWEN2, {"fsdp": 2, "sequence": 4}, "full"),
        (QWEN2, {"fsdp": 2, "tensor": 4}, "none"),
    ],
    ids=["qwen3-sequence-tensor", "qwen3-data-tensor", "qwen2-sequence", "qwen2-tensor"],
)
def test_log_probs_and_gradients_of_a_model_do_not_depend_on_the_mesh(model, mesh, remat):
    """Heads, kv heads and a vocabulary that do not divide among them."""
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, model.vocab_size, (2, 8, 32), dtype=np.int32)
    segments = np.sort(rng.integers(1, 3, (8, 32)), axis=1) * (np.arange(32) < 29)
    weights = (rng.normal(size=(8, 32)) * (segments > 0)).astype(np.float32)
    params = qwen.init_params(model, jax.random.key(0))

    def run(config, params):
        def total(params):
            hidden = qwen.hidden_states(config, params, tokens, None, segments)
            unembed = qwen.unembedding(config, params)
            logp, entropy = chunked_logprobs(hidden, unembed, targets, chunk=64, entropy=True)
            return jnp.sum((logp + 0.1 * entropy) * weights)

        return jax.device_get(jax.jit(jax.value_and_grad(total))(params))

    alone = run(dataclasses.replace(model, attention="plain"), params)
    over = make_mesh(**mesh)
    with jax.set_mesh(over):
        placed = jax.tree.map(
            lambda x, names: jax.device_put(x, DEFAULT_RULES.sharding(over, names, x.shape)),
            params,
            qwen.param_axes(model),
        )
        assert_same(run(dataclasses.replace(model, attention="chunked", remat=remat), placed), alone)


def test_ids_outside_the_vocabulary_are_clipped_on_a_mesh_too():
    table_VD = jnp.arange(32.0).reshape(8, 4)
    tokens_BT = jnp.asarray([[0, 7, 8, 99], [3, -1, 4, -50]] * 2)

    def looked_up():
        return embed_tokens(table_VD, tokens_BT, jnp.float32, TokenLayout.of(4, 4))

    alone = looked_up()
    with jax.set_mesh(make_mesh(2, 2, 2)):
        np.testing.assert_array_equal(jax.jit(looked_up)(), alone)
    np.testing.assert_array_equal(alone[:4, 0], [0, 28, 28, 28])
