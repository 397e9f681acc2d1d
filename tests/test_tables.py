"""Tables on terminals of 80 and of 120 columns: no name, number or interval is cut, and the whole is in a file."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from decode.config import Setting
from decode.diagnose import page as diagnose_page
from decode.results.summary import summarise, with_differences, write_summaries
from decode.results.tables import chosen, print_settings, settings_text
from demo import study
from demo.__main__ import Demo, report
from rlvr_jax.runs.tables import Column, fitted, whole
from tests.test_decode_files import row
from train.records import report as training
from train.records.curves import lines, read_run

LONG = "a_name_of_a_setting_that_somebody_chose_with_care_and_without_regard_for_tables"


def printed(width: int, show) -> list[str]:
    screen = Console(file=io.StringIO(), width=width, force_terminal=False)
    show(screen)
    return screen.file.getvalue().splitlines()


def without_breaks(text_lines: list[str]) -> str:
    """What stands in the table, without the line breaks of a folded name."""
    return "".join("".join(line.split()) for line in text_lines)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """The demo's settings, all right (intervals are as long as they get) or of a quarter of 8 problems."""
    outcomes = []
    for place, setting in enumerate((*study.ALONE, *study.settings())):
        rows = {(p, s): row(p, s, correct=place % 2 == 0 or p < 2, prediction="1") for p in range(8) for s in range(4)}
        outcomes.append(summarise(dataclasses.replace(setting, role="setting"), [rows], range(8), 4))
    return with_differences(outcomes)


@pytest.mark.parametrize("width", [80, 120])
def test_the_demo_s_table_is_short_and_whole(records, width, tmp_path):
    write_summaries(tmp_path, records)
    path = tmp_path / "summary.txt"
    got = printed(width, lambda screen: print_settings(screen, records, path))
    table, said = got[:-1], got[-1]
    assert len(got) <= 24
    assert all(len(line.rstrip()) <= width for line in table)
    assert not any("…" in line for line in table)
    names = {record["setting"] for record in chosen(records)}
    assert len(names) == 16
    for name in names:
        (line,) = (line for line in table if line.split()[:1] == [name])
        (record,) = (record for record in records if record["setting"] == name)
        low, high = (f"{100 * end:.1f}" for end in record["interval"])
        assert f"{100 * record['avg_at_k']:.1f} {low}-{high}" in line
        if "rl" in record["differences"]:
            ends = record["differences"]["rl"]["avg_at_k"]["interval"]
            assert " ".join(f"{100 * end:+.1f}" for end in ends) in line
    assert said.startswith("16 more settings and the columns ")
    assert said.endswith(str(path))
    text = path.read_text()
    assert text == settings_text(records)
    for record in records:
        assert f" {record['setting']} " in text
    for heading in (
        "Avg@4",
        "Pass@4",
        "maj@4",
        "- rl",
        "- base",
        "- g0",
        "select",
        "change",
        "ended",
        "length",
        "tok/s",
    ):
        assert heading in text


def test_what_is_read_first():
    """The models alone, then the best of each criterion and gamma; the order of the settings stays."""

    def made(setting: Setting, right: int) -> dict:
        rows = {(p, 0): row(p, 0, correct=p < right, prediction="1") for p in range(8)}
        return summarise(setting, [rows], range(8), 1).record

    def pair(name: str, criterion: str, gamma: float = 0.0) -> Setting:
        return Setting(name, "pair", criterion, tau=0.1, gamma=gamma, sample_from="base")

    records = [
        *(made(pair("kl_low", "kl"), 3), made(pair("kl_high", "kl"), 5), made(pair("kl_gamma", "kl", 0.5), 4)),
        *(made(Setting("rl", "rl"), 2), made(Setting("base", "pair", "none", sample_from="base"), 1)),
        made(pair("delta", "delta_logp"), 6),
    ]
    assert chosen(records) == records
    assert [record["setting"] for record in chosen(records, 5)] == ["kl_high", "kl_gamma", "rl", "base", "delta"]
    assert [record["setting"] for record in chosen(records, 3)] == ["rl", "base", "delta"]


@pytest.mark.parametrize("width", [80, 120])
def test_long_names_are_folded_and_brackets_are_no_markup(records, width):
    several = [record | {"setting": f"{LONG}_{i}", "run": f"a/run[{i}]/of/several", "unfinished": "yes"}
               for i, record in enumerate(records[:3])]  # fmt: skip
    got = printed(width, lambda screen: print_settings(screen, several, "x.txt"))[:-1]
    assert all(len(line.rstrip()) <= width for line in got)
    assert not any("…" in line for line in got)
    for i in range(3):
        line = next(place for place, line in enumerate(got) if f"[{i}]" in line or f"n[{i}" in line)
        assert f"run[{i}]" in without_breaks(got[line : line + 3]) or f"[{i}]" in got[line]
    assert "100.0 63.1-100.0" in "\n".join(got)
    assert f"a/run[2]/of/several  *  {LONG}_2" in settings_text(several)


def test_columns_are_taken_in_their_order_of_rank():
    columns = [Column("name", ["x" * 20], name=True), Column("b", ["1" * 10], 2), Column("a", ["2" * 10], 1)]
    widths = {width: fitted("", columns, width) for width in (30, 40, 60)}
    assert {width: [column.header.plain for column in table.columns] for width, (table, _) in widths.items()} == {
        30: ["name"],
        40: ["name", "a"],
        60: ["name", "b", "a"],
    }
    assert [left_out for _, left_out in widths.values()] == [["a", "b"], ["b"], []]
    text = whole("title", columns)
    assert all(part in text for part in ("title", "x" * 20, "1" * 10, "2" * 10))


@pytest.mark.parametrize("width", [80, 120])
def test_the_findings_of_a_diagnosis(width):
    interval = {"value": -0.012345, "low": -0.123456, "high": 0.123456}
    tail = {"threshold": 0.3, "below": interval, "above": interval | {"low": None}}
    sources = {name: {"responses": 4_000, "tokens": 12_345_678, "mean_delta_logp": interval} for name in ("base", "rl")}
    found = {
        "sources": sources,
        "delta_logp_tails": {name: [tail] for name in sources},
        "histograms": {"delta_logp": {"overlap": interval, "overlap_tail": interval | {"low": None}}},
    }
    got = printed(width, lambda screen: diagnose_page._print(screen, found))
    assert all(len(line.rstrip()) <= width for line in got)
    text = "\n".join(got)
    assert "…" not in text
    for part in ("-0.0123 [-0.1235, 0.1235]", "-1.23 [-12.35, 12.35]", "-0.012 [-0.123, 0.123]", "-0.012 [not known]"):
        assert part in text
    assert ("4,000" in text) == (width == 120)  # where there is room


@pytest.mark.parametrize("width", [80, 120])
def test_the_curves_of_training_runs(width, tmp_path):
    for name, seed, lr in (("one", 0, 1e-6), ("two", 1, 1e-6), ("three", 0, 3e-6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"seed": seed, "optim": {"lr": lr}}))
        numbers = [{"kind": "train", "trainer_steps": s, "rollout_gap_fresh_mean_abs": -1.234e-5 * (s + seed)}
                   for s in (1, 2)]  # fmt: skip
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in numbers))
    made = lines([read_run(tmp_path / name, name) for name in ("one", "two", "three")])
    metric = "train/rollout_gap_fresh_mean_abs"
    rows = [training.summary(line, metric) for line in made]
    what = training.Report(tmp_path, made, [metric])
    got = printed(width, lambda screen: screen.print(fitted("", training._columns(what, rows), width)[0]))
    assert all(len(line.rstrip()) <= width for line in got)
    text = "\n".join(got)
    assert "…" not in text
    for part in (metric, "lr 1e-06", "lr 3e-06", "-3.09e-05 [-3.70e-05, -2.47e-05]"):
        assert "".join(part.split()) in without_breaks(got) or part in text


def test_the_demo_names_the_file_with_all_rows(records, monkeypatch, tmp_path):
    screen = Console(file=io.StringIO(), width=80, force_terminal=False)
    monkeypatch.setattr("demo.__main__.console", screen)
    report(records, tmp_path / "summary.txt")
    got = screen.file.getvalue()
    assert re.search(r"^16 more settings and the columns - base,.* tok/s: .*summary\.txt$", got, re.MULTILINE)
    assert str(tmp_path / "summary.txt") in got
    assert Demo().n == 4
