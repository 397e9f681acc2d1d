"""`python -m decode compare`: the table, the files and the figure, from run folders written by hand."""

import csv
import dataclasses
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from decode.config import DecodeConfig, Setting
from decode.diagnose.config import DiagnoseConfig
from decode.results import compare, figure
from decode.results.compare import CompareConfig
from decode.results.files import RowLog, write_config
from decode.settings.calibrate import KEYS
from rlvr_jax.evaluation import mean_interval
from rlvr_jax.runs.program import config_dict, run_program
from tests.test_decode_files import row
from train import config as train_config
from train import sft

PROBLEMS = range(6)
DRAW = compare.draw


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """Drawing takes a second; the test of the figure does it."""
    monkeypatch.setattr(compare, "draw", lambda *_: None)


BASE, RL = Setting("base", "base", role="base"), Setting("rl", "rl", role="rl")
COLD = Setting("rl_cold", "rl", temperature=0.3, role="temperatures")


def delta(name: str, criterion: str = "delta_logp", **values) -> Setting:
    return Setting(name, "pair", criterion, **({"tau": -0.3} | values))


def write_run(
    folder: Path, right: dict[Setting, int], *, content: str = "1", fired: int = 2, missing: int = 0, seeds: int = 2
) -> str:
    """A run folder. `right`: of each setting's 6 problems, so many are right; `missing` rows of the last setting."""
    config = DecodeConfig("b", "r", f"{folder.name}.jsonl", str(folder), seeds=tuple(range(seeds)), n=2)
    config = dataclasses.replace(config, settings=tuple(right))
    problems = [types.SimpleNamespace(index=i, id=str(i), answer="1") for i in PROBLEMS]
    write_config(folder, config, types.SimpleNamespace(fingerprints={"problem file": content}, problems=problems))
    last = list(right)[-1]
    for setting, count in right.items():
        pair = setting.model == "pair"
        infos = {"fired": range(fired), "original": range(fired), "assistant": range(fired)}
        infos = {key: tuple(x) for key, x in infos.items()} | {"resampled": (99, *range(1, fired))}
        for seed in range(seeds):
            rows = [
                row(p, sample, correct=p < count, prediction="1", length=10, **(infos if pair and fired else {}))
                for p in PROBLEMS
                for sample in range(2)
            ]
            kept = len(rows) - missing if (setting, seed) == (last, seeds - 1) else len(rows)
            RowLog(folder / setting.name / f"seed{seed}.rows.jsonl").append(rows[:kept])
    return str(folder)


def records(out: Path) -> dict[str, dict]:
    found = json.loads((out / "compare.json").read_text())
    return {f"{record['run']}/{record['setting']}": record for record in found["settings"]}


def run(*runs: str, out: Path, against: str | None = None) -> dict[str, dict]:
    compare.run(compare.read(CompareConfig(runs, against, str(out))))
    return records(out)


def test_two_runs_in_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "draw", DRAW)
    one = write_run(tmp_path / "one", {delta("kl", "kl", tau=0.1): 4, RL: 3, BASE: 1})
    two = write_run(tmp_path / "two", {delta("delta", gamma=0.1): 5, delta("redraw"): 4, COLD: 6}, fired=3)
    found = run(one, two, out=tmp_path / "out")
    assert list(found) == ["one/kl", "one/rl", "one/base", "two/delta", "two/redraw", "two/rl_cold"]
    got = found["two/delta"]
    assert (got["avg_at_k"], got["problems"], got["k"]) == (pytest.approx(5 / 6), 6, 4)
    assert got["share_selected"] == pytest.approx(0.3)
    assert got["share_changed"] == pytest.approx(0.1)
    assert got["difference"]["against"] == "one/rl"
    assert got["difference"]["avg_at_k"]["difference"] == pytest.approx(2 / 6)
    low, high = got["difference"]["avg_at_k"]["interval"]
    expected = mean_interval([0, 0, 0, 1, 1, 0], bounds=(-1.0, 1.0))
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert "difference" not in found["one/rl"]
    printed = capsys.readouterr().out
    for text in ("one/rl, paired", "rl_cold", "83.3", "+33.3", "30.0", "10.0"):
        assert text in printed
    assert "unfinished" not in printed
    lines = (tmp_path / "out" / "compare.csv").read_text().splitlines()
    assert len(lines) == 7
    assert "difference.avg_at_k.interval_low" in lines[0]
    pixels = np.asarray(Image.open(tmp_path / "out" / "compare.png").convert("RGB"))
    assert pixels.shape[1] > 1000
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):  # kl and delta_logp
        assert (pixels == colour).all(axis=-1).sum() > 20


def drawn_across(monkeypatch, *runs: str, out: Path) -> list[tuple[str, float]]:
    """(label, Avg@k) of the lines that the figure draws for the models alone."""
    lines = []
    monkeypatch.setattr(compare, "draw", lambda path, records, references: lines.extend(references))
    run(*runs, out=out)
    return [(one.label, round(6 * one.record["avg_at_k"])) for one in lines]


def test_a_setting_is_compared_with_models_sampled_like_it(tmp_path, monkeypatch, capsys):
    """Nearly alike is not enough: where the model alone is not there, nothing stands for it and that is said."""
    greedy = Setting("base_greedy", "base", temperature=0.0)
    one = write_run(tmp_path / "one", {delta("delta"): 5, greedy: 4, COLD: 6, RL: 3})
    assert drawn_across(monkeypatch, one, out=tmp_path / "out") == [("rl alone", 3)]
    found = records(tmp_path / "out")
    assert found["one/delta"]["difference"]["against"] == "one/rl"
    printed = capsys.readouterr().out
    said = "no line for base alone at temperature 1, top-p 0.7 over 6 problems with 4 samples each, as one/delta would"
    assert said in printed
    assert "no difference" not in printed

    for key, value in (("temperature", 0.9), ("top_p", 0.95), ("top_k", 20)):
        other = write_run(tmp_path / key, {delta("delta", **{key: value}): 5, RL: 3, BASE: 2})
        assert drawn_across(monkeypatch, other, out=tmp_path / "out") == []
        found = records(tmp_path / "out")
        assert "difference" not in found[f"{key}/delta"]
        assert "difference" not in found[f"{key}/base"] or found[f"{key}/base"]["difference"]["against"] == f"{key}/rl"
        assert f"no difference for {key}/delta: no rl alone at" in capsys.readouterr().out

    two = write_run(tmp_path / "two", {delta("delta"): 5, delta("warm", temperature=0.3): 4, RL: 3, BASE: 2, COLD: 1})
    lines = drawn_across(monkeypatch, two, out=tmp_path / "out")
    assert lines == [
        ("rl alone at temperature 1, top-p 0.7 (two)", 3),
        ("base alone at temperature 1, top-p 0.7 (two)", 2),
        ("rl alone at temperature 0.3, top-p 0.7 (two)", 1),
    ]
    found = records(tmp_path / "out")
    assert [found[f"two/{name}"]["difference"]["against"] for name in ("delta", "warm")] == ["two/rl", "two/rl_cold"]
    assert "rl alone, sampled in the same way" in capsys.readouterr().out


def test_a_line_is_of_the_same_problems_and_samples(tmp_path, monkeypatch):
    """A model alone of another run stands beside a setting only where both runs are alike."""
    one = write_run(tmp_path / "one", {delta("delta"): 5})
    for name, options in (("fewer", {"seeds": 1}), ("cut", {"missing": 2})):
        other = write_run(tmp_path / name, {BASE: 2, RL: 3}, **options)
        assert ("rl alone", 3) not in drawn_across(monkeypatch, one, other, out=tmp_path / "out")
    whole = write_run(tmp_path / "whole", {BASE: 2, RL: 3})
    assert drawn_across(monkeypatch, one, whole, out=tmp_path / "out") == [("rl alone", 3), ("base alone", 2)]
    path = tmp_path / "whole" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rl": "another"}))
    assert drawn_across(monkeypatch, one, whole, out=tmp_path / "out") == []
    # Its own run comes first, whatever the order.
    both = write_run(tmp_path / "both", {RL: 1, delta("delta"): 5})
    found = run(write_run(tmp_path / "third", {RL: 4}), both, out=tmp_path / "out")
    assert found["both/delta"]["difference"]["against"] == "both/rl"


def test_one_problem_has_no_interval(tmp_path, capsys, monkeypatch):
    """A single problem says nothing of others: no interval of width zero, in no file and no figure."""
    monkeypatch.setattr(compare, "draw", DRAW)
    folder = write_run(tmp_path / "one", {RL: 3, delta("delta"): 6})
    for log in (tmp_path / "one").glob("*/*.rows.jsonl"):
        log.write_text("".join(line + "\n" for line in log.read_text().split("\n") if '"problem": 5' in line))
    found = run(folder, out=tmp_path / "out")["one/delta"]
    assert (found["problems"], found["avg_at_k"], found["interval"], found["maj_interval"]) == (1, 1.0, None, None)
    assert set(found["pass_intervals"].values()) == {None}
    assert found["difference"]["avg_at_k"] == {"difference": 1.0, "interval": None}
    printed = capsys.readouterr().out
    assert printed.count("not known") >= 7
    assert "100.0-100.0" not in printed
    header, *lines = csv.reader((tmp_path / "out" / "compare.csv").open())
    assert lines[1][header.index("interval_low")] == lines[1][header.index("difference.avg_at_k.interval_high")] == ""


def test_the_reference_can_be_chosen(tmp_path):
    one = write_run(tmp_path / "one", {delta("delta", gamma=0.1): 5, delta("redraw"): 4, RL: 3})
    found = run(one, out=tmp_path / "out", against="redraw")
    assert found["one/delta"]["difference"]["avg_at_k"]["difference"] == pytest.approx(1 / 6)
    two = write_run(tmp_path / "two", {RL: 6})
    assert run(one, two, out=tmp_path / "out", against="two/rl")["one/rl"]["difference"]["avg_at_k"][
        "difference"
    ] == pytest.approx(-3 / 6)
    with pytest.raises(ValueError, match="against = 'rl': expected one of one/rl, two/rl"):
        run(one, two, out=tmp_path / "out", against="rl")
    cold = write_run(tmp_path / "cold", {COLD: 6})
    run(one, cold, out=tmp_path / "out", against="rl_cold")
    said = "cold/rl_cold is sampled at temperature 0.3, top-p 0.7, and one/delta, one/redraw, one/rl in another way"
    assert said in json.loads((tmp_path / "out" / "compare.json").read_text())["notes"]
    with pytest.raises(ValueError, match="against = 'x': expected one of one/delta, one/redraw, one/rl"):
        run(one, out=tmp_path / "out", against="x")


def test_an_unfinished_run_says_so(tmp_path, capsys):
    folder = write_run(tmp_path / "one", {RL: 3, delta("delta"): 6}, missing=3)
    log = tmp_path / "one" / "delta" / "seed1.rows.jsonl"
    with open(log, "ab") as file:
        file.write(b'{"problem": 5, "sam')  # another process is writing this line
    before = log.read_bytes()
    found = run(folder, out=tmp_path / "out")["one/delta"]
    assert log.read_bytes() == before
    assert found["unfinished"] == "4 of 6 problems are there, 3 responses missing"
    assert (found["problems"], found["difference"]["problems"]) == (4, 4)
    assert found["difference"]["avg_at_k"]["difference"] == pytest.approx(1 / 4)  # 4 of 4 against 3 of the same 4
    assert "one/delta is unfinished: 4 of 6 problems" in capsys.readouterr().out
    # A later command with fewer problems: what is there of the others does not count.
    problems = tmp_path / "one" / "problems.json"
    problems.write_text(json.dumps([one for one in json.loads(problems.read_text()) if one["index"] != 0]))
    found = run(folder, out=tmp_path / "out")["one/delta"]
    assert (found["problems"], found["unfinished"]) == (3, "3 of 5 problems are there, 3 responses missing")
    log.unlink()
    assert list(run(folder, out=tmp_path / "out")) == ["one/rl"]
    assert "one/delta is left out" in capsys.readouterr().out


def test_what_does_not_fit_together_is_refused(tmp_path, monkeypatch, capsys):
    one = write_run(tmp_path / "one", {RL: 3})
    two = write_run(tmp_path / "two", {RL: 3}, content="2")
    for runs, message in [
        ((one, two), f"{one} decoded {Path('one.jsonl')}, {two} decoded two.jsonl"),
        ((one, str(tmp_path)), f"{tmp_path}: expected a folder that `python -m decode` wrote, and this one holds "),
        ((one, f"{one}/"), f"{one} is given twice"),
        ((), "runs=(): expected one or more"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            compare.read(CompareConfig(runs))
    (tmp_path / "two" / "rl" / "seed0.rows.jsonl").unlink()
    with pytest.raises(ValueError, match="no setting has a finished problem"):
        compare.read(CompareConfig((two,)))
    monkeypatch.setattr("sys.argv", ["decode", str(tmp_path)])
    assert run_program(compare.prepare, compare.run) == 2
    assert "this one holds folders of runs: one, two" in capsys.readouterr().err


def test_folders_of_other_programs_are_told_what_to_do(tmp_path):
    """Each says in one sentence what it is and what is wanted."""
    one = write_run(tmp_path / "one", {RL: 3})
    for name, content, message in [
        (
            "trained",
            config_dict(train_config.Config(run_dir="x")),
            r"a training run; `python -m train report .*trained`",
        ),
        ("tuned", config_dict(sft.SFTConfig(run_dir="x")), r"a training run; .*--rl .*tuned/hf"),
        ("seen", dataclasses.asdict(DiagnoseConfig(base="b", rl="r")), r"a diagnosis; open its page\.html"),
        ("other", {"model_type": "qwen3"}, r"no config\.json of a decoding run"),
        ("empty", None, r"no config\.json of a decoding run"),
        ("nowhere", ..., "there is no such folder"),
    ]:
        if content is not ...:
            (tmp_path / name).mkdir()
        if isinstance(content, dict):
            (tmp_path / name / "config.json").write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=rf"{name}: expected a folder that `python -m decode` wrote, and .*{message}"
        ):
            compare.read(CompareConfig((one, str(tmp_path / name))))
    (tmp_path / "seen" / "decode").mkdir()
    with pytest.raises(ValueError, match=r"the run that it decoded is .*seen/decode"):
        compare.read(CompareConfig((str(tmp_path / "seen"),)))
    with pytest.raises(ValueError, match=r"this is a single setting of .*one$"):
        compare.read(CompareConfig((str(tmp_path / "one" / "rl"),)))


def test_what_runs_differ_in_is_said(tmp_path, capsys):
    one = write_run(tmp_path / "one", {RL: 3, delta("delta"): 4})
    two = write_run(tmp_path / "two", {delta("delta"): 5}, seeds=1)
    path = tmp_path / "two" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 9, "graders": ["dapo_answer"]}))
    found = run(one, two, out=tmp_path / "out", against="one/rl")
    # More samples make Pass@k larger, so it is not a difference between the settings.
    assert set(found["one/delta"]["difference"]) == {"against", "problems", "avg_at_k", "pass_at_k", "maj_at_k"}
    assert set(found["two/delta"]["difference"]) == {"against", "problems", "avg_at_k"}
    fewer = run(one, two, out=tmp_path / "out", against="two/delta")["one/delta"]["difference"]
    assert set(fewer) == {"against", "problems", "avg_at_k"}
    # Unless it is asked for, nothing is compared with a model that other rules made.
    assert "difference" not in run(one, two, out=tmp_path / "out")["two/delta"]
    printed = capsys.readouterr().out
    assert "no difference for two/delta: no rl alone at temperature 1, top-p 0.7 is there" in printed
    assert "the runs differ in max_new_tokens: one 20000, two 9" in printed
    assert "the runs differ in graders: one ['math_verify'], two ['dapo_answer']" in printed
    assert "differ in n" not in printed


def test_a_found_threshold_is_in_the_table(tmp_path):
    """Whether its setting is finished and in the last command's list or not."""
    setting = delta("delta", tau=None, share=0.05)
    folder = write_run(tmp_path / "one", {RL: 3, setting: 4}, missing=3)
    keys = {key: getattr(setting, key) for key in KEYS}
    (tmp_path / "one" / "calibration.json").write_text(json.dumps({"thresholds": [keys | {"tau": -0.7}]}))
    assert run(folder, out=tmp_path / "out")["one/delta"]["tau"] == -0.7


def test_settings_sampled_in_another_way_are_lines_of_their_own(tmp_path):
    settings = {delta("hot", tau=-0.3): 3, delta("hotter", tau=-0.4): 4, delta("top", temperature=0.5): 5}
    found = run(write_run(tmp_path / "one", {**settings, delta("k", top_logprobs=50): 2}), out=tmp_path / "out")
    axes = Figure().subplots()
    figure._lines(axes, list(found.values()), "share_selected")
    labels = [container.get_label() for container in axes.containers]
    assert labels == [
        "delta_logp, temperature 1.0, top_logprobs None",
        "delta_logp, temperature 0.5, top_logprobs None",
        "delta_logp, temperature 1.0, top_logprobs 50",
    ]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name / "run", {RL: 3}) for name in ("a", "b")]
    assert list(run(*runs, out=tmp_path / "out")) == ["a/run/rl", "b/run/rl"]
