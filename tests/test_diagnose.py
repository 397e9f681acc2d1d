"""The diagnosing program as a whole: against the library, cut off and resumed, and its one-sentence errors."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from decode.config import MeshConfig
from decode.diagnose import page as diagnose_page
from decode.diagnose import run as diagnose
from decode.diagnose.config import DiagnoseConfig, FindingsConfig, PageConfig
from decode.diagnose.inputs import read_given
from decode.diagnose.page import chosen
from rlvr_jax.data.text import load_tokenizer
from rlvr_jax.microscope import files
from rlvr_jax.microscope.pair import score_pair
from rlvr_jax.models.hf import load_hf
from rlvr_jax.runs.program import Preempted, RunError
from tests.tiny import tiny_checkpoint, write_tiny_problems

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DiagnoseConfig:
    """A pair of models and responses to 4 problems, of base and of rl."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, role in enumerate(("base", "rl")):
        tiny_checkpoint(folder / role, seed=seed, num_layers=1)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        text = "".join(rng.choice(list("0123456789+-=abc"), size=int(rng.integers(3, 19)))) + "<|im_end|>"
        content = f"{i % 4}+{i % 3}"
        rows.append(
            {"messages": [{"role": "user", "content": content}]}
            | {"problem": i % 4, "response": text, "source": ("base", "rl")[i // 4 % 2], "correct": bool(i % 2)}
            | ({"answer": "7"} if i % 2 else {})
        )
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DiagnoseConfig(
        **{"base": str(folder / "base"), "rl": str(folder / "rl"), "responses": (str(folder / "responses.jsonl"),)},
        **{"batch_tokens": 128, "chunk": 32, "top": 3, "mesh": MeshConfig(1, 1, 1), "compile_cache": None},
        findings=FindingsConfig(resamples=50),
    )


@pytest.fixture(scope="module")
def done(config, tmp_path_factory) -> DiagnoseConfig:
    """The same, finished."""
    config = dataclasses.replace(config, out=str(tmp_path_factory.mktemp("out")))
    diagnose.run(diagnose.checked(config))
    return config


def test_the_files_are_those_of_the_library(config, done):
    out, tokenizer = Path(done.out), load_tokenizer(str(config.rl))
    given = read_given(config.responses, tokenizer)
    responses = files.read_responses(out)
    assert [r.key for r in responses] == [one.key for one in given]
    assert [r.key for r in responses][:4] == [(0, 0, "base"), (0, 0, "rl"), (0, 1, "base"), (1, 0, "base")]
    assert responses[0].prompt == PROMPT.format("0+0")
    assert {(r.problem, r.correct, r.answer) for r in responses} == {
        (0, False, None), (1, True, "7"), (2, False, None), (3, True, "7")
    }  # fmt: skip
    models = [load_hf(path, dtype="float32") for path in (config.base, config.rl)]
    expected = score_pair(
        *models[0], *models[1], [one.prompt_ids for one in given], [one.tokens for one in given], top=3,
        batch_tokens=128, chunk=32, written_by=["base" if one.source == "base" else "rl" for one in given],
    )  # fmt: skip
    scored = files.read_scored(out, range(len(given)))
    for want, one, response in zip(expected, scored, responses, strict=True):
        assert "".join(one.pieces) == one.text == response.text
        for name in want._fields:
            got = getattr(one.columns, name)
            np.testing.assert_allclose(got, getattr(want, name), atol=1e-4, err_msg=name)
            assert got.dtype == getattr(want, name).dtype
    table, flat = files.read_tokens(out), files.flatten(scored)
    for name in ("response", "position", "token"):
        np.testing.assert_array_equal(getattr(table, name), getattr(flat, name))
    for name, values in table.values.items():
        np.testing.assert_array_equal(values, flat.values[name])
    assert table.text.to_pylist() == flat.text.to_pylist()
    words = files.read_vocabulary(out)
    assert words[tokenizer.encode("b")[0]] == "b"
    assert words.keys() >= set(table.token.tolist())


def test_what_is_looked_at_is_written(done, monkeypatch):
    out = Path(done.out)
    found = json.loads((out / "findings.json").read_text())
    tokens = pq.ParquetFile(out / "tokens.parquet").metadata.num_rows
    assert (found["tokens"], found["responses"], found["problems"], found["left_out"]) == (tokens, 12, 4, 0)
    assert sum(found["histograms"]["delta_logp"]["counts"]["rl"]) == found["sources"]["rl"]["tokens"]
    names = {"histograms", "gradient", "high_delta_logp", "position", "agreement", "token_types", "extremes"}
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert {path.stem for path in (out / "figures").glob("*" + suffix)} == names
        assert all(path.read_bytes().startswith(start) for path in (out / "figures").glob("*" + suffix))
    assert (out / "page.html").read_text().startswith("<!doctype html>")
    assert not (out / "parts").exists()
    monkeypatch.setattr(diagnose_page, "figures", lambda *_: [])  # drawing takes seconds
    before = (out / "findings.json").read_bytes()
    diagnose.run(diagnose.prepare(["page", str(out), "--findings.resamples", "50"]))
    assert (out / "findings.json").read_bytes() == before
    diagnose.run(diagnose.prepare(["page", str(out), "--findings.resamples", "60", "--page.problems", "1"]))
    assert (out / "findings.json").read_bytes() != before


def test_a_run_that_was_cut_off_goes_on(config, done, tmp_path, monkeypatch):
    """No response is scored twice, and the files are those of a run in one go: killed, damaged since, asked to end."""
    config = dataclasses.replace(config, out=str(tmp_path))
    scored = []
    write = diagnose._write_part

    def cut(folder, stretch, part):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.extend([[(one.problem, one.sample, one.source) for one in part]])
        write(folder, stretch, part)

    def asked_to_end(*part):
        write(*part)
        first.extend((one.problem, one.sample, one.source) for one in part[2])
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(diagnose, "STRETCH", 40)
    monkeypatch.setattr(diagnose, "draw_results", lambda *_: None)
    monkeypatch.setattr(diagnose, "_write_part", cut)
    job = diagnose.checked(config)
    with pytest.raises(KeyboardInterrupt):
        diagnose.run(job)
    assert not (tmp_path / "tokens.parquet").exists()
    _, second = sorted((tmp_path / "parts").iterdir())
    second.write_bytes(second.read_bytes()[:-30])  # damaged since: what it has is scored again
    first = scored[0]
    scored.clear()
    monkeypatch.setattr(diagnose, "_write_part", asked_to_end)
    with pytest.raises(Preempted, match=r"^stopped on request \(SIGTERM\), what was scored is saved; the same command"):
        diagnose.run(diagnose.checked(config))
    monkeypatch.setattr(diagnose, "_write_part", lambda *part: (scored.append(part[2]), write(*part)))
    diagnose.run(diagnose.checked(config))
    again = [(one.problem, one.sample, one.source) for part in scored for one in part]
    assert sorted(first + again) == sorted(r.key for r in files.read_responses(tmp_path))
    whole, resumed = (pq.read_table(Path(folder) / "tokens.parquet") for folder in (done.out, tmp_path))
    for name in whole.column_names:
        if whole[name].type in ("float", "double"):
            np.testing.assert_allclose(resumed[name].to_numpy(), whole[name].to_numpy(), atol=1e-4)
        elif "logp" not in name:
            assert resumed[name].to_pylist() == whole[name].to_pylist()


def test_decoding_runs_are_read(tmp_path, config):
    """The published format, its source, the problems' numbers and the drawn tokens from what lies beside it."""
    tokenizer = load_tokenizer(str(config.rl))
    folder = tmp_path / "base"
    folder.mkdir()
    entries = [
        {"prompt": PROMPT.format(i), "gt": str(i), "generated_texts": ["12", "3"], "accs": [True, False]}
        for i in range(2)
    ]
    for seed in (0, 1):
        (folder / f"seed{seed}.json").write_text(json.dumps(entries))
    (folder / "setting.json").write_text(json.dumps({"model": "pair", "criterion": "none", "sample_from": "base"}))
    (tmp_path / "problems.json").write_text(json.dumps([{"index": 4}, {"index": 7}]))
    rows = [{"seed": 0, "problem": 4, "sample": 0, "tokens": [1, 2, 40]}]
    pq.write_table(files.pa.Table.from_pylist(rows), folder / "tokens.parquet")
    paths = [str(folder / "seed0.rows.jsonl"), str(folder / "seed1.json")]
    given = read_given(paths, tokenizer)
    assert [one.key for one in given] == [(p, s, "base") for p in (4, 7) for s in range(4)]
    assert [one.tokens for one in given][:3] == [[1, 2, 40], [3], [1, 2]]
    assert [one.correct for one in given] == [True, False] * 4
    assert [one.answer for one in given] == ["0"] * 4 + ["1"] * 4
    lines = tmp_path / "plain.jsonl"
    lines.write_text("".join(json.dumps({"prompt": p, "response": "1"}) + "\n" for p in "abba"))
    assert [one.key for one in read_given([str(lines)], tokenizer)] == [
        (0, 0, "given"), (0, 1, "given"), (1, 0, "given"), (1, 1, "given")
    ]  # fmt: skip


def test_what_the_page_shows_is_spread_over_problems():
    responses = [
        files.Response(problem, sample, source, "", "", None, None, 1)
        for problem in range(10)
        for sample in range(2)
        for source in ("base", "rl")
    ]
    shown = [responses[place].key for place in chosen(responses, PageConfig(8))]
    assert shown == [(p, 0, source) for p in (0, 2, 5, 7) for source in ("base", "rl")]
    assert len(chosen(responses, PageConfig(30))) == 30
    assert {responses[i].problem for i in chosen(responses, PageConfig(8, (3, 4)))} == {3, 4}
    with pytest.raises(ValueError, match=r"page\.problems has 11"):
        chosen(responses, PageConfig(8, (3, 11)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "base missing"),
        ({"problems": "p.jsonl"}, "expected one of --responses PATH and --problems FILE, both are given"),
        ({"responses": ("nowhere.jsonl",)}, r"nowhere\.jsonl: no such file"),
        ({"chunk": 0}, "chunk=0: expected 1 to"),
        ({"top": 49}, "top = 49: expected at most 48"),
        ({"findings": FindingsConfig(rate=0.7)}, r"findings\.rate=0\.7: expected above 0, at most 0\.5"),
    ],
)
def test_what_is_wrong_is_said_before_work(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        diagnose.checked(dataclasses.replace(config, out=str(tmp_path), **change))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "1"}, "expected prompt, a text as the model reads it, or messages"),
        ({"prompt": "1"}, "response = None: expected a text"),
        ({"prompt": "1", "response": "2", "problem": "what"}, "problem = 'what': expected a number"),
        ({"prompt": "1", "response": "2", "source": "sft"}, "source = 'sft': expected one of base, rl, given"),
        ({"prompt": "1", "tokens": ["a"]}, "expected a list of token ids"),
        ({"prompt": "1", "tokens": [48]}, "token 48, the base model has 48"),
        ({"prompt": "1", "tokens": [1] * 300}, "301 tokens with its prompt, the base model has 256 positions"),
        ({"prompt": "", "response": "2"}, "its prompt is empty"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(config, tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        diagnose.checked(dataclasses.replace(config, out=str(tmp_path / "out"), responses=(str(path),)))


def test_a_folder_of_another_diagnosis_is_refused(done):
    with pytest.raises(ValueError, match="it holds a run with top = 3, now top = 4"):
        diagnose.checked(dataclasses.replace(done, top=4))
    with pytest.raises(RunError, match=r"no tokens\.parquet and no step_"):
        diagnose.run(diagnose.prepare(["page", str(Path(done.out) / "figures")]))


@pytest.mark.slow
def test_problems_are_decoded_and_a_killed_run_goes_on(config, tmp_path):
    """Killed for real, while it scores; then the same command ends with what a run in one go has."""
    write_tiny_problems(tmp_path / "problems.jsonl", 40)
    options = ["--problems", str(tmp_path / "problems.jsonl"), "--n", "4", "--max-new-tokens", "40"]
    options += ["--base", str(config.base), "--rl", str(config.rl), "--batch-tokens", "64", "--mesh.tensor", "1"]
    options += ["--graders", "tests.tiny_pair:contains_answer", "--findings.resamples", "50"]
    for name in ("killed", "whole"):
        out = tmp_path / name
        command = [sys.executable, "-m", "decode", "diagnose", *options, "--out", str(out)]
        process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        if name == "killed":
            while len(list((out / "parts").glob("*-*.parquet"))) < 3 and process.poll() is None:
                time.sleep(0.01)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            kept = {path: path.read_bytes() for path in (out / "parts").glob("*-*.parquet")}
            assert kept
            process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        assert process.wait() == 0
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    assert files.read_responses(killed) == files.read_responses(whole)
    one, other = files.read_tokens(killed), files.read_tokens(whole)
    np.testing.assert_array_equal(one.token, other.token)
    for name, values in one.values.items():
        np.testing.assert_allclose(values, other.values[name], atol=1e-3)
    found = json.loads((killed / "findings.json").read_text())
    assert (found["responses"], found["problems"]) == (2 * 4 * 40, 40)
    assert found["sources"]["base"]["mean_delta_logp"]["value"] < 0 < found["sources"]["rl"]["mean_delta_logp"]["value"]
