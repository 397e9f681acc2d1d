"""The compact account of a decoding run: one record a setting, as JSON, as CSV and as a table to read."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from decode.config import Setting
from decode.results import Row, Timing
from rlvr_jax.evaluation import avg_at_k, avg_per_problem, bootstrap_interval, maj_at_k, pass_at_k
from rlvr_jax.files import atomic_path, write_json

TIMINGS = ("seconds", "tokens_per_second")  # the only entries that differ between two equal runs


def summarise(
    setting: Setting,
    rows: Sequence[dict[tuple[int, int], Row]],
    problems: Sequence[int],
    n: int,
    timings: Sequence[Timing],
) -> dict[str, Any]:
    """Summary of one finished setting.

    `rows` holds one dictionary a seed, each with samples 0..n-1 of every problem; together they are the k = seeds x n
    samples of Avg@k and maj@k. `share_selected` is the share of emitted tokens where the criterion fired,
    `share_changed` that of tokens that differ from the one proposed, `interval` the 95% bootstrap interval of Avg@k
    over problems. Lengths and tokens include the stop token. `tokens_per_second` leaves out batches that compiled,
    unless there are no others.
    """
    table = [[seed_rows[problem, sample] for seed_rows in rows for sample in range(n)] for problem in problems]
    correct = np.array([[row.correct for row in samples] for samples in table], dtype=bool)
    predictions = [[row.prediction for row in samples] for samples in table]
    flat = [row for samples in table for row in samples]
    tokens = sum(row.length for row in flat)
    k = correct.shape[1]
    resamples = 10_000 if len(table) <= 1000 else 1000  # every one of them draws all problems
    low, high = bootstrap_interval(avg_per_problem(correct, k), resamples=resamples)
    powers = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
    warm = [timing for timing in timings if not timing.compiled] or list(timings)
    warm_seconds = sum(timing.seconds for timing in warm)
    return {
        "setting": setting.name,
        "problems": len(table),
        "k": k,
        "avg_at_k": avg_at_k(correct, k),
        "interval": [low, high],
        "pass_at_k": {str(power): pass_at_k(correct, power) for power in powers},
        "maj_at_k": maj_at_k(correct, predictions, k),
        "share_selected": sum(len(row.fired) for row in flat) / max(tokens, 1),
        "share_changed": sum(_changed(row) for row in flat) / max(tokens, 1),
        "tokens": tokens,
        "mean_length": tokens / len(flat),
        "share_finished": sum(row.finished for row in flat) / len(flat),
        "grading_errors": sum(row.error is not None for row in flat),
        "seconds": sum(timing.seconds for timing in timings),
        "tokens_per_second": sum(timing.tokens for timing in warm) / warm_seconds if warm_seconds else 0.0,
    }


def _changed(row: Row) -> int:
    return sum(original != emitted for original, emitted in zip(row.original, row.resampled, strict=True))


def write_summaries(folder: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """Writes summary.json, a list with one record a setting, and summary.csv, the same flat."""
    write_json(folder / "summary.json", list(summaries))
    flat = [_flat(summary) for summary in summaries]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for record in flat for key in record)))
    writer.writeheader()
    writer.writerows(flat)
    with atomic_path(folder / "summary.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def summary_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """The summaries as a table for a terminal of 80 columns or more. `ended`: share of responses that drew a stop."""
    ks = {summary["k"] for summary in summaries}
    k = str(ks.pop()) if len(ks) == 1 else "k"
    title = f"{summaries[0]['problems']} problems, {k} samples each; shares in %"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("setting", overflow="fold", min_width=20)
    for heading in (f"Avg@{k}", "95% int.", f"Pass@{k}", f"maj@{k}", "select", "change", "length", "ended", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        low, high = summary["interval"]
        table.add_row(
            summary["setting"],
            _percent(summary["avg_at_k"]),
            f"{_percent(low)}-{_percent(high)}",
            _percent(summary["pass_at_k"][str(summary["k"])]),
            _percent(summary["maj_at_k"]),
            _percent(summary["share_selected"]),
            _percent(summary["share_changed"]),
            f"{summary['mean_length']:.0f}",
            _percent(summary["share_finished"]),
            f"{summary['tokens_per_second']:.0f}",
        )
    return table


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    record = {key: value for key, value in summary.items() if key not in ("interval", "pass_at_k")}
    record["interval_low"], record["interval_high"] = summary["interval"]
    return record | {f"pass_at_{k}": value for k, value in summary["pass_at_k"].items()}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
