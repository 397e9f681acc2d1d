"""Problems with verifiable answers: the published parquet schema and simple JSON lines, in and out."""

import collections
import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlvr_jax.data.rows import brief, read_rows, write_rows
from rlvr_jax.data.shards import Source, data_files, names
from rlvr_jax.data.text import ROLES, check_messages
from rlvr_jax.rewards.rules import last_boxed

logger = logging.getLogger(__name__)

_PROMPTS = ("prompt", "problem", "question", "messages")
_COLUMNS = ("prompt", "messages", "reward_model", "data_source", "extra_info")
_PLAIN_COLUMNS = ("problem", "question", "answer", "ground_truth", "solution", "id", "index", "unique_id")
_SPELLINGS = tuple(form(name) for name in _PLAIN_COLUMNS for form in (str, str.capitalize, str.upper))


_WORKED = re.compile(r"(?:^|\n)####[ \t]*(\S[^\n]*?)\s*$")  # GSM8K: the answer is the last line of a worked solution


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
    path: Source,
    *,
    prompt_suffix: str = "",
    deduplicate: Literal["none", "by_id"] = "none",
    prompt_column: str = "",
    answer_column: str = "",
) -> list[Problem]:
    r"""Reads .parquet or .jsonl files of problems.

    Columns, as in DAPO-Math-17k and AIME-2024 of BytedTsinghua-SIA: `prompt` (chat messages, or one text for a user
    turn), `reward_model.ground_truth`, `data_source`, `extra_info.index`. Instead of them `problem`, `question` or
    `messages`, `answer` or `ground_truth` (a text or number) or else `solution` (its last `\boxed{...}` is the answer),
    `id`, `index` or `unique_id`; these may be capitalised or in capitals. That covers, as they are published: AIME24 of
    HuggingFaceH4, Maxwell-Jia and math-ai, AIME25 of math-ai and opencompass, AMC23 of math-ai, MATH-500 of
    HuggingFaceH4. Of a worked solution in the place of an answer whose last line is `#### 72` (GSM8K of openai), 72 is
    the answer. Numbers become plain decimals, 27.0 the text 27 and 1e-7 the text 0.0000001.

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
        path: the file, or several files, a folder of them, a pattern, a URL (`rlvr_jax.data.shards`). The rows of all
            are one list.
        prompt_suffix: if given, the last user turn becomes its stripped text plus this.
        deduplicate: "none" keeps every row; "by_id" keeps the first row of every id. Both count the rows in `repeats`.
        prompt_column: where the prompt stands, instead of the names above; `a.b` is b inside of a.
        answer_column: the same for the answer.

    Raises:
        ValueError: a missing, empty or unreadable file; a missing or unusable key, naming file, row and key (an answer
            that is NaN or infinite, a blank prompt or one that the assistant answers, a role not in
            `rlvr_jax.data.text.ROLES`); "by_id" where indices do not identify the problems.
    """
    if deduplicate not in ("none", "by_id"):
        raise ValueError(f"deduplicate = {deduplicate!r}: expected 'none' or 'by_id'")
    files, columns = data_files(path), (prompt_column, answer_column)
    given = (name for column in filter(None, columns) for name in (column, column.partition(".")[0]))
    wanted = (*_COLUMNS, *_SPELLINGS, *given)
    # A file may hold 1.8 million rows of 17 thousand problems, so equal content is kept once.
    numbers: dict[Any, int] = {}
    contents: list[tuple[tuple[dict[str, str], ...], str]] = []
    rows: list[tuple[str | None, str, int]] = []
    for file in files:
        for number, read in read_rows(file, wanted):
            row = {key.lower(): value for key, value in read.items()} | dict(read)
            where = f"{file} row {number}"
            messages, answer = _messages(row, where, prompt_suffix, prompt_column), _answer(row, where, answer_column)
            content = tuple((message["role"], message["content"]) for message in messages), answer
            if content not in numbers:
                numbers[content] = len(contents)
                contents.append((messages, answer))
            rows.append((_row_id(row, where), _data_source(row, file), numbers[content]))

    path = names(path)
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


def _messages(row, where, suffix, column="") -> tuple[dict[str, str], ...]:
    key = column or next((key for key in _PROMPTS if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{where}: no {_any_of(_PROMPTS)}")
    value = _at(row, column, where) if column else row[key]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    check_messages(messages, f"{where}: {key!r}", roles=ROLES)
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    users = [message for message in messages if message["role"] == "user"]
    if not all(message["content"].strip() for message in users or messages):
        raise ValueError(f"{where}: {key!r} is blank: expected a text")
    if messages[-1]["role"] == "assistant":  # in whichever column: it would tell the model the solution
        raise ValueError(f"{where}: {key!r} ends with the assistant's turn: expected a prompt that is to be answered")
    if suffix:
        if not users:
            raise ValueError(f"{where}: {key!r} has no user turn for prompt_suffix = {suffix!r}")
        users[-1]["content"] = users[-1]["content"].strip() + suffix
    return tuple(messages)


def _answer(row, where, column="") -> str:
    if column:
        return _answer_text(_at(row, column, where), where, column)
    reward = row.get("reward_model")
    if reward is not None and not isinstance(reward, Mapping):
        raise ValueError(f"{where}: 'reward_model' = {brief(reward)}: expected an object with 'ground_truth'")
    found = {
        "reward_model.ground_truth": (reward or {}).get("ground_truth"),
        "answer": row.get("answer"),
        "ground_truth": row.get("ground_truth"),
    }
    key = next((key for key, value in found.items() if value is not None), None)
    if key is not None:
        return _answer_text(found[key], where, key)
    if not isinstance(row.get("solution"), str):
        raise ValueError(f"{where}: no {_any_of((*found, 'solution'))}")
    boxed, _ = last_boxed(row["solution"])
    if boxed is None:
        raise ValueError(f"{where}: no 'answer', and 'solution' does not end in a \\boxed{{...}}")
    return _answer_text(boxed, where, "solution")


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"


def _at(row, column, where) -> Any:
    """The value of a column that was asked for by name; `a.b` is b inside of a."""
    value = row.get(column)
    if value is None:
        value = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        raise ValueError(f"{where}: no {column!r}, which was given as a column")
    return value


def _answer_text(value, where, key) -> str:
    text = value if isinstance(value, str) else _number_text(value)
    if text is None or not text.strip():
        raise ValueError(f"{where}: {key!r} = {brief(value)}: expected a text or a finite number")
    worked = _WORKED.search(text)
    return text if worked is None else worked.group(1)


def _number_text(value) -> str | None:
    """A number as graders compare it, a plain decimal without trailing zeros; None for anything else.

    27.0 is 27: files that lack an answer somewhere store all of them as floats.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, float | Decimal) or not math.isfinite(value):
        return None
    text = f"{Decimal(repr(value)) if isinstance(value, float) else value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _row_id(row, where) -> str | None:
    extra = row.get("extra_info")
    if extra is not None and not isinstance(extra, Mapping):
        raise ValueError(f"{where}: 'extra_info' = {brief(extra)}: expected an object")
    found = [(extra or {}).get("index"), *(row.get(key) for key in ("id", "index", "unique_id"))]
    value = next((value for value in found if value is not None), None)
    if value is None or isinstance(value, str):
        return value
    if (text := _number_text(value)) is None:
        raise ValueError(f"{where}: 'extra_info.index' = {brief(value)}: expected a text or a finite number")
    return text


def _data_source(row, path) -> str:
    source = row.get("data_source")
    return source if isinstance(source, str) else path.stem if source is None else brief(source)


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
