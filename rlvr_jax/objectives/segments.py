"""Sums over the responses of a batch whose rows are responses, or hold several of them one behind the other."""

import jax
import jax.numpy as jnp

from rlvr_jax.direction import widen
from rlvr_jax.scatter import scatter_sum
from rlvr_jax.typing import Array, Bool, Float, Int, Real


def response_sums(
    values_BT: Real[Array, "B T"] | Bool[Array, "B T"], segment_BT: Int[Array, "B T"] | None = None
) -> Float[jax.Array, "B T"]:
    """At every token the sum of `values_BT` over its response, in at least float32.

    Args:
      values_BT: 0 where a token does not count.
      segment_BT: the number of each token's response, from 1; 0 on padding, which is summed up as well. Equal numbers
        side by side are one response, so they may start anew in every row or not. None: a row is a response.
    """
    values_BT = widen(values_BT)
    if segment_BT is None:
        return jnp.broadcast_to(jnp.sum(values_BT, axis=-1, keepdims=True), values_BT.shape)

    segment_BT = jnp.asarray(segment_BT)
    changes_BT = segment_BT != jnp.roll(segment_BT, 1, axis=1)
    run_BT = jnp.cumsum(changes_BT, axis=1, dtype=jnp.int32)  # from 0 to T, whatever the numbers are

    def of_row(values_T: jax.Array, run_T: jax.Array) -> jax.Array:
        return scatter_sum(values_T, run_T, values_T.size + 1)[run_T]

    return jax.vmap(of_row)(values_BT, run_BT)


def response_begins(segment_BT: Int[Array, "B T"] | None, shape: tuple[int, ...]) -> jax.Array:
    """bool [B, T]: the first token of every response (of every row without `segment_BT`)."""
    if segment_BT is None:
        return jnp.zeros(shape, bool).at[:, 0].set(True)
    segment_BT = jnp.asarray(segment_BT)
    return (jnp.diff(segment_BT, axis=1, prepend=0) != 0) & (segment_BT > 0)
