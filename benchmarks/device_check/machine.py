"""The machine's own limits: bandwidth, matrix rate, and what a loop turn, a branch and a small kernel cost."""

import os
import platform
import subprocess
from importlib.metadata import version

import jax
import jax.numpy as jnp

from benchmarks.device_check.sizes import Size
from benchmarks.device_check.timing import median_seconds
from rlvr_jax.planning.chips import H100

# Dense bfloat16 FLOP/s and bytes/s of NVIDIA's data sheets, SXM forms.
PEAKS = {"H100": (H100.flops, H100.bandwidth), "H200": (H100.flops, 4.8e12)}


def peaks() -> tuple[float | None, float | None]:
    """(FLOP/s, bytes/s) that this device can reach; None for a device that the table does not know."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS.items() if name in kind), (None, None))


def identity() -> dict:
    """Which device, driver, versions and flags the figures belong to."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "devices": len(jax.devices()),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "nvidia_smi": _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _said("git", "rev-parse", "HEAD"),
    }


def measure(size: Size) -> dict:
    """TB/s, TFLOP/s and microseconds of this device."""
    found = {}
    x = jax.random.normal(jax.random.key(0), (size.copy_bytes // 2,), jnp.bfloat16)
    copy, total = jax.jit(lambda x: x + jnp.bfloat16(1)), jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    found["copy_TB_s"] = 2 * size.copy_bytes / median_seconds(lambda: copy(x), size.repeats) / 1e12
    found["read_TB_s"] = size.copy_bytes / median_seconds(lambda: total(x), size.repeats) / 1e12
    del x
    a, b = (jax.random.normal(jax.random.key(i), (size.product, size.product), jnp.bfloat16) for i in (1, 2))
    product = jax.jit(jnp.dot)
    found["product_TFLOP_s"] = 2 * size.product**3 / median_seconds(lambda: product(a, b), size.repeats) / 1e12

    small = jnp.ones((128,), jnp.float32)

    def turn(_: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(x * 1.0001)

    known = jax.jit(lambda x: jax.lax.fori_loop(0, size.turns, turn, x))
    by_data = jax.jit(lambda x, bound: jax.lax.fori_loop(0, bound, turn, x))
    found["loop_turn_us"] = median_seconds(lambda: known(small), size.repeats) / size.turns * 1e6
    bound = jnp.int32(size.turns)
    found["data_dependent_loop_turn_us"] = (
        median_seconds(lambda: by_data(small, bound), size.repeats) / size.turns * 1e6
    )

    branches, flags = min(50, size.turns), jnp.ones(4)

    @jax.jit
    def conds(x: jax.Array, flags: jax.Array) -> jax.Array:
        for i in range(branches):
            x = jax.lax.cond(flags[i % 4] > 0, lambda x: x * 1.01, jnp.sin, x)
        return x

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(branches):
            x = jax.lax.optimization_barrier(jnp.tanh(x))
        return x

    found["cond_us"] = median_seconds(lambda: conds(small, flags), size.repeats) / branches * 1e6
    found["small_kernel_us"] = median_seconds(lambda: chain(small), size.repeats) / branches * 1e6
    return found


def _said(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
