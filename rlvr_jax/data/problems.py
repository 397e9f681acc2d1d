"""Problems with verifiable answers: the published parquet schema and simple JSON lines, in and out."""

import collections
import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlvr_jax.data.rows import read_rows, write_rows
from rlvr_jax.data.text import check_messages
from rlvr_jax.remote import local
from rlvr_jax.rewards.rules import last_boxed

logger = logging.getLogger(__name__)

_COLUMNS = ("prompt", "reward_model", "data_source", "extra_info")
_PLAIN_COLUMNS = ("problem", "question", "answer", "solution", "id", "index", "unique_id")
_SPELLINGS = tuple(form(name) for name in _PLAIN_COLUMNS for form in (str, str.capitalize, str.upper))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row to be solved.

    Attributes:
        index: position in the list read (unique; seeds the sampling of its responses).
        id: the problem's identity: rows of one id are the same problem, whatever their number.
        messages: chat messages, `{"role", "content"}`.
        answer: reference answer.
        data_source: name of its data set.
        repeats: how many rows of the file have this id.
    """

    index: int
    id: str
    messages: tuple[dict[str, str], ...]
    answer: str
    data_source: str
    repeats: int = 1


def read_problems(
    path: str | Path, *, prompt_suffix: str = "", deduplicate: Literal["none", "by_id"] = "none"
) -> list[Problem]:
    r"""Reads a .parquet or .jsonl file of problems.

    Columns, as in DAPO-Math-17k and AIME-2024 of BytedTsinghua-SIA: `prompt` (chat messages, or one text for a user
    turn), `reward_model.ground_truth`, `data_source`, `extra_info.index`. Instead of them `problem` or `question` (a
    text), `answer` (a text or number) or else `solution` (its last `\boxed{...}` is the answer), `id`, `index` or
    `unique_id`; these may be capitalised or in capitals. That covers, as they are published: AIME24 of HuggingFaceH4,
    Maxwell-Jia and math-ai, AIME25 of math-ai and opencompass, AMC23 of math-ai, MATH-500 of HuggingFaceH4.

    Published files repeat rows: AIME problems 32 times, DAPO's about 100 times. What makes two rows the same problem is
    their id, never their text alone. The id is the first of these under which all rows of one id have the same
    messages and answer: the index; `data_source/index`; the row's number (a warning is logged if an index is there but
    does not identify the problems). Rows without an index are numbered. So repeats that a file numbers one by one count
    as different problems.

    AIME's rows are repeated on purpose, one for each of its 32 samples. The 1.8 million rows of DAPO-Math-17k are 17
    thousand problems about 100 times each: by accident, its authors are quoted (discussion 2 of the data set, in issue
    36 of BytedTsinghua-SIA/DAPO). The published recipes nevertheless train on that file as it is, so their one epoch is
    100 passes, and of the 1,536 rows of a batch about 70 are repeats. "by_id" with 100 epochs is the same amount of
    data without repeats in a batch (but where one epoch ends and the next begins).

    Args:
        path: the file; one at a URL is copied to this machine (`rlvr_jax.remote`).
        prompt_suffix: if given, the last user turn becomes its stripped text plus this.
        deduplicate: "none" keeps every row; "by_id" keeps the first row of every id. Both count the rows in `repeats`.

    Raises:
        ValueError: a missing, empty or unreadable file; a missing or unusable key, naming file, row and key; "by_id"
            where indices do not identify the problems.
    """
    if deduplicate not in ("none", "by_id"):
        raise ValueError(f"deduplicate = {deduplicate!r}: expected 'none' or 'by_id'")
    path = Path(local(str(path)))
    # A file may hold 1.8 million rows of 17 thousand problems, so equal content is kept once.
    numbers: dict[Any, int] = {}
    contents: list[tuple[tuple[dict[str, str], ...], str]] = []
    rows: list[tuple[str | None, str, int]] = []
    for number, read in read_rows(path, _COLUMNS + _SPELLINGS):
        row = {key.lower(): value for key, value in read.items()} | {k: v for k, v in read.items() if k.islower()}
        where = f"{path} row {number}"
        messages, answer = _messages(row, where, prompt_suffix), _answer(row, where)
        content = tuple((message["role"], message["content"]) for message in messages), answer
        if content not in numbers:
            numbers[content] = len(contents)
            contents.append((messages, answer))
        rows.append((_row_id(row, where), _data_source(row, path), numbers[content]))

    ids, identified = _identities(rows, path)
    if deduplicate == "by_id" and not identified:
        raise ValueError(
            f"{path}: deduplicate = 'by_id' needs an index that identifies the problems (extra_info.index)"
        )
    if deduplicate == "by_id" and len(contents) < len(set(ids)):
        logger.warning(
            "%s: %d ids but only %d different problems with answers; rows with an id of their own are kept",
            *(path, len(set(ids)), len(contents)),
        )
    repeats = collections.Counter(ids)
    if len(repeats) < len(ids):
        done = "kept once each" if deduplicate == "by_id" else "all kept"
        logger.info("%s: %d rows of %d problems, %s", path, len(ids), len(repeats), done)
    problems = []
    seen = set()
    for id_, (_, source, content) in zip(ids, rows, strict=True):
        if deduplicate == "by_id" and id_ in seen:
            continue
        seen.add(id_)
        problems.append(Problem(len(problems), id_, *contents[content], source, repeats[id_]))
    return problems


def group_by_id(problems: Sequence[Problem]) -> list[list[int]]:
    """Positions in `problems` of the rows of each problem, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for position, problem in enumerate(problems):
        groups.setdefault(problem.id, []).append(position)
    return list(groups.values())


def write_problems(path: str | Path, rows: Iterable[Problem | Mapping[str, Any]]) -> None:
    """Writes problems in the published schema, whole or not at all; parquet or JSON lines by the ending of `path`.

    Args:
        path: a .parquet or .jsonl file; its folder is made.
        rows: `Problem`s, or mappings in the published schema (`prompt` and `reward_model.ground_truth` needed; other
            keys are kept).

    Raises:
        ValueError: no rows, or a row that `read_problems` would refuse.
    """
    written = []
    for number, row in enumerate(rows):
        row = _published(row) if isinstance(row, Problem) else dict(row)
        where = f"row {number} for {path}"
        _messages(row, where, "")
        _answer(row, where)
        _row_id(row, where)
        written.append(row)
    write_rows(path, written)


def _published(problem: Problem) -> dict[str, Any]:
    return {
        "data_source": problem.data_source,
        "prompt": list(problem.messages),
        "ability": "MATH",
        "reward_model": {"ground_truth": problem.answer, "style": "rule"},
        "extra_info": {"index": problem.id},
    }


def _messages(row, where, suffix) -> tuple[dict[str, str], ...]:
    key = next((key for key in ("prompt", "problem", "question") if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{where}: no 'prompt', 'problem' or 'question'")
    value = row[key]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    check_messages(messages, f"{where}: {key!r}")
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    if suffix:
        users = [message for message in messages if message["role"] == "user"]
        if not users:
            raise ValueError(f"{where}: {key!r} has no user turn for prompt_suffix = {suffix!r}")
        users[-1]["content"] = users[-1]["content"].strip() + suffix
    return tuple(messages)


def _answer(row, where) -> str:
    reward = row.get("reward_model")
    if reward is not None and not isinstance(reward, Mapping):
        raise ValueError(f"{where}: 'reward_model' = {reward!r:.100}: expected an object with 'ground_truth'")
    key, value = "reward_model.ground_truth", (reward or {}).get("ground_truth")
    if value is None:
        key, value = "answer", row.get("answer")
    if value is None and isinstance(row.get("solution"), str):
        key, (value, _) = "solution", last_boxed(row["solution"])
        if value is None:
            raise ValueError(f"{where}: no 'answer', and 'solution' does not end in a \\boxed{{...}}")
    if value is None:
        raise ValueError(f"{where}: no 'reward_model.ground_truth', 'answer' or 'solution'")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{where}: {key!r} = {value!r:.100}: expected a text or a number")
    # Answers that a published file stores as floats (27.0) are the integers that graders compare as text.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _row_id(row, where) -> str | None:
    extra = row.get("extra_info")
    if extra is not None and not isinstance(extra, Mapping):
        raise ValueError(f"{where}: 'extra_info' = {extra!r:.100}: expected an object")
    found = [(extra or {}).get("index"), *(row.get(key) for key in ("id", "index", "unique_id"))]
    value = next((value for value in found if value is not None), None)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f"{where}: 'extra_info.index' = {value!r:.100}: expected a text or a number")
    return None if value is None else str(value)


def _data_source(row, path) -> str:
    source = row.get("data_source")
    return path.stem if source is None else str(source)


def _identities(rows, path) -> tuple[list[str], bool]:
    """An id a row, and whether it comes from the rows' own index."""
    named = [number for number, (id_, _, _) in enumerate(rows) if id_ is not None]
    if len(named) == len(rows):
        for form in (lambda id_, source: id_, lambda id_, source: f"{source}/{id_}"):
            ids = [form(id_, source) for id_, source, _ in rows]
            content_of: dict[str, int] = {}
            if all(content_of.setdefault(id_, row[2]) == row[2] for id_, row in zip(ids, rows, strict=True)):
                return ids, True
    if named:
        problem = "stands for different problems" if len(named) == len(rows) else "is missing in some rows"
        logger.warning("%s: the same index %s, so rows are told apart by their number", path, problem)
    return [str(number) for number in range(len(rows))], False
