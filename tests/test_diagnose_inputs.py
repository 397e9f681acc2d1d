"""What a diagnosis scores: the tokens that were drawn, from the files and folders that runs leave."""

import dataclasses
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decode.config import Setting
from decode.diagnose.files import response_files
from decode.diagnose.inputs import read_given
from decode.results.files import RowLog, published
from rlvr_jax.data.text import decode_ids
from rlvr_jax.data.token_ids import pack_ids, unpack_ids
from tests.test_decode_files import row
from tests.tiny import tiny_tokenizer
from train.records.tokens import drawn

PROMPTS = ("<|im_start|>user\n1+1<|im_end|>\n", "<|im_start|>user\n2+2<|im_end|>\n")


@pytest.fixture(scope="module")
def tokenizer():
    """With a token for "12", which a model may write digit by digit as well."""
    made = tiny_tokenizer()
    made.add_tokens(["12"])
    return made


@pytest.fixture(scope="module")
def other_split(tokenizer):
    """Tokens that no tokenizer would split their text into."""
    tokens = [token for letter in "12+12" for token in tokenizer.encode(letter)]
    assert (decode_ids(tokenizer, tokens), len(tokens), len(tokenizer.encode("12+12"))) == ("12+12", 5, 3)
    return tokens


def write_run(folder, tokenizer, drawn_ids, *, setting="rl", model="rl", keep=True, seed=0):
    """A finished setting of a decoding run, with the same two samples to each of the problems 4 and 7."""
    rows = {
        (problem, sample): row(
            problem, sample, text=decode_ids(tokenizer, drawn_ids), length=len(drawn_ids), correct=bool(sample),
            ids=pack_ids(drawn_ids) if keep else "",
        )
        for problem in (4, 7)
        for sample in range(2)
    }  # fmt: skip
    out = folder / setting
    RowLog(out / f"seed{seed}.rows.jsonl").append(list(rows.values()))
    entries = published([(4, PROMPTS[0], "2"), (7, PROMPTS[1], "4")], rows, 2)
    (out / f"seed{seed}.json").write_text(json.dumps(entries))
    (out / "setting.json").write_text(json.dumps(dataclasses.asdict(Setting(setting, model))))
    (folder / "problems.json").write_text(json.dumps([{"index": 4}, {"index": 7}]))
    return out


def rollout(tokenizer, prompt, tokens, **values):
    """A line of a training run's rollouts."""
    return {
        "problem": "a name",
        **drawn(tokenizer, prompt, np.array(tokens)),
        **{"response": decode_ids(tokenizer, tokens), "answer": "2", "correct": True, "length": len(tokens)},
        **{"group": 0, "sampled_at": 3, "tokens": [["1", 0.5, 1.0, -0.25]] * len(tokens)},
    } | values


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def test_ids_are_packed_and_come_back():
    for ids in ([], [0], [151_935, 7, 7, 2**31 - 1]):
        assert unpack_ids(pack_ids(np.array(ids, np.int32))) == ids
    text = pack_ids(np.random.default_rng(0).integers(0, 150_000, 10_000))
    assert len(text) < 4 * 10_000  # of numbers without any order; a list of them takes 7
    for damaged in ("not base64!", text[:100], "AAAA"):
        with pytest.raises(ValueError, match="not packed token ids"):
            unpack_ids(damaged)


def test_decoding_runs_are_scored_by_the_tokens_they_drew(tmp_path, tokenizer, other_split, caplog):
    out = write_run(tmp_path, tokenizer, other_split)
    write_run(tmp_path, tokenizer, other_split, setting="base", model="base")
    for path, sources in (
        (out / "seed0.json", {"rl"}),
        (out / "seed0*", {"rl"}),
        (out / "seed0.rows.jsonl", {"rl"}),
        (tmp_path, {"base", "rl"}),
    ):
        given = read_given([str(path)], tokenizer)
        assert [one.tokens for one in given] == [other_split] * 4 * len(sources)
        assert {one.source for one in given} == sources
        assert {one.problem for one in given} == {4, 7}
    assert not caplog.records


def test_a_text_that_is_split_in_another_way_is_warned_of(tmp_path, tokenizer, other_split, caplog):
    """Once per file, with both counts; not where the counts agree or are not known."""
    out = write_run(tmp_path, tokenizer, other_split, keep=False)
    with caplog.at_level(logging.WARNING):
        given = read_given([str(out)], tokenizer)
    (record,) = caplog.records
    assert {tuple(one.tokens) for one in given} == {tuple(tokenizer.encode("12+12"))}
    said = record.getMessage()
    assert "seed0.json: it has no token ids, and 4 of its 4 responses" in said
    assert f"({4 * len(other_split)} tokens drawn, {4 * len(given[0].tokens)} scored)" in said
    caplog.clear()
    rows = [{"seed": 0, "problem": p, "sample": s, "tokens": other_split} for p in (4, 7) for s in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), out / "tokens.parquet")  # of --save-tokens
    assert {tuple(one.tokens) for one in read_given([str(out)], tokenizer)} == {tuple(other_split)}
    write_run(tmp_path / "plain", tokenizer, tokenizer.encode("12"), keep=False)
    read_given([str(tmp_path / "plain")], tokenizer)
    read_given([write_lines(tmp_path / "own.jsonl", [{"prompt": "1", "response": "12"}])], tokenizer)
    assert not caplog.records
    read_given([write_lines(tmp_path / "own.jsonl", [{"prompt": "1", "response": "12", "length": 3}])], tokenizer)
    assert len(caplog.records) == 1


def test_rollouts_of_training_are_read(tmp_path, tokenizer, other_split, caplog):
    """From the run's folder, that of the rollouts, a pattern or a file: problems by their prompt, ids as drawn."""
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    cut = prompts[1][2:]  # a prompt that lost tokens on the left
    for step, rows in (
        (2, [rollout(tokenizer, prompts[0], other_split), rollout(tokenizer, cut, [1, 2], correct=False)]),
        (10, [rollout(tokenizer, prompts[0], [3]), rollout(tokenizer, prompts[0], [4, 5])]),
    ):
        write_lines(tmp_path / "rollouts" / f"step_{step:06d}.jsonl", rows)
    (tmp_path / "config.json").write_text(json.dumps({"run_dir": "x"}))
    folder = str(tmp_path / "rollouts")
    for path in (str(tmp_path), folder, f"{folder}/step_*.jsonl"):
        given = read_given([path], tokenizer)
        assert [(one.problem, one.sample, one.source, one.tokens) for one in given] == [
            (0, 0, "step 10", [3]), (0, 0, "step 2", other_split), (0, 1, "step 10", [4, 5]), (1, 0, "step 2", [1, 2])
        ]  # fmt: skip
        assert given[-1].prompt_ids == cut
        assert (given[-1].correct, given[0].correct, given[0].answer) == (False, True, "2")
    assert not caplog.records
    assert len(read_given([folder], tokenizer, limit=1)) == 2  # of each file
    # Files of older runs have no ids: the text is tokenized, without the stop token it lost, and that is said.
    old = rollout(tokenizer, prompts[0], [*tokenizer.encode("12"), tokenizer.eos_token_id], response="12")
    old = {key: value for key, value in old.items() if key not in ("ids", "prompt_ids")}
    (one,) = read_given([write_lines(tmp_path / "old" / "step_000001.jsonl", [old])], tokenizer)
    assert (one.tokens, one.prompt_ids) == (tokenizer.encode("12"), prompts[0])
    assert "1 of its 1 responses" in caplog.text
    odd = write_lines(tmp_path / "odd.jsonl", [old | {"length": "3"}])
    assert read_given([odd], tokenizer)[0].tokens == tokenizer.encode("12")


def test_folders_without_responses_say_what_they_are(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    (tmp_path / "diagnosis").mkdir()
    (tmp_path / "diagnosis" / "responses.parquet").touch()
    (tmp_path / "microscope" / "step_000002").mkdir(parents=True)
    (tmp_path / "microscope" / "step_000002" / "responses.parquet").touch()
    unfinished = write_run(tmp_path / "unfinished", tokenizer, [1, 2])
    (unfinished / "seed0.json").unlink()
    for name, message in [
        ("empty", "no responses in this folder"),
        ("unfinished", "no responses in this folder; expected that of a decoding run with a finished setting"),
        ("diagnosis", "already scored; `python -m decode diagnose page .*diagnosis` shows it"),
        ("microscope", "already scored; `python -m decode diagnose page .*microscope` shows it"),
        ("nowhere", "no such file"),
        ("nowhere_*.jsonl", "no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            response_files(str(tmp_path / name))
    bad = rollout(tokenizer, [1], [2], ids="?")
    with pytest.raises(ValueError, match=r"step_000001\.jsonl row 0: ids = '\?': not packed token ids"):
        read_given([write_lines(tmp_path / "step_000001.jsonl", [bad])], tokenizer)
    bad = rollout(tokenizer, [1], [2]) | {"prompt": None}
    with pytest.raises(ValueError, match="row 0: prompt = None: expected a text"):
        read_given([write_lines(tmp_path / "step_000001.jsonl", [bad])], tokenizer)
