"""The key / value cache of the decoder, indexed by position.

The index of a token in the cache is its position, row by row, and a query at position p sees indices up to p. Prompts
are therefore right-padded: what lies beyond a row's length is junk that is overwritten before it is ever seen, so no
mask is kept. Layers are separate arrays because XLA copies a stacked `[L, ...]` cache that a scan carries. Every array
has the rows on axis 0 and the positions on axis 2.

A cache of dtype int8 holds, for each token and head, round(127 x / max |x|) and the scale max |x| / 127 in float32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.sharding.rules import constrain
from rlvr_jax.typing import Array, Float, Int, Num

CACHE_AXES = ("cache_rows", "kv_heads", None, "head_dim")  # logical names of its arrays, for `ShardingRules`
_INT8_MAX = 127.0


class LayerCache(NamedTuple):
    """One layer of a cache. Attributes: k, v: [B, K, S, H]; k_scale, v_scale: float32 [B, K, S], None unless int8."""

    k: Array
    v: Array
    k_scale: Array | None
    v_scale: Array | None


class KVCache(NamedTuple):
    """Keys (rotated) and values of every layer.

    Attributes:
      k, v: one array [B, K, S, H] a layer; S is the capacity in tokens.
      k_scale, v_scale: of an int8 cache, float32 [B, K, S] a layer; otherwise empty.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    k_scale: tuple[jax.Array, ...] = ()
    v_scale: tuple[jax.Array, ...] = ()

    @property
    def length(self) -> int:
        """S, the capacity in tokens."""
        return self.k[0].shape[2]

    def layers(self) -> list[LayerCache]:
        """The same arrays, layer by layer."""
        none = (None,) * len(self.k)
        return [LayerCache(*x) for x in zip(self.k, self.v, self.k_scale or none, self.v_scale or none, strict=True)]

    @classmethod
    def of_layers(cls, layers: list[LayerCache]) -> "KVCache":
        """The inverse of `layers`."""
        return cls(*(tuple(x for x in of_kind if x is not None) for of_kind in zip(*layers, strict=True)))


def init_cache(config: QwenConfig, batch: int, length: int, dtype: Any = None) -> KVCache:
    """An empty cache for `batch` rows of `length` tokens, in `dtype`: int8, a float, or None for the config's own.

    The config's own is its compute dtype, float32 where it leaves that open.
    """
    shapes = _shapes(config, batch, length, dtype)
    # Separate buffers, so that each can be donated.
    return KVCache(*(tuple(jnp.zeros(x.shape, x.dtype) for _ in range(config.num_layers)) for x in shapes))


def cache_bytes(config: QwenConfig, batch: int, length: int, dtype: Any = None) -> int:
    """Bytes of `init_cache(config, batch, length, dtype)`, over all devices."""
    return config.num_layers * sum(x.size * x.dtype.itemsize for x in _shapes(config, batch, length, dtype))


def cache_dtype(config: QwenConfig, dtype: Any = None) -> jnp.dtype:
    """The dtype that `init_cache` makes of its argument. Raises ValueError unless it is int8 or a float."""
    try:
        resolved = jnp.dtype(config.compute_dtype(jnp.float32) if dtype is None else dtype)
    except TypeError as error:
        raise ValueError(f"cache dtype {dtype!r}: expected a float type or int8") from error
    if resolved != jnp.int8 and not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(f"cache dtype {dtype!r}: expected a float type or int8")
    return resolved


def _shapes(config: QwenConfig, batch: int, length: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a layer holds: k and v, and the scales of an int8 cache."""
    if batch < 1 or length < 1:
        raise ValueError(f"init_cache: batch {batch} and length {length} must be positive")
    x = jax.ShapeDtypeStruct((batch, config.num_kv_heads, length, config.head_dim), cache_dtype(config, dtype))
    scale = jax.ShapeDtypeStruct(x.shape[:3], jnp.float32)
    return (x, x, scale, scale) if x.dtype == jnp.int8 else (x, x)


def constrain_cache(cache: KVCache) -> KVCache:
    """Inside jit: rows over the mesh axes of the cache's rows, heads over those of the kv heads."""
    return jax.tree.map(_constrain, cache)


def _constrain(x: jax.Array) -> jax.Array:
    return jnp.asarray(constrain(x, *CACHE_AXES[: x.ndim]))


def grow_cache(cache: KVCache, length: int) -> KVCache:
    """The same content with capacity `length` tokens; a cache that is already as long is returned as it is.

    On the host the arrays grow one by one and **the old cache is deleted on the way**, so that the memory needed beside
    the larger cache is that of one array. (Donating them would not do it: a longer array cannot take the place of a
    shorter one.) Inside jit it is an ordinary function.
    """
    extra = length - cache.length
    if extra < 0:
        raise ValueError(f"grow_cache: length {length} is below the present capacity {cache.length}")
    if extra == 0:
        return cache

    def grow(x: jax.Array) -> jax.Array:
        longer = _pad(x, extra)
        if not isinstance(x, Tracer):
            longer.block_until_ready()  # else the next array would be allocated before this one is free
            x.delete()
        return longer

    return jax.tree.map(grow, cache)


@partial(jax.jit, static_argnames=("extra",))
def _pad(x: jax.Array, extra: int) -> jax.Array:
    return _constrain(jnp.pad(x, [(0, extra if axis == 2 else 0) for axis in range(x.ndim)]))


def insert_cache(cache: KVCache, prompts: KVCache, source_B: Int[Array, " B"]) -> KVCache:
    """The cache whose row b begins with row `source_B[b]` of `prompts`; rows of a negative source stay as they are.

    `prompts` is at most as long. So a prompt that was prefilled once starts any number of rows.
    """
    if prompts.length > cache.length:
        raise ValueError(f"insert_cache: prompts of length {prompts.length} into a cache of length {cache.length}")

    def insert(x: jax.Array, y: jax.Array) -> jax.Array:
        kept = (source_B < 0).reshape(-1, *[1] * (x.ndim - 1))
        start = jnp.where(kept, x[:, :, : y.shape[2]], jnp.take(y, jnp.maximum(source_B, 0), axis=0))
        return jax.lax.dynamic_update_slice_in_dim(x, start, 0, axis=2)

    return jax.tree.map(insert, cache, prompts)


def write_layer(
    cache: LayerCache, k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], positions_BT: Int[Array, "B T"]
) -> LayerCache:
    """The layer's cache with keys and values of new tokens at their positions, in the cache's own dtype.

    What is not finite is written as 0: a masked position has weight 0, but 0 times NaN is NaN, so that a poisoned row
    would spoil whoever uses its place in the cache after it.
    """
    # Where the cache's rows lie in more parts than the batch, each writes its own.
    k, v = (constrain(_finite(jnp.asarray(x)), "cache_rows", None, "kv_heads", "head_dim") for x in (k_BTKH, v_BTKH))
    positions_BT = constrain(positions_BT, "cache_rows", None)
    k_scale, v_scale = cache.k_scale, cache.v_scale
    if k_scale is not None and v_scale is not None:
        k, k_scale_BTK = _quantise(k)
        v, v_scale_BTK = _quantise(v)
        k_scale = write_cache(k_scale, k_scale_BTK, positions_BT)
        v_scale = write_cache(v_scale, v_scale_BTK, positions_BT)
    return LayerCache(write_cache(cache.k, k, positions_BT), write_cache(cache.v, v, positions_BT), k_scale, v_scale)


def _quantise(x: Array) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x32), axis=-1) / _INT8_MAX
    whole = jnp.round(x32 / jnp.where(scale > 0, scale, 1.0)[..., None])
    return jnp.clip(whole, -_INT8_MAX, _INT8_MAX).astype(jnp.int8), scale


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x


def write_cache(
    cache: Num[Array, "B K S *H"], new: Num[Array, "B T K *H"], positions_BT: Int[Array, "B T"]
) -> Num[Array, "B K S *H"]:
    """Puts token (b, t) at `cache[b, :, positions[b, t]]`; positions outside 0 .. S-1 are dropped.

    Positions of one row must differ from each other. What is not finite in the cache's dtype is written as 0.
    """
    # A negative index would count from the end, so it is sent beyond the capacity, where it is dropped.
    index_BT = jnp.where(positions_BT < 0, cache.shape[2], positions_BT)
    # The kv heads are indexed too: were they written as a slice, the TPU compiler would re-lay the whole cache for it.
    rows_B11, heads_1K1 = jnp.arange(cache.shape[0])[:, None, None], jnp.arange(cache.shape[1])[None, :, None]
    new_BKT = jnp.swapaxes(_finite(jnp.asarray(new).astype(cache.dtype)), 1, 2)
    return jnp.asarray(cache).at[rows_B11, heads_1K1, index_BT[:, None]].set(new_BKT, mode="drop")
