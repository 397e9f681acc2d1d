"""Figures of a check's JSON: decoding beside its limit, and where a GPU's time goes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def draw(found: dict, out: Path) -> list[Path]:
    """Writes `decode.png` and `kernels.png` into `out`, where the check has what they show; gives their paths."""
    decodes = {name: part for name, part in found.items() if name.startswith("decode_") and "cases" in part}
    profiles = {n: p["profile"] for n, p in found.items() if isinstance(p, dict) and p.get("profile", {}).get("events")}
    title = f"{found['identity']['device']}, jax {found['identity']['jax']}"
    written = []
    if decodes:
        written.append(_save(_decode(decodes, title), out / "decode.png"))
    if profiles:
        written.append(_save(_kernels(profiles, title), out / "kernels.png"))
    return written


def _decode(decodes: dict, title: str) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.32 * sum(len(part["cases"]) for part in decodes.values())))
    labels, rates, notes = [], [], []
    for name, part in decodes.items():
        for case in part["cases"]:
            how = "greedy" if case["temperature"] == 0 else f"top-p {case['top_p']:g}"
            labels.append(f"{name.removeprefix('decode_').replace('_', ', ')}, {case['live']:,} live, {how}")
            rates.append(case["tokens_per_s"])
            share = case["share_of_bandwidth"]
            notes.append(f"{case['tokens_per_s']:,.0f}" + ("" if share is None else f" ({share:.0%} of the bandwidth)"))
    bars = axes.barh(labels, rates, color="#4c78a8")
    axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlabel("tokens per second, all rows")
    axes.set_title(f"Decoding, {title}", fontsize=10)
    return figure


def _kernels(profiles: dict, title: str) -> Figure:
    figure, all_axes = plt.subplots(len(profiles), 1, figsize=(9, 2.4 * len(profiles)), squeeze=False)
    for axes, (name, profile) in zip(all_axes[:, 0], profiles.items(), strict=True):
        largest = profile["largest"][:8]
        axes.barh(
            [f"{k['kernel'][:48]} x {k['launches']:,}" for k in largest], [k["ms"] for k in largest], color="#f58518"
        )
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel("ms")
        axes.set_title(
            f"{name}: {profile['launches_per_pass']:,.0f} launches per pass, "
            f"idle {profile['idle_share']:.0%} ({title})",
            fontsize=9,
        )
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
