"""`python -m benchmarks.train`: our update beside a straightforward torch + transformers one, one command, one run.

Every side makes a DAPO update on the same 64 sequences of a random checkpoint (geometry S) in a process of its own;
timed runs take turns; medians, ratios and bars are printed. benchmarks/README.md says what the figures mean.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import train_cases as cases
from benchmarks.decode import machine, say
from benchmarks.worker import Worker, WorkerError
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.program import RunError, run_program

OURS, TORCH, TUNIX = "ours", "torch fp32", "tunix"
_TABLE = Console(width=160)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Training updates beside their peers."""

    sides: tuple[Literal["ours", "torch fp32", "torch bf16", "tunix"], ...] = (
        "ours",
        "torch fp32",
        "torch bf16",
        "tunix",
    )
    """Sides; tunix needs --tunix-python, else its recorded figure is used."""
    repeats: int = 5
    """Timed runs."""
    micro_rows: int = 4
    """Rows of a micro-batch of ours."""
    remat: Literal["none", "dots", "full"] = "none"
    """What our forward keeps."""
    chunk: int = 1024
    """Tokens whose logits exist at one time, ours."""
    threads: int = 2
    """Processors each side may use."""
    cache: str = str(Path(tempfile.gettempdir()) / "rlvr_jax_benchmarks")
    """Folder of the random checkpoint, made once; that of `benchmarks.decode`."""
    torch_python: str = sys.executable
    """Interpreter that has torch and transformers."""
    tunix_python: str | None = None
    """Interpreter that has google-tunix."""
    out: str | None = None
    """JSON file for all figures."""


def prepare(argv: Sequence[str]) -> Bench:
    bench = tyro.cli(Bench, args=list(argv), prog="python -m benchmarks.train", description=__doc__)
    if bench.repeats < 1 or bench.micro_rows < 1 or bench.chunk < 1:
        raise ValueError("--repeats, --micro-rows and --chunk: expected at least 1")
    return bench


def run(bench: Bench) -> None:
    folder = Path(bench.cache).resolve() / "S"
    try:
        with closing(Worker("benchmarks.pair", threads=bench.threads, hello={})) as worker:
            worker.ask({"geometry": "S", "folder": str(folder), "pairs": ["near"]})
        replies, products = measure(bench, str(folder / "base"))
    except WorkerError as error:
        raise RunError(str(error)) from error
    listed = bars(replies, products)
    _TABLE.print(table(replies))
    for name, value, wanted, held in listed:
        _TABLE.print(f"{'held  ' if held else 'missed'}  {name}: {value:.3f} ({wanted})", highlight=False)
    say(f"load average {os.getloadavg()[0]:.1f} (ours included)")
    if bench.out is not None:
        record = {"settings": dataclasses.asdict(bench), "machine": machine(), "runs": replies, "products": products}
        write_json(bench.out, record | {"bars": listed, "recorded": cases.RECORDED})


def measure(bench: Bench, folder: str) -> tuple[dict[str, dict[str, list[dict]]], float]:
    """Replies of every side and kind of sequences, in turns; seconds of jax's products of one update alone."""
    sides = [side for side in bench.sides if side != TUNIX or bench.tunix_python is not None]
    kinds, replies = ("full", "mix"), {side: {} for side in sides}
    products: list[float] = []
    with ExitStack() as stack:
        workers = {}
        for side in sides:
            say(f"starting {side}")
            if side == OURS:
                hello = {"remat": bench.remat, "chunk": bench.chunk, "micro_rows": bench.micro_rows}
                module, python = "benchmarks.train_ours", sys.executable
            elif side == TUNIX:
                hello, module, python = {}, "benchmarks.train_tunix", str(bench.tunix_python)
            else:
                hello = {"dtype": "float32" if side == TORCH else "bfloat16"}
                module, python = "benchmarks.train_torch", bench.torch_python
            hello |= {"folder": folder}
            workers[side] = stack.enter_context(
                closing(Worker(module, python=python, threads=bench.threads, hello=hello))
            )
            for kind in kinds:
                workers[side].ask({"ask": "update", "kind": kind})  # compiles, allocates
                replies[side][kind] = []
        for turn in range(bench.repeats):
            say(f"run {turn + 1} of {bench.repeats}")
            for kind in kinds:
                for side, worker in workers.items():
                    replies[side][kind].append(worker.ask({"ask": "update", "kind": kind}))
            if OURS in workers:
                products.append(workers[OURS].ask({"ask": "products"})["seconds"])
    return replies, statistics.median(products) if products else float("nan")


def seconds(replies: dict[str, dict[str, list[dict]]], side: str, kind: str) -> float:
    return statistics.median(reply["seconds"] for reply in replies[side][kind])


def bars(replies: dict[str, Any], products: float) -> list[tuple[str, float, str, bool]]:
    """(what, measured, wanted, held) of everything that this run can tell."""
    found: list[tuple[str, float, str, bool]] = []

    def at_most(name: str, value: float, limit: float) -> None:
        found.append((name, value, f"at most {limit:g}", value <= limit))

    if OURS not in replies:
        return found
    full, mix = seconds(replies, OURS, "full"), seconds(replies, OURS, "mix")
    found.append(
        ("share of the rate of jax's own products", products / full, f"at least {cases.BAR_PRODUCTS:g}",
         products / full >= cases.BAR_PRODUCTS)
    )  # fmt: skip
    if TUNIX in replies:
        at_most("time of tunix's DAPO step", full / seconds(replies, TUNIX, "full"), cases.BAR_TUNIX)
        at_most("time of tunix's DAPO step, length mix", mix / seconds(replies, TUNIX, "mix"), cases.BAR_TUNIX)
    else:
        at_most("time of tunix's step (recorded elsewhere)", full / cases.RECORDED["tunix DAPO step"], cases.BAR_TUNIX)
    at_most("padding of the mix", replies[OURS]["mix"][-1]["padding_share"], cases.BAR_PADDING)
    if TORCH in replies:
        at_most("time of torch fp32, full length", full / seconds(replies, TORCH, "full"), cases.BAR_TORCH)
        at_most("time of torch fp32, length mix", mix / seconds(replies, TORCH, "mix"), cases.BAR_MIX)
        peaks = [max(reply["peak"] for reply in replies[side]["full"]) for side in (OURS, TORCH)]
        at_most("peak memory of torch fp32, above the loaded model", peaks[0] / peaks[1], cases.BAR_MEMORY)
    return found


def table(replies: dict[str, dict[str, list[dict]]]) -> Table:
    made = Table(title="64 sequences, geometry S, fp32 unless said otherwise")
    for name in ("side", "sequences", "s an update", "min-max", "GFLOP/s", "computed tokens", "peak GiB", "loss",
                 "grad norm"):  # fmt: skip
        made.add_column(name, justify="left" if name in ("side", "sequences") else "right")
    for side, kinds in replies.items():
        for kind, runs in kinds.items():
            times = [reply["seconds"] for reply in runs]
            middle, last = statistics.median(times), runs[-1]
            made.add_row(
                side,
                kind,
                f"{middle:.2f}",
                f"{min(times):.2f}-{max(times):.2f}",
                f"{cases.work(cases.sequences(kind)) / middle / 1e9:.0f}",
                f"{last['computed_tokens']:,} ({last['padding_share']:.0%} padding)",
                f"{max(reply['peak'] for reply in runs) / 2**30:.2f}",
                f"{runs[0]['loss']:.6f}",
                f"{runs[0]['grad_norm']:.4f}",
            )
    return made


if __name__ == "__main__":
    sys.exit(run_program(prepare, run))
