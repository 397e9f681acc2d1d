"""`python -m decode compare RUN RUN ...`: the settings of several runs in one table, one file and one figure."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from decode.calibrate import known_thresholds
from decode.config import Setting
from decode.figure import draw
from decode.results import RowLog, read_json
from decode.summary import (
    Outcome,
    alone,
    difference,
    percent,
    ranged,
    references,
    signed,
    summarise,
    write_csv,
)
from rlvr_jax.files import write_json
from rlvr_jax.remote import local

MATTERS = (
    *("base", "rl", "tokenizer", "prompt_suffix", "max_new_tokens", "stop_token_ids"),
    *("graders", "dtype", "cache_dtype"),
)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Runs over one problem file, compared.

    Attributes:
      runs: folders that `python -m decode` wrote, finished or not
      against: setting that all are compared with, SETTING or RUN/SETTING; default: the rl model alone, if there
      out: folder for compare.json, compare.csv and compare.png
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    against: str | None = None
    out: str = "runs/compare"


@dataclasses.dataclass(frozen=True)
class Found:
    """A setting of a run. `unfinished` says what is missing of it, else it is empty."""

    run: str
    outcome: Outcome
    unfinished: str

    @property
    def label(self) -> str:
        """RUN/SETTING."""
        return f"{self.run}/{self.outcome.setting.name}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was read: the settings, the one that they are compared with (if any), and notes on what is not there."""

    config: CompareConfig
    found: list[Found]
    against: Found | None
    problems: str
    notes: list[str]


def prepare(argv: Sequence[str]) -> Comparison:
    """Reads the runs. Raises ValueError naming what does not fit together."""
    return read(tyro.cli(CompareConfig, args=list(argv), prog="python -m decode compare", description=__doc__))


def read(config: CompareConfig) -> Comparison:
    """See `prepare`."""
    folders = [Path(local(run, ("*.json", "*/setting.json", "*/*.rows.jsonl"))) for run in config.runs]
    if not folders:
        raise ValueError("no run: give one or more folders that `python -m decode` wrote")
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json, so this is not the folder of a decoding run")
    _check_problem_files(folders)
    labels = _labels(folders)
    found, notes = [], _apart(folders, labels)
    for folder, label in zip(folders, labels, strict=True):
        for one in _read_run(folder, label, notes):
            found.append(one)
            if one.unfinished:
                notes.append(f"{one.label} is unfinished: {one.unfinished}")
    if not found:
        raise ValueError(f"{', '.join(map(str, folders))}: no setting has a finished problem yet")
    return Comparison(config, found, _against(config, found), read_json(folders[0] / "config.json")["problems"], notes)


def run(comparison: Comparison) -> None:
    """Writes compare.json, compare.csv and compare.png, and prints the table."""
    out = Path(comparison.config.out)
    records = [_record(one, comparison) for one in comparison.found]
    against = None if comparison.against is None else comparison.against.label
    write_json(
        out / "compare.json",
        {"problems": comparison.problems, "against": against, "notes": comparison.notes, "settings": records},
    )
    write_csv(out / "compare.csv", records)
    draw(out / "compare.png", records)
    screen = Console(width=None if sys.stdout.isatty() else 140)
    screen.print(_table(records, against))
    for note in comparison.notes:
        screen.print(note, markup=False, highlight=False, soft_wrap=True)
    screen.print(f"figure: {out / 'compare.png'}", markup=False, highlight=False, soft_wrap=True)


def _check_problem_files(folders: Sequence[Path]) -> None:
    files = [
        (read_json(f / "inputs.json").get("problem file"), read_json(f / "config.json")["problems"]) for f in folders
    ]
    for folder, (content, path) in zip(folders[1:], files[1:], strict=True):
        if content != files[0][0]:
            raise ValueError(
                f"runs over different problem files cannot be compared: {folders[0]} decoded {files[0][1]}, "
                f"{folder} decoded {path}" + (" with another content" if path == files[0][1] else "")
            )


def _apart(folders: Sequence[Path], labels: Sequence[str]) -> list[str]:
    """What the runs do not share, beside their settings, that bears on their results."""
    configs = [read_json(folder / "config.json") for folder in folders]
    notes = []
    for key in MATTERS:
        values = [config.get(key) for config in configs]
        if any(value != values[0] for value in values):
            said = ", ".join(f"{label} {value!r}" for label, value in zip(labels, values, strict=True))
            notes.append(f"the runs differ in {key}: {said}")
    return notes


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or as much of their paths as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"the run {next(str(f) for f, p in zip(folders, paths, strict=True) if paths.count(p) > 1)} is given twice"
        )
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _read_run(folder: Path, label: str, notes: list[str]) -> list[Found]:
    config = read_json(folder / "config.json")
    order = {setting["name"]: place for place, setting in enumerate(config["settings"])}
    found = []
    # What an earlier command decoded in this folder counts too, after what the last one lists.
    files = sorted(folder.glob("*/setting.json"), key=lambda path: (order.get(path.parent.name, len(order)), path))
    for path in files:
        setting = _setting(read_json(path))
        logs = [RowLog(path.parent / f"seed{seed}.rows.jsonl", repair=False) for seed in config["seeds"]]
        rows = [log.rows for log in logs]
        every = _problems(folder) or sorted({problem for log in rows for problem, _ in log})
        samples = range(config["n"])
        whole = [p for p in every if all((p, sample) in log for log in rows for sample in samples)]
        if not whole:
            notes.append(f"{label}/{setting.name} is left out: no problem has all its responses yet")
            continue
        known = set(every)
        missing = len(every) * len(rows) * config["n"] - sum(p in known for log in rows for p, _ in log)
        outcome = summarise(
            setting,
            rows,
            whole,
            config["n"],
            [timing for log in logs for timing in log.timings],
            graders=config.get("graders") or [config["grader"]],
            tau=known_thresholds(folder, [setting]).get(setting.name),
        )
        unfinished = f"{len(whole)} of {len(every)} problems are there, {missing} responses missing" if missing else ""
        found.append(Found(label, outcome, unfinished))
    return found


def _problems(folder: Path) -> list[int]:
    path = folder / "problems.json"
    return [problem["index"] for problem in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _setting(values: dict[str, Any]) -> Setting:
    known = {field.name for field in dataclasses.fields(Setting)}
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items() if key in known}
    return Setting(**fields)


def _against(config: CompareConfig, found: Sequence[Found]) -> Found | None:
    if config.against is None:
        pair = next((one.outcome.setting for one in found if alone(one.outcome.setting) is None), None)
        settings = [one.outcome.setting for one in found]
        wanted = references(pair, settings).get("rl") if pair is not None else None
        chosen = next((one for one in found if one.outcome.setting == wanted), None)
        return chosen or next((one for one in found if alone(one.outcome.setting) == "rl"), None)
    named = [one for one in found if config.against in (one.label, one.outcome.setting.name)]
    if len(named) != 1:
        there = ", ".join(one.label for one in (named or found))
        raise ValueError(f"against = {config.against!r}: expected one of {there}")
    return named[0]


def _record(one: Found, comparison: Comparison) -> dict[str, Any]:
    record = {"run": one.run, **one.outcome.record, "unfinished": one.unfinished}
    if comparison.against is not None and comparison.against is not one:
        record["difference"] = difference(one.outcome, comparison.against.outcome) | {
            "against": comparison.against.label
        }
    return record


def _table(records: Sequence[dict[str, Any]], against: str | None) -> Table:
    ks = {record["k"] for record in records}
    k = str(ks.pop()) if len(ks) == 1 else "k"
    many = len({record["run"] for record in records}) > 1
    title = f"{records[0]['problems']} problems, {k} samples each; shares in %, 95% intervals over problems"
    if against is not None:
        title += f"\ndifference: Avg@{k} less that of {against if many else against.rpartition('/')[2]}, paired"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    if many:
        table.add_column("run", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("setting", overflow="fold", min_width=16)
    for heading in (f"Avg@{k}", f"Pass@{k}", f"maj@{k}", "select", "change", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        last = str(record["k"])
        table.add_row(
            *([record["run"]] if many else []),
            ("c" if record["role"] != "setting" else "") + ("*" if record["unfinished"] else ""),
            record["setting"],
            ranged(record["avg_at_k"], record["interval"]),
            ranged(record["pass_at_k"][last], record["pass_intervals"][last]),
            ranged(record["maj_at_k"], record["maj_interval"]),
            percent(record["share_selected"]),
            percent(record["share_changed"]),
            signed(record.get("difference", {}).get("avg_at_k")),
        )
    return table
