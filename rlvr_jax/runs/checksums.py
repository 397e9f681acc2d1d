"""Checksums of the values of a checkpoint, so that what is read back is known to be what was saved.

A checksum is of values, not of files: it does not depend on the mesh, on the number of processes or on how a store lays
files out, and it is computed where the values are. Arrays of the state are summed on their devices, each device its own
part; one pass over the memory, some milliseconds per GB on an accelerator.

What is found: any damage of a single number with certainty, other damage but for one chance in 2^32.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlvr_jax.runs.distributed import to_host

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes; 8 are two words
_GOLDEN = 0x9E3779B9  # spreads the places of neighbours over all 32 bits


def of_tree(tree: Any) -> dict[str, list]:
    """[dtype, shape, checksum] of every array of a pytree, by its path; all processes call it.

    The checksum is the sum modulo 2^32 of mix(word + 0x9E3779B9 * place) over the words of an array. A `word` has the
    bits of an element (two words where these are 64), `place` is its number in row-major order, `mix` a bijection. The
    sum does not depend on its order.
    """
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    together = defaultdict(dict)  # a program covers the devices of one mesh
    for name, x in named.items():
        together[frozenset(x.sharding.device_set) if isinstance(x, jax.Array) else None][name] = x
    sums = {name: int(x) for part in together.values() for name, x in to_host(_sums(part)).items()}
    return {name: [*_form(x), sums[name]] for name, x in named.items()}


def forms_of(tree: Any) -> dict[str, list]:
    """[dtype, shape] of every array of a pytree or of its `jax.ShapeDtypeStruct`s, by its path."""
    return {jax.tree_util.keystr(path): _form(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def of_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, list]:
    """[dtype, shape, CRC-32] of host arrays."""
    return {name: [*_form(x), zlib.crc32(np.ascontiguousarray(x).tobytes())] for name, x in arrays.items()}


def of_plain(value: Any) -> int:
    """CRC-32 of values that JSON can hold, as JSON gives them back."""
    back = json.loads(json.dumps(value))
    return zlib.crc32(json.dumps(back, sort_keys=True).encode())


def _form(x: Any) -> list:
    return [str(x.dtype), list(np.shape(x))]


@jax.jit
def _sums(arrays: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: _sum(jnp.asarray(x)) for name, x in arrays.items()}


def _sum(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mixed(words + place * np.uint32(_GOLDEN)), dtype=jnp.uint32)


def _mixed(h: jax.Array) -> jax.Array:
    """A bijection of 32-bit words each of whose bits depends on all (the end of MurmurHash3, public domain)."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
