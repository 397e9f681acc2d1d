"""Decode attention over the cache as a Pallas TPU kernel: what a row has used of its cache is read, once.

The kernel walks a *work list* of (row, block of cache positions), built from the rows' own lengths: row b of length n
has ceil(n / C) entries, one after the other, so a short row costs as little beside a long one as alone, and an unused
capacity costs nothing. The list's length is a traced grid bound; the blocks of the next entry are fetched while the
present one is computed. Softmax is accumulated block by block in float32 (Milakov & Gimelshein, arXiv 1805.02867; Dao
et al., arXiv 2205.14135). The T queries of all heads of one kv head are the rows of one matmul.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from rlvr_jax.sharding.rules import DEFAULT_RULES
from rlvr_jax.typing import Array, Float, Int, Num

MAX_QUERIES = 16  # more are prefill, where the plain form is bound by arithmetic, not by the cache's bytes
_BLOCK_BYTES = 512 * 1024  # of keys; as much of values, and both twice for the double buffer
_MAX_ITEMS = 16_384  # entries of the work list, which lies in scalar memory (1 MiB)
_LANES = 128
_MASKED = -1e30  # finite, so that a query that sees nothing stays finite


def fits(mesh: Any, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
    """Whether `pallas_cached_attention` takes these shapes ([B, T, N, H] and [B, K, S, H]) on this mesh.

    It does not when there are more than `MAX_QUERIES` queries, or when the mesh's axes for kv heads do not divide K:
    the plain form then still splits the query heads, which a kernel on whole groups cannot.
    """
    if q_shape[1] > MAX_QUERIES:
        return False
    split = [mesh.shape[axis] for axis in DEFAULT_RULES.axes("kv_heads") if axis in mesh.shape]
    return k_shape[1] % int(np.prod(split, dtype=int)) == 0


def pallas_cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Num[Array, "B K S H"],
    v_BKSH: Num[Array, "B K S H"],
    positions_BT: Int[Array, "B T"],
    k_scale_BKS: Float[Array, "B K S"] | None = None,
    v_scale_BKS: Float[Array, "B K S"] | None = None,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`softmax(q k^T / sqrt(H)) v` where the query at position p sees the cache indices up to p; N / K heads a kv head.

    Under an ambient mesh it runs in a `shard_map`: rows over the axes of the cache's rows, kv heads over theirs.

    Args:
      q_BTNH: rotated queries, T at most `MAX_QUERIES`.
      k_BKSH, v_BKSH: the cache, the present tokens in it; float32, bfloat16, or int8 with scales.
      positions_BT: cache index of each query. Outside 0 .. S-1 the query is not live: it costs nothing when its row has
        no live query, and what comes out for it is finite and means nothing.
      k_scale_BKS, v_scale_BKS: float32 factors of an int8 cache, one a token and head.
      block: C, cache positions a grid step, a multiple of 128 or S itself; by default about 512 KiB of keys.
      interpret: run as plain JAX, for machines without a TPU.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`. Scores, softmax and sums are float32, the weights are rounded to the dtype
      of the values before they multiply them, as in `layers.attention`.

    Raises:
      ValueError: shapes that `fits` refuses.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not fits(mesh, q_BTNH.shape, k_BKSH.shape):
        raise ValueError(
            f"pallas_cached_attention: queries {q_BTNH.shape} and keys {k_BKSH.shape} on mesh {dict(mesh.shape)}: "
            f"expected at most {MAX_QUERIES} queries and kv heads that the mesh divides; use the plain form"
        )
    run = functools.partial(_attend, block=block, interpret=interpret)
    scales = [] if k_scale_BKS is None or v_scale_BKS is None else [k_scale_BKS, v_scale_BKS]
    arrays = [jnp.asarray(x) for x in (q_BTNH, k_BKSH, v_BKSH, positions_BT, *scales)]
    if mesh.empty or mesh.manual_axes:  # inside somebody's shard_map the arrays are local already
        return run(*arrays)
    spec = DEFAULT_RULES.fitting_spec(mesh, ("cache_rows", "kv_heads", None, None), k_BKSH.shape)
    rows, heads = spec[0], spec[1]
    q_spec, rows_spec = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    in_specs = (q_spec, spec, spec, rows_spec, *[PartitionSpec(rows, heads, None) for _ in scales])
    return jax.shard_map(run, in_specs=in_specs, out_specs=q_spec, check_vma=False)(*arrays)


def _block_size(batch: int, kv_heads: int, length: int, head_dim: int, itemsize: int) -> int:
    """C: about `_BLOCK_BYTES` of keys, and few enough blocks for the work list."""
    block = max(_BLOCK_BYTES // (kv_heads * head_dim * itemsize) // _LANES, 1) * _LANES
    while batch * pl.cdiv(length, block) > _MAX_ITEMS:
        block *= 2
    return min(block, length)


def _work_list(length_PR: jax.Array, block: int, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The entries of each of P parts, row and block in one int32 (`_unpack`), [P, R * blocks], and how many count, [P].

    `length_PR` is what each of the R rows of a part has used. Entries that do not count name the part's first row, so
    that no part ever touches another's output.
    """
    parts, rows = length_PR.shape
    end_PR = jnp.cumsum((length_PR + block - 1) // block, axis=1, dtype=jnp.int32)
    index_I = jnp.arange(rows * blocks, dtype=jnp.int32)
    past_PIR = end_PR[:, None, :] <= index_I[:, None]
    row_PI = jnp.sum(past_PIR, axis=2, dtype=jnp.int32)
    block_PI = index_I - jnp.max(jnp.where(past_PIR, end_PR[:, None, :], 0), axis=2)
    first_P1 = rows * jnp.arange(parts, dtype=jnp.int32)[:, None]
    counts_PI = row_PI < rows
    row_PI, block_PI = first_P1 + jnp.where(counts_PI, row_PI, 0), jnp.where(counts_PI, block_PI, 0)
    return (row_PI << blocks.bit_length()) | block_PI, end_PR[:, -1]


def _unpack(item: Any, blocks: int) -> tuple[Any, Any]:
    """Row and block of an entry. Shifts, because a scalar core divides slowly."""
    return item >> blocks.bit_length(), item & ((1 << blocks.bit_length()) - 1)


def _attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    positions_BT: jax.Array,
    *scales_BKS: jax.Array,
    block: int | None,
    interpret: bool,
) -> jax.Array:
    batch, queries, heads, head_dim = q_BTNH.shape
    _, kv_heads, length, _ = k_BKSH.shape
    group = heads // kv_heads
    block = block or _block_size(batch, kv_heads, length, head_dim, k_BKSH.dtype.itemsize)
    blocks = pl.cdiv(length, block)
    # Matmul rows (t, g), filled up to whole tiles of the dtype.
    tile = 32 // q_BTNH.dtype.itemsize
    rows = pl.cdiv(queries * group, tile) * tile
    q_BKRH = jnp.transpose(q_BTNH.reshape(batch, queries, kv_heads, group, head_dim), (0, 2, 1, 3, 4))
    q_BKRH = q_BKRH.reshape(batch, kv_heads, queries * group, head_dim)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, rows - queries * group), (0, 0)))

    positions_BT = positions_BT.astype(jnp.int32)
    live_BT = (positions_BT >= 0) & (positions_BT < length)
    length_B = jnp.max(jnp.where(live_BT, positions_BT + 1, 0), axis=1)
    # Chips with two cores take a part of the rows each.
    parts = 2 if batch % 2 == 0 else 1
    item_PI, count_P = _work_list(length_B.reshape(parts, -1), block, blocks)
    items = item_PI.shape[1]

    def item_of(part: Any, step: Any, item_ref: Any, count_ref: Any) -> Any:
        return item_ref[part * items + jnp.clip(step, 0, jnp.maximum(count_ref[part] - 1, 0))]

    def whole_row(part: Any, step: Any, item_ref: Any, count_ref: Any, *_: Any) -> tuple:
        return _unpack(item_of(part, step, item_ref, count_ref), blocks)[0], 0, 0, 0

    def one_block(part: Any, step: Any, item_ref: Any, count_ref: Any, *_: Any) -> tuple:
        row, index = _unpack(item_of(part, step, item_ref, count_ref), blocks)
        return row, 0, index, 0

    if not interpret:
        # Else the compiler fetches caches that fit whole into on-chip memory ahead of the kernel, whatever is used.
        k_BKSH, v_BKSH = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k_BKSH, v_BKSH))
    row_spec = pl.BlockSpec((None, kv_heads, rows, head_dim), whole_row)
    cache_spec = pl.BlockSpec((None, kv_heads, block, head_dim), one_block)
    scale_spec = pl.BlockSpec((None, kv_heads, block), lambda *x: one_block(*x)[:3])
    statistic = pltpu.VMEM((kv_heads, rows, _LANES), jnp.float32)
    out_BKRH = pl.pallas_call(
        functools.partial(_kernel, queries=queries, group=group, block=block, blocks=blocks, items=items),
        out_shape=jax.ShapeDtypeStruct(q_BKRH.shape, q_BKRH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(parts, jnp.maximum(jnp.max(count_P), 1)),
            in_specs=[row_spec, cache_spec, cache_spec, *[scale_spec for _ in scales_BKS]],
            out_specs=row_spec,
            scratch_shapes=[statistic, statistic, pltpu.VMEM((kv_heads, rows, head_dim), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="cached_attention",
    )(item_PI.reshape(-1), count_P, length_B, positions_BT.reshape(-1), q_BKRH, k_BKSH, v_BKSH, *scales_BKS)
    # A row without a live query is on no list, so nothing was written for it.
    out_BKRH = jnp.where((length_B > 0)[:, None, None, None], out_BKRH, 0)[:, :, : queries * group]
    out_BKTGH = out_BKRH.reshape(batch, kv_heads, queries, group, head_dim)
    return jnp.transpose(out_BKTGH, (0, 2, 1, 3, 4)).reshape(q_BTNH.shape)


def _kernel(
    item_ref: Any,
    count_ref: Any,
    length_ref: Any,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    queries: int,
    group: int,
    block: int,
    blocks: int,
    items: int,
) -> None:
    *scale_refs, out_ref, max_ref, sum_ref, acc_ref = refs
    part, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step < count_ref[part])
    def _() -> None:
        row, index = _unpack(item_ref[part * items + step], blocks)
        length = length_ref[row]

        @pl.when(index == 0)
        def _() -> None:
            max_ref[...] = jnp.full(max_ref.shape, _MASKED, jnp.float32)
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

        q_KRH, k_KCH, v_KCH = q_ref[...], k_ref[...].astype(q_ref.dtype), v_ref[...].astype(q_ref.dtype)
        precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
        matmul = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        scores_KRC = matmul("krh,kch->krc", q_KRH, k_KCH) * q_ref.shape[-1] ** -0.5
        if scale_refs:
            scores_KRC *= scale_refs[0][...][:, None]
        # The last index that each matmul row may see, within this block.
        row_R1 = jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], 1), 0)
        last_R1 = jnp.full(row_R1.shape, -1, jnp.int32)
        for query in range(queries):
            place = jnp.minimum(position_ref[row * queries + query], length - 1) - index * block
            last_R1 = jnp.where(row_R1 >= query * group, place, last_R1)
        seen_RC = jax.lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], block), 1) <= last_R1
        scores_KRC = jnp.where(seen_RC[None], scores_KRC, _MASKED)

        max_KR1 = max_ref[:, :, :1]
        new_max_KR1 = jnp.maximum(max_KR1, jnp.max(scores_KRC, axis=2, keepdims=True))
        weights_KRC = jnp.exp(scores_KRC - new_max_KR1)
        scale_KR1 = jnp.exp(max_KR1 - new_max_KR1)
        max_ref[...] = jnp.broadcast_to(new_max_KR1, max_ref.shape)
        sum_KR1 = scale_KR1 * sum_ref[:, :, :1] + jnp.sum(weights_KRC, axis=2, keepdims=True)
        sum_ref[...] = jnp.broadcast_to(sum_KR1, sum_ref.shape)
        if scale_refs:
            weights_KRC = jnp.where(seen_RC[None], weights_KRC * scale_refs[1][...][:, None], 0.0)
        # Beyond the row's length lies what nobody wrote, at worst NaN, which 0 times would not remove.
        used_1C1 = jax.lax.broadcasted_iota(jnp.int32, (1, block, 1), 1) < length - index * block
        v_KCH = jnp.where(used_1C1, v_KCH, jnp.zeros_like(v_KCH))
        acc_ref[...] = scale_KR1 * acc_ref[...] + matmul("krc,kch->krh", weights_KRC.astype(v_KCH.dtype), v_KCH)

        @pl.when((index + 1) * block >= length)
        def _() -> None:
            out_ref[...] = (acc_ref[...] / sum_ref[:, :, :1]).astype(out_ref.dtype)
