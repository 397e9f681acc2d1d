"""The parts of the batch decoding program: configuration, plan of batches, files that survive a kill, summary."""

import dataclasses
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from decode.batches import Unit, plan
from decode.config import DecodeConfig, Setting, resolve
from decode.results import Row, RowLog, Timing, TokenParts, check_resume, published, write_config
from decode.summary import summarise, summary_table, write_summaries
from rlvr_jax.program import read_config

PAIR = DecodeConfig(base="b", rl="r", problems="p.jsonl", setting=Setting(criterion="delta_logp", tau=-0.3, gamma=0.05))


def change(config: DecodeConfig, **values) -> DecodeConfig:
    """`replace`, where the names of Setting change the single setting."""
    inner = {key: values.pop(key) for key in list(values) if key in Setting.__dataclass_fields__}
    setting = dataclasses.replace(values.pop("setting", config.setting), **inner)
    return dataclasses.replace(config, setting=setting, **values)


def row(problem: int, sample: int, **values) -> Row:
    defaults = {"text": f"text {problem}.{sample} \n é \u2028", "correct": False, "prediction": None, "error": None}
    return Row(problem, sample, **(defaults | {"length": 4, "finished": True} | values))


def test_a_single_setting_is_resolved():
    (setting,) = resolve(PAIR).settings
    assert setting == Setting("delta_logp_tau-0.3_gamma0.05_t1_p0.7", "pair", "delta_logp", -0.3, 0.05)
    alone = DecodeConfig(rl="r", problems="p.jsonl")
    assert resolve(alone).settings[0].model == "rl"
    assert resolve(change(PAIR, criterion=None, tau=None, gamma=0.0, model="base")).settings[0].model == "base"
    assert resolve(change(PAIR, criterion="none", tau=None)).settings[0].model == "pair"  # needs no threshold
    assert resolve(resolve(PAIR)) == resolve(PAIR)


@pytest.mark.parametrize(
    ("recipe", "tau", "gamma"), [("dapo_32b", -0.3, 0.05), ("orz_32b", -0.4, 0.1), ("unireason_14b", -0.35, 0.1)]
)
def test_the_published_recipes(recipe, tau, gamma):
    config = resolve(read_config(DecodeConfig, Path(__file__).parent.parent / "configs" / f"decode_{recipe}.py"))
    extrapolate, replace = config.settings[:2]
    assert (extrapolate.criterion, extrapolate.tau, extrapolate.gamma) == ("delta_logp", tau, gamma)
    assert replace == dataclasses.replace(extrapolate, name="replace", gamma=0.0)
    assert (extrapolate.sample_from, extrapolate.temperature, extrapolate.top_p) == ("base", 1.0, 0.7)
    assert (len(config.seeds), config.n, config.max_new_tokens) == (8, 4, 20_000)
    assert config.prompt_suffix.endswith("final answer within \\boxed{}.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": None, "rl": None}, "no model"),
        ({"problems": ""}, "--problems"),
        ({"n": 0}, "n = 0: expected 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"batch_rows": -1}, "batch_rows = -1"),
        ({"limit": 0}, "limit = 0"),
        ({"seeds": ()}, "seeds = ()"),
        ({"seeds": (1, 1)}, "seeds = (1, 1)"),
        ({"grader": "maths"}, "grader = 'maths': expected one of math_verify, dapo_answer"),
        ({"tau": None}, "tau missing: criterion delta_logp needs a threshold"),
        ({"tau": float("nan")}, "tau = nan"),
        ({"gamma": float("inf")}, "gamma = inf"),
        ({"criterion": "dlogp"}, "criterion = 'dlogp': expected one of delta_logp, "),
        ({"criterion": None}, "criterion missing"),
        ({"rl": None}, "model 'pair' needs --rl"),
        ({"model": "rl"}, "belong to model 'pair'"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_logprobs": 0}, "top_logprobs = 0"),
        ({"name": "../x"}, "setting name '../x'"),
        ({"settings": (Setting("a", "rl"), Setting("a", "base")), "setting": Setting()}, "'a' occurs twice"),
        ({"settings": (Setting("a", "rl"),)}, "--settings.0.tau"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(change(PAIR, **values))


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
    with pytest.raises(ValueError, match=r"seed0.rows.jsonl, line 1: not a result row"):
        RowLog(path)


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
    config, inputs = resolve(PAIR), {"rl model": "1", "problem file": "2"}
    check_resume(tmp_path, config, inputs)
    write_config(tmp_path, config, inputs)
    write_config(tmp_path, config, {"problem file": "2"})  # a run that does not load rl keeps what is known of it
    added = dataclasses.replace(config, settings=(*config.settings, Setting("rl", "rl")))
    for harmless in (config, added, change(config, batch_rows=3, seeds=(5, 6), limit=1)):
        check_resume(tmp_path, harmless, inputs)
    (setting,) = config.settings
    with pytest.raises(ValueError, match="n = 4, now n = 8"):
        check_resume(tmp_path, change(config, n=8), inputs)
    with pytest.raises(ValueError, match="rl = 'r', now rl = 'q'"):
        check_resume(tmp_path, change(config, rl="q"), inputs)
    with pytest.raises(ValueError, match="another rl model"):
        check_resume(tmp_path, config, inputs | {"rl model": "3"})
    with pytest.raises(ValueError, match=r"setting 'delta.*', gamma = 0.05, now .* gamma = 0.5"):
        check_resume(tmp_path, change(config, settings=(dataclasses.replace(setting, gamma=0.5),)), inputs)


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
    timings = [Timing(50, 5.0, True), Timing(40, 2.0, False), Timing(10, 0.5, False)]
    got = summarise(Setting("x"), seeds, [3, 4], 2, timings)
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
    assert 0 <= got["interval"][0] <= 0.5 <= got["interval"][1] <= 1
    write_summaries(tmp_path, [got, got | {"setting": "y"}])
    assert json.loads((tmp_path / "summary.json").read_text())[0] == got
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(lines) == 3
    assert dict(zip(lines[0].split(","), lines[2].split(","), strict=True))["pass_at_4"] == "1.0"
    assert summary_table([got]).row_count == 1
    assert got["maj_at_k"] == 1.0  # 3: "1" has three of four votes; 4: "9" is the only answer


@pytest.mark.parametrize(("problems", "n", "batch_rows"), [(5, 4, 8), (5, 4, 3), (7, 5, 64), (1, 1, 1), (3, 7, 2)])
def test_a_plan_keeps_every_response_once(problems, n, batch_rows):
    batches = plan(problems, n, batch_rows)
    assert batches.units * batches.group <= batch_rows
    kept = []
    for batch in batches.batches:
        filled = batches.filled(batch)
        assert len(filled) == batches.units
        for row, place, sample in batches.kept(batch):
            unit = filled[row // batches.group]
            assert (place, sample) == (unit.place, unit.first + row % batches.group)
            kept.append((place, sample))
    assert sorted(kept) == [(place, sample) for place in range(problems) for sample in range(n)]
    assert len(kept) == len(set(kept))


def test_a_plan_is_even():
    assert plan(30, 4, 64).batches[1][0] == Unit(15, 0)  # 2 x 15 prompts rather than 16 + 14
    assert plan(1, 4, 3).group == 2  # 2 + 2 samples rather than 3 + 1
