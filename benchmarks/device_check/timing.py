"""Medians of repeated runs, on the host's clock, each waited for."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of `run` until its result is there: the median of `repeats`, after two runs that do not count."""
    for _ in range(2):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def peak_bytes() -> int | None:
    """Most device memory that was ever in use so far, where the backend tells."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
