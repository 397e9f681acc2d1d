"""Self-attention of the training forward: one entry, four ways to compute it, the same result.

    plain    scores of all pairs at once, [B, N, T, T]: short rows, and what the others are compared with
    chunked  blocks of queries against blocks of keys in XLA alone; nothing of size T x T, forward or backward
    splash   the Pallas kernels of jax for TPU (interpreted elsewhere, which is slow)
    cudnn    cuDNN's fused kernels, on NVIDIA GPUs in 16 bit, for rows of one sequence with padding behind it

On a mesh each device computes whole rows for some of the heads: the axes "tensor" and "sequence" split heads here, so a
sequence that is spread over devices is exchanged for heads and back (arXiv 2309.14509).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from rlvr_jax.models import layers
from rlvr_jax.models.config import ATTENTIONS
from rlvr_jax.models.tokens import TokenLayout
from rlvr_jax.sharding.rules import DEFAULT_RULES, ambient_mesh, ways
from rlvr_jax.typing import Array, Float

SAVED = "attention"  # name of what the remat policy of that name keeps
_BLOCK = 512  # queries, and keys, of one block of the chunked form
_FUSED = "cudnn"  # of `jax.nn.dot_product_attention`
_LANES = 128
_PLAIN_TOKENS = 1024  # up to here all scores at once are fast and small
_MASKED = -1e30
_Local = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def resolved_attention(kind: str, platform: str, *, tokens: int, head_dim: int, dtype: Any, packed: bool = True) -> str:
    """What "auto" stands for; another kind stands for itself.

    Args:
      kind: one of `ATTENTIONS`.
      platform: "cpu", "gpu" or "tpu".
      tokens: of a row. head_dim: of a head. dtype: of the queries.
      packed: whether a row may hold several sequences or padding.
    """
    if kind != "auto":
        return kind
    if platform == "tpu" and head_dim % _LANES == 0 and tokens >= _LANES:
        return "splash"
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128 and not packed:
        return "cudnn"
    return "plain" if tokens <= _PLAIN_TOKENS else "chunked"


def self_attention(
    q_MNH: Float[Array, "M N H"],
    k_MKH: Float[Array, "M K H"],
    v_MKH: Float[Array, "M K H"],
    segment_BT: Array | None,
    layout: TokenLayout,
    *,
    kind: str = "auto",
) -> Float[jax.Array, "M N H"]:
    """Causal grouped-query attention `softmax(q k^T / sqrt(H)) v` within each sequence of a row.

    Args:
      q_MNH, k_MKH, v_MKH: rotated queries and keys, values; head n uses kv head n // (N / K).
      segment_BT: 0 on padding, otherwise the number of the token's sequence; None: every row is one sequence.
      layout: of the rows and tokens.
      kind: one of `ATTENTIONS`.

    Returns:
      [M, N, H] in the dtype of the queries; at padding finite and without meaning. Sums are float32.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"attention={kind!r}: expected one of {', '.join(ATTENTIONS)}")
    options = {"tokens": layout.length, "head_dim": q_MNH.shape[2], "dtype": q_MNH.dtype}
    platform = jax.default_backend() if kind == "auto" else ""  # asking takes a device
    named = resolved_attention(kind, platform, packed=segment_BT is not None, **options)
    segments = None if segment_BT is None else _numbers(segment_BT)
    q, k, v = map(jnp.asarray, (q_MNH, k_MKH, v_MKH))
    if ambient_mesh() is None:
        q_BTNH, k_BTKH, v_BTKH = (x.reshape(layout.rows, layout.length, *x.shape[1:]) for x in (q, k, v))
        return _LOCAL[named](q_BTNH, k_BTKH, v_BTKH, segments).reshape(q.shape)
    return _over_heads(_LOCAL[named], q, k, v, segments, layout)


def _numbers(segment_BT: Array) -> jax.Array:
    """As int32, a fraction that is not 0 as 1."""
    number_BT = jnp.asarray(segment_BT, jnp.int32)
    return jnp.where((segment_BT != 0) & (number_BT == 0), 1, number_BT)


def _over_heads(
    local: _Local, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, layout: TokenLayout
) -> jax.Array:
    """`local` on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in DEFAULT_RULES.axes("kv_heads") if mesh.shape.get(axis, 1) > 1)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    group, copies = _split_heads(num_heads, num_kv_heads, ways(axes))
    extra = group - num_heads // num_kv_heads
    if extra:  # heads of zeros, so that every device has as many
        grouped = jnp.pad(q.reshape(q.shape[0], num_kv_heads, -1, q.shape[2]), ((0, 0), (0, 0), (0, extra), (0, 0)))
        q = grouped.reshape(q.shape[0], -1, q.shape[2])
    if copies > 1:
        k, v = (jnp.asarray(_copied(layout.place(x, "kv_heads"), copies)) for x in (k, v))
    elsewhere = tuple(axis for axis in axes if axis not in layout.time)

    def exchanged(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
        q, k, v = (_whole_rows(x, layout) for x in (q, k, v))
        return _own_tokens(local(q, k, v, *segments or (None,)), layout)

    spec = PartitionSpec((*layout.batch, *layout.time) or None, elsewhere or None, None)
    specs, arguments = (spec,) * 3, (q, k, v)
    if segments is not None:
        specs, arguments = (*specs, PartitionSpec(layout.batch or None, None)), (*arguments, segments)
    out = jax.shard_map(exchanged, in_specs=specs, out_specs=spec, check_vma=False)(*arguments)
    if extra:
        out = out.reshape(out.shape[0], num_kv_heads, group, -1)[:, :, :-extra]
    return out.reshape(-1, num_heads, out.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copied(x_MKH: jax.Array, copies: int) -> jax.Array:
    """[M, K copies, H], the copies of a head side by side; their gradients are summed in float32."""
    return jnp.repeat(x_MKH, copies, axis=1)


def _copied_backward(copies: int, _: None, d_MKH: jax.Array) -> tuple[jax.Array]:
    d_MKcH = d_MKH.reshape(d_MKH.shape[0], -1, copies, d_MKH.shape[2])
    wide = jnp.promote_types(d_MKH.dtype, jnp.float32)
    return (jnp.sum(d_MKcH.astype(wide), axis=2).astype(d_MKH.dtype),)


_copied.defvjp(lambda x_MKH, copies: (_copied(x_MKH, copies), None), _copied_backward)


def _whole_rows(x_MNH: jax.Array, layout: TokenLayout) -> jax.Array:
    """A device's tokens of many heads as [B, T, N, H], all tokens of fewer heads."""
    x_BTNH = x_MNH.reshape(layout.local_rows, -1, *x_MNH.shape[1:])
    if not layout.time:
        return x_BTNH
    return jax.lax.all_to_all(x_BTNH, layout.time, split_axis=2, concat_axis=1, tiled=True)


def _own_tokens(x_BTNH: jax.Array, layout: TokenLayout) -> jax.Array:
    """The inverse of `_whole_rows`."""
    if layout.time:
        x_BTNH = jax.lax.all_to_all(x_BTNH, layout.time, split_axis=1, concat_axis=2, tiled=True)
    return x_BTNH.reshape(-1, *x_BTNH.shape[2:])


def _split_heads(num_heads: int, num_kv_heads: int, devices: int) -> tuple[int, int]:
    """(query heads a kv head, copies of each kv head) so that the devices get whole groups, as few as there can be.

    8 kv heads of 4 on 16 devices: two copies. 4 kv heads of 7 on 8 devices: groups of 8, two copies.
    """
    group = num_heads // num_kv_heads
    while num_kv_heads * group % devices:
        group += 1
    copies = next(c for c in range(1, group + 1) if group % c == 0 and num_kv_heads * c % devices == 0)
    return group, copies


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    mask_BTS = layers.causal_mask(segments, q.shape[1])
    return jnp.asarray(layers.attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask_BTS))


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The TPU kernels; elsewhere (tests) the same ones, interpreted."""
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    (scaled, k, v), segments, length = _padded((scaled, k, v), segments, _LANES)
    run = functools.partial(_splash_on, length=scaled.shape[1], num_heads=scaled.shape[2])
    interpreted = functools.partial(run, interpret=True)
    out = jax.lax.platform_dependent(scaled, k, v, segments, tpu=run, default=interpreted)
    return out[:, :length]


def _splash_on(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    length: int,
    num_heads: int,
    interpret: bool = False,
) -> jax.Array:
    kernel = _splash_kernel(length, num_heads, interpret)

    def row(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array) -> jax.Array:
        return kernel(q, k, v, splash_attention_kernel.SegmentIds(segment, segment))

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(row)(q, k, v, segments), 1, 2)


def _splash_kernel(length: int, num_heads: int, interpret: bool) -> Any:
    def block(most: int) -> int:
        return max(size for size in range(_LANES, most + 1, _LANES) if length % size == 0)

    # The backward kernel leaves a part of dq for every block of keys: fewer of them, less memory.
    largest, large, small = block(2048), block(1024), block(512)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=large,
        block_kv=large,
        block_kv_compute=small,
        block_q_dkv=large,
        block_kv_dkv=largest,
        block_kv_dkv_compute=small,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * num_heads)
    return splash_attention_kernel.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, residual_checkpoint_name=SAVED, interpret=interpret
    )


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Rows of one sequence each from their first token, padding behind it: what `segments` says beyond is not seen."""
    lengths_B = None
    if segments is not None:  # a row of padding alone sees its first token, so that nothing is divided by 0
        lengths_B = jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        is_causal=True,
        implementation=_FUSED,  # pyright: ignore[reportArgumentType]
    )
    if segments is not None:
        out = jnp.where(segments[..., None, None] != 0, out, 0)
    return checkpoint_name(out, SAVED)


def _chunked(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    size = min(_BLOCK, -(-q.shape[1] // 8) * 8)
    (q_pad, k, v), segments, length = _padded((q, k, v), segments, size)
    batch, padded, num_heads, head_dim = q_pad.shape
    q_BTKGH = q_pad.reshape(batch, padded, k.shape[2], -1, head_dim)
    out_BTKGH = jnp.asarray(_blocks(q_BTKGH, k, v, segments, size))
    return out_BTKGH.reshape(batch, padded, num_heads, head_dim)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q_BTKGH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array, size: int) -> jax.Array:
    return _blocks_forward(q_BTKGH, k_BTKH, v_BTKH, segment_BT, size)[0]


def _blocks_forward(q_BTKGH, k_BTKH, v_BTKH, segment_BT, size: int):
    """Softmax carried from block to block of keys (arXiv 1805.02867); blocks of the future are not computed."""

    def queries(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_BCKGH, segment_BC = _block(q_BTKGH, i, size), _block(segment_BT, i, size)

        def fold(j: jax.Array, carry: tuple) -> tuple:
            top, total, out = carry
            scores, v_BCKH = _block_scores(q_BCKGH, segment_BC, k_BTKH, v_BTKH, segment_BT, i, j, size)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            added = layers.einsum("BKGCS,BSKH->BKGCH", weights.astype(q_BCKGH.dtype), v_BCKH, jnp.float32)
            return new_top, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + added

        B, C, K, G, H = q_BCKGH.shape
        top, total = jnp.full((B, K, G, C), _MASKED, jnp.float32), jnp.zeros((B, K, G, C), jnp.float32)
        carry = (top, total, jnp.zeros((B, K, G, C, H), jnp.float32))
        top, total, out = jax.lax.fori_loop(0, i + 1, fold, carry)
        return (out / total[..., None]).astype(q_BTKGH.dtype), top + jnp.log(total)

    out_nBKGCH, log_sum_nBKGC = jax.lax.map(queries, jnp.arange(q_BTKGH.shape[1] // size))
    out_nBCKGH = jnp.moveaxis(out_nBKGCH, 4, 2)
    out = checkpoint_name(jnp.moveaxis(out_nBCKGH, 0, 1).reshape(q_BTKGH.shape), SAVED)
    log_sum_nBKGC = checkpoint_name(log_sum_nBKGC, SAVED)
    return out, (q_BTKGH, k_BTKH, v_BTKH, segment_BT, out, log_sum_nBKGC)


def _blocks_backward(size: int, saved, d_out_BTKGH):
    """Weights are computed again from the saved log-sums (Dao et al., arXiv 2205.14135)."""
    q_BTKGH, k_BTKH, v_BTKH, segment_BT, out_BTKGH, log_sum_nBKGC = saved
    scale, dtype = q_BTKGH.shape[-1] ** -0.5, q_BTKGH.dtype
    dot_BTKG = jnp.sum(d_out_BTKGH.astype(jnp.float32) * out_BTKGH.astype(jnp.float32), axis=-1)

    def queries(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        q_BCKGH, d_out_BCKGH = _block(q_BTKGH, i, size), _block(d_out_BTKGH, i, size)
        segment_BC, log_sum_BKGC = _block(segment_BT, i, size), log_sum_nBKGC[i]
        dot_BKGC = jnp.moveaxis(_block(dot_BTKG, i, size), 1, 3)

        def fold(j: jax.Array, carry: tuple) -> tuple:
            dq, dk_BTKH, dv_BTKH = carry
            scores, v_BCKH = _block_scores(q_BCKGH, segment_BC, k_BTKH, v_BTKH, segment_BT, i, j, size)
            weights = jnp.exp(scores - log_sum_BKGC[..., None])
            d_weights = layers.einsum("BCKGH,BSKH->BKGCS", d_out_BCKGH, v_BCKH, jnp.float32)
            d_scores = (weights * (d_weights - dot_BKGC[..., None]) * scale).astype(dtype)
            dq += layers.einsum("BKGCS,BSKH->BCKGH", d_scores, _block(k_BTKH, j, size), jnp.float32)
            dk = layers.einsum("BKGCS,BCKGH->BSKH", d_scores, q_BCKGH, jnp.float32)
            dv = layers.einsum("BKGCS,BCKGH->BSKH", weights.astype(dtype), d_out_BCKGH, jnp.float32)
            return dq, _add_block(dk_BTKH, dk, j, size), _add_block(dv_BTKH, dv, j, size)

        dq, dk_BTKH, dv_BTKH = jax.lax.fori_loop(0, i + 1, fold, (jnp.zeros(q_BCKGH.shape, jnp.float32), *carry))
        return (dk_BTKH, dv_BTKH), dq.astype(dtype)

    zeros = (jnp.zeros(k_BTKH.shape, jnp.float32), jnp.zeros(v_BTKH.shape, jnp.float32))
    (dk, dv), dq_nBCKGH = jax.lax.scan(queries, zeros, jnp.arange(q_BTKGH.shape[1] // size))
    dq_BTKGH = jnp.moveaxis(dq_nBCKGH, 0, 1).reshape(q_BTKGH.shape)
    return dq_BTKGH, dk.astype(k_BTKH.dtype), dv.astype(v_BTKH.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _block_scores(q_BCKGH, segment_BC, k_BTKH, v_BTKH, segment_BT, i, j, size: int) -> tuple[jax.Array, jax.Array]:
    """Scaled, masked float32 scores [B, K, G, C, S] of query block i on key block j, and that block's values."""
    scores = layers.einsum("BCKGH,BSKH->BKGCS", q_BCKGH, _block(k_BTKH, j, size), jnp.float32)
    at = jnp.arange(size)
    seen_BCS = (j * size + at <= (i * size + at)[:, None]) & (
        segment_BC[:, :, None] == _block(segment_BT, j, size)[:, None]
    )
    return jnp.where(seen_BCS[:, None, None], scores * q_BCKGH.shape[-1] ** -0.5, _MASKED), _block(v_BTKH, j, size)


def _block(x: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _add_block(x: jax.Array, added: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, _block(x, index, size) + added, index * size, axis=1)


def _padded(arrays: tuple, segments: jax.Array | None, multiple: int) -> tuple[tuple, jax.Array, int]:
    """Rows lengthened to a multiple, the segments made if there were none, and the length that was."""
    batch, length = arrays[0].shape[:2]
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    extra = -length % multiple
    if not extra:
        return arrays, segments, length
    made = tuple(jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in arrays)
    return made, jnp.pad(segments, ((0, 0), (0, extra))), length


_LOCAL: dict[str, _Local] = {"plain": _plain, "chunked": _chunked, "splash": _splash, "cudnn": _cudnn}
