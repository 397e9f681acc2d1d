"""What a decoding run leaves behind: files that survive a kill, the published format, the summary."""

import dataclasses
import json
import re
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from decode.config import Setting
from decode.results.files import Row, RowLog, Timing, TokenParts, check_resume, published, write_config
from decode.results.summary import references, remarks, summarise, with_differences, write_summaries
from decode.results.tables import settings_text
from decode.settings.sweep import resolve
from rlvr_jax.evaluation import mean_interval
from tests.test_decode_config import PAIR, change


def row(problem: int, sample: int, **values) -> Row:
    defaults = {"text": f"text {problem}.{sample} \n é \u2028", "correct": False, "prediction": None, "error": None}
    return Row(problem, sample, **(defaults | {"length": 4, "finished": True} | values))


def test_rows_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "seed0.rows.jsonl"
    rows = [row(0, 0), row(0, 1, fired=(2, 3), original=(5, 6), assistant=(None, 7), resampled=(5, 7)), row(1, 0)]
    RowLog(path).append(rows, Timing(12, 0.5, True))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        log = RowLog(path)
        kept = [end for end in ends if end <= cut]
        assert list(log.rows.values()) == rows[: len(kept)]
        assert path.read_bytes() == whole[: kept[-1] if kept else 0]
        log.append(rows)
        assert list(RowLog(path).rows.values()) == rows
    path.write_bytes(whole)
    assert RowLog(path).timings == [Timing(12, 0.5, True)]
    path.write_bytes(b'{"problem": 0}\n' + whole)
    with pytest.raises(ValueError, match=r"seed0.rows.jsonl, line 1: .*missing"):
        RowLog(path, repair=False)
    assert list(RowLog(path).rows.values()) == rows
    assert path.read_bytes() == whole


def test_the_published_format():
    fired = row(7, 1, correct=True, fired=(0, 2), original=(5, 6), assistant=(8, None), resampled=(5, 9))
    rows = {(7, 0): row(7, 0, length=3), (7, 1): fired, (7, 2): row(7, 2), (9, 0): row(9, 0), (9, 1): row(9, 1)}
    got = json.loads(json.dumps(published([(7, "prompt 7", "42"), (9, "prompt 9", "1")], rows, 2)))
    assert got[0] == {
        "prompt": "prompt 7",
        "gt": "42",
        "generated_texts": [rows[7, 0].text, rows[7, 1].text],
        "accs": [False, True],
        "lengths": [3, 4],
        "resample_rates": [0.0, 0.5],
        "resample_infos": [
            {},
            {
                "0": {"original": 5, "assistant": 8, "resampled": 5},
                "2": {"original": 6, "assistant": None, "resampled": 9},
            },
        ],
    }
    assert [problem["prompt"] for problem in got] == ["prompt 7", "prompt 9"]


def test_token_parts_merge_once_in_order(tmp_path):
    def tokens(seed, problem, sample):
        values = [seed, problem, sample][: sample + 1]
        return {
            **{"seed": seed, "problem": problem, "sample": sample, "tokens": values},
            **{"logp": [-0.5] * len(values), "delta_logp": [0.25] * len(values), "fired": [True] * len(values)},
        }

    TokenParts(tmp_path).add([tokens(1, 0, 0), tokens(0, 2, 1)])
    TokenParts(tmp_path).add([tokens(0, 2, 1), tokens(0, 1, 2)])
    TokenParts(tmp_path).assemble()
    TokenParts(tmp_path).add([tokens(0, 0, 0)])
    TokenParts(tmp_path).assemble()
    TokenParts(tmp_path).assemble()
    table = pq.read_table(tmp_path / "tokens.parquet").to_pylist()
    assert table == [tokens(0, 0, 0), tokens(0, 1, 2), tokens(0, 2, 1), tokens(1, 0, 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.parquet"]


def test_another_config_in_the_same_folder_is_named(tmp_path):
    config = resolve(PAIR)
    inputs = {"architecture of rl": "1", "weights of rl": "1", "problem file": "2"}
    check_resume(tmp_path, config, inputs)
    # the second is a run that does not load rl: it keeps what is known of it
    for fingerprints in (inputs, {"problem file": "2"}):
        write_config(tmp_path, config, types.SimpleNamespace(fingerprints=fingerprints, problems=[]))
    added = dataclasses.replace(config, settings=(*config.settings, Setting("rl", "rl")))
    for harmless in (config, added, change(config, slots=3, block=8, memory=1.0, seeds=(5, 6), limit=1)):
        check_resume(tmp_path, harmless, inputs)
    (setting,) = config.settings
    marked = dataclasses.replace(setting, role="gamma0", control_of=("x",))  # no response depends on that
    check_resume(tmp_path, change(config, settings=(marked,)), inputs)
    with pytest.raises(ValueError, match="n = 4, now n = 8"):
        check_resume(tmp_path, change(config, n=8), inputs)
    for moved in ({"rl": "q"}, {"problems": "elsewhere.jsonl"}):  # its content is known, and the same
        check_resume(tmp_path, change(config, **moved), inputs)
    with pytest.raises(ValueError, match="base = 'b', now base = 'q'"):  # which no run has read yet
        check_resume(tmp_path, change(config, base="q"), inputs | {"architecture of base": "1", "weights of base": "1"})
    with pytest.raises(ValueError, match="rl = 'r', now rl = 'q'"):  # which this run does not read
        check_resume(tmp_path, change(config, rl="q"), {"problem file": "2"})
    with pytest.raises(ValueError, match="other content of the weights of rl, which has changed since"):
        check_resume(tmp_path, config, inputs | {"weights of rl": "3"})
    with pytest.raises(ValueError, match=r"setting 'delta.*', gamma = 0.05, now .* gamma = 0.5"):
        check_resume(tmp_path, change(config, settings=(dataclasses.replace(setting, gamma=0.5),)), inputs)


def test_one_path_spelled_two_ways_is_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "br":
        (tmp_path / name).mkdir()
    (tmp_path / "p.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    here = change(resolve(PAIR), base="b", rl="r", problems="p.jsonl")
    write_config(tmp_path / "out", here, types.SimpleNamespace(fingerprints={}, problems=[]))
    for spelling in ({"base": "./b/"}, {"base": f"{tmp_path}/b"}, {"base": "link"}, {"problems": "r/../p.jsonl"}):
        check_resume(tmp_path / "out", change(here, **spelling), {})
    with pytest.raises(ValueError, match=f"base = '{tmp_path}/b', now base = '{tmp_path}/r'"):
        check_resume(tmp_path / "out", change(here, base="r"), {})


@pytest.mark.parametrize("theirs", [{"architectures": ["Qwen3ForCausalLM"]}, {"findings": {}, "base": "b"}, ["list"]])
def test_a_config_that_no_decoding_run_wrote_is_not_replaced(tmp_path, theirs):
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: no configuration of this program .*use another"):
        check_resume(tmp_path, resolve(PAIR), {})


@pytest.mark.parametrize("name", ["rl/seed0.rows.jsonl", "tokens.parquet"])
def test_results_that_no_config_names_are_not_gone_on_with(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"it holds results \({name}\), and no config.json says of which run"):
        check_resume(tmp_path, resolve(PAIR), {})


def test_the_summary_counts_by_hand(tmp_path):
    fired = {"fired": (0, 1, 2), "original": (5, 6, 7), "assistant": (None,) * 3, "resampled": (5, 6, 8)}
    seeds = [
        {
            (3, 0): row(3, 0, correct=True, prediction="1", length=10, **fired),
            (3, 1): row(3, 1, prediction="2", length=20, finished=False),
            (4, 0): row(4, 0, error="time"),
            (4, 1): row(4, 1),
        },
        {
            (3, 0): row(3, 0, correct=True, prediction="1", length=6),
            (3, 1): row(3, 1, correct=True, prediction="1"),
            (4, 0): row(4, 0, correct=True, prediction="9"),
            (4, 1): row(4, 1, length=48),
        },
    ]
    timings = [Timing(50, 5.0, True, 60, 9), Timing(40, 2.0, False, 45, 11), Timing(10, 0.5, False, 15, 0)]
    outcome = summarise(Setting("x", "pair", "kl", share=0.1), seeds, [3, 4], 2, timings, tau=0.5)
    got = outcome.record
    assert got["problems"] == 2
    assert got["k"] == 4
    assert got["avg_at_k"] == pytest.approx(0.5)  # (3/4 + 1/4) / 2
    assert got["pass_at_k"] == pytest.approx({"1": 0.5, "2": (1 + 1 / 2) / 2, "4": 1.0})
    assert got["tokens"] == 100
    assert got["mean_length"] == 12.5
    assert got["share_selected"] == pytest.approx(0.03)
    assert got["share_changed"] == pytest.approx(0.01)
    assert got["share_finished"] == 7 / 8
    assert got["grading_errors"] == 1
    assert got["seconds"] == 7.5
    assert got["tokens_per_second"] == 20.0
    assert (got["sampled_passes_per_token"], got["other_passes_per_token"]) == (1.2, 0.2)
    assert (got["tau"], got["share_wanted"], got["invalid"]) == (0.5, 0.1, 0)
    assert 0 <= got["interval"][0] <= 0.5 <= got["interval"][1] <= 1
    write_summaries(tmp_path, [got, got | {"setting": "y"}])
    assert json.loads((tmp_path / "summary.json").read_text())[0] == got
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(lines) == 3
    assert dict(zip(lines[0].split(","), lines[2].split(","), strict=True))["pass_at_k.4"] == "1.0"
    assert (tmp_path / "summary.txt").read_text() == settings_text([got, got | {"setting": "y"}])
    assert got["maj_at_k"] == 1.0  # 3: "1" has three of four votes; 4: "9" is the only answer
    assert got["maj_interval"] == [pytest.approx(0.025**0.5), 1.0]  # of two problems: nearly nothing is known
    assert got["interval"] == mean_interval([3 / 4, 1 / 4]).ends
    assert got["pass_intervals"]["1"] == pytest.approx(got["interval"])


def test_a_second_grader_has_metrics_of_its_own():
    def two(problem, first, second):
        return row(problem, 0, correct=first, prediction="1", others={"strict": (second, None, "broken")})

    rows = {(p, 0): two(p, p > 0, p > 2) for p in range(4)}
    outcome = summarise(Setting("x", "rl"), [rows], range(4), 1, graders=("math_verify", "strict"))
    assert (outcome.record["grader"], outcome.record["avg_at_k"]) == ("math_verify", 0.75)
    assert {name: record["avg_at_k"] for name, record in outcome.record["graders"].items()} == {
        "math_verify": 0.75,
        "strict": 0.25,
    }
    assert outcome.record["graders"]["strict"]["grading_errors"] == 4
    assert outcome.record["graders"]["math_verify"]["maj_at_k"] == 0.75
    assert outcome.record["graders"]["strict"]["maj_at_k"] == 0.0  # nothing extracted, so no votes


def test_differences_are_paired_over_problems():
    def outcome(setting, right, problems=range(8)):
        rows = {(p, 0): row(p, 0, correct=p in right, prediction="1" if p in right else None) for p in problems}
        return summarise(setting, [rows], list(problems), 1)

    extra = Setting("extra", "pair", "delta_logp", -0.3, 0.1)
    settings = [
        extra,
        Setting("redraw", "pair", "delta_logp", -0.3, 0.0, role="gamma0", control_of=("extra",)),
        Setting("rl", "rl", role="rl"),
        Setting("rl_cold", "rl", temperature=0.3, role="temperatures"),
        Setting("other_redraw", "pair", "delta_logp", -0.4, 0.0),
    ]
    named = [outcome(setting, []) for setting in settings]
    found = {x.setting.name: {role: other.setting.name for role, other in references(x, named).items()} for x in named}
    assert found == {
        "extra": {"rl": "rl", "gamma0": "redraw"},
        "redraw": {"rl": "rl"},
        "rl": {},
        "rl_cold": {"rl": "rl"},
        "other_redraw": {"rl": "rl"},
    }
    # `none` is the sampled model alone, and so a reference too
    none = Setting("alone", "pair", "none", sample_from="base")
    assert references(outcome(extra, []), [outcome(extra, []), base := outcome(none, [])])["base"] is base
    # A model alone beside settings that sample in two ways is compared as it is sampled itself.
    warm = outcome(dataclasses.replace(extra, name="warm", temperature=0.3), [])
    assert references(named[3], [*named, warm]) == {}
    assert references(warm, [*named, warm]) == {"rl": named[3]}
    # right on 0..5 against 2..6: two problems more, one problem less, of eight
    outcomes = [outcome(settings[0], range(6)), outcome(settings[1], range(2, 7)), outcome(settings[2], range(6))]
    records = with_differences(outcomes)
    against = records[0]["differences"]
    assert against["gamma0"]["against"] == "redraw"
    assert against["gamma0"]["avg_at_k"]["difference"] == pytest.approx(1 / 8)
    low, high = against["gamma0"]["avg_at_k"]["interval"]
    assert low < 0 < high
    unpaired = np.sqrt(2 * 0.25 / 8)
    t = stats.t.ppf(0.975, 7)
    assert high - low < 2 * t * unpaired
    # the same problems right: eight problems without a difference leave room for one in some of all problems
    unseen = 1 - 0.025 ** (1 / 8)
    assert against["rl"]["avg_at_k"] == {"difference": 0.0, "interval": pytest.approx([-unseen, unseen])}
    assert against["rl"]["maj_at_k"]["difference"] == against["rl"]["pass_at_k"]["difference"] == 0
    # only the problems that both have
    short = outcome(settings[2], range(6), range(4, 12))
    assert with_differences([outcomes[1], short])[0]["differences"]["rl"]["problems"] == 4
    assert with_differences([outcomes[1], short])[0]["differences"]["rl"]["avg_at_k"]["difference"] == 0.25
    printed = settings_text(records)
    assert "- rl" in printed
    assert re.search(r"^ +extra .* \+0\.0 -36\.9 \+36\.9 ", printed, re.MULTILINE)


def test_what_went_wrong_is_said():
    rows = {(p, 0): row(p, 0, error="exceeded the time limit") if p < 3 else row(p, 0) for p in range(6)}
    rows[0, 0] = row(0, 0, invalid=True, error="the logits after 3 tokens were not finite")
    record = summarise(Setting("x", "rl"), [rows], range(6), 1).record
    assert remarks([record | {"invalid": 0, "grading_errors": 0}]) == []
    assert remarks([record]) == [
        "x: 1 of 6 responses ended on logits that were not finite and count as wrong",
        "x: 2 of 6 responses could not be graded (error in seedN.rows.jsonl says why) and count as wrong",
    ]
