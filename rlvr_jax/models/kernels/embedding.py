"""Looking tokens up in an embedding, on one device or spread over a mesh.

A device sums the gradient of its tokens in float32, to the same bits in every run (see `scatter_sum`). On a mesh the
compiler would sum the gradient of the whole table on every device. Here each device looks up the tokens that lie in its
part of the vocabulary, and the gradient is summed into parts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlvr_jax.models.tokens import TokenLayout
from rlvr_jax.scatter import scatter_sum, wide_ids
from rlvr_jax.sharding.rules import ambient_mesh, constrain, dividing_axes, fitting_axes, sum_into, ways, whole_tiles
from rlvr_jax.typing import Array, Float, Integer


def embed_tokens(
    embed_VD: Float[Array, "V D"], tokens_BT: Integer[Array, "B T"], dtype: Any, layout: TokenLayout
) -> Float[jax.Array, "M D"]:
    """`embed_VD[tokens_BT]` in `dtype`, tokens in one dimension; reverse mode only.

    Ids outside are clipped, so any id may stand on padding (-100, say): what is looked up there means nothing, but is
    finite. The gradient is summed in float32 on each device, and in `dtype` over devices.
    """
    known_BT = jnp.clip(wide_ids(tokens_BT), 0, embed_VD.shape[0] - 1)
    return _looked_up(jnp.asarray(embed_VD), known_BT, jnp.dtype(dtype), layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _looked_up(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, layout: TokenLayout) -> jax.Array:
    if ambient_mesh() is None:
        return jnp.take(embed_VD, tokens_BT.reshape(-1), axis=0, mode="clip").astype(dtype)
    tokens_axes, vocab, scattered, out = _axes(layout, embed_VD.shape[0])
    table_VD = jnp.asarray(constrain(embed_VD.astype(dtype), "vocab", None))

    def local(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        row_M, here_M = _rows(_in_order(tokens_BT, layout, scattered), table_VD.shape[0], vocab)
        x_MD = jnp.where(here_M[:, None], jnp.take(table_VD, row_M, axis=0, mode="clip"), 0)
        return sum_into(x_MD, 0, scattered, vocab)

    specs = PartitionSpec(vocab or None, None), tokens_axes
    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)(table_VD, tokens_BT)


def _forward(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, layout: TokenLayout) -> tuple[jax.Array, tuple]:
    # Of the table its size and dtype alone are kept.
    return _looked_up(embed_VD, tokens_BT, dtype, layout), (tokens_BT, embed_VD[:, :0])


def _backward(dtype: Any, layout: TokenLayout, saved: tuple, d_x_MD: jax.Array) -> tuple[jax.Array, None]:
    (tokens_BT, like), width = saved, d_x_MD.shape[1]
    if ambient_mesh() is None:
        return scatter_sum(d_x_MD, tokens_BT.reshape(-1), like.shape[0]).astype(like.dtype), None
    tokens_axes, vocab, scattered, of_x = _axes(layout, like.shape[0])
    rows = like.shape[0] // ways(vocab)
    summed = tuple(axis for axis in (*layout.batch, *layout.time) if axis not in vocab)
    over_width = dividing_axes(width, "embed", summed)

    def local(tokens_BT: jax.Array, d_x_MD: jax.Array) -> jax.Array:
        if scattered:
            d_x_MD = jax.lax.all_gather(d_x_MD, scattered, axis=0, tiled=True)
        row_M, here_M = _rows(_in_order(tokens_BT, layout, scattered), rows, vocab)
        filled = whole_tiles(rows)
        # What lies elsewhere goes beyond the table, where it is dropped.
        d_table_VD = scatter_sum(d_x_MD, jnp.where(here_M, row_M, filled), filled)
        return sum_into(d_table_VD.astype(dtype), 1, over_width, summed)[:rows]

    out = PartitionSpec(vocab or None, over_width or None)
    d_table_VD = jax.shard_map(local, in_specs=(tokens_axes, of_x), out_specs=out, check_vma=False)(tokens_BT, d_x_MD)
    return d_table_VD.astype(like.dtype), None


_looked_up.defvjp(_forward, _backward)


def _axes(layout: TokenLayout, rows: int) -> tuple[PartitionSpec, tuple[str, ...], tuple[str, ...], PartitionSpec]:
    """Where the token ids lie, the mesh axes of the vocabulary, those of them that then take tokens, and the result.

    Devices with different parts of the vocabulary look the same tokens up, and sum into parts what they found.
    """
    vocab = fitting_axes(ambient_mesh(), "vocab", rows)
    scattered = tuple(axis for axis in (*layout.time, *layout.part) if axis in vocab)
    time = tuple(axis for axis in layout.time if axis not in vocab)
    kept = (*layout.batch, *layout.time, *(axis for axis in layout.part if axis in vocab))
    return PartitionSpec(layout.batch or None, time or None), vocab, scattered, PartitionSpec(kept or None)


def _in_order(tokens_BT: jax.Array, layout: TokenLayout, scattered: tuple[str, ...]) -> jax.Array:
    """A device's token ids in the order in which `scattered` axes divide them: by time, then by row."""
    parts = ways(tuple(axis for axis in layout.time if axis in scattered))
    rows, length = tokens_BT.shape
    return jnp.swapaxes(tokens_BT.reshape(rows, parts, length // parts), 0, 1).reshape(-1)


def _rows(tokens_M: jax.Array, rows: int, vocab: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Where the tokens lie in this device's part of the table, and whether they do."""
    first = jax.lax.axis_index(vocab) * rows if vocab else 0
    return tokens_M - first, (tokens_M >= first) & (tokens_M < first + rows)
