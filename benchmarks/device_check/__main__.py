"""Does rlvr_jax compute the right thing on this accelerator, and how fast?

    python -m benchmarks.device_check --out OUT                      # one GPU: at most 8 minutes
    JAX_PLATFORMS=cpu python -m benchmarks.device_check --size tiny --out OUT     # the same code on any machine
    python -m benchmarks.device_check --draw OUT                     # the figures again, from OUT/device_check.json

Parts: machine (its limits), numerics (against float32 on this machine's CPU), sampler, decode_* and train_* (with
random weights). OUT/device_check.json is written anew after each part. A part for which the budget is too short is left
out and named. Exit code 1: a number is wrong, or a part failed; both are listed.

It runs where jax, flax, optax, numpy, jaxtyping and transformers are, without the requirements that GPU images seldom
carry (tyro, grain, math-verify, orbax). With matplotlib it draws as well.
"""

import argparse
import concurrent.futures
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from rlvr_jax.runs.files import write_json

BEGAN = time.monotonic()
LEAST = {"machine": 20, "numerics": 60, "sampler": 20}  # seconds that must be left for a part to begin
LEAST_MEASURED = 40
log = logging.getLogger("device_check")


class Parts:
    """The parts of a check as they end, in one JSON file.

    Attributes:
      found: what the parts gave; `left_out`, `wrong` and `seconds` beside them.
    """

    def __init__(self, out: Path, size: str, budget_s: float, identity: dict):
        self._path, self._budget_s = out / "device_check.json", budget_s
        self.found: dict = {"size": size, "identity": identity, "left_out": [], "wrong": []}

    @property
    def left_s(self) -> float:
        return self._budget_s - (time.monotonic() - BEGAN)

    def run(self, name: str, part: Callable[[], dict], least_s: float) -> None:
        """Runs a part, unless fewer than `least_s` seconds are left; what it raises is its result."""
        if self.left_s < least_s:
            log.warning("%s: left out, %.0f s are left", name, self.left_s)
            self.found["left_out"].append(name)
        else:
            begin = time.monotonic()
            try:
                self.found[name] = part()
            except Exception as error:  # the other parts still tell something
                self.found[name] = {
                    "error": f"{type(error).__name__}: {error}"[:2000],
                    "traceback": traceback.format_exc(),
                }
                self.found["wrong"].append(f"{name} failed: {type(error).__name__}: {str(error)[:300]}")
            log.warning("[%4.0f s] %s: %.0f s", time.monotonic() - BEGAN, name, time.monotonic() - begin)
        self.save()

    def save(self) -> None:
        self.found["seconds"] = time.monotonic() - BEGAN
        write_json(self._path, self.found)


def check(size_name: str, out: Path, budget_s: float, threads: int) -> dict:
    """Runs every part for which there is time; gives what `device_check.json` holds."""
    from benchmarks.device_check import decode, machine, reference, sampler, train
    from benchmarks.device_check.sizes import SIZES

    size = SIZES[size_name]
    parts = Parts(out, size_name, budget_s, machine.identity())
    flops, bandwidth = machine.peaks()
    with (
        reference.Reference(size_name, out / "reference.npz") as numbers,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        # Before anything else is compiled beside it.
        parts.run("machine", lambda: machine.measure(size), LEAST["machine"])
        trains, decodes = train.programs(size, pool), decode.programs(size, pool)

        def numerics() -> dict:
            found, wrong = reference.check(size, numbers, max(LEAST["numerics"], parts.left_s))
            parts.found["wrong"] += wrong
            return found

        parts.run("numerics", numerics, LEAST["numerics"])
        parts.run("sampler", lambda: sampler.measure(size), LEAST["sampler"])
        for one in trains:
            parts.run(one.name, lambda one=one: one.measure(out, flops), LEAST_MEASURED)
        for one in decodes:
            parts.run(one.name, lambda one=one: one.measure(out, bandwidth), LEAST_MEASURED)
        pool.shutdown(cancel_futures=True)
    parts.found["pair_over_single"] = decode.pair_over_single(parts.found)
    parts.save()
    return parts.found


def report(found: dict) -> int:
    """Says what is wrong and what was left out; the exit code."""
    identity = found["identity"]
    print(f"{identity['device']}, jax {identity['jax']}, {found['seconds']:.0f} s")
    for name, part in found.items():
        if isinstance(part, dict) and name != "identity" and "error" not in part:
            print(f"  {name}: {json.dumps({k: v for k, v in part.items() if not isinstance(v, (dict, list))})[:400]}")
    for name in found["left_out"]:
        print(f"  LEFT OUT: {name}")
    for sentence in found["wrong"]:
        print(f"  WRONG: {sentence}")
    print("device check: " + ("FAILED" if found["wrong"] else "passed"))
    return int(bool(found["wrong"]))


@contextlib.contextmanager
def _programs_kept(folder: Path) -> Iterator[None]:
    """Inside, compiled programs are kept in `folder`, so that a second check compiles nothing again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    options = {"jax_compilation_cache_dir": os.path.abspath(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}

    def use(settings: dict) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax looks at the folder once, at its first compilation

    use(options)
    try:
        yield
    finally:
        use(before)


def _draw(out: Path, found: dict) -> None:
    try:
        from benchmarks.device_check.draw import draw
    except ImportError as error:
        log.warning("no figures: %s; `--draw %s` makes them where matplotlib is installed", error, out)
        return
    for path in draw(found, out):
        print(f"  drawn: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_check", description="See the module.")
    parser.add_argument("--size", choices=("gpu", "tiny"), default="gpu", help="tiny: the same code on any machine")
    parser.add_argument("--out", type=Path, default=Path("runs/device_check"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds; parts that do not fit are left out")
    parser.add_argument("--threads", type=int, default=4, help="programs that are compiled at one time")
    parser.add_argument("--draw", type=Path, metavar="OUT", help="only draw the figures of an earlier check")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.draw:
        _draw(options.draw, json.loads((options.draw / "device_check.json").read_text()))
        return 0
    # The pair of models with full caches needs more than the 75% of the memory that jax takes by default.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")
    if options.reference:
        from benchmarks.device_check.reference import write_reference

        with _programs_kept(options.reference.parent / "compile_cache"):
            write_reference(options.size, options.reference)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    with _programs_kept(options.out / "compile_cache"):
        found = check(options.size, options.out, options.budget, options.threads)
    _draw(options.out, found)
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
