"""Accuracy against the share of tokens selected, and against the share of tokens changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlvr_jax.runs.files import atomic_path

# Okabe and Ito's colours, told apart by colour-blind readers too; criteria of one kind share theirs.
COLOURS = {
    **{"delta_logp": "#0072B2", "neg_delta_logp": "#0072B2", "abs_delta_logp": "#56B4E9"},
    **{"kl": "#D55E00", "kl_reverse": "#D55E00", "js": "#CC79A7", "js_true": "#CC79A7"},
    **{"entropy_base": "#009E73", "entropy_rl": "#009E73", "random": "#888888", "all": "#000000"},
}
BASE, RL, OTHER = "#7A5C00", "#000000", "#5A5A5A"
MARKERS = "os^Dv<>P"
SAMPLING = ("temperature", "top_p", "top_k", "top_logprobs")
SHARES = (("share_selected", "tokens selected (%)"), ("share_changed", "tokens changed (%)"))


class Reference(NamedTuple):
    """A model alone that is drawn as a line across: its record, its role (base or rl) and what the legend says."""

    record: dict[str, Any]
    role: str
    label: str


def draw(path: Path, records: Sequence[dict[str, Any]], references: Sequence[Reference]) -> None:
    """Writes the figure (PNG) of a comparison's records: a line a criterion and gamma.

    Beside them is what no share belongs to: the models alone, and the criterion `all`. `references` are of the models
    alone those that the lines may be compared with.
    """
    alone = [record for record in records if _alone(record) is not None or record["criterion"] == "all"]
    pair = [record for record in records if record not in alone]
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    widths = (1.0, 1.0, 0.13 + 0.07 * len(alone)) if alone else (1.0, 1.0)
    axes = figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]
    for panel, (share, label) in zip(axes, SHARES, strict=False):
        _lines(panel, pair, share)
        _across(panel, references)
        panel.set_xlabel(label)
        right = max([100 * record[share] for record in pair], default=1.0) or 1.0
        panel.set_xlim(-0.03 * right, 1.05 * right)
        panel.grid(axis="y", color="0.92")
        panel.set_axisbelow(True)
    k = {record["k"] for record in records}
    axes[0].set_ylabel(f"Avg@{k.pop() if len(k) == 1 else 'k'} (%), 95% interval over problems")
    if alone:
        _models_alone(axes[2], alone, references)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        columns = max(1, min(6, len(labels), 170 // (max(map(len, labels)) + 9)))
        figure.set_figheight(5.2 + 0.22 * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140, format="png")


def _lines(axes: Axes, pair: Sequence[dict[str, Any]], share: str) -> None:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in pair:
        groups.setdefault((_series(record), record["criterion"], record["gamma"]), []).append(record)
    gammas = sorted({record["gamma"] for record in pair} - {0.0})
    runs = {record["run"] for record in pair}
    sampled = {record["sample_from"] for record in pair}
    marked = list(dict.fromkeys(map(_series, pair)))
    varied = [key for key in SAMPLING if len({record[key] for record in pair}) > 1]
    for (series, criterion, gamma), members in groups.items():
        members = sorted(members, key=lambda record: record[share])
        label = criterion
        label += f", gamma {gamma:g}" if gammas else ""
        label += " (control)" if all(record["role"] != "setting" for record in members) else ""
        label += f", from {members[0]['sample_from']}" if len(sampled) > 1 else ""
        label += "".join(f", {key} {members[0][key]}" for key in varied)
        label += f" ({members[0]['run']})" if len(runs) > 1 else ""
        axes.errorbar(
            [100 * record[share] for record in members],
            [100 * record["avg_at_k"] for record in members],
            yerr=_whiskers(members),
            color=COLOURS.get(criterion, OTHER),
            linestyle="-" if not gamma else ("--", "-.", ":")[gammas.index(gamma) % 3],
            marker=MARKERS[marked.index(series) % len(MARKERS)],
            markersize=5,
            markerfacecolor=COLOURS.get(criterion, OTHER) if not gamma else "white",
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            label=label,
            zorder=3,
        )


def _series(record: dict[str, Any]) -> tuple:
    """What the points of one line share, beside criterion and gamma."""
    return tuple(record[key] for key in ("run", "sample_from", *SAMPLING))


def _across(axes: Axes, references: Sequence[Reference]) -> None:
    shades = {"rl": (RL, ("--", (0, (6, 2, 1, 2)))), "base": (BASE, (":", (0, (1, 3))))}
    for role, (colour, styles) in shades.items():
        for place, one in enumerate(one for one in references if one.role == role):
            style: Any = styles[place % len(styles)]
            y = 100 * one.record["avg_at_k"]
            axes.axhline(y, color=colour, linestyle=style, linewidth=1.1, label=one.label, zorder=1)


def _whiskers(records: Sequence[dict[str, Any]]) -> np.ndarray:
    """[2, records]: how far the intervals reach below and above, NaN (not drawn) where they are not known."""
    reach = []
    for record in records:
        low, high = record["interval"] or (np.nan, np.nan)
        reach.append((record["avg_at_k"] - low, high - record["avg_at_k"]))
    return np.maximum(100 * np.array(reach).T, 0)  # of rounding


def _models_alone(axes: Axes, alone: Sequence[dict[str, Any]], references: Sequence[Reference]) -> None:
    shown = [one.record for one in references]
    for place, record in enumerate(alone):
        colour = BASE if _alone(record) == "base" else RL if record in shown else OTHER
        axes.errorbar(
            [place],
            [100 * record["avg_at_k"]],
            yerr=_whiskers([record]),
            color=colour,
            marker="D",
            markersize=5,
            markerfacecolor=colour if record in shown else "white",
            elinewidth=0.8,
            capsize=2,
            linestyle="none",
        )
    _across(axes, references)
    names = []
    for record in alone:
        name = "greedy" if record["temperature"] == 0 else f"T {record['temperature']:g}"
        name = f"{_alone(record)}, {name}" if _alone(record) else f"all, gamma {record['gamma']:g}, {name}"
        names.append(name)
    names = [f"{n} ({r['run']})" if names.count(n) > 1 else n for n, r in zip(names, alone, strict=True)]
    axes.set_xticks(range(len(alone)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_xlim(-0.6, len(alone) - 0.4)
    axes.set_xlabel("one model alone" if all(map(_alone, alone)) else "one model alone; every token")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)


def _alone(record: dict[str, Any]) -> str | None:
    """base or rl where one model alone made the tokens."""
    if record["model"] == "pair":
        return record["sample_from"] if record["criterion"] == "none" else None
    return record["model"]
