"""The batch decoding program as a whole: against the library, killed and resumed, and its one-sentence errors."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest

import decode.check.inputs
import decode.run
from decode.config import DecodeConfig, MeshConfig, Setting
from decode.results.summary import TIMINGS
from decode.settings.sweep import resolve
from rlvr_jax.data.text import load_tokenizer, stop_token_ids
from rlvr_jax.decoding.selective import decode_selective
from rlvr_jax.generation import language_model
from rlvr_jax.models.hf import load_hf
from rlvr_jax.runs.lock import FolderInUse
from rlvr_jax.runs.program import run_program
from tests.tiny import devices, tiny_checkpoint, write_tiny_problems

DELTA = Setting("delta", "pair", "delta_logp", tau=-3.0, gamma=0.5, top_p=1.0)
RL = Setting("rl", "rl")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> DecodeConfig:
    """A pair of models and 6 problems, one of them listed twice; 7 responses at a time, two graders."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, role in enumerate(("base", "rl")):
        tiny_checkpoint(folder / role, seed=seed, num_layers=1)
    rows = [
        {"id": f"q{i}", "problem": f" {i}+{i * i} ", "answer": str((i + i * i) % 10)} for i in (0, 1, 2, 2, 3, 4, 5)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DecodeConfig(
        **{"base": str(folder / "base"), "rl": str(folder / "rl"), "problems": str(folder / "problems.jsonl")},
        **{"seeds": (0, 3), "n": 3, "max_new_tokens": 24, "slots": 7, "prompt_suffix": "="},
        **{
            "settings": (DELTA, RL),
            "graders": ("tests.tiny_pair:contains_answer", "math_verify"),
            "mesh": MeshConfig(1, 1, 1),
        },
        **{"save_tokens": True, "grader_workers": 1},
    )


@pytest.fixture(scope="module")
def done(job, tmp_path_factory) -> DecodeConfig:
    """The same, finished."""
    config = dataclasses.replace(job, out=str(tmp_path_factory.mktemp("out")))
    decode.run.run(decode.run.check(config))
    return config


class Close(list):
    """Log-probabilities: their last digits depend on how many tokens a model reads at once."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Close) and len(self) == len(other) and np.allclose(self, other, atol=1e-4)


def table(path: Path) -> list[dict]:
    """The rows of a tokens.parquet."""
    rows = pq.read_table(path).to_pylist()
    return [{k: Close(x) if k in ("logp", "delta_logp") else x for k, x in row.items()} for row in rows]


def results(config: DecodeConfig) -> dict[str, object]:
    """Everything a run leaves that must not depend on how it came about."""
    out, found = Path(config.out), {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".parquet":
            found[name] = table(path)
        elif path.suffix == ".json" and path.name.startswith("seed"):
            found[name] = path.read_bytes()
        elif path.name == "summary.json":
            records = json.loads(path.read_text())
            records = records if isinstance(records, list) else [records]
            found[name] = [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]
        elif path.suffix == ".jsonl":
            found[name] = sorted(line for line in path.read_text().splitlines() if "timing" not in line)
    return found


def test_a_run_equals_the_library(job, done):
    tokenizer = load_tokenizer(job.rl)
    (published_rows, rl_rows) = (
        json.loads((Path(done.out) / name / "seed3.json").read_text()) for name in ("delta", "rl")
    )
    assert [row["gt"] for row in published_rows] == ["0", "2", "6", "2", "0", "0"]
    assert published_rows[1]["prompt"] == "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    loaded = [load_hf(path, dtype="float32") for path in (job.base, job.rl)]
    models = tuple(language_model(dataclasses.replace(config, dtype="float32")) for config, _ in loaded)
    params = tuple(params for _, params in loaded)
    at = 3  # the problem in row 4 of the file
    alone = decode_selective(
        models, params, [tokenizer.encode(published_rows[at]["prompt"])], criterion="delta_logp", tau=-3.0, gamma=0.5,
        max_new_tokens=24, n=2, seed=3, problem_ids=[4], sample_ids=[2, 1],
        stop_tokens=stop_token_ids(tokenizer, job.rl),
    )  # fmt: skip
    for row, sample in enumerate((2, 1)):
        length = int(alone.lengths[row])
        ids, proposed = alone.tokens[row, :length].tolist(), alone.sampled_token[row].tolist()
        fired = alone.fired[row].nonzero()[0].tolist()
        got = {key: published_rows[at][key][sample] for key in published_rows[at] if key not in ("prompt", "gt")}
        assert got == {
            "generated_texts": tokenizer.decode(ids, skip_special_tokens=False),
            "accs": "2" in tokenizer.decode(ids, skip_special_tokens=True),
            "lengths": length,
            "resample_rates": len(fired) / length,
            "resample_infos": {
                str(i): {"original": proposed[i], "assistant": None, "resampled": ids[i]} for i in fired
            },
        }
    assert 0 < published_rows[at]["resample_rates"][1] < 1
    assert rl_rows[0]["resample_infos"] == [{}, {}, {}]
    rows = pq.read_table(Path(done.out) / "delta" / "tokens.parquet").to_pylist()
    assert len(rows) == 2 * 6 * 3
    (row,) = [row for row in rows if (row["seed"], row["problem"], row["sample"]) == (3, 4, 1)]
    assert row["tokens"] == alone.tokens[1, : alone.lengths[1]].tolist()
    assert row["delta_logp"] == pytest.approx(alone.delta_logp[1, : alone.lengths[1]].tolist(), abs=1e-4)
    assert sum(row["fired"]) == len(fired)
    assert "delta_logp" not in pq.read_table(Path(done.out) / "rl" / "tokens.parquet").column_names
    summary = json.loads((Path(done.out) / "summary.json").read_text())
    assert [record["setting"] for record in summary] == ["delta", "rl"]
    assert summary[0]["tokens"] == sum(len(row["tokens"]) for row in rows)
    assert json.loads((Path(done.out) / "config.json").read_text())["settings"][0]["tau"] == -3.0


def test_results_do_not_depend_on_the_batch(done, tmp_path):
    other = dataclasses.replace(done, out=str(tmp_path), slots=2, settings=(RL,))
    decode.run.run(decode.run.check(other))
    got = results(other)
    assert got.pop("summary.json") == results(done)["summary.json"][1:]
    for name in ("rl/seed0.json", "rl/seed3.json", "rl/summary.json", "rl/seed3.rows.jsonl"):
        assert got[name] == results(done)[name]


def test_every_response_of_a_chunk_waited_for_a_compilation(monkeypatch):
    counter, flags = types.SimpleNamespace(count=5), []

    def draw(*args, on_chunk, **options):
        for compiled in (1, 0, 2):
            on_chunk(0, 0)
            counter.count += compiled
            yield from [(RL, None)] * 2

    monkeypatch.setattr(decode.run, "compilations", lambda: counter)
    monkeypatch.setattr(decode.run, "draw", draw)
    writer = types.SimpleNamespace(put=lambda destination, drawn, *, compiled: flags.append(compiled))
    one = types.SimpleNamespace(decoded=RL, setting=RL, number=1, missing=[], destination=None)
    job = mock.MagicMock(plans={"rl": types.SimpleNamespace(slots=2)})
    decode.run._decode(job, {}, [one], writer, mock.MagicMock(), lambda phase: None)
    assert flags == [True, True, False, False, True, True]


def test_a_finished_run_is_not_decoded_again(done, monkeypatch):
    before = results(done)
    monkeypatch.setattr(decode.run, "load", None)
    (Path(done.out) / "rl" / "seed3.json").unlink()
    decode.run.run(decode.run.check(dataclasses.replace(done, slots=64)))
    assert results(done) == before


def test_a_half_written_batch_is_done_again(done, tmp_path):
    """All but one row of one batch and half of that row are on disk, and the published file is not."""
    config = dataclasses.replace(done, out=str(tmp_path / "copy"), settings=(RL,))
    subprocess.run(["cp", "-r", done.out, config.out], check=True)
    log = Path(config.out) / "rl" / "seed3.rows.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().split(b"\n")[:-4])[:-20])
    (Path(config.out) / "rl" / "seed3.json").unlink()
    decode.run.run(decode.run.check(config))
    expected = results(done)
    got = results(config)
    assert got == expected | {"summary.json": expected["summary.json"][1:]}


def test_killed_at_any_moment_and_resumed(job, tmp_path):
    write_tiny_problems(tmp_path / "problems.jsonl", 40)
    job = dataclasses.replace(job, problems=str(tmp_path / "problems.jsonl"), settings=(RL, DELTA))
    environment = os.environ | devices(1) | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(out: str) -> subprocess.Popen:
        config = dataclasses.replace(job, out=str(tmp_path / out))
        recipe = tmp_path / f"{out}.py"
        recipe.write_text(f"from decode.config import *\nconfig = {config!r}\n")
        command = [sys.executable, "-m", "decode", "--config", str(recipe)]
        return subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent)

    assert start("whole").wait() == 0
    for log in ("rl/seed3", "delta/seed0"):
        process, path = start("killed"), tmp_path / "killed" / f"{log}.rows.jsonl"
        while process.poll() is None and not (path.exists() and path.stat().st_size > 3000):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        assert not (tmp_path / "killed" / f"{log}.json").exists()
    assert start("killed").wait() == 0
    got, expected = (results(dataclasses.replace(job, out=str(tmp_path / out))) for out in ("killed", "whole"))
    assert got.keys() == expected.keys()
    assert got == expected


# ---- bad input -----------------------------------------------------------------------------------------------------


def fails(monkeypatch, capsys, *words: object) -> tuple[int, str]:
    """Exit code and error text of the program."""
    monkeypatch.setattr(sys, "argv", ["decode", *map(str, words)])
    try:
        code = run_program(decode.run.prepare, decode.run.run)
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err


def test_bad_input_ends_with_one_sentence(job, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.py").write_text("from decode.config import *\nconfig = DecodeConfig(basis='x')\n")
    (tmp_path / "other").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "other" / name).write_bytes((Path(job.base) / name).read_bytes())
    tokenizer = (
        (Path(job.base) / "tokenizer.json").read_text().replace('"+":10', '"~":10').replace('"+": 10', '"~": 10')
    )
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer)
    pair = ("--base", job.base, "--rl", job.rl, "--criterion", "delta_logp", "--tau", "-0.3", "--max-new-tokens", 20)
    good = (*pair, "--problems", job.problems, "--out", tmp_path / "out")
    for words, message in [
        ((*good, "--taus", "1"), "--taus"),
        (("--config", tmp_path / "bad.py"), "unexpected keyword argument 'basis'"),
        (("--config", tmp_path / "none.py"), "none.py: no such file"),
        ((*good, "--n", "0"), "n=0: expected 1 to 1,000,000"),
        ((*good, "--tau", "None"), "tau missing"),
        ((*good, "--base", tmp_path / "none"), "base = "),
        ((*good, "--base", tmp_path), "no .safetensors file"),
        ((*good, "--problems", tmp_path / "none.jsonl"), "none.jsonl"),
        ((*good, "--problems", tmp_path / "empty.jsonl"), "empty.jsonl"),
        ((*good, "--base", tmp_path / "other"), "vocabulary mismatch: token 10 is '+' in "),
        ((*good, "--max-prompt-tokens", "9"), "problem 'q0' of "),
        ((*good, "--max-new-tokens", "250"), "max_position_embeddings"),
        ((*good, "--graders", "tests.tiny_pair:nothing"), "tests.tiny_pair:nothing"),
        ((*good, "--stop-token-ids", "48"), "stop_token_ids: 48"),
        ((*good, "--mesh.data", "3"), "mesh"),
    ]:
        code, error = fails(monkeypatch, capsys, *words)
        assert (code, message in " ".join(error.split())) == (2, True), f"{words}: {code}, {error}"
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_tokens_that_one_side_alone_defines_are_allowed(job, tmp_path, caplog):
    def vocabulary(name: str, change) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for path in Path(job.base).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return str(folder)

    def add(content):
        last = content["added_tokens"][-1]
        content["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<tool>"})

    def swap(content):
        one, other = content["added_tokens"][-2:]
        one["content"], other["content"] = other["content"], one["content"]

    def move(content):
        add(content)
        swap(content)

    decode.check.inputs.read_inputs(resolve(dataclasses.replace(job, base=vocabulary("more", add))))
    assert "1 tokens, from 35 '<tool>' on, are defined by the tokenizer in" in caplog.text
    for name, change, message in (
        ("swapped", swap, r"token 33 is '<\|im_start\|>' in .* and '<\|im_end\|>' in "),
        ("moved", move, r"token 34 is '<\|im_end\|>' in .* and '<tool>' in "),
    ):
        with pytest.raises(ValueError, match=f"vocabulary mismatch: {message}"):
            decode.check.inputs.read_inputs(resolve(dataclasses.replace(job, base=vocabulary(name, change))))
    bare = Path(vocabulary("bare", add))
    (bare / "tokenizer.json").unlink()
    decode.check.inputs.read_inputs(resolve(dataclasses.replace(job, base=str(bare))))
    assert f"{bare} has no tokenizer.json" in caplog.text


def test_a_run_that_fails_ends_with_one_sentence(job, tmp_path, monkeypatch, capsys):
    tiny_checkpoint(tmp_path / "cut", seed=2)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ("--rl", tmp_path / "cut", "--problems", job.problems, "--out", tmp_path / "out", "--max-new-tokens", 20)
    code, error = fails(monkeypatch, capsys, *words)
    assert code == 1
    assert "model.safetensors" in error


def test_what_is_damaged_is_drawn_again(done, tmp_path, caplog):
    """A row whose text has changed, a line that is none, and a table of tokens with one bit flipped."""
    config = dataclasses.replace(done, out=str(tmp_path / "copy"))
    subprocess.run(["cp", "-r", done.out, config.out], check=True)
    log, table = Path(config.out) / "rl" / "seed3.rows.jsonl", Path(config.out) / "delta" / "tokens.parquet"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join((b"{\n", lines[0].replace(b'"text": "', b'"text": "a'), *lines[1:])))
    data = bytearray(table.read_bytes())
    data[100] ^= 4
    table.write_bytes(data)
    decode.run.run(decode.run.check(config))
    assert results(config) == results(done)
    assert "seed3.rows.jsonl: 2 damaged lines, the first is line 1 (not JSON" in caplog.text
    assert "delta/tokens.parquet: damaged (" in caplog.text


def test_a_run_keeps_its_dtype(done, monkeypatch):
    """What the platform chose is what the run holds, wherever it is resumed."""
    decode.run.check(dataclasses.replace(done, dtype="float32")).folder.release()
    monkeypatch.setattr(decode.run.jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="dtype = 'float32', now dtype = 'bfloat16'"):
        decode.run.check(done)


def test_two_runs_cannot_share_a_folder(done, monkeypatch, capsys):
    held = decode.run.check(done)
    with pytest.raises(FolderInUse, match="in use by process"):
        decode.run.check(done)
    held.folder.release()
    with pytest.raises(ValueError, match="now n = ") as refused:  # a refused start holds nothing, seen or forgotten
        decode.run.check(dataclasses.replace(done, n=done.n + 1))
    decode.run.check(done).folder.release()
    del refused
