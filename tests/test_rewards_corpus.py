"""Hundreds of written answers (answers.jsonl): both rules say what their sources say.

The verdicts in the file are those of the sources: math-verify itself on the content of the last box, and the DAPO rule
of verl (`verl/utils/reward_score/math_dapo.py` of July 2025), which was run on every line when the file was made.
"""

import json
import logging
from pathlib import Path

import math_verify
import pytest

from rlvr_jax.rewards import GraderPool

ROWS = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()]


def differing(expected, graded):
    return [
        (row["response"], row["answer"], wanted, verdict)
        for row, wanted, verdict in zip(ROWS, expected, graded, strict=True)
        if verdict.correct != wanted
    ]


def boxed(text):
    """What the last box holds, by plain counting of braces."""
    _, found, rest = text.rpartition("\\boxed")
    depth = 0
    for i, letter in enumerate(rest if found and rest.startswith("{") else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[1:i]
    return None


def test_the_corpus_is_wide():
    assert len({(row["response"], row["answer"]) for row in ROWS}) == len(ROWS) >= 300
    for rule in ("math_verify", "dapo_answer"):
        right = sum(row[rule] for row in ROWS)
        assert 75 <= right <= len(ROWS) - 75  # so that neither "always" nor "never" comes close


@pytest.mark.parametrize("rule", ["math_verify", "dapo_answer"])
def test_the_recorded_verdicts(rule):
    with GraderPool(workers=2, timeout_s=20.0) as pool:
        graded = pool.grade(rule, [row["response"] for row in ROWS], [row["answer"] for row in ROWS])
    assert not differing([row[rule] for row in ROWS], graded)


def test_the_record_is_that_of_math_verify_as_installed(monkeypatch):
    monkeypatch.setattr(logging.getLogger("math_verify"), "disabled", True)
    published = []
    for row in ROWS:
        found = boxed(row["response"])
        if not found:
            published.append(False)
            continue
        gold, target = (math_verify.parse(f"${text}$") for text in (row["answer"], found))
        published.append(bool(math_verify.verify(gold, target)))
    assert [row for row, verdict in zip(ROWS, published, strict=True) if row["math_verify"] != verdict] == []
