"""The key / value cache of the decoder, indexed by position.

The index of a token in the cache is its position, row by row, and a query at position p sees indices up to p. Prompts
are therefore right-padded: what lies beyond a row's length is junk that is overwritten before it is ever seen, so no
mask is kept. Layers are separate arrays because XLA copies a stacked `[L, ...]` cache that a scan carries.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.typing import Array, Float, Int


class KVCache(NamedTuple):
    """Keys (rotated) and values of every layer.

    Attributes:
      k, v: one array [B, K, S, H] a layer; S is the capacity in tokens.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        """S, the capacity in tokens."""
        return self.k[0].shape[2]


def init_cache(config: QwenConfig, batch: int, length: int, dtype: Any = None) -> KVCache:
    """An empty cache for `batch` rows of `length` tokens, in `dtype` (by default the config's, else float32)."""
    if batch < 1 or length < 1:
        raise ValueError(f"init_cache: batch {batch} and length {length} must be positive")
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    dtype = config.compute_dtype(jnp.float32) if dtype is None else dtype

    def empty() -> tuple[jax.Array, ...]:
        # Separate buffers, so that each can be donated.
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))

    return KVCache(empty(), empty())


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """The same content with capacity `length` tokens; a cache that is already as long is returned as it is."""
    extra = length - cache.length
    if extra < 0:
        raise ValueError(f"grow_cache: length {length} is below the present capacity {cache.length}")
    if extra == 0:
        return cache
    return jax.tree.map(lambda x_BKSH: jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, extra), (0, 0))), cache)


def repeat_cache(cache: KVCache, n: int) -> KVCache:
    """Every row n times, neighbours together: the n samples of a prompt that was prefilled once."""
    if n < 1:
        raise ValueError(f"repeat_cache: n is {n}, expected at least 1")
    return jax.tree.map(lambda x_BKSH: jnp.repeat(x_BKSH, n, axis=0), cache)


def write_cache(
    cache_BKSH: Float[Array, "B K S H"], new_BTKH: Float[Array, "B T K H"], positions_BT: Int[Array, "B T"]
) -> Float[Array, "B K S H"]:
    """Puts token (b, t) at `cache[b, :, positions[b, t]]`; positions outside 0 .. S-1 are dropped.

    Positions of one row must differ from each other.
    """
    rows_B1 = jnp.arange(cache_BKSH.shape[0])[:, None]
    # A negative index would count from the end, so it is sent beyond the capacity, where it is dropped.
    index_BT = jnp.where(positions_BT < 0, cache_BKSH.shape[2], positions_BT)
    return jnp.asarray(cache_BKSH).at[rows_B1, :, index_BT].set(new_BTKH.astype(cache_BKSH.dtype), mode="drop")
