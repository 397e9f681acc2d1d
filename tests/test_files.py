"""Files of a run: text of any kind is written so that it reads back."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from decode.results.files import read_record
from decode.results.parts import JsonLines
from rlvr_jax.microscope.files import RESPONSE_SCHEMA, Response, write_responses
from rlvr_jax.runs.files import json_bytes, valid_text, write_json
from train.records.metrics import MetricLog, write_jsonl

ODD = ["8\ud83d", "\ude00\ud83d", "é\u2028\x00\ufffd", "\U0001f600"]


def test_lone_surrogates_are_written_as_their_escapes(tmp_path):
    write_json(tmp_path / "a.json", ODD)
    write_jsonl(tmp_path / "a.jsonl", [{"x": text} for text in ODD])
    JsonLines(tmp_path / "rows.jsonl").append([{"x": text} for text in ODD])
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ODD
    for name in ("a.jsonl", "rows.jsonl"):
        lines = (tmp_path / name).read_text(encoding="utf-8").split("\n")
        assert [json.loads(line)["x"] for line in lines if line] == ODD
    assert JsonLines(tmp_path / "rows.jsonl").read(lambda record: record["x"]) == ODD
    assert json_bytes("é\U0001f600") == '"é\U0001f600"\n'.encode()
    assert valid_text("".join(ODD[:2])) == "8???"


def test_metrics_and_responses_hold_any_text(tmp_path):
    log = MetricLog(tmp_path, tensorboard=False)
    log.write({"kind": "train", "trainer_steps": 1, "note": ODD[0], "loss": float("nan"), "n": np.float32(2)})
    log.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"))
    assert record == {"kind": "train", "trainer_steps": 1, "note": ODD[0], "loss": None, "n": 2.0}
    values = dict.fromkeys(RESPONSE_SCHEMA.names, 0) | {"source": "rl", "correct": None}
    texts = {field.name for field in RESPONSE_SCHEMA if str(field.type) == "string"} - {"source"}
    write_responses(tmp_path, [Response(**values | dict.fromkeys(texts, ODD[0]))])
    (row,) = pq.read_table(tmp_path / "responses.parquet").to_pylist()
    assert {row[name] for name in texts} == {"8?"}


def test_json_of_a_run_is_read_whatever_its_first_bytes(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_record(tmp_path / "a.json") == {"a": 1}
    assert read_record(tmp_path / "absent.json") == {}
    for content in (b"{", b"\xff\xfe{", b"[" * 100_000):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json: not"):
            read_record(tmp_path / "a.json")
