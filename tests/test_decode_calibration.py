"""Thresholds for a wanted share: found from the sampled model's own responses, kept, and used again."""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest

import decode.run
import decode.settings.calibrate
from decode.config import Calibration, Controls, DecodeConfig, Grid, MeshConfig, Setting
from rlvr_jax.criteria import fires
from rlvr_jax.models.hf import load_hf
from rlvr_jax.runs.program import RunError
from tests.decoding_tools import full_logprobs
from tests.test_decode_program import results
from tests.tiny import tiny_checkpoint, write_tiny_problems

SHARE = 0.2


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> DecodeConfig:
    """A finished sweep at a matched share, with controls."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed, role in enumerate(("base", "rl")):
        tiny_checkpoint(folder / role, seed=seed, num_layers=1)
    write_tiny_problems(folder / "problems.jsonl", 5)
    config = DecodeConfig(
        **{"base": str(folder / "base"), "rl": str(folder / "rl"), "problems": str(folder / "problems.jsonl")},
        **{"n": 2, "max_new_tokens": 16, "slots": 8, "graders": ("tests.tiny_pair:contains_answer",)},
        **{"mesh": MeshConfig(1, 1, 1), "grader_workers": 1, "out": str(folder / "out")},
        grid=Grid(("delta_logp", "random"), gammas=(0.1,), sample_from=("rl",)),
        match_rate=(SHARE,),
        controls=Controls(skip=("base",), temperatures=(0.0,)),
        calibration=Calibration(responses=7),
        setting=Setting(top_p=1.0),
    )
    decode.run.run(decode.run.check(config))
    return config


def calibration(config: DecodeConfig) -> dict:
    return json.loads((Path(config.out) / "calibration.json").read_text())


def test_tau_selects_the_share_of_the_sampled_models_tokens(swept):
    found = calibration(swept)
    (account,) = found["passes"]
    assert (account["sampled"], account["responses"], account["problems"]) == ("rl", 7, 5)
    lines = (Path(swept.out) / "calibration" / "rl_t1_p1.jsonl").read_text().splitlines()
    responses = [json.loads(line) for line in lines]
    assert sorted((r["problem"], r["sample"]) for r in responses) == [(p, 0) for p in range(5)] + [(0, 1), (1, 1)] or (
        sorted((r["problem"], r["sample"]) for r in responses) == sorted([*((p, 0) for p in range(5)), (0, 1), (1, 1)])
    )
    assert account["tokens"] == sum(len(r["tokens"]) for r in responses)
    inputs = decode.run.read_inputs(decode.run.resolve(swept))
    models = [load_hf(path, dtype="float32") for path in (swept.base, swept.rl)]
    by_name = {entry["criterion"]: entry for entry in found["thresholds"]}
    assert set(by_name) == {"delta_logp", "abs_delta_logp", "random"}
    assert len(found["thresholds"]) == 3  # settings that differ in gamma alone share one
    assert by_name["random"]["tau"] == SHARE
    selected = {"delta_logp": 0, "abs_delta_logp": 0}
    for response in responses:
        prompt, tokens = inputs.prompts[response["problem"]], np.array(response["tokens"])
        at = np.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        logp = [
            full_logprobs(config, params, [prompt + response["tokens"]])[0, at].astype(np.float32)
            for config, params in models
        ]
        for name in selected:
            selected[name] += int(np.asarray(fires(name, *logp, tokens, by_name[name]["tau"])).sum())
    for name, count in selected.items():
        entry = by_name[name]
        assert entry["tokens"] == account["tokens"]
        assert entry["share_selected"] == pytest.approx(SHARE, abs=1 / account["tokens"])
        assert count == round(entry["share_selected"] * account["tokens"])


def test_the_sweep_has_its_controls_and_says_so(swept):
    records = {r["setting"]: r for r in json.loads((Path(swept.out) / "summary.json").read_text())}
    wanted = ["delta_logp_share0.2_gamma0.1_from-rl_t1_p1", "random_share0.2_gamma0.1_from-rl_t1_p1"]
    assert [name for name, record in records.items() if record["role"] == "setting"] == wanted
    assert {name: (r["role"], r["control_of"]) for name, r in records.items() if r["role"] != "setting"} == {
        "delta_logp_share0.2_gamma0_from-rl_t1_p1": ("gamma0", wanted[:1]),
        "random_share0.2_gamma0_from-rl_t1_p1": ("gamma0", wanted[1:]),
        "abs_delta_logp_share0.2_gamma0.1_from-rl_t1_p1": ("abs_delta_logp", wanted[:1]),
        "rl_t1_p1": ("rl", wanted),
        "rl_t0_p1": ("temperatures", wanted),
    }
    taus = {entry["criterion"]: entry["tau"] for entry in calibration(swept)["thresholds"]}
    assert records[wanted[0]]["tau"] == taus["delta_logp"]
    assert records[wanted[0]]["share_wanted"] == SHARE
    assert set(records[wanted[0]]["differences"]) == {"rl", "gamma0"}
    assert 0 < records[wanted[0]]["share_selected"] < 1


def test_what_was_found_is_kept(swept, monkeypatch):
    """A finished run resumed loads nothing; one with another criterion adds its threshold and changes no other."""
    before, files = calibration(swept), results(swept)
    with monkeypatch.context() as patch:
        patch.setattr(decode.run, "load", None)
        decode.run.run(decode.run.check(swept))
    assert calibration(swept) == before
    assert results(swept) == files
    more = dataclasses.replace(
        swept, grid=dataclasses.replace(swept.grid, criteria=("delta_logp", "kl")), controls=Controls(False)
    )
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(
            decode.settings.calibrate, "draw", lambda *args, **options: drawn.append(args[3][0][1]) or iter(())
        )
        decode.run.run(decode.run.check(more))
    assert drawn == [[]]  # the responses that are on disk are scored again, none is drawn
    after = calibration(swept)
    assert after["thresholds"][: len(before["thresholds"])] == before["thresholds"]
    assert [entry["criterion"] for entry in after["thresholds"][len(before["thresholds"]) :]] == ["kl"]


def test_tokens_without_a_number_are_left_out(swept, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(
        swept, out=str(tmp_path), grid=Grid(("kl",), sample_from=("rl",)), controls=Controls(False)
    )
    measure, left_out = decode.settings.calibrate.criterion_values, []

    def poisoned(*args, **options):
        assert options["sample_from"] == "rl"  # whose most probable tokens `top_logprobs` would take
        found = measure(*args, **options)
        for rows in (x[:many] for x in found.values()):
            left_out.append(sum(row.size for row in rows))
            for row in rows:
                row[:] = np.nan
        return found

    monkeypatch.setattr(decode.settings.calibrate, "criterion_values", poisoned)
    many = None
    with pytest.raises(RunError, match="no token of 7 responses has a kl: a model's logits are not finite"):
        decode.run.run(decode.run.check(config))
    many = 1
    decode.run.run(decode.run.check(config))
    found = calibration(config)
    assert found["thresholds"][0]["tokens"] == found["passes"][0]["tokens"] - left_out[-1]
    assert f"{left_out[-1]} tokens are left out" in capsys.readouterr().err


def test_infinite_values_count_and_missing_ones_do_not():
    """A token that one model rules out has a criterion, and it is the first that a share selects."""
    said = []
    rows = [np.array([0.5, np.inf], np.float32), np.array([np.nan, -np.inf], np.float32)]
    progress = types.SimpleNamespace(say=said.append)
    assert decode.settings.calibrate._numbers("kl", rows, progress).tolist() == [0.5, np.inf, -np.inf]
    assert said == ["  kl: 1 tokens are left out, a model's logits are not finite there"]


def test_calibration_responses_are_spread_over_the_problems():
    assert decode.settings.calibrate._spread(3, 10) == [(0, 0), (3, 0), (6, 0)]
    assert decode.settings.calibrate._spread(10, 10) == [(place, 0) for place in range(10)]
    assert decode.settings.calibrate._spread(7, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_share_that_ties_miss_is_said():
    entry = {"criterion": "kl", "share": 0.05, "tau": 0.0, "share_selected": 0.4, "tokens": 1000, "tied": 0.38}
    said = decode.settings.calibrate._said(entry)
    assert said == (
        "  kl at 5%: tau = 0, selects 40.00% of 1,000 tokens "
        "(38.0% of them have one value, which is selected or not as a whole)"
    )
    assert "one value" not in decode.settings.calibrate._said(entry | {"share_selected": 0.0501})
    assert decode.settings.calibrate._said(entry | {"criterion": "random"}) == "  random at 5%: tau = 0"


def test_a_lost_threshold_is_not_found_anew(swept, tmp_path):
    path = Path(swept.out) / "calibration.json"
    content = path.read_text()
    path.unlink()
    try:
        with pytest.raises(RunError, match=r"calibration.json has no threshold for 'delta_logp_share0.2.*10 responses"):
            decode.run.run(decode.run.check(swept))
        with pytest.raises(ValueError, match="calibration"):
            decode.run.check(dataclasses.replace(swept, calibration=Calibration(responses=8)))
        at = content.index('"tau": ') + len('"tau": -0.')
        path.write_text(f"{content[:at]}{(int(content[at]) + 1) % 10}{content[at + 1 :]}")
        with pytest.raises(RunError, match=r"calibration.json: damaged: not what was written"):
            decode.run.run(decode.run.check(swept))
    finally:
        path.write_text(content)
