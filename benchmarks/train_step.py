"""`python -m benchmarks.train_step`: how much of a whole trainer step is spent outside compiled code.

Runs the training program on a random model of geometry S (256 responses a step, graded, two optimizer steps) and takes
a profile of its last step: the share of the wall time in which no compiled program runs on any thread.
"""

import collections
import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.cases import GEOMETRIES
from benchmarks.pair import config_of, random_params
from demo import task
from rlvr_jax import load_hf, save_hf
from rlvr_jax.data.text import load_tokenizer
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.program import RunError, run_program
from train import config as c
from train.check.prepare import check
from train.run.loop import _Run, run

_RUNS = "ThunkExecutor::Execute"  # a compiled program, in a trace of XLA's CPU backend
BAR = 0.05


@dataclasses.dataclass(frozen=True)
class Bench:
    """A trainer step in profile."""

    steps: int = 3
    """Trainer steps; the last one is measured."""
    response: int = 128
    """Tokens a response, at most; a random model uses them up."""
    out: str | None = None
    """JSON file for the figures."""


def prepare(argv: Sequence[str]) -> Bench:
    bench = tyro.cli(Bench, args=list(argv), prog="python -m benchmarks.train_step", description=__doc__)
    if bench.steps < 2:
        raise ValueError(f"--steps {bench.steps}: expected at least 2, the first compiles")
    return bench


def measure(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), bench)
        spans, records = profiled(config, Path(folder), bench.steps)
    wall = records["seconds"]
    busy = covered(spans) / 1e9
    phases = {name: records[f"seconds_{name}"] for name in ("rollout", "grade", "score", "update", "other")}
    outside = 1 - busy / wall
    said = ", ".join(f"{name} {x:.2f} s" for name, x in phases.items())
    print(f"a trainer step of {wall:.2f} s: {said}")
    print(f"{outside:.1%} outside compiled code: {'held' if outside < BAR else 'missed'} (below {BAR:.0%})")
    if bench.out is not None:
        write_json(bench.out, {"seconds": wall, "phases": phases, "outside": outside})


def configuration(folder: Path, bench: Bench) -> c.Config:
    """The run: a random model that knows the demo's tokenizer, the demo's problems, every group trained on."""
    task.write_task(folder / "task", task.Task(), clean_rows=1, mixed_rows=1, train=64, test=1)
    geometry = GEOMETRIES["S"]
    save_hf(
        folder / "model",
        config_of(geometry),
        random_params(geometry),
        tokenizer=load_tokenizer(folder / "task" / "init"),
        dtype=jnp.float32,
    )
    load_hf(folder / "model")  # it can be read
    return c.Config(
        run_dir=str(folder / "run"),
        steps=bench.steps,
        epochs=bench.steps,
        model=c.ModelConfig(path=str(folder / "model"), remat="none"),
        data=c.DataConfig(train=str(folder / "task" / "train.parquet")),
        rollout=c.RolloutConfig(generation_batch=16, n=16, max_response=bench.response),
        reward=c.RewardConfig(overlong_buffer=0),
        algorithm=c.AlgorithmConfig(dynamic_sampling=False, train_batch=16, mini_batch=8, micro_batches=32),
        eval=c.EvalConfig(every=0),
        checkpoint=c.CheckpointConfig(every=0),
    )


def profiled(config: c.Config, folder: Path, step: int) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Begin and end in ns of every compiled program in a trainer step, and the step's record."""
    found: dict[str, Any] = {}
    make_step, log = _Run._step, _Run._log

    def traced(self: Any, **options: Any) -> bool:
        if self.trainer_steps != step - 1:
            return make_step(self, **options)
        with jax.profiler.trace(str(folder / "trace")):
            return make_step(self, **options)

    def noted(self: Any, kind: str, metrics: dict[str, Any]) -> None:
        found.update(metrics)
        log(self, kind, metrics)

    _Run._step, _Run._log = traced, noted
    try:
        run(check(config))
    finally:
        _Run._step, _Run._log = make_step, log
    traces = sorted((folder / "trace").rglob("*.xplane.pb"))
    if not traces:
        raise RunError("the profiler wrote no trace")
    spans = collections.deque()
    for plane in jax.profiler.ProfileData.from_file(str(traces[0])).planes:
        for line in plane.lines:
            spans.extend((e.start_ns, e.start_ns + e.duration_ns) for e in line.events if e.name.startswith(_RUNS))
    return list(spans), found


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    sys.exit(run_program(prepare, measure))
