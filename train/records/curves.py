"""The numbers of finished or unfinished runs as curves: read, put together by configuration, seeds as one."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import MAY_CHANGE

# What two runs of one experiment may differ in. What evaluation does changes its numbers, so it tells runs apart.
FREE = ("seed", *(key for key in MAY_CHANGE if key not in ("eval", "data.val")))
MOST_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder's numbers: `curves[kind/name]` is (steps, values), without the records that have none there."""

    name: str
    seed: Any
    config: dict[str, Any]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Line:
    """Runs that differ in nothing but the seed; `label` is what tells them from the other lines."""

    label: str
    runs: tuple[Run, ...]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line's values of one metric: the mean over the seeds that have the step, their least and greatest.

    `count` says how many seeds have each step: fewer than all where one ended earlier.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray


def read_run(folder: Path, name: str) -> Run:
    """Reads `config.json` and `metrics.jsonl`. Raises ValueError where they are not those of a training run."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    path = folder / "metrics.jsonl"
    for file in (folder / "config.json", path):
        if not file.is_file():
            raise ValueError(f"{folder}: no {file.name}, so this is not the folder of a training run")
    points: dict[str, list[tuple[float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that is being written
            continue
        for key, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "trainer_steps":
                points.setdefault(f"{record['kind']}/{key}", []).append((record["trainer_steps"], value))
    if not points:
        raise ValueError(f"{path}: no record yet")
    config = _flat(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    curves = {key: tuple(np.array(made, np.float64).T) for key, made in points.items()}
    return Run(name, config.get("seed"), config, curves)  # type: ignore[arg-type]


def lines(runs: Sequence[Run]) -> list[Line]:
    """Runs whose configurations differ in the seed alone as one line, in the order of their first run.

    A seed that comes twice means that something else differs (the code, say): then each is a line of its own.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_telling(run.config), sort_keys=True), []).append(run)
    split: list[list[Run]] = []
    for members in groups.values():
        seeds = [run.seed for run in members]
        split += [members] if len(set(seeds)) == len(seeds) else [[run] for run in members]
    labels = _labels(split)
    return [Line(label, tuple(members)) for label, members in zip(labels, split, strict=True)]


def curve(line: Line, metric: str) -> Curve | None:
    """The line's curve of a metric (kind/name); None where no run has it."""
    there = [run.curves[metric] for run in line.runs if metric in run.curves]
    if not there:
        return None
    steps = np.unique(np.concatenate([at for at, _ in there]))
    values_SX = np.full((len(there), len(steps)), np.nan)
    for values_X, (at, values) in zip(values_SX, there, strict=True):
        values_X[np.searchsorted(steps, at)] = values  # of a step recorded twice the newer one
    return Curve(
        steps,
        np.nanmean(values_SX, axis=0),
        np.nanmin(values_SX, axis=0),
        np.nanmax(values_SX, axis=0),
        np.isfinite(values_SX).sum(axis=0),
    )


def find_metric(name: str, known: Sequence[str]) -> str:
    """The full name (kind/name) of a metric; a bare name means the training record's, where both have it.

    Raises:
      ValueError: no run has it; with the nearest names.
    """
    for candidate in (name, f"train/{name}", f"eval/{name}"):
        if candidate in known:
            return candidate
    bare = {key.partition("/")[2] for key in known}
    near = difflib.get_close_matches(name.rpartition("/")[2], sorted(bare), n=4, cutoff=0.5)
    near += sorted(key for key in bare if name in key and key not in near)[:4]
    said = f"; near it: {', '.join(near)}" if near else ""
    raise ValueError(f"--metrics {name}: no such metric in these runs{said} (all are in docs/metrics.md)")


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.items()
        if not any(key == free or key.startswith(free + ".") for free in FREE)
    }


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What differs between the lines' configurations; names of runs where that is nothing, too much or not enough."""
    configs = [_telling(members[0].config) for members in groups]
    names = [
        members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} more" for members in groups
    ]
    keys = sorted({key for config in configs for key in config})
    differ = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    if not differ or len(differ) > MOST_NAMED:
        return names
    short = {key: key.rpartition(".")[2] for key in differ}
    if len(set(short.values())) < len(differ):
        short = {key: key for key in differ}
    labels = [", ".join(f"{short[key]} {_value(config.get(key))}" for key in differ) for config in configs]
    return [
        f"{label} ({name})" if labels.count(label) > 1 else label for label, name in zip(labels, names, strict=True)
    ]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
