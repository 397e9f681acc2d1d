"""Problem files in the published schema and as JSON lines; ids; bad input."""

import json
import logging
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvr_jax.data.problems import Problem, group_by_id, read_problems, write_problems


def published(index, text="What is 1+1?", answer="2", source="math_dapo"):
    return {
        "data_source": source,
        "prompt": [{"content": text, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index, "split": "train"},
    }


def write_jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_published_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    rows = [published("9a9b6eb4", "é $x$?", "34"), published("ffff", "y?", "-1")]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_problems(path) == [
        Problem(0, "9a9b6eb4", ({"role": "user", "content": "é $x$?"},), "34", "math_dapo"),
        Problem(1, "ffff", ({"role": "user", "content": "y?"},), "-1", "math_dapo"),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"problem": "x?", "answer": "068"}, ("0", "x?", "068", "rows")),
        ({"question": "x?", "answer": 7, "id": 60}, ("60", "x?", "7", "rows")),
        ({"problem": "x?", "answer": 0.5, "unique_id": "test/a.json"}, ("test/a.json", "x?", "0.5", "rows")),
        ({"prompt": "x?", "answer": "1", "index": 0, "data_source": "aime25"}, ("0", "x?", "1", "aime25")),
        (published(3), ("3", "What is 1+1?", "2", "math_dapo")),
        ({**published(None), "id": "q"}, ("q", "What is 1+1?", "2", "math_dapo")),
    ],
)
def test_json_lines(tmp_path, row, expected):
    path = write_jsonl(tmp_path / "rows.jsonl", row, "")
    (problem,) = read_problems(path)
    assert (problem.id, problem.messages[0]["content"], problem.answer, problem.data_source) == expected


def test_prompt_suffix_goes_to_the_stripped_last_user_turn(tmp_path):
    chat = [
        {"role": "system", "content": " s "},
        {"role": "user", "content": " first "},
        {"role": "assistant", "content": " a "},
        {"role": "user", "content": "\n x? \n"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", {"prompt": chat, "answer": "1"}, {"problem": " y? ", "answer": "2"})
    suffix = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    first, second = read_problems(path, prompt_suffix=suffix)
    assert [m["content"] for m in first.messages] == [" s ", " first ", " a ", "x?" + suffix]
    assert second.messages[0]["content"] == "y?" + suffix
    assert read_problems(path)[1].messages[0]["content"] == " y? "
    path = write_jsonl(tmp_path / "rows.jsonl", {"prompt": chat[:1], "answer": "1"})
    with pytest.raises(ValueError, match="row 0: 'prompt' has no user turn"):
        read_problems(path, prompt_suffix="!")


def test_rows_are_grouped_by_id_never_by_text(tmp_path, caplog):
    # two different problems with one text, each four times, interleaved
    rows = [published(index, "What is x?", str(index)) for _ in range(4) for index in (7, 5)]
    write_problems(tmp_path / "aime.parquet", rows)
    with caplog.at_level(logging.INFO):
        problems = read_problems(tmp_path / "aime.parquet")
    assert [p.index for p in problems] == list(range(8))
    assert [p.id for p in problems] == ["7", "5"] * 4
    assert {p.repeats for p in problems} == {4}
    assert group_by_id(problems) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert "8 rows of 2 problems, all kept" in caplog.text
    once = read_problems(tmp_path / "aime.parquet", deduplicate="by_id")
    assert [(p.index, p.id, p.answer, p.repeats) for p in once] == [(0, "7", "7", 4), (1, "5", "5", 4)]
    # the same text twice with two ids stays two problems
    write_problems(tmp_path / "two.parquet", [published(0), published(1)])
    assert "2 ids but only 1 different problems" not in caplog.text
    assert len(read_problems(tmp_path / "two.parquet", deduplicate="by_id")) == 2
    assert "2 ids but only 1 different problems" in caplog.text


def test_an_index_that_restarts_in_each_data_set_is_told_apart(tmp_path):
    rows = [published(i, f"{source} {i}", str(i), source) for source in ("aime24", "aime25") for i in (0, 1, 0, 1)]
    write_problems(tmp_path / "both.parquet", rows)
    problems = read_problems(tmp_path / "both.parquet", deduplicate="by_id")
    assert [(p.id, p.repeats) for p in problems] == [
        ("aime24/0", 2),
        ("aime24/1", 2),
        ("aime25/0", 2),
        ("aime25/1", 2),
    ]


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([published(0, "a"), published(0, "b")], "stands for different problems"),
        ([published(0, answer="1"), published(0, answer="2")], "stands for different problems"),
        ([published(0, "a"), published(None, "a")], "is missing in some rows"),
    ],
)
def test_an_index_that_does_not_identify_is_not_used(tmp_path, caplog, rows, part):
    write_problems(tmp_path / "rows.jsonl", rows)
    assert [p.id for p in read_problems(tmp_path / "rows.jsonl")] == ["0", "1"]
    assert part in caplog.text
    with pytest.raises(ValueError, match="deduplicate = 'by_id' needs an index"):
        read_problems(tmp_path / "rows.jsonl", deduplicate="by_id")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_written_problems_read_back_the_same(tmp_path, ending):
    problems = [
        Problem(0, "b", ({"role": "system", "content": "é\n"}, {"role": "user", "content": "x"}), "\\frac12", "s"),
        Problem(1, "a", ({"role": "user", "content": "y"},), "2", "t"),
    ]
    path = tmp_path / "deep" / f"problems.{ending}"
    write_problems(path, problems)
    assert read_problems(path) == problems
    write_problems(path, problems[:1])
    assert read_problems(path) == problems[:1]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_parquet_keeps_columns_that_the_first_row_lacks(tmp_path):
    write_problems(tmp_path / "x.parquet", [{"problem": "a", "answer": "1"}, published(4)])
    assert [p.answer for p in read_problems(tmp_path / "x.parquet")] == ["1", "2"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "problems.parquet"
    write_problems(path, [published(0)])
    before = path.read_bytes()
    for rows, part in [
        ([published(0), {"prompt": "x"}], "row 1 for .*problems.parquet: no 'reward_model.ground_truth'"),
        ([published(0), published("one")], "one parquet schema"),
        ([published(0, "\ud800")], "one parquet schema"),
        ([], "no rows to write"),
    ]:
        with pytest.raises(ValueError, match=part):
            write_problems(path, rows)
        assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match=r"expected a \.parquet or \.jsonl"):
        write_problems(tmp_path / "problems.csv", [published(0)])


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"answer": "1"}, "no 'prompt', 'problem', 'question' or 'messages'"),
        ({"problem": "x"}, "no 'reward_model.ground_truth', 'answer', 'ground_truth' or 'solution'"),
        ({"problem": "x", "reward_model": "1"}, "'reward_model' = '1'"),
        ({"prompt": [], "answer": "1"}, "at least one"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, r"'prompt'\[0\]\['content'\] = None"),
        ({"prompt": {"role": "user"}, "answer": "1"}, "expected a list"),
        ({"problem": "x", "answer": "1", "extra_info": 3}, "'extra_info' = 3"),
        ({"problem": "x", "answer": "1", "extra_info": {"index": [1]}}, r"'extra_info.index' = \[1\]"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, part):
    path = write_jsonl(tmp_path / "rows.jsonl", {"problem": "x", "answer": "1"}, row)
    with pytest.raises(ValueError, match=f"rows.jsonl row 1: .*{part}"):
        read_problems(path)


def test_a_bad_file_is_named(tmp_path):
    for name, content, part in [
        ("absent.jsonl", None, "no such file"),
        ("absent.parquet", None, "no such file"),
        ("rows.csv", b"a,b", "expected a .parquet or .jsonl"),
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl", b"\n\n", "no rows"),
        ("bad.jsonl", b'{"problem": "x", "answer": "1"}\n\n{oops\n', "line 3: not JSON"),
        ("list.jsonl", b"[1]\n", "line 1: .*expected a JSON object"),
        ("latin.jsonl", b"\xe9\n", "not a UTF-8 text"),
        ("bad.parquet", b"PAR1 no", "not a parquet file"),
        ("empty.parquet", b"", "not a parquet file"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{part}"):
            read_problems(tmp_path / name)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other.parquet: has the columns x, expected some of prompt"):
        read_problems(tmp_path / "other.parquet")
    pq.write_table(pa.Table.from_pylist([published(0)]).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="no rows in this file"):
        read_problems(tmp_path / "none.parquet")
    write_problems(tmp_path / "ok.jsonl", [published(0)])
    with pytest.raises(ValueError, match="deduplicate = 'by_text'"):
        getattr(read_problems, "__wrapped__", read_problems)(tmp_path / "ok.jsonl", deduplicate="by_text")


def test_many_repeated_rows_share_their_content(tmp_path):
    rows = [published(i % 50, f"{i % 50} " + "long " * 200, "1") for i in range(5000)]
    write_problems(tmp_path / "many.parquet", rows)
    start = time.monotonic()
    problems = read_problems(tmp_path / "many.parquet")
    assert time.monotonic() - start < 5
    assert len({id(p.messages) for p in problems}) == 50
    assert [p.repeats for p in read_problems(tmp_path / "many.parquet", deduplicate="by_id")] == [100] * 50
