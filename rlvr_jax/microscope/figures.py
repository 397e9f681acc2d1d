"""The figures of a diagnosis, from its findings alone: each as an SVG for the page, and both SVG and PNG as files."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from rlvr_jax.evaluation import bracketed
from rlvr_jax.microscope.columns import Figure
from rlvr_jax.runs.files import atomic_path

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = {"base": "#D55E00", "rl": "#0072B2", "given": "#009E73"}
ENDS, SHOWN = ("highest", "lowest"), 12
NEUTRAL, GRID = "#5A5A5A", "0.92"
LABELS = {
    **{"entropy_base": "entropy of base (nats)", "entropy_rl": "entropy of rl (nats)", "kl": "KL(rl ‖ base) (nats)"},
    **{"kl_reverse": "KL(base ‖ rl) (nats)", "js_true": "JS divergence (nats)", "delta_logp": "Δlogp (nats)"},
}
STYLE: Any = {
    **{"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False},
}


def draw(found: dict[str, Any]) -> Iterator[tuple[str, Canvas]]:
    """(name, figure) of each figure of `findings.findings`."""
    steps = [name for name in found["sources"] if name.startswith("step ")]
    if len(steps) > 1:
        yield "steps", _steps(found, steps)
    yield "histograms", _histograms(found)
    yield "gradient", _gradient(found)
    yield "high_delta_logp", _high(found)
    yield "position", _position(found)
    yield "agreement", _agreement(found)
    if any(found["token_types"][end] for end in ENDS):
        yield "token_types", _token_types(found)
    if any(found["extremes"][end] for end in ENDS):
        yield "extremes", _extremes(found)


def texts(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Title and caption of each figure, by its name."""
    options = found["options"]
    rate, tail = f"{100 * options['rate']:g}%", f"{100 * options['tail']:g}%"
    intervals = f"{100 * options['confidence']:g}% intervals over problems"
    threshold = _first(found["delta_logp_tails"])[0]["threshold"]
    chance = _first(found["agreement"])["jaccard_by_chance"]
    overlap = ""
    if "overlap" in found["histograms"]["delta_logp"]:
        overlap = (
            " Overlap: the mass that the histograms on base's and on rl's responses share; in brackets, that of the "
            f"{tail} of tokens with the largest absolute values; with {intervals}. If alike: what so many tokens would "
            "share if it did not matter which model wrote them (problems swapped at random)."
        )
    return {
        "steps": (
            "The direction as it grows",
            "Histogram of Δlogp against the initial policy on rollouts of each step, and the share of tokens beyond "
            f"±{threshold:g} nats with {intervals}.",
        ),
        "histograms": (
            "Magnitude and direction",
            "Share of tokens by each number, on responses of each source; logarithmic, the end bins count what lies "
            f"beyond.{overlap} The mean of Δlogp is at least 0 on rl's responses and at most 0 on base's by "
            "construction (responses sampled at temperature 1 from whole distributions), so the means show nothing.",
        ),
        "gradient": (
            "Gradient mass by probability",
            "Tokens, and their gradient mass (the sum of 1 − p: Lemma 3.1 with equal weights), by the token's "
            f"probability under the model that wrote it; {intervals}. The line is 1 − p, the points are means.",
        ),
        "high_delta_logp": (
            "Probability of tokens with high and low Δlogp",
            f"Probability under both models of the {rate} of tokens with the highest Δlogp, of the {rate} with the "
            "lowest, and of all; the dashed lines are means.",
        ),
        "position": (
            "Δlogp along the response",
            f"Mean of Δlogp and of its absolute value by position; the bands are {intervals}.",
        ),
        "token_types": (
            "Tokens by their mean Δlogp",
            f"Mean over all occurrences of a token, with {intervals}; tokens that occur at least "
            f"{found['token_types']['at_least']} times and in several problems.",
        ),
        "extremes": (
            "The most extreme tokens and where they stand",
            "Δlogp in nats and the token in brackets in its context; at most one of a response.",
        ),
        "agreement": (
            f"Which tokens each criterion selects, {rate} of them",
            "Jaccard index of the tokens that two criteria select at this rate: 1 where they are the same ones, "
            f"{chance:.3f} by chance.",
        ),
    }


def figures(found: dict[str, Any], folder: Path | None = None) -> list[Figure]:
    """The figures for the page; where `folder` is given, each is written there as NAME.svg and NAME.png too."""
    made, said = [], texts(found)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the PNG shows a box, the SVG's reader knows
        for name, canvas in draw(found):
            with matplotlib.rc_context({"svg.hashsalt": name}):  # else ids, and so the file, differ every time
                text = io.StringIO()
                canvas.savefig(text, format="svg", metadata={"Date": None})
            canvas.set_layout_engine("none")  # all is in its place
            svg = text.getvalue()
            made.append(Figure(*said[name], svg[svg.index("<svg") :]))
            if folder is not None:
                with atomic_path(folder / f"{name}.svg") as temporary:
                    temporary.write_text(svg, encoding="utf-8")
                with atomic_path(folder / f"{name}.png") as temporary:
                    canvas.savefig(temporary, format="png", dpi=130)
    return made


def _canvas(rows: int, columns: int, *, width: float = 3.3, height: float = 2.6, **options: Any) -> tuple[Canvas, Any]:
    canvas = Canvas(figsize=(width * columns, height * rows), layout="constrained")
    return canvas, canvas.subplots(rows, columns, squeeze=False, **options)


def _colour(source: str, sources: list[str]) -> Any:
    """base, rl and given have their own; steps go from light to dark."""
    if source in COLOURS:
        return COLOURS[source]
    steps = [name for name in sources if name not in COLOURS]
    return matplotlib.colormaps["viridis_r"](0.1 + 0.85 * steps.index(source) / max(len(steps) - 1, 1))


def _first(by_source: dict[str, Any]) -> Any:
    return next(iter(by_source.values()))


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in values])


def _said(interval: dict[str, float | None], digits: int = 2) -> str:
    if interval["value"] is None:
        return "–"
    return f"{interval['value']:.{digits}f} {bracketed(interval['low'], interval['high'], f'.{digits}f')}"


def _stairs(axes: Axes, counts: list[int], edges: list[float], **options: Any) -> None:
    share = np.array(counts) / max(sum(counts), 1)
    axes.stairs(share, edges, **options)


def _histograms(found: dict[str, Any]) -> Canvas:
    sources = list(found["sources"])
    canvas, grid = _canvas(2, 3)
    for axes, (name, one) in zip(grid.flat, found["histograms"].items(), strict=True):
        for source in sources:
            colour = _colour(source, sources)
            _stairs(axes, one["counts"][source], one["edges"], color=colour, label=source, linewidth=1.3)
            _stairs(axes, one["counts"][source], one["edges"], color=colour, fill=True, alpha=0.12)
        axes.set_yscale("log")
        axes.set_xlabel(LABELS[name])
        axes.grid(axis="y", color=GRID)
        if name == "delta_logp":
            axes.axvline(0, color=NEUTRAL, linewidth=0.8)
        if "overlap" in one:
            lines = []
            for key in ("overlap", "overlap_tail"):
                alike = one[f"{key}_if_alike"]["value"]
                lines.append(_said(one[key]) + ("" if alike is None else f", if alike {alike:.2f}"))
            axes.set_title(f"overlap {lines[0]}\n({lines[1]})", color=NEUTRAL)
    for axes in grid[:, 0]:
        axes.set_ylabel("share of tokens")
    _legend(canvas, grid[0, 0], "responses of")
    return canvas


def _legend(canvas: Canvas, axes: Axes, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(handles, labels, title=title, loc="outside right upper")


def _gradient(found: dict[str, Any]) -> Canvas:
    sources = list(found["gradient"])
    canvas, grid = _canvas(1, 3)
    labels = ("share of tokens", "share of gradient mass", "gradient mass a token")
    for axes, key, label in zip(grid[0], ("token_share", "mass_share", "mass_per_token"), labels, strict=True):
        for place, source in enumerate(sources):
            one = found["gradient"][source]
            edges = np.array(one["edges"])
            middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
            value, low, high = (_numbers(one[key][part]) for part in ("value", "low", "high"))
            shift = (place - (len(sources) - 1) / 2) * width / (len(sources) + 1) * (key != "mass_per_token")
            axes.errorbar(
                middle + shift,
                value,
                yerr=(np.maximum(value - low, 0), np.maximum(high - value, 0)),
                **{"color": _colour(source, sources), "label": source, "marker": "o", "markersize": 3},
                **{"linestyle": "none", "elinewidth": 0.8},
            )
        if key == "mass_per_token":
            axes.plot([0, 1], [1, 0], color=NEUTRAL, linewidth=0.8, label="1 − p")
        axes.set_xlabel("probability of the token")
        axes.set_ylabel(label)
        axes.grid(axis="y", color=GRID)
    _legend(canvas, grid[0, 2], "responses of")
    return canvas


def _high(found: dict[str, Any]) -> Canvas:
    sources = list(found["high_delta_logp"])
    rate = f"{100 * found['options']['rate']:g}%"
    canvas, grid = _canvas(len(sources), 3, height=2.3, sharex=True, sharey=True)
    titles = {"high": f"highest {rate} of Δlogp", "low": f"lowest {rate} of Δlogp", "all": "all tokens"}
    for row, source in zip(grid, sources, strict=True):
        one = found["high_delta_logp"][source]
        for axes, (group, title) in zip(row, titles.items(), strict=True):
            for model in ("base", "rl"):
                numbers, colour = one[group][f"p_{model}"], COLOURS[model]
                _stairs(axes, numbers["counts"], one["edges"], color=colour, label=model, linewidth=1.3)
                axes.axvline(numbers["mean"]["value"], color=colour, linewidth=0.9, linestyle="--")
            axes.set_yscale("log")
            axes.grid(axis="y", color=GRID)
            axes.set_title(f"{source}: {title}" if len(sources) > 1 else title)
        row[0].set_ylabel("share of tokens")
    for axes in grid[-1]:
        axes.set_xlabel("probability of the token")
    _legend(canvas, grid[0, 0], "probability under")
    return canvas


def _position(found: dict[str, Any]) -> Canvas:
    sources = list(found["position"])
    canvas, grid = _canvas(1, 3)
    panels = (("relative", "mean"), ("relative", "mean_absolute"), ("absolute", "mean_absolute"))
    for axes, (kind, key) in zip(grid[0], panels, strict=True):
        for source in sources:
            one = found["position"][source][kind]
            edges = np.array(one["edges"])
            middle = (edges[1:] + edges[:-1]) / 2
            value, low, high = (_numbers(one[key][part]) for part in ("value", "low", "high"))
            colour = _colour(source, sources)
            axes.plot(middle, value, color=colour, label=source, linewidth=1.3, marker="o", markersize=2.5)
            axes.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("position / length of the response" if kind == "relative" else "position (tokens)")
        axes.set_ylabel("mean Δlogp (nats)" if key == "mean" else "mean |Δlogp| (nats)")
        axes.grid(axis="y", color=GRID)
        if kind == "absolute":
            axes.set_xscale("log")
        if key == "mean":
            axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    _legend(canvas, grid[0, 0], "responses of")
    return canvas


def _agreement(found: dict[str, Any]) -> Canvas:
    sources = list(found["agreement"])[-3:]
    canvas, grid = _canvas(1, len(sources), width=4.2, height=3.7)
    for axes, source in zip(grid[0], sources, strict=True):
        one = found["agreement"][source]
        names = [name.replace("delta_logp", "Δlogp").replace("abs_Δlogp", "|Δlogp|") for name in one["criteria"]]
        index = np.array([_numbers(row) for row in one["jaccard"]["value"]])
        axes.imshow(index, cmap="cividis", vmin=0, vmax=1)
        for (i, j), x in np.ndenumerate(index):
            shown = "" if np.isnan(x) else f"{x:.2f}"
            axes.text(j, i, shown, ha="center", va="center", fontsize=7, color="white" if x < 0.6 else "black")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(f"responses of {source}" if not source.startswith("step ") else source)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return canvas


def _token_types(found: dict[str, Any]) -> Canvas:
    canvas, grid = _canvas(1, 2, width=4.2, height=3.4)
    for axes, end in zip(grid[0], ENDS, strict=True):
        listed = found["token_types"][end][:SHOWN]
        for row, one in enumerate(listed):
            mean = one["mean_delta_logp"]
            value, low, high = (_numbers([mean[part]]) for part in ("value", "low", "high"))
            colour = COLOURS["rl" if end == "highest" else "base"]
            spread = (np.maximum(value - low, 0), np.maximum(high - value, 0))
            axes.errorbar(value, [row], xerr=spread, color=colour, marker="o", markersize=4, elinewidth=0.9)
        names = [f"{_shown(one['token'])}  ({one['count']:,})" for one in listed]
        axes.set_yticks(range(len(listed)), names, family="monospace")
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
        axes.set_ylim(max(len(listed), 1) - 0.5, -0.5)
        axes.axvline(0, color=NEUTRAL, linewidth=0.8)
        axes.set_xlabel("mean Δlogp (nats)")
        axes.grid(axis="x", color=GRID)
    return canvas


def _extremes(found: dict[str, Any]) -> Canvas:
    listed = [one for end in ENDS for one in found["extremes"][end][:SHOWN]]
    canvas = Canvas(figsize=(9, 0.21 * len(listed) + 0.3))
    for row, one in enumerate(listed):
        y = 1 - (row + 1) / (len(listed) + 1)
        colour = COLOURS["rl" if one["delta_logp"] > 0 else "base"]
        before, after = _shown(one["before"])[-44:], _shown(one["after"])[:34]
        texts_at = (
            (0.01, f"{one['delta_logp']:+.2f}", "left", colour),
            (0.08, f"{one['source']}, problem {one['problem']}", "left", NEUTRAL),
            (0.60, before, "right", "black"),
            (0.602, f"[{_shown(one['token'])}]{after}", "left", colour),
        )
        for x, text, side, tint in texts_at:
            canvas.text(x, y, text, ha=side, va="center", color=tint, family="monospace", fontsize=8, parse_math=False)
    return canvas


def _shown(text: str) -> str:
    """On one line, control characters spelled out."""
    return text.encode("unicode_escape").decode() if not text.isprintable() else text.replace(" ", "␣")


def _steps(found: dict[str, Any], steps: list[str]) -> Canvas:
    canvas, grid = _canvas(1, 2, width=4.6, height=3.2)
    one = found["histograms"]["delta_logp"]
    for source in steps:
        colour = _colour(source, steps)
        _stairs(grid[0, 0], one["counts"][source], one["edges"], color=colour, label=source[5:], linewidth=1.2)
    grid[0, 0].set_yscale("log")
    grid[0, 0].set_xlabel(LABELS["delta_logp"])
    grid[0, 0].set_ylabel("share of tokens")
    numbers = [int(source[5:]) for source in steps]
    tails = [found["delta_logp_tails"][source][0] for source in steps]
    for key, colour, sign in (("above", COLOURS["rl"], "≥ "), ("below", COLOURS["base"], "≤ −")):
        value, low, high = (_numbers([tail[key][part] for tail in tails]) for part in ("value", "low", "high"))
        label = f"Δlogp {sign}{tails[0]['threshold']:g}"
        grid[0, 1].plot(numbers, 100 * value, color=colour, marker="o", markersize=3, linewidth=1.3, label=label)
        grid[0, 1].fill_between(numbers, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
    grid[0, 1].set_xlabel("trainer step")
    grid[0, 1].set_ylabel("tokens (%)")
    grid[0, 1].set_ylim(bottom=0)
    grid[0, 1].legend()
    for axes in grid[0]:
        axes.grid(axis="y", color=GRID)
    _legend(canvas, grid[0, 0], "step")
    return canvas
