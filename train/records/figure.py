"""Figures of runs: curves, the gradient by probability, time by phase."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlvr_jax.runs.files import atomic_path
from train.records.curves import Curve, Line, curve
from train.step.metrics import BINS, OUTSIDE_PHASES, STEP_PHASES

# Okabe and Ito's colours, told apart by colour-blind readers too; beyond them the line style changes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
PHASES = (*STEP_PHASES, "other", *OUTSIDE_PHASES)
PHASE_COLOURS = (*COLOURS, "#999999", "#F0E442", "#7A5C00")
BAND = "line: mean over seeds, band: least to greatest"
INTERVAL = "band: 95% interval over problems"


def curves_figure(lines: Sequence[Line], metrics: Sequence[str]) -> Figure:
    """A panel a metric (kind/name), a line a configuration.

    Where several seeds are one line, the band goes from the least to the greatest of them; where a seed ended earlier,
    the mean of the others goes on thin, without a band. A single run's avg@k has its 95% interval as a band.
    """
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 2.9 * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    notes = []
    for axes, metric in zip(panels, metrics, strict=False):
        for number, line in enumerate(lines):
            made = curve(line, metric)
            if made is not None:
                notes.append(_draw(axes, line, metric, made, number))
        kind, _, name = metric.partition("/")
        axes.set_title(f"{name} (evaluation)" if kind == "eval" else name, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _plain(axes)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(metrics) - columns) : len(metrics)]:
        axes.set_xlabel("trainer steps")
    _legend(figure, panels[: len(metrics)], "; ".join(note for note in (BAND, INTERVAL) if note in notes))
    return figure


def gradient_figure(lines: Sequence[Line]) -> Figure | None:
    """Shares of the gradient and of the tokens by probability, means over all steps and seeds; None without them."""
    shown = [line for line in lines if curve(line, f"train/gradient_share_{BINS[0]}") is not None]
    if not shown:
        return None
    figure = Figure(figsize=(7.5, 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / (len(shown) + 1)
    series = [(line.label, "gradient_share", line, COLOURS[n % len(COLOURS)]) for n, line in enumerate(shown)]
    series = [("tokens", "token_share", shown[0], "#BBBBBB"), *series]
    for place, (label, name, line, colour) in enumerate(series):
        heights = [100 * _mean(line, f"train/{name}_{bin_}") for bin_ in BINS]
        axes.bar(np.arange(len(BINS)) + (place + 0.5) * width - 0.4, heights, width, color=colour, label=label)
    axes.set_xticks(range(len(BINS)), [bin_.removeprefix("p") for bin_ in BINS])
    axes.set_xlabel("probability of the token under the policy")
    axes.set_ylabel("share (%)")
    of = " (of the first)" if len(shown) > 1 else ""
    axes.set_title(f"gradient in the logits at ratio 1, and tokens{of}, by probability", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def time_figure(lines: Sequence[Line]) -> Figure | None:
    """Seconds a step by phase, means over all steps and seeds; None without them."""
    shown = [line for line in lines if curve(line, "train/seconds_rollout") is not None]
    if not shown:
        return None
    figure = Figure(figsize=(7.5, 1.6 + 0.45 * len(shown)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(shown))
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        seconds = np.nan_to_num([_mean(line, f"train/seconds_{phase}") for line in shown])
        axes.barh(range(len(shown)), seconds, left=left, color=colour, label=phase, height=0.6)
        left += seconds
    axes.set_yticks(range(len(shown)), [line.label for line in shown])
    axes.invert_yaxis()
    axes.set_xlabel("seconds a trainer step")
    _plain(axes, grid="x")
    figure.legend(loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")


def _draw(axes: Axes, line: Line, metric: str, made: Curve, number: int) -> str:
    """Draws one line; says what its band is, if it has one."""
    colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
    marker = "o" if metric.startswith("eval/") or len(made.steps) < 3 else None
    seeds = int(made.count.max())
    whole = made.count == seeds
    label = f"{line.label} ({seeds} seeds)" if seeds > 1 else line.label
    options = {"color": colour, "linestyle": style, "marker": marker, "markersize": 3.5}
    axes.plot(made.steps, np.where(whole, made.mean, np.nan), linewidth=1.6, label=label, **options)
    if not whole.all():
        rest = ~whole
        rest[:-1] |= rest[1:]  # joined to the last step that all have
        axes.plot(made.steps, np.where(rest, made.mean, np.nan), linewidth=0.7, **options)
    low, high, note = made.low, made.high, BAND
    if seeds == 1:
        bounds = [x.mean for side in ("low", "high") if (x := curve(line, f"{metric}_{side}")) is not None]
        if [len(x) for x in bounds] != 2 * [len(made.steps)]:
            return ""
        (low, high), note = bounds, INTERVAL
    low, high = (np.where(whole, x, np.nan) for x in (low, high))
    axes.fill_between(made.steps, low, high, color=colour, alpha=0.2, linewidth=0)
    return note


def _mean(line: Line, metric: str) -> float:
    """Over all steps of all seeds."""
    values = [run.curves[metric][1] for run in line.runs if metric in run.curves]
    return float(np.concatenate(values).mean()) if values else float("nan")


def _legend(figure: Figure, panels: Sequence[Axes], note: str) -> None:
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = max(1, min(len(found), int(14 * figure.get_figwidth()) // (max(map(len, found), default=1) + 9)))
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(found) // columns))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, title=note or None
    )


def _plain(axes: Axes, grid: str = "y") -> None:
    axes.grid(axis=grid, color="0.92")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
