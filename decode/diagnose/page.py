"""From the files of a diagnosis to what is looked at: findings.json, the figures, the page."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from decode.diagnose.config import FindingsConfig, PageConfig
from decode.results.files import read_record
from rlvr_jax.evaluation import bracketed
from rlvr_jax.microscope import files
from rlvr_jax.microscope.columns import ScoredResponse
from rlvr_jax.microscope.figures import figures
from rlvr_jax.microscope.files import Response, TokenTable
from rlvr_jax.microscope.findings import Options, findings
from rlvr_jax.microscope.page import write_page
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.tables import Column, fitted, screen

_PLAIN: Any = {"markup": False, "highlight": False, "soft_wrap": True}


def draw_results(folder: Path, settings: FindingsConfig, page: PageConfig) -> None:
    """Writes findings.json, figures/ and page.html into a folder that holds a diagnosis, or several as step_* folders.

    Raises:
      ValueError: no such files there; a problem for the page that is not there.
    """
    folders = [folder] if (folder / files.TOKENS).is_file() else sorted(folder.glob("step_*"))
    folders = [
        one for one in folders if (one / files.RESPONSES).is_file()
    ]  # which comes last: the others are half there
    if not folders:
        raise ValueError(f"{folder}: no {files.TOKENS} and no step_* folders; expected a finished diagnosis")
    tables = [files.read_tokens(one) for one in folders]
    table = joined(tables)
    options = Options(**{name: getattr(settings, name) for name in Options._fields if hasattr(settings, name)})
    found = findings(table, options)
    write_json(folder / "findings.json", found)
    drawn = figures(found, folder / "figures")
    shown = chosen(table.responses, page)
    words = {token: text for one in folders for token, text in files.read_vocabulary(one).items()}
    size = write_page(
        folder / "page.html",
        _read(folders, tables, shown),
        vocabulary=words,
        figures=drawn,
        note=_note(folder, found, page, len(shown)),
    )
    out = screen()
    _print(out, found)
    out.print(f"findings: {folder / 'findings.json'}, figures: {folder / 'figures'}", **_PLAIN)
    out.print(f"page: {folder / 'page.html'} ({size / 1e6:.1f} MB, {len(shown)} responses)", **_PLAIN)


def joined(tables: Sequence[TokenTable]) -> TokenTable:
    """Several tables as one."""
    if len(tables) == 1:
        return tables[0]
    begins = np.cumsum([0, *(len(table.responses) for table in tables)])
    return TokenTable(
        responses=[one for table in tables for one in table.responses],
        response=np.concatenate([t.response + np.int32(begin) for t, begin in zip(tables, begins, strict=False)]),
        position=np.concatenate([table.position for table in tables]),
        token=np.concatenate([table.token for table in tables]),
        text=pa.chunked_array([chunk for table in tables for chunk in table.text.chunks], pa.string()),
        values={name: np.concatenate([table.values[name] for table in tables]) for name in tables[0].values},
    )


def chosen(responses: Sequence[Response], page: PageConfig) -> list[int]:
    """Places of the responses that the page shows, in their own order.

    Problems spread evenly over all; of each the first response of every source, then the second, until they suffice.

    Raises:
      ValueError: a problem in `page.problems` that no response belongs to.
    """
    of_problem: dict[int, dict[str, list[int]]] = {}
    for place, one in enumerate(responses):
        if one.length:
            of_problem.setdefault(one.problem, {}).setdefault(one.source, []).append(place)
    problems = sorted(of_problem)
    if page.problems:
        missing = sorted(set(page.problems) - of_problem.keys())
        if missing:
            raise ValueError(f"page.problems has {missing[0]}: no response belongs to a problem of that number")
        problems = sorted(set(page.problems))
    sources = max(len(by_source) for by_source in of_problem.values())
    count = min(len(problems), max(1, page.responses // sources))
    spread = [problems[i * len(problems) // count] for i in range(count)]
    most = max(len(places) for problem in spread for places in of_problem[problem].values())
    found = [
        places[turn]
        for turn in range(most)
        for problem in spread
        for places in of_problem[problem].values()
        if turn < len(places)
    ]
    return sorted(found[: page.responses])


def _read(folders: Sequence[Path], tables: Sequence[TokenTable], places: Sequence[int]) -> list[ScoredResponse]:
    """The responses at these places of the joined table."""
    found, begin = [], 0
    for folder, table in zip(folders, tables, strict=True):
        end = begin + len(table.responses)
        found += files.read_scored(folder, [place - begin for place in places if begin <= place < end])
        begin = end
    return found


def _note(folder: Path, found: dict[str, Any], page: PageConfig, shown: int) -> str:
    """Which models, which responses, chosen how."""
    config = read_record(folder / "config.json")
    models = ""
    if {"base", "rl"} <= config.keys():
        models = " and ".join(_short(config[role]) for role in ("base", "rl")) + ". "
    which = (
        "of the problems that were asked for" if page.problems else f"spread over all {found['problems']:,} problems"
    )
    return (
        f"{models}{shown} of {found['responses']:,} responses, {which}; the figures are of all "
        f"{found['tokens']:,} tokens."
    )


def _short(path: str) -> str:
    """A path under the working directory without it."""
    short = os.path.relpath(path)
    return path if short.startswith("..") else short


def _print(out: Console, found: dict[str, Any]) -> None:
    """The numbers that are read first."""
    tails = [found["delta_logp_tails"][source][0] for source in found["sources"]]
    columns = [
        Column("responses of", list(found["sources"]), name=True),
        Column("mean Δlogp", [_said(one["mean_delta_logp"], 1, ".4f") for one in found["sources"].values()]),
        *(
            Column(
                f"Δlogp {sign}{tails[0]['threshold']:g} (%)", [_said(tail[side], 100, ".2f") for tail in tails], rank
            )
            for rank, (side, sign) in enumerate((("below", "≤ −"), ("above", "≥ ")), start=1)
        ),
        Column("responses", [f"{one['responses']:,}" for one in found["sources"].values()], 4),
        Column("tokens", [f"{one['tokens']:,}" for one in found["sources"].values()], 3),
    ]
    out.print(fitted("", columns, out.width)[0])
    both = {name: one for name, one in found["histograms"].items() if "overlap" in one}
    if both:
        columns = [
            Column("base and rl overlap in", list(both), name=True),
            Column("of all tokens", [_said(one["overlap"], 1, ".3f") for one in both.values()]),
            Column("of the tail", [_said(one["overlap_tail"], 1, ".3f") for one in both.values()], 1),
        ]
        out.print(fitted("", columns, out.width)[0])


def _said(interval: dict[str, float | None], times: float, form: str) -> str:
    value, low, high = (None if x is None else times * x for x in interval.values())
    return "–" if value is None else f"{value:{form}} {bracketed(low, high, form)}"
