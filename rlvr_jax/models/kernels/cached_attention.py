"""Attention of new tokens over the cache, whose cost grows with the live context and not with the capacity.

The cache may be allocated for the longest text there can be. It is read in chunks of positions, from 0 to the longest
live query of the batch: how many is known on the device alone, so one program serves every length. The softmax is
carried from chunk to chunk (Milakov and Gimelshein, arXiv 1805.02867), and an int8 cache is turned into floats one
chunk at a time, so no temporary is as large as the cache. On TPU a few queries go to `pallas_attention`, where every
row reads no further than its own length.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rlvr_jax.models import layers
from rlvr_jax.models.cache import LayerCache
from rlvr_jax.models.kernels.pallas_attention import fits, pallas_cached_attention
from rlvr_jax.sharding.rules import ROWS, constrain
from rlvr_jax.typing import Array, Float, Int

CHUNK = 256
_MASKED = -1e30  # finite, so that a query that sees nothing stays finite


def live_chunks(positions_BT: Int[Array, "B T"], length: int, chunk: int = CHUNK) -> Int[Array, ""]:
    """How many chunks hold all that the live queries may see: int32, a number on the device.

    Args:
      positions_BT: positions of the queries. One outside 0 .. length - 1 is not live and counts for nothing.
      length: the capacity S of the cache.
      chunk: positions a chunk.
    """
    live_BT = (positions_BT >= 0) & (positions_BT < length)
    seen = jnp.max(jnp.where(live_BT, positions_BT + 1, 0))
    return (seen + chunk - 1) // chunk


def cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    cache: LayerCache,
    positions_BT: Int[Array, "B T"],
    chunks: Int[Array, ""],
    chunk: int = CHUNK,
) -> Float[Array, "B T N H"]:
    """`layers.attention` over one layer's cache, where the query at position p sees indices 0 .. p.

    Args:
      q_BTNH: queries, rotated.
      cache: the layer's keys and values, the new tokens' among them.
      positions_BT: positions of the queries. What comes out for one outside 0 .. S-1 is finite and means nothing.
      chunks: `live_chunks(positions_BT, S, chunk)`, the same for every layer.
      chunk: positions read at a time. A cache of up to two chunks is read at once, without a loop, unless it is int8.

    Returns:
      [B, T, N, H] in the dtype of the queries; scores, softmax and sums are float32.
    """
    in_chunks = partial(_in_chunks, chunk=chunk)
    mesh = jax.sharding.get_abstract_mesh()
    if ROWS in mesh.shape:  # to where the cache is, and back
        q_BTNH = constrain(q_BTNH, "cache_rows", None, "kv_heads", "head_dim")
        positions_BT = constrain(positions_BT, "cache_rows", None)
    arguments = jax.tree.map(jnp.asarray, (q_BTNH, cache, positions_BT, chunks))
    if fits(mesh, q_BTNH.shape, cache.k.shape):
        out_BTNH = jax.lax.platform_dependent(*arguments, tpu=_on_tpu, default=in_chunks)
    else:
        out_BTNH = in_chunks(*arguments)
    if ROWS in mesh.shape:
        out_BTNH = constrain(out_BTNH, "cache_rows", None, "kv_heads", "head_dim")
        out_BTNH = constrain(out_BTNH, "batch", None, "heads", "head_dim")
    return jnp.asarray(out_BTNH)


def _on_tpu(q_BTNH: jax.Array, cache: LayerCache, positions_BT: jax.Array, chunks: jax.Array) -> jax.Array:
    del chunks  # every row has a length of its own there
    return jnp.asarray(pallas_cached_attention(q_BTNH, cache.k, cache.v, positions_BT, cache.k_scale, cache.v_scale))


def _in_chunks(
    q_BTNH: jax.Array, cache: LayerCache, positions_BT: jax.Array, chunks: jax.Array, chunk: int
) -> jax.Array:
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads, capacity = cache.k.shape[1:3]
    # On CPU a matmul reads the whole cache in place but a chunk only as a copy (three times the time a position), so
    # the loop pays from about three chunks on.
    if capacity <= 2 * chunk and cache.k_scale is None:
        mask_BTS = jnp.arange(capacity) <= positions_BT[:, :, None]
        return jnp.asarray(layers.attention(q_BTNH, cache.k, cache.v, mask_BTS))
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q_BKGTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))
    size = min(chunk, capacity)

    def fold(index: jax.Array | int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        begin = index * size
        start = jnp.minimum(begin, capacity - size)  # the last chunk may reach back into the one before
        position_C = start + jnp.arange(size)
        mask_BTC = (position_C <= positions_BT[:, :, None]) & (position_C >= begin)
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2), cache)
        return _fold_chunk(q_BKGTH, part, mask_BTC, carry)

    shape = q_BKGTH.shape[:-1]
    largest, total = jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    carry = (largest, total, jnp.zeros(q_BKGTH.shape, jnp.float32))
    _, total, out = fold(0, carry) if size == capacity else jax.lax.fori_loop(0, chunks, fold, carry)
    # Where nobody is live no chunk is read, and the sum is 0.
    out_BKGTH = (out / jnp.maximum(total, 1e-30)[..., None]).astype(q_BTNH.dtype)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(q_BTNH.shape)


def _fold_chunk(
    q_BKGTH: jax.Array, part: LayerCache, mask_BTC: jax.Array, carry: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """One step of the running softmax: (largest score, sum of weights, weighted sum of values), all float32."""
    largest_BKGT, total_BKGT, out_BKGTH = carry
    scores = _scores(q_BKGTH, jnp.asarray(part.k)) * (q_BKGTH.shape[-1] ** -0.5)
    if part.k_scale is not None:
        scores = scores * part.k_scale[:, :, None, None]
    scores_BKGTC = jnp.where(mask_BTC[:, None, None], scores, _MASKED)
    new_largest_BKGT = jnp.maximum(largest_BKGT, jnp.max(scores_BKGTC, axis=-1))
    weights_BKGTC = jnp.exp(scores_BKGTC - new_largest_BKGT[..., None])
    shrink_BKGT = jnp.exp(largest_BKGT - new_largest_BKGT)
    total_BKGT = total_BKGT * shrink_BKGT + jnp.sum(weights_BKGTC, axis=-1)
    if part.v_scale is not None:
        weights_BKGTC = weights_BKGTC * part.v_scale[:, :, None, None]
    added = layers.einsum("BKGTS,BKSH->BKGTH", weights_BKGTC.astype(q_BKGTH.dtype), part.v, jnp.float32)
    return new_largest_BKGT, total_BKGT, out_BKGTH * shrink_BKGT[..., None] + added


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(q_BKGTH, k_BKSH, cuda=_scores_cuda, default=layers.attention_scores)


def _scores_cuda(q_BKGTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    # XLA wants a right operand transposed, and where it is cut out of a cache that a loop carries, it transposes all of
    # the cache before the loop and back after it. As the left one the keys stay as they are.
    scores_BKSGT = layers.einsum("BKSH,BKGTH->BKSGT", k_BKSH.astype(q_BKGTH.dtype), q_BKGTH, jnp.float32)
    return jnp.moveaxis(jax.lax.optimization_barrier(scores_BKSGT), 2, 4)
