"""`python -m benchmarks.decode`: dual-model decoding beside its peers, one command, one run.

Every side decodes the same prompts with the same checkpoints in a process of its own; timed runs of all sides take
turns, and medians are reported with ratios, the machine's limits and the bars of the issue. benchmarks/README.md says
what the columns mean.
"""

import dataclasses
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from benchmarks.cases import GEOMETRIES, Geometry, Request
from benchmarks.report import (
    LOOP,
    OURS_DUAL,
    OURS_SINGLE,
    OURS_STEPS,
    PEER_DUAL,
    PEER_SINGLE,
    Row,
    bars,
    bars_table,
    rows_table,
)
from benchmarks.worker import Worker, WorkerError
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.program import RunError, run_program

Peer = Literal["ours", "transformers-fp32", "transformers-bf16", "vllm"]
_PAUSE = 0.3  # seconds in which another side's threads stop waiting for work in a busy loop
_TABLE = Console(width=None if sys.stdout.isatty() else 160)


@dataclasses.dataclass(frozen=True)
class Bench:
    geometry: tuple[Literal["S", "M"], ...] = ("S", "M")
    """S: 6 layers, hidden 256, 4,096 tokens. M: the shape of Qwen3-0.6B."""
    batch: tuple[int, ...] = (8, 32, 128)
    """Batch sizes at S; M is measured at 8."""
    peers: tuple[Peer, ...] = ("ours", "transformers-fp32", "transformers-bf16", "vllm")
    """Sides; vllm needs --vllm-python, else its recorded figure is used."""
    pairs: tuple[Literal["near", "wide"], ...] = ("near", "wide")
    """near: the criterion fires on about 3% of tokens; wide: on about 34%."""
    blocks: tuple[int, ...] = (4, 8)
    """Explicit block sizes beside token by token and the default choice."""
    repeats: int | None = None
    """Timed runs; by default 5 at S, 3 at M."""
    threads: int = 2
    """Processors each side may use."""
    cache: str = str(Path(tempfile.gettempdir()) / "rlvr_jax_benchmarks")
    """Folder of the random checkpoints, made once (7.2 GB for M)."""
    out: str | None = None
    """JSON file for all figures."""
    torch_python: str = sys.executable
    """Interpreter that has torch and transformers."""
    vllm_python: str | None = None
    """Interpreter that has vLLM's CPU build."""


@dataclasses.dataclass(frozen=True)
class Side:
    """A worker, what it holds in memory and what is asked of it: (label, mode, block) each."""

    module: str
    python: str
    hello: dict[str, Any]
    itemsize: int
    lines: tuple[tuple[str, str, int | None], ...]


def prepare(argv: Sequence[str]) -> Bench:
    bench = tyro.cli(Bench, args=list(argv), prog="python -m benchmarks.decode", description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= bench.threads <= cores:
        raise ValueError(f"--threads {bench.threads}: expected 1 to {cores}, the processors of this machine")
    for name in ("batch", "blocks"):
        if any(value < 1 for value in getattr(bench, name)):
            raise ValueError(f"--{name} {getattr(bench, name)}: expected numbers of at least 1")
    if bench.repeats is not None and bench.repeats < 1:
        raise ValueError(f"--repeats {bench.repeats}: expected at least 1")
    return bench


def run(bench: Bench) -> None:
    started, load = time.time(), os.getloadavg()
    record: dict[str, Any] = {"settings": dataclasses.asdict(bench), "machine": machine(), "geometries": {}}
    rows: list[Row] = []
    open_limits: list[dict[str, Any]] = []
    try:
        for name in bench.geometry:
            rows += measure(bench, GEOMETRIES[name], record["geometries"].setdefault(name, {}), open_limits)
    except WorkerError as error:
        raise RunError(str(error)) from error
    listed = bars(rows, open_limits)
    for name in bench.geometry:
        _TABLE.print(rows_table(name, [row for row in rows if row.geometry == name]))
    _TABLE.print(bars_table(listed))
    record |= {
        "seconds": time.time() - started,
        "load_average": {"before": load, "after": os.getloadavg()},
        "rows": [row.figures() for row in rows],
        "open_limits": open_limits,
        "bars": [dataclasses.asdict(bar) | {"verdict": bar.verdict} for bar in listed],
    }
    say(f"{record['seconds']:.0f} s; load average before {load[0]:.1f}, after {os.getloadavg()[0]:.1f} (ours included)")
    if bench.out is not None:
        write_json(bench.out, record)


def measure(bench: Bench, geometry: Geometry, record: dict[str, Any], open_limits: list[dict[str, Any]]) -> list[Row]:
    """All rows of a geometry; what is known of the pairs and the machine goes into `record`."""
    folder = Path(bench.cache).resolve() / geometry.name
    say(f"{geometry.name}: the pairs, in {folder}")
    with closing(Worker("benchmarks.pair", threads=bench.threads, hello={})) as worker:
        made = worker.ask({"geometry": geometry.name, "folder": str(folder), "pairs": list(bench.pairs)})
    record["pairs"] = {name: made[name] for name in bench.pairs}
    for name, pair in record["pairs"].items():
        say(f"{geometry.name}: pair {name}: perturbation {pair['epsilon']:.4f}, fires on {pair['rate']:.2%} of tokens")
    batches = [b for b in geometry.batches if b in bench.batch] if geometry.name == "S" else geometry.batches
    with closing(Worker("benchmarks.machine", threads=bench.threads, hello={})) as limits:
        record["machine"] = {b: limits.ask({"ask": "machine", "geometry": geometry.name, "batch": b}) for b in batches}
        for b, measured in record["machine"].items():
            rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in measured["product_rates"].items())
            best = max(measured["bandwidth"].values()) / 1e9
            say(f"{geometry.name}: batch {b}: reads {best:.1f} GB/s; products of {b} rows in GFLOP/s: {rates}")
        rows = []
        for group in together(sides(bench, geometry), geometry):
            rows += take_turns(bench, geometry, folder, group, batches, open_limits)
        for row in rows:
            if not row.failed:
                row.limit = limit_of(limits, row)
    order = [line[0] for side in sides(bench, geometry) for line in side.lines]
    return sorted(rows, key=lambda row: (row.batch, row.pair != "-", row.pair, order.index(row.who)))


def sides(bench: Bench, geometry: Geometry) -> list[Side]:
    """The sides that were asked for and can run at this geometry."""
    ours = [(OURS_SINGLE, "single", None), (OURS_STEPS, "dual", 1), (OURS_DUAL, "dual", None)]
    ours += [(f"ours dual, block {block}", "dual", block) for block in bench.blocks]
    found = []
    if "ours" in bench.peers:
        found.append(Side("benchmarks.ours", sys.executable, {}, 4, tuple(ours)))
    for name, dtype, itemsize in (("fp32", "float32", 4), ("bf16", "bfloat16", 2)):
        if f"transformers-{name}" in bench.peers:
            labels = (PEER_DUAL.replace("fp32", name), PEER_SINGLE.replace("fp32", name))
            lines = tuple((label, mode, None) for label, mode in zip(labels, ("dual", "single"), strict=True))
            module = "benchmarks.peer_transformers"
            found.append(Side(module, bench.torch_python, {"dtype": dtype}, itemsize, lines))
    if "vllm" in bench.peers and bench.vllm_python is not None and geometry.name == "S":
        lines = ((LOOP, "dual", None),)
        found.append(Side("benchmarks.peer_vllm", bench.vllm_python, {"dtype": "float32"}, 4, lines))
    return found


def together(found: list[Side], geometry: Geometry) -> Iterator[list[Side]]:
    """Groups of sides whose runs take turns: as many as half of the free memory holds with two models each."""
    group: list[Side] = []
    room = _available_memory() / 2
    for side in found:
        needed = 2 * side.itemsize * geometry.matrix_elements()
        if group and needed > room:
            yield group
            group, room = [], _available_memory() / 2
        group.append(side)
        room -= needed
    yield group


def take_turns(
    bench: Bench, geometry: Geometry, folder: Path, group: list[Side], batches: Sequence[int], open_limits: list[dict]
) -> list[Row]:
    """The rows of some sides: all are started, and for each pair and batch their timed runs alternate."""
    rows = []
    repeats = bench.repeats or geometry.repeats
    with ExitStack() as stack:
        workers = []
        for side in group:
            say(f"{geometry.name}: starting {side.module} {side.hello.get('dtype', '')}")
            worker = Worker(side.module, python=side.python, threads=bench.threads, hello=side.hello)
            workers.append(stack.enter_context(closing(worker)))
        for index, pair in enumerate(bench.pairs):
            for batch in batches:
                entries = []
                for side, worker in zip(group, workers, strict=True):
                    for who, mode, block in side.lines:
                        if mode == "single" and index:
                            continue
                        folders = (str(folder / "base"), str(folder / pair))[: 1 if mode == "single" else 2]
                        request = Request(geometry.name, mode, batch, geometry.new, folders, block)
                        row = Row(geometry.name, "-" if mode == "single" else pair, batch, who, geometry.new)
                        rows.append(row)
                        if warm_up(worker, request, row):
                            entries.append((worker, request, row))
                for turn in range(repeats):
                    say(f"{geometry.name}: pair {pair}, batch {batch}: run {turn + 1} of {repeats}")
                    for number, (worker, request, row) in enumerate(entries):
                        if number == 0 or worker is not entries[number - 1][0]:
                            time.sleep(_PAUSE)
                        time_once(worker, request, row)
        if geometry.name == "S" and group[0].module == "benchmarks.ours":
            open_limits += open_limit_checks(
                workers[0], group[0], geometry, folder, bench.pairs[0], batches[0], repeats
            )
    return rows


def warm_up(worker: Worker, request: Request, row: Row) -> bool:
    """Everything that happens once: loading, compiling, choosing a cache. False where the side cannot do it."""
    # A compiled side compiles for the lengths it sees; the others need no more than a few steps.
    new = request.new if worker.module == "benchmarks.ours" else 4
    try:
        for tokens in (new, 1):
            worker.ask(dataclasses.asdict(dataclasses.replace(request, new=tokens)))
    except WorkerError as error:
        row.failed = str(error)
        say(f"not measured: {row.who}: {error}")
        return False
    return True


def time_once(worker: Worker, request: Request, row: Row) -> None:
    """One timed run of all tokens and one of the first token."""
    first = worker.ask(dataclasses.asdict(dataclasses.replace(request, new=1)))
    reply = worker.ask(dataclasses.asdict(request))
    if reply["tokens"] != request.batch * request.new:
        raise RunError(f"{row.who} drew {reply['tokens']} tokens, expected {request.batch * request.new}")
    row.first.append(first["seconds"])
    row.seconds.append(reply["seconds"])
    row.selected, row.passes, row.note = reply["selected"], reply["passes"], reply.get("note", "")
    row.compiled += reply.get("compiled", 0) + first.get("compiled", 0)


def limit_of(limits: Worker, row: Row) -> dict[str, float]:
    """The machine's limits for a row; bytes alone for bfloat16, whose products jax has no fast form of here."""
    itemsize = 2 if "bf16" in row.who else 4
    asked = {"geometry": row.geometry, "batch": row.batch, "new": row.new, "itemsize": itemsize, "passes": row.passes}
    found = limits.ask({"ask": "limit", **asked})
    return {"bytes": found["bytes"]} if itemsize == 2 else found


def open_limit_checks(
    worker: Worker, side: Side, geometry: Geometry, folder: Path, pair: str, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """max_new_tokens of 20,000 against the length really generated, and idle slots, for one model and for two."""
    checks = []
    for who, mode, block in side.lines:
        if who not in (OURS_SINGLE, OURS_DUAL):
            continue
        folders = (str(folder / "base"), str(folder / pair))[: 1 if mode == "single" else 2]
        request = Request(geometry.name, mode, batch, geometry.new, folders, block)
        say(f"{geometry.name}: {who}: max_new_tokens of 20,000 against the length generated")
        reply = worker.ask({**dataclasses.asdict(request), "open_limit_repeats": repeats})
        idle = worker.ask({**dataclasses.asdict(request), "idle": True})
        checks.append({"geometry": geometry.name, "batch": batch, "who": who, **reply, "engine": idle})
        rows = f"{idle['rows']} rows of {idle['mean_length']:.0f} tokens (longest {idle['longest']})"
        shares = f"{idle['idle_share']:.1%} idle, {idle['idle_share_in_groups']:.1%} if decoded in groups"
        say(f"{geometry.name}: {who}: {rows} in {idle['slots']} slots: {shares}")
    return checks


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "transformers")}
    return {"processor": models[0] if models else platform.processor(), "cores": os.cpu_count(), "versions": versions}


def _available_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    raise RunError("/proc/meminfo: no MemAvailable")


def say(text: str) -> None:
    """A line of progress on standard error."""
    print(f"[bench] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_program(prepare, run))
