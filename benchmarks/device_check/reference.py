"""The numeric comparison: this device against float32 on this machine's CPU, which a process of its own computes."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.device_check import numerics
from benchmarks.device_check.numerics import EQUAL_TOKENS, Arrays
from benchmarks.device_check.sizes import SIZES, Size

# Relative L2 distance of every gradient and parameter, absolute distance of log-probs and entropies in nats. A GPU
# multiplies float32 through TF32 unless it is told otherwise, so both ways are looked at.
LIMITS = {
    "float32, exact products": {"gradient": 1e-3, "updated": 1e-3, "logp": 1e-3, "entropy": 1e-3, "gap": 1e-3},
    "float32": {"gradient": 2e-2, "updated": 2e-2, "logp": 2e-2, "entropy": 2e-2, "gap": 2e-2},
    "bfloat16": {"gradient": 1e-1, "updated": 1e-1, "logp": 1e-1, "entropy": 1e-1, "gap": 1e-1},
}
SAME_TOKENS = 0.9  # of float32 responses, before their first difference: a near tie may fall the other way


class Reference:
    """The CPU's numbers, computed while this process does other things. Use as a context manager."""

    def __init__(self, size_name: str, path: Path):
        self.path = path
        command = [sys.executable, "-m", "benchmarks.device_check", "--size", size_name, "--reference", str(path)]
        cpu_only = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": ""}
        self._process = subprocess.Popen(command, env=os.environ | cpu_only)

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self.path.unlink(missing_ok=True)

    def wait(self, timeout_s: float) -> None:
        """Until the numbers are there. Raises subprocess.TimeoutExpired, or RuntimeError when the process failed."""
        if self._process.wait(timeout=timeout_s):
            raise RuntimeError(f"the CPU reference ended with exit code {self._process.returncode}")

    def read(self, timeout_s: float) -> Arrays:
        """The numbers, once they are there; raises as `wait` does."""
        self.wait(timeout_s)
        with np.load(self.path) as stored:
            return dict(stored)


def write_reference(size_name: str, path: Path) -> None:
    """What the process of `Reference` runs."""
    size = SIZES[size_name]
    made = numerics.update(size, "float32") | numerics.decode(size, "float32")
    made |= {f"unpacked {name}": x for name, x in numerics.update(size, "float32", packed=False).items()}
    np.savez(path, **made)  # type: ignore[arg-type]


def here(size: Size) -> dict[str, Arrays]:
    """This device's numbers, by how they were computed."""
    found = {}
    with jax.default_matmul_precision("float32"):
        found["float32, exact products"] = numerics.update(size, "float32") | numerics.decode(size, "float32")
    if jax.default_backend() == "cpu":
        return found  # the CPU multiplies float32 exactly, and bfloat16 slowly
    for dtype in ("float32", "bfloat16"):
        found[dtype] = numerics.update(size, dtype) | numerics.decode(size, dtype)
    kinds = ("chunked", "cudnn") if jax.default_backend() == "gpu" else ("chunked",)
    for kind in kinds:
        found[f"bfloat16, {kind}, one sequence per row"] = numerics.update(
            size, "bfloat16", attention=kind, packed=False
        )
    return found


def compare(name: str, got: Arrays, want: Arrays) -> tuple[dict, list[str]]:
    """Distances of one way of computing from the reference, and a sentence for each that is too large."""
    unpacked = "one sequence per row" in name
    limits = LIMITS[name.split(", ")[0] if unpacked else name]
    prefix = "unpacked " if unpacked else ""
    found: dict = {"same_bits": bool(got["same_bits"]), "loss": [float(got["loss"]), float(want[prefix + "loss"])]}
    wrong = [] if found["same_bits"] else ["the same micro-batch gave other bits when it was computed again"]
    if not all(np.isfinite(x).all() for x in got.values()):
        wrong.append("some numbers are not finite")
    for kind in ("gradient", "updated"):
        distances = {key: relative(x, want[prefix + key]) for key, x in got.items() if key.startswith(kind)}
        worst = max(distances, key=distances.__getitem__)
        found[kind] = {"worst": worst, "relative": distances[worst]}
        if not distances[worst] <= limits[kind]:
            wrong.append(f"{worst} is off by {distances[worst]:.2g} (relative), at most {limits[kind]:g} is expected")
    for kind in ("logp", "entropy"):
        off = np.abs(got[kind] - want[prefix + kind])
        found[kind] = {"largest": float(off.max()), "mean": float(off.mean())}
        if not off.mean() <= limits[kind]:
            wrong.append(f"{kind} is off by {off.mean():.2g} nats on average, at most {limits[kind]:g} is expected")
    if not unpacked:
        more, also = _compare_tokens(got, want, limits["gap"], exact="exact" in name)
        found, wrong = found | more, wrong + also
    return found, [f"{name}: {sentence}" for sentence in wrong]


def _compare_tokens(got: Arrays, want: Arrays, gap: float, *, exact: bool) -> tuple[dict, list[str]]:
    same = {key: same_share(got[key], want[key]) for key in ("greedy", "drawn", "pair", "pair_in_blocks")}
    same["pair and pair_in_blocks"] = same_share(got["pair"], got["pair_in_blocks"])
    off = np.abs(got["gap"])
    found = {
        "same_tokens": same,
        "fired_share": float(got["fired"].mean()),
        "gap": {"largest": float(off.max()), "mean": float(off.mean())},
    }
    wrong = []
    if exact:
        wrong = [
            f"{key}: only {share:.1%} of the tokens are the same" for key, share in same.items() if share < SAME_TOKENS
        ]
    if not off.mean() <= gap:
        wrong.append(f"sampler and trainer differ by {off.mean():.2g} nats on average, at most {gap:g} is expected")
    return found, wrong


def check(size: Size, reference: Reference, timeout_s: float) -> tuple[dict, list[str]]:
    """The part `numerics`: distances by way of computing, and a sentence for each wrong number."""
    if jax.default_backend() == "cpu":  # then both compile the same programs, which wait in the cache
        reference.wait(timeout_s)
    mine, equal = here(size), numerics.equal_tokens_gradient()
    want = reference.read(timeout_s)
    found: dict = {"gradient_of_equal_tokens": [equal, EQUAL_TOKENS]}
    wrong = [] if equal == EQUAL_TOKENS else [f"{EQUAL_TOKENS} equal tokens sum to a gradient of {equal:g}"]
    for name, got in mine.items():
        found[name], sentences = compare(name, got, want)
        wrong += sentences
    return found, wrong


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """L2 distance over the L2 norm of `want`, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def same_share(got: np.ndarray, want: np.ndarray) -> float:
    """Share of tokens before each row's first difference."""
    return float(np.cumprod(got == want, axis=1).mean())
