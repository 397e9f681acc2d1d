"""Rows summed into the places that an index names: in at least float32, and to the same bits in every run.

A sum in bfloat16 stops growing at 256 equal terms. A GPU's scatter adds by atomics, in the order in which they arrive,
so a resumed run would differ from the one that was not interrupted.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlvr_jax.typing import Array, Float, Integer, Num


@functools.partial(jax.jit, static_argnames="size")
def scatter_sum(values: Num[Array, "M *D"], index_M: Integer[Array, " M"], size: int) -> Float[jax.Array, "size *D"]:
    """out[i] = the sum of `values[m]` over every m with `index_M[m] == i`, for i in 0 .. size - 1.

    Other indices are dropped. Sums are float32, or wider where the values are. CPUs and TPUs add one row after the
    other; on GPUs rows are sorted by their index first, and summed in a tree that depends on the index alone.
    """
    values = jnp.asarray(values)
    index_M = wide_ids(index_M)
    index_M = jnp.where(index_M < 0, size, index_M)  # a negative index would count from the end
    run = functools.partial(_summed_in_order, size=size)
    return jax.lax.platform_dependent(values, index_M, cuda=run, rocm=run, default=functools.partial(_added, size=size))


def wide_ids(ids: ArrayLike) -> jax.Array:
    """Integers as a jax array of at least 32 bits, since fewer need not hold the number of rows that ids count."""
    array = jnp.asarray(ids)
    return array.astype(jnp.int32) if array.dtype.itemsize < 4 else array


def _accumulator(values: jax.Array):
    return jnp.promote_types(values.dtype, jnp.float32)


def _added(values: jax.Array, index_M: jax.Array, *, size: int) -> jax.Array:
    out = jnp.zeros((size, *values.shape[1:]), _accumulator(values))
    return out.at[index_M].add(values.astype(out.dtype), mode="drop")


def _summed_in_order(values: jax.Array, index_M: jax.Array, *, size: int) -> jax.Array:
    out, M = jnp.zeros((size, *values.shape[1:]), _accumulator(values)), values.shape[0]
    if M == 0:
        return out
    order_M = jnp.argsort(index_M, stable=True)
    index_M, values = index_M[order_M], values[order_M].astype(out.dtype)
    begins_M = jnp.concatenate([jnp.ones(1, bool), index_M[1:] != index_M[:-1]])

    def join(left: tuple, right: tuple) -> tuple:
        (first, first_begins), (second, second_begins) = left, right
        return jnp.where(second_begins, second, first + second), first_begins | second_begins

    flags = begins_M.reshape(M, *[1] * (values.ndim - 1))
    totals, _ = jax.lax.associative_scan(join, (values, flags))
    # The last row of every run holds its sum; the others go to places of their own beyond the end, and are dropped.
    ends_M = jnp.roll(begins_M, -1)
    place_M = jnp.where(ends_M & (index_M < size), index_M, size + jnp.arange(M, dtype=index_M.dtype))
    return out.at[place_M].set(totals, mode="drop", unique_indices=True)
