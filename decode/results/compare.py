"""`python -m decode compare RUN RUN ...`: the settings of several runs in one table, one file and one figure."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from decode.config import Setting
from decode.results.figure import Reference, draw
from decode.results.files import CONTENT_OF, RowLog, read_record
from decode.results.summary import (
    Outcome,
    alone,
    difference,
    references,
    sampling_of,
    summarise,
    write_csv,
    write_table,
)
from decode.results.tables import print_settings
from decode.settings.calibrate import known_thresholds
from rlvr_jax.runs.bounds import Name, PathText, Several, require
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.lock import lock
from rlvr_jax.runs.program import parse_flags
from rlvr_jax.runs.remote import local
from rlvr_jax.runs.tables import screen

MATTERS = (
    *("base", "rl", "tokenizer", "prompt_suffix", "max_new_tokens", "stop_token_ids"),
    *("graders", "dtype", "cache_dtype"),
)


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Runs over one problem file, compared.

    Attributes:
      runs: folders that `python -m decode` wrote, finished or not
      against: setting that all are compared with, SETTING or RUN/SETTING; default: for each setting the rl model alone,
        sampled in the same way, of its own run or of one that differs in nothing else
      out: folder for compare.json, compare.csv, compare.txt and compare.png
    """

    runs: tyro.conf.Positional[Annotated[tuple[PathText, ...], Several()]]
    against: Name | None = None
    out: PathText = "runs/compare"


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A setting of a run. `unfinished` says what is missing of it, else it is empty.

    `basis` has what the run's results depend on beside the setting (`MATTERS`).
    """

    run: str
    basis: dict[str, Any]
    outcome: Outcome
    unfinished: str

    @property
    def label(self) -> str:
        """RUN/SETTING."""
        return f"{self.run}/{self.outcome.setting.name}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was read: the settings, the one that each is compared with (if any), and notes on what is not there."""

    config: CompareConfig
    found: list[Found]
    against: list[Found | None]
    problems: str
    notes: list[str]


def prepare(argv: Sequence[str]) -> Comparison:
    """Reads the runs. Raises ValueError naming what does not fit together."""
    return read(parse_flags(CompareConfig, argv, prog="python -m decode compare", description=__doc__))


def read(config: CompareConfig) -> Comparison:
    """See `prepare`."""
    require(config)
    folders = [Path(local(run, ("*.json", "*/setting.json", "*/*.rows.jsonl"))) for run in config.runs]
    for folder in folders:
        _check_folder(folder)
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
    against = _against(config, found, notes)
    return Comparison(config, found, against, read_record(folders[0] / "config.json")["problems"], notes)


def run(comparison: Comparison) -> None:
    """Writes compare.json, compare.csv, compare.txt and compare.png, and prints the table."""
    with lock(comparison.config.out):
        _write(comparison)


def _write(comparison: Comparison) -> None:
    out = Path(comparison.config.out)
    records = [_record(one, against) for one, against in zip(comparison.found, comparison.against, strict=True)]
    against = {record["difference"]["against"] for record in records if "difference" in record}
    lines, missing = _lines_across(comparison.found, records)
    notes = [*comparison.notes, *missing]
    write_json(
        out / "compare.json",
        {
            "problems": comparison.problems,
            "against": against.pop() if len(against) == 1 else None,
            "notes": notes,
            "settings": records,
        },
    )
    write_csv(out / "compare.csv", records)
    draw(out / "compare.png", records, lines)
    write_table(out / "compare.txt", records)
    out_screen = screen()
    print_settings(out_screen, records, out / "compare.txt")
    for note in notes:
        out_screen.print(note, markup=False, highlight=False, soft_wrap=True)
    out_screen.print(f"figure: {out / 'compare.png'}", markup=False, highlight=False, soft_wrap=True)


def _check_folder(folder: Path) -> None:
    """Refuses what no decoding run wrote, and says what to do with what others did."""
    wanted = f"{folder}: expected a folder that `python -m decode` wrote"
    if not folder.is_dir():
        raise ValueError(f"{wanted}, and there is no such folder")
    config = read_record(folder / "config.json")
    if {"settings", "problems", "seeds", "n"} <= config.keys():
        return
    if "responses" in config and "findings" in config:
        decoded = folder / "decode"
        raise ValueError(
            f"{wanted}, and this is a diagnosis; "
            + (f"the run that it decoded is {decoded}" if decoded.is_dir() else "open its page.html")
        )
    if "run_dir" in config:
        raise ValueError(
            f"{wanted}, and this is a training run; `python -m train report {folder}` shows its curves, or decode its "
            f"model (--rl {folder / 'hf'}) and compare that"
        )
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside:
        raise ValueError(f"{wanted}, and this one holds folders of runs: {', '.join(inside[:5])}")
    if (folder / "setting.json").is_file():
        raise ValueError(f"{wanted}, and this is a single setting of {folder.parent}")
    raise ValueError(f"{wanted}, and this one has no config.json of a decoding run")


def _check_problem_files(folders: Sequence[Path]) -> None:
    files = [
        (read_record(f / "inputs.json").get("problem file"), read_record(f / "config.json")["problems"])
        for f in folders
    ]
    for folder, (content, path) in zip(folders[1:], files[1:], strict=True):
        if content != files[0][0]:
            raise ValueError(
                f"runs over different problem files cannot be compared: {folders[0]} decoded {files[0][1]}, "
                f"{folder} decoded {path}" + (" with another content" if path == files[0][1] else "")
            )


def _apart(folders: Sequence[Path], labels: Sequence[str]) -> list[str]:
    """What the runs do not share, beside their settings, that bears on their results."""
    configs = [read_record(folder / "config.json") for folder in folders]
    contents = [read_record(folder / "inputs.json") for folder in folders]
    notes = []
    for key in MATTERS:
        values, known = [config.get(key) for config in configs], CONTENT_OF.get(key, ())
        if known and all(content.keys() >= set(known) for content in contents):  # wherever they lay
            differ = any(content[name] != contents[0][name] for content in contents for name in known)
        else:
            differ = any(value != values[0] for value in values)
        if differ:
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
    config = read_record(folder / "config.json")
    basis = {key: config.get(key) for key in MATTERS}
    order = {setting["name"]: place for place, setting in enumerate(config["settings"])}
    found = []
    # What an earlier command decoded in this folder counts too, after what the last one lists.
    files = sorted(folder.glob("*/setting.json"), key=lambda path: (order.get(path.parent.name, len(order)), path))
    for path in files:
        setting = _setting(read_record(path))
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
        found.append(Found(label, basis, outcome, unfinished))
    return found


def _problems(folder: Path) -> list[int]:
    path = folder / "problems.json"
    return [problem["index"] for problem in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def _setting(values: dict[str, Any]) -> Setting:
    known = {field.name for field in dataclasses.fields(Setting)}
    fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items() if key in known}
    return Setting(**fields)


def _against(config: CompareConfig, found: Sequence[Found], notes: list[str]) -> list[Found | None]:
    """What each setting is compared with."""
    if config.against is None:
        chosen = [_references(one, found).get("rl") for one in found]
        without: dict[str, list[str]] = {}
        for one, reference in zip(found, chosen, strict=True):
            if reference is None and alone(one.outcome.setting) is None:
                without.setdefault(_sampled(one), []).append(one.label)
        notes += [
            f"no difference for {', '.join(labels)}: no rl alone at {sampled} is there; --against names another setting"
            for sampled, labels in without.items()
        ]
        return chosen
    named = [one for one in found if config.against in (one.label, one.outcome.setting.name)]
    if len(named) != 1:
        there = ", ".join(one.label for one in (named or found))
        raise ValueError(f"against = {config.against!r}: expected one of {there}")
    other = [one.label for one in found if sampling_of(one.outcome.setting) != sampling_of(named[0].outcome.setting)]
    if other:
        notes.append(f"{named[0].label} is sampled at {_sampled(named[0])}, and {', '.join(other)} in another way")
    return [None if one is named[0] else named[0] for one in found]


def _references(one: Found, found: Sequence[Found]) -> dict[str, Found]:
    """`summary.references` among the settings of this run, then among those of runs that agree with it in `MATTERS`."""
    among = [other for other in found if other.basis == one.basis]
    among.sort(key=lambda other: other.run != one.run)
    of_outcome = {id(other.outcome): other for other in among}
    chosen = references(one.outcome, [other.outcome for other in among])
    return {role: of_outcome[id(outcome)] for role, outcome in chosen.items()}


def _lines_across(found: Sequence[Found], records: Sequence[dict[str, Any]]) -> tuple[list[Reference], list[str]]:
    """The models alone that the figure draws as lines, and notes on those that it does not draw.

    Such a line has the sampling, the problems and the number of samples of the settings beside it.
    """
    pair = [one for one in found if alone(one.outcome.setting) is None]
    served: collections.Counter[tuple[str, int]] = collections.Counter()
    missing: dict[str, list[str]] = {}
    place_of = {id(one): place for place, one in enumerate(found)}
    for one in pair:
        alike = [
            other
            for other in found
            if (other.outcome.problems, other.outcome.record["k"]) == (one.outcome.problems, one.outcome.record["k"])
        ]
        chosen = _references(one, alike)
        for role in ("rl", "base"):
            if role in chosen:
                served[role, place_of[id(chosen[role])]] += 1
            else:
                what = f"no line for {role} alone at {_sampled(one)} over {len(one.outcome.problems)} problems with "
                missing.setdefault(f"{what}{one.outcome.record['k']} samples each", []).append(one.label)
    drawn = []
    for (role, place), settings in served.items():
        label = f"{role} alone"
        if settings < len(pair):  # not what all of them are compared with
            label += f" at {_sampled(found[place])} ({found[place].run})"
        drawn.append(Reference(records[place], role, label))
    notes = [f"{what}, as {', '.join(labels)} would need: it is not there" for what, labels in missing.items()]
    return drawn, notes


def _sampled(one: Found) -> str:
    temperature, top_p, top_k = sampling_of(one.outcome.setting)
    return f"temperature {temperature:g}, top-p {top_p:g}" + (f", top-k {top_k}" if top_k else "")


def _record(one: Found, against: Found | None) -> dict[str, Any]:
    record = {"run": one.run, **one.outcome.record, "unfinished": one.unfinished}
    if against is not None:
        record["difference"] = difference(one.outcome, against.outcome) | {"against": against.label}
    return record
