"""`python -m train report RUN [RUN ...]`: the curves of runs; those that differ in the seed alone are one line."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from rlvr_jax.runs.bounds import Name, PathText, Several, require
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.lock import lock
from rlvr_jax.runs.program import parse_flags
from rlvr_jax.runs.remote import is_url, local
from rlvr_jax.runs.tables import Column, fitted, screen
from train.records import figure
from train.records.curves import Line, curve, find_metric, lines, read_run

# Drawn without --metrics, where they are; then whether more is better (None: neither).
SHOWN: dict[str, bool | None] = {
    "eval/avg@*[0-9]": True,
    "eval/pass@*": True,
    "train/accuracy": True,
    "train/score": True,
    "train/entropy": None,
    "train/response_length": None,
    "train/groups_kept_share": True,
    "train/loss": None,
    "train/grad_norm": None,
    "train/advantage_weight": None,
    "train/clip_fraction_low": None,
    "train/clip_fraction_high": None,
    "train/rollout_gap_mean_abs": False,
    "train/rollout_tokens_per_s": True,
    "train/tokens_per_s": True,
    "train/padding_share": False,
    "train/seconds": False,
}
OTHERS: dict[str, bool | None] = {
    "train/trained_accuracy": True,
    "train/*seconds*": False,
    "train/skipped*": False,
    "train/rollout_gap*": False,
    "*/response_cut_share": False,
    "*/grading_errors": False,
    "*/rollout_tokens_per_s": True,
    "train/*memory*": False,
}


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Curves of runs, drawn and tabulated.

    Attributes:
      runs: folders that `python -m train` wrote, finished or not
      out: folder for curves.png, gradient.png, time.png and report.json; default: RUN/report, of several runs/report
      metrics: what to draw, docs/metrics.md names all: accuracy, avg@32, train/seconds ...; default: a choice
    """

    runs: tyro.conf.Positional[Annotated[tuple[PathText, ...], Several()]]
    out: PathText | None = None
    metrics: Annotated[tuple[Name, ...], Several(0, repeats=True)] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read: the lines, and the metrics to draw as kind/name."""

    out: Path
    lines: list[Line]
    metrics: list[str]


def prepare(argv: Sequence[str]) -> Report:
    """Reads the runs. Raises ValueError naming what is not there."""
    return read(parse_flags(ReportConfig, argv, prog="python -m train report", description=__doc__))


def read(config: ReportConfig) -> Report:
    """See `prepare`."""
    require(config)
    folders = [Path(local(run, ("config.json", "metrics.jsonl"))) for run in config.runs]
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(str(f) for f, p in zip(folders, paths, strict=True) if paths.count(p) > 1)
        raise ValueError(f"the run {twice} is given twice")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(paths), strict=True)]
    known = list(dict.fromkeys(metric for run in runs for metric in run.curves))
    if config.metrics:
        metrics = list(dict.fromkeys(find_metric(name, known) for name in config.metrics))
    else:
        metrics = [name for shown in SHOWN for name in sorted(fnmatch.filter(known, shown), key=_by_number)]
    default = folders[0] / "report" if len(folders) == 1 and not is_url(config.runs[0]) else Path("runs/report")
    return Report(Path(config.out) if config.out else default, lines(runs), metrics)


def run(report: Report) -> None:
    """Writes the figures and report.json, and prints the table."""
    with lock(report.out):
        _write(report)


def _write(report: Report) -> None:
    made = {
        "curves.png": figure.curves_figure(report.lines, report.metrics),
        "gradient.png": figure.gradient_figure(report.lines),
        "time.png": figure.time_figure(report.lines),
    }
    for name, drawn in made.items():
        if drawn is not None:
            figure.save(drawn, report.out / name)
    rows = [row for metric in report.metrics for line in report.lines if (row := summary(line, metric)) is not None]
    members = [{"label": line.label, "runs": [run.name for run in line.runs]} for line in report.lines]
    write_json(report.out / "report.json", {"lines": members, "metrics": rows})
    out = screen()
    title = "last: least to greatest seed in brackets\nbest: where more or less is better, else the range"
    table, left_out = fitted(title, _columns(report, rows), out.width)
    out.print(table)
    if left_out:
        out.print(f"columns {', '.join(left_out)}: {report.out / 'report.json'}", markup=False, highlight=False)
    names = ", ".join(str(report.out / name) for name, drawn in made.items() if drawn is not None)
    out.print(f"figures: {names}", markup=False, highlight=False, soft_wrap=True)


def summary(line: Line, metric: str) -> dict[str, Any] | None:
    """First, last, least, greatest and (where more or less is better) best value of a line's mean, with their steps.

    `last` is at the newest step that all its seeds have. None where no run has the metric.
    """
    found = curve(line, metric)
    if found is None:
        return None
    last = int(np.flatnonzero(found.count == found.count.max())[-1])
    steps, mean = found.steps[: last + 1], found.mean[: last + 1]
    at = {"first": 0, "last": last, "least": int(mean.argmin()), "greatest": int(mean.argmax())}
    upward = next((up for known, up in (SHOWN | OTHERS).items() if fnmatch.fnmatch(metric, known)), None)
    if upward is not None:
        at["best"] = at["greatest" if upward else "least"]
    values = {name: {"value": float(mean[i]), "step": int(steps[i])} for name, i in at.items()}
    seeds = int(found.count.max())
    if seeds > 1:
        values["last"] |= {"low": float(found.low[last]), "high": float(found.high[last])}
    return {"metric": metric, "line": line.label, "seeds": seeds} | values


def _columns(report: Report, rows: Sequence[dict[str, Any]]) -> list[Column]:
    cells: dict[str, list[str]] = {
        name: [] for name in ("metric", "line", "first", "last", "last at", "best", "best at")
    }
    before = None
    for row in rows:
        last = _number(row["last"]["value"])
        if row["seeds"] > 1:
            last += f" [{_number(row['last']['low'])}, {_number(row['last']['high'])}]"
        if "best" in row:
            best = (_number(row["best"]["value"]), str(row["best"]["step"]))
        else:
            best = (f"{_number(row['least']['value'])} to {_number(row['greatest']['value'])}", "")
        made = (row["metric"] if row["metric"] != before else "", row["line"], _number(row["first"]["value"]))
        for column, cell in zip(cells.values(), (*made, last, str(row["last"]["step"]), *best), strict=True):
            column.append(cell)
        before = row["metric"]
    return [
        Column("metric", cells["metric"], name=True),
        *([Column("line", cells["line"], name=True)] if len(report.lines) > 1 else []),
        Column("first", cells["first"], 3),
        Column("last", cells["last"]),
        Column("at step", cells["last at"], 2),
        Column("best", cells["best"], 1),
        Column("at step", cells["best at"], 4),
    ]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _by_number(name: str) -> tuple[str, int]:
    """pass@4 before pass@16."""
    head, _, tail = name.partition("@")
    return head, int(tail) if tail.isdigit() else 0
