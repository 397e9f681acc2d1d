"""The demo's one figure: training curve, dlogp histogram, accuracy against the share of selected tokens."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from rlvr_jax.runs.files import atomic_path

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = {
    "delta_logp": "#0072B2",
    "abs_delta_logp": "#56B4E9",
    "kl": "#D55E00",
    "entropy_base": "#009E73",
    "random": "#999999",
}
BASE, RL = "#E69F00", "#0072B2"


def draw(path: Path, *, metrics: Path, alone: Path, summaries: list[dict]) -> None:
    """Writes the figure (PNG) from the training run's metrics, the tokens of the models alone and all summaries."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.4), layout="constrained")
    by_name = {summary["setting"]: summary for summary in summaries}
    _training(left, metrics)
    _histogram(middle, alone)
    _replacement(right, by_name)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def _training(axes: Axes, metrics: Path) -> None:
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    evaluated = next(key for record in records for key in record if key.startswith("avg@") and "_" not in key)
    for kind, name, label, colour in (
        ("train", "accuracy", "rollouts (training problems)", BASE),
        ("eval", evaluated, "held-out problems", RL),
    ):
        before = kind == "train"  # a step's rollouts come from the policy that the step before it left
        points = [
            (r["trainer_steps"] - before, 100 * r[name])
            for r in records
            if r["kind"] == kind and r.get(name) is not None
        ]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=label)
    axes.set(
        xlabel="trainer steps made", ylabel="accuracy (%)", title="DAPO, low-probability re-weighting", ylim=(0, 100)
    )
    axes.legend(frameon=False)


def _histogram(axes: Axes, alone: Path) -> None:
    bins = np.linspace(-4, 4, 81)
    for name, label, colour in (("base", "on base's responses", BASE), ("rl", "on rl's responses", RL)):
        column = pq.read_table(alone / name / "tokens.parquet", columns=["delta_logp"])["delta_logp"]
        dlogp = np.clip(column.combine_chunks().flatten().to_numpy(), bins[0], bins[-1])
        axes.hist(
            dlogp, list(bins), weights=np.full(dlogp.size, 100 / dlogp.size), histtype="step", color=colour, label=label
        )
    axes.set(
        xlabel=r"$\Delta\log p = \log\pi_{RL} - \log\pi_{Base}$ (nats; ends collect the tails)",
        ylabel="share of tokens (%)",
        yscale="log",
        title="Few tokens changed, and in which direction",
    )
    axes.legend(frameon=False)


def _replacement(axes: Axes, by_name: dict[str, dict]) -> None:
    for criterion, colour in COLOURS.items():
        points = sorted(
            (
                100 * s["share_selected"],
                100 * s["avg_at_k"],
                [100 * bound for bound in s["interval"] or (np.nan, np.nan)],
            )
            for name, s in by_name.items()
            if name.startswith(f"replace_{criterion}_")
        )
        x, y, intervals = zip(*points, strict=True)
        below, above = ([abs(b - v) for b, v in zip(bounds, y, strict=True)] for bounds in zip(*intervals, strict=True))
        axes.errorbar(x, y, yerr=(below, above), marker="o", markersize=4, capsize=2, color=colour, label=criterion)
    for name, style in (("base", ":"), ("rl", "--")):
        axes.axhline(
            100 * by_name[name]["avg_at_k"], color="black", linestyle=style, linewidth=1, label=f"{name} alone"
        )
    axes.set(
        xlabel="tokens selected and drawn again from rl (%)",
        ylabel="accuracy (%), 95% interval over problems",
        title="Base with some of rl's tokens",
    )
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
