"""Rows and files from strangers: each is read right, or refused in one sentence that names file and row."""

import datetime
import decimal
import json
import logging
import random
import string
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvr_jax.data import rows as rows_module
from rlvr_jax.data.problems import read_problems, write_problems
from rlvr_jax.data.rows import brief
from rlvr_jax.data.sft import read_conversations
from tests.mutations import refusal
from tests.test_data_problems import published, write_jsonl

GOOD = '{"problem": "1+1?", "answer": "2"}\n'


def only(path) -> str:
    (problem,) = read_problems(path)
    return problem.answer


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("3.0", "3"),
        ("-0.0", "0"),
        ("0.50", "0.5"),
        ("1e-7", "0.0000001"),
        ("1e22", "1" + 22 * "0"),
        ("1e23", "1" + 23 * "0"),  # whose float is 99999999999999991611392
        ("1E3", "1000"),
        ("9007199254740993", "9007199254740993"),
        ("1" * 400, "1" * 400),
        ('"3.0"', "3.0"),  # a text is kept as it is
        ('"nan"', "nan"),
    ],
)
def test_numbers_of_json_become_plain_decimals(tmp_path, written, answer):
    path = write_jsonl(tmp_path / "a.jsonl", f'{{"problem": "x", "answer": {written}}}')
    assert only(path) == answer


@pytest.mark.parametrize("key", ["answer", "ground_truth", "reward_model"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999", "true", "[1]", '{"a": 1}', '" "'])
def test_what_is_no_answer_is_refused_by_row(tmp_path, key, value):
    inner = f'{{"ground_truth": {value}}}' if key == "reward_model" else value
    path = write_jsonl(tmp_path / "n.jsonl", GOOD.strip(), f'{{"problem": "x", "{key}": {inner}}}')
    with pytest.raises(ValueError, match=r"n\.jsonl row 1: '.*(answer|ground_truth)' = .*expected a text or a finite"):
        read_problems(path)


@pytest.mark.parametrize(
    ("column", "answer"),
    [
        (pa.array([27.0], pa.float64()), "27"),
        (pa.array([0.1], pa.float32()), "0.1"),
        (pa.array([0.1], pa.float16()), "0.1"),
        (pa.array([2**63], pa.uint64()), str(2**63)),
        (pa.array([decimal.Decimal("27.00")], pa.decimal128(10, 2)), "27"),
        (pa.array([decimal.Decimal("0.50")], pa.decimal128(10, 2)), "0.5"),
        (pa.array(["068"], pa.large_string()), "068"),
        (pa.array(["7"]).dictionary_encode(), "7"),
        (pa.array([float("nan")]), None),
        (pa.array([float("inf")], pa.float32()), None),
        (pa.array([True]), None),
        (pa.array([b"7"]), None),
        (pa.array([datetime.date(2024, 1, 2)]), None),
        (pa.array([[7]]), None),
        (pa.array([{"a": 7}]), None),
        (pa.array([2**40], pa.timestamp("s")), None),  # no year that Python has
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_types_of_parquet(tmp_path, column, answer, nested):
    path = tmp_path / "p.parquet"
    if isinstance(column, pa.DictionaryArray) and nested:
        column = column.dictionary_decode()
    named = {"reward_model": pa.StructArray.from_arrays([column], ["ground_truth"])} if nested else {"answer": column}
    pq.write_table(pa.table({"problem": ["x"], **named}), path)
    if answer is not None:
        assert only(path) == answer
    else:
        with pytest.raises(ValueError, match=r"p\.parquet"):
            read_problems(path)


def test_numpy_values_can_be_written(tmp_path):
    write_problems(tmp_path / "x.parquet", [{"problem": "x", "answer": np.float32(3)}])
    assert only(tmp_path / "x.parquet") == "3"
    with pytest.raises(ValueError, match=r"x\.jsonl: the rows cannot be written as JSON"):
        write_problems(tmp_path / "x.jsonl", [{"problem": "x", "answer": "1", "more": float("nan")}])


def test_indices_that_became_floats(tmp_path):
    path = write_jsonl(tmp_path / "i.jsonl", {"problem": "x", "answer": "1", "id": 60.0})
    assert read_problems(path)[0].id == "60"
    path = write_jsonl(tmp_path / "i.jsonl", '{"problem": "x", "answer": "1", "id": NaN}')
    with pytest.raises(ValueError, match=r"i\.jsonl row 0: 'extra_info.index' = nan"):
        read_problems(path)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"problem": " \n", "answer": "1"}, "'problem' is blank"),
        ({"prompt": [{"role": "user", "content": ""}], "answer": "1"}, "'prompt' is blank"),
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " "}], "answer": "1"}, "is blank"),
        (
            {"prompt": [{"role": "human", "content": "x"}], "answer": "1"},
            r"'prompt'\[0\]\['role'\] = 'human': expected",
        ),
        ({"prompt": [{"from": "human", "value": "x"}], "answer": "1"}, r"\['role'\] = None"),
        ({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")], "answer": "1"}, "assistant's turn"),
        ({"prompt": [{"role": r, "content": "x"} for r in ("user", "assistant")], "answer": "1"}, "assistant's turn"),
    ],
)
def test_prompts_that_ask_nothing(tmp_path, row, part):
    path = write_jsonl(tmp_path / "q.jsonl", GOOD.strip(), row)
    with pytest.raises(ValueError, match=rf"q\.jsonl row 1: .*{part}"):
        read_problems(path)
    key = next(iter(row))
    path = write_jsonl(tmp_path / "named.jsonl", {"asked" if name == key else name: row[name] for name in row})
    with pytest.raises(ValueError, match=rf"named\.jsonl row 0: .*{part}".replace(f"'{key}'", "'asked'")):
        read_problems(path, prompt_column="asked")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["1"]), pa.array(["2"])], ["problem", "answer", "answer"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: has several columns of the name answer"):
        read_problems(tmp_path / "twice.parquet")


def test_unknown_roles_of_conversations(tmp_path):
    turns = [{"role": "user", "content": "x"}, {"role": "gpt", "content": "y"}]
    with pytest.raises(ValueError, match=r"c\.jsonl row 0: 'messages'\[1\]\['role'\] = 'gpt': expected one of system"):
        read_conversations(write_jsonl(tmp_path / "c.jsonl", {"messages": turns}))


def test_byte_order_marks(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\xef\xbb\xbf" + GOOD.encode())
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf [" + GOOD.encode() + b"]")
    assert len(read_problems(tmp_path / "a.jsonl")) == 2
    assert only(tmp_path / "a.json") == "2"
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x", "response": "y"}\r\n')
    assert len(read_conversations(tmp_path / "c.jsonl")) == 1
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / "u.jsonl").write_bytes(GOOD.encode(encoding))
        with pytest.raises(ValueError, match=r"u\.jsonl.*(UTF-16|not JSON)"):
            read_problems(tmp_path / "u.jsonl")


def test_lone_surrogates_count_as_question_marks(tmp_path, caplog):
    path = write_jsonl(
        tmp_path / "s.jsonl", '{"problem": "a\\ud83d b \\ud83d\\ude00", "answer": "8\\uDC00"}', GOOD.strip()
    )
    with caplog.at_level(logging.WARNING):
        first, _ = read_problems(path)
    assert (first.messages[0]["content"], first.answer) == ("a? b \U0001f600", "8?")
    assert [r.message for r in caplog.records] == [
        f"{path} line 1: half of a surrogate pair counts as '?', here and in later rows of this file"
    ]
    write_problems(tmp_path / "again.jsonl", [published(0, "\ud83d")])
    assert read_problems(tmp_path / "again.jsonl")[0].messages[0]["content"] == "?"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("deep.jsonl", b'{"problem": ' + b"[" * 100_000, "line 1: .*nested too deeply"),
        ("deep.json", b"[" * 100_000, r"deep\.json: .*nested too deeply"),
        (
            "nested.jsonl",
            b'{"problem": ' + b"[" * 900 + b"]" * 900 + b', "answer": 1}',
            r"row 0: 'problem'\[0\] = \[\[",
        ),
        ("half.jsonl", b'{"problem": ' + b"[" * 700 + b'"\\ud83d"' + b"]" * 700 + b"}", "half.jsonl"),
        ("digits.jsonl", b'{"problem": "x", "answer": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        ("packed.jsonl", b"\x1f\x8b\x08\x00 ...", "a gzip file: unpack it"),
        ("zip.jsonl", b"PK\x03\x04 ...", "a zip file: unpack it"),
        ("parquet.jsonl", b"PAR1 ...", r"its name must end in \.parquet"),
        ("cesu.jsonl", b'{"problem": "\xed\xa0\xbd", "answer": 1}', "line 1: not a UTF-8 text"),
        ("text.json", b'"x"', "expected a JSON object"),
        ("list.json", b"[1]", "row 0: 1: expected a JSON object"),
        ("empty.json", b"[]", "no rows"),
        ("lines.parquet", GOOD.encode(), "not a parquet file"),
        ("zeros.jsonl", b"\0" * 1000, "line 1: not JSON"),
    ],
)
def test_files_of_another_kind(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=part) as error:
        read_problems(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert len(str(error.value)) < 1000
    assert time.monotonic() - start < 5


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(rows_module, "_LONGEST_LIST", 1 << 20)
    for name, part in (("long.jsonl", "line 2: longer than 1 MiB"), ("long.json", "a list of more than 1 MiB")):
        (tmp_path / name).write_bytes((GOOD if name == "long.jsonl" else "[").encode() + b"x" * (3 << 20))
        with pytest.raises(ValueError, match=f"{name}.*{part}"):
            read_problems(tmp_path / name)
    (tmp_path / "fits.jsonl").write_text(json.dumps({"problem": "x" * (1 << 19), "answer": "1"}) + "\n")
    assert only(tmp_path / "fits.jsonl") == "1"


def test_a_parquet_file_that_was_cut_or_changed(tmp_path):
    path, damaged = tmp_path / "whole.parquet", tmp_path / "damaged.parquet"
    write_problems(path, [published(i, f"what is {i}?") for i in range(50)])
    data, random_ = path.read_bytes(), random.Random(0)
    for turn in range(60):
        if turn % 2:
            changed = bytearray(data)
            changed[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        else:
            changed = data[: random_.randrange(len(data))]
        damaged.write_bytes(changed)
        read, error = refusal(lambda: read_problems(damaged))
        assert (error is None) == bool(read)
        assert error is None or (error.startswith(str(damaged)) and len(error) < 1000)
        assert error is not None or turn % 2, "the end of a file that was cut has its index"


def test_mutated_rows_load_or_are_refused_by_name(tmp_path):
    """Seeded: values, keys and bytes of a row that is right are replaced by what strangers write."""
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "x?"}]
    rows = [published(3), {"problem": "x", "answer": "1", "id": 1}, {"prompt": chat, "solution": "\\boxed{2}"}]
    odd = [None, True, float("nan"), float("inf"), 1e22, -0.0, 2**70, "", " ", "\ud83d", "\0", [], [1], {}, {"role": 1}]
    random_, path = random.Random(1), tmp_path / "fuzz.jsonl"

    def mutated(value):
        if isinstance(value, dict) and value and random_.random() < 0.8:
            key = random_.choice(list(value))
            new = random_.choice([key, key, key.upper(), "", "role"])
            return {k: v for k, v in value.items() if k != key} | {new: mutated(value[key])}
        if isinstance(value, list) and value and random_.random() < 0.6:
            return [mutated(one) if random_.random() < 0.5 else one for one in value]
        return random_.choice(odd)

    outcomes = {True: 0, False: 0}
    for turn in range(600):
        line = json.dumps(mutated(random_.choice(rows)) if turn % 3 else random_.choice(rows)).encode()
        if turn % 3 == 0:
            at = random_.randrange(len(line))
            new = random_.choice([b"", b'"', b"\xff", b"\\", random_.choice(string.printable).encode()])
            line = line[:at] + new + line[at + 1 :]
        path.write_bytes(GOOD.encode() + line + b"\n")
        read, error = refusal(lambda: read_problems(path))
        outcomes[error is None] += 1
        if error is not None:
            assert error.startswith((f"{path} row 1: ", f"{path} line 2: "))
            continue
        assert read
        for problem in read:
            assert problem.answer.strip()
            assert problem.answer.lower() not in ("nan", "inf", "infinity")
            json.dumps([problem.id, problem.answer, problem.data_source, problem.messages], ensure_ascii=False).encode()
    assert min(outcomes.values()) > 50, outcomes


def test_a_value_of_any_size_is_shown_in_brief():
    assert len(brief([[["x" * 1000] * 1000] * 1000] * 1000)) <= 300
    assert brief("a\ud83d") == r"'a\ud83d'"
