"""Benchmarks in the schemas they are published in: column names, their order and types as on the hub."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvr_jax.data.problems import read_problems
from tests.test_data_problems import write_jsonl

TEXT = "Find $x$."
URL = "https://artofproblemsolving.com/wiki"
SOLUTION = "First $\\boxed{1}$ seems right, but $\\boxed{\\frac{2}{3}}$ is."


def dapo(count: int) -> list[dict]:
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": TEXT, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        }
    ] * count


SCHEMAS = {
    "BytedTsinghua-SIA/DAPO-Math-17k": ("parquet", dapo(2), "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "34"),
    "BytedTsinghua-SIA/AIME-2024": ("parquet", dapo(32), "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "34"),
    "HuggingFaceH4/aime_2024": (
        "parquet",
        [{"id": 60, "problem": TEXT, "solution": SOLUTION, "answer": "204", "url": URL, "year": "2024"}],
        "60",
        "204",
    ),
    "Maxwell-Jia/AIME_2024": (
        "parquet",
        [{"ID": "2024-II-4", "Problem": TEXT, "Solution": SOLUTION, "Answer": 33}],
        "2024-II-4",
        "33",
    ),
    "math-ai/aime24": (
        "parquet",
        [{"id": 60, "problem": TEXT, "solution": "\\boxed{204}", "url": URL}],
        "60",
        "204",
    ),
    "math-ai/aime25": ("jsonl", [{"problem": TEXT, "answer": "70", "id": "0"}], "0", "70"),
    "opencompass/AIME2025": ("jsonl", [{"question": TEXT, "answer": "70"}], "0", "70"),
    "math-ai/amc23": ("parquet", [{"id": 0, "question": TEXT, "answer": "27", "url": URL}], "0", "27"),
    "HuggingFaceH4/MATH-500": (
        "jsonl",
        [
            {
                "problem": TEXT,
                "solution": SOLUTION,
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "subject": "Precalculus",
                "level": 2,
                "unique_id": "test/precalculus/807.json",
            }
        ],
        "test/precalculus/807.json",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_published_schema(tmp_path, name):
    ending, rows, id_, answer = SCHEMAS[name]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, *rows)
    problems = read_problems(path)
    assert [(p.id, p.answer, p.messages) for p in problems] == [
        (id_, answer, ({"role": "user", "content": TEXT},))
    ] * len(rows)
    assert problems[0].repeats == len(rows)


def test_the_answer_of_a_solution_is_its_last_box(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", {"problem": TEXT, "solution": SOLUTION})
    assert read_problems(path)[0].answer == "\\frac{2}{3}"
    # an answer that is there goes before the solution's
    path = write_jsonl(tmp_path / "rows.jsonl", {"PROBLEM": TEXT, "Solution": SOLUTION, "ANSWER": 27.0})
    assert read_problems(path)[0].answer == "27"
    # so does a name in lower case where both are there
    path = write_jsonl(tmp_path / "rows.jsonl", {"Problem": "title", "problem": TEXT, "Answer": "9", "answer": "7"})
    (problem,) = read_problems(path)
    assert (problem.messages[0]["content"], problem.answer) == (TEXT, "7")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sold 48/2 = <<48/2=24>>24.\nSo 24+48 = 72.\n#### 72", "72"),
        ("#### -1,072 \n", "-1,072"),
        ("#### 1\n#### 2\r\n", "2"),
        ("#### 1\nand more", "#### 1\nand more"),
        ("a #### b", "a #### b"),
        ("x\n####", "x\n####"),
    ],
)
def test_the_answer_of_a_worked_solution_is_its_marked_last_line(tmp_path, text, answer):
    path = write_jsonl(tmp_path / "rows.jsonl", {"question": TEXT, "answer": text})
    assert read_problems(path)[0].answer == answer


@pytest.mark.parametrize("solution", ["so it is 7", "\\boxed{1} or \\boxed{2"])
def test_a_solution_without_a_box_is_named(tmp_path, solution):
    path = write_jsonl(tmp_path / "rows.jsonl", {"problem": TEXT, "solution": solution})
    with pytest.raises(ValueError, match=r"rows.jsonl row 0: no 'answer', and 'solution' does not end in a \\boxed"):
        read_problems(path)
