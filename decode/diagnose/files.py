"""The files of responses that a diagnosis reads: of decoding runs, of training runs, of others."""

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from decode.results.files import RowLog, read_record
from rlvr_jax.data.rows import read_rows
from rlvr_jax.data.text import Tokenizer, render_chat
from rlvr_jax.data.token_ids import unpack_ids
from rlvr_jax.microscope import files
from rlvr_jax.runs.files import parse_json
from rlvr_jax.runs.remote import is_url, local

KEYS = (
    *("prompt", "messages", "response", "answer", "correct", "problem", "sample", "source", "tokens"),
    *("ids", "prompt_ids", "length", "sampled_at"),
)
SOURCES = ("base", "rl", "given")
_AT_A_URL = ("*.json", "*.jsonl", "*.parquet", "*/*.json", "*/*.jsonl", "*/tokens.parquet")


class Read(NamedTuple):
    """A response as a file has it; what it does not say is None. `length`: tokens that were drawn."""

    where: str
    prompt: str
    response: str
    tokens: list[int] | None
    answer: str | None
    correct: bool | None
    problem: int | None
    sample: int | None
    source: str
    prompt_ids: list[int] | None = None
    length: int | None = None


def response_files(path: str) -> list[Path]:
    """The files that a path stands for: itself, what a pattern matches, or those of a run's folder.

    Of a decoding run these are its `seedN.json`, of a training run `rollouts/step_N.jsonl`.

    Raises:
      ValueError: nothing of that kind there.
    """
    at = Path(local(path, _AT_A_URL))
    if at.name.endswith(".rows.jsonl"):  # which has no prompts; the file that is assembled from it has
        at = at.with_name(at.name.removesuffix(".rows.jsonl") + ".json")
        if not at.is_file():
            raise ValueError(f"{at}: no such file; rows have no prompts, this file has them when the run has ended")
    if at.is_file():
        return [at]
    if not at.is_dir():
        found = [] if is_url(path) or not glob.has_magic(path) else sorted(Path(one) for one in glob.glob(path))
        if not found:
            raise ValueError(f"responses: {path}: no such file")
        return [file for one in found for file in response_files(str(one))]
    if (at / files.RESPONSES).is_file() or any(at.glob(f"step_*/{files.RESPONSES}")):
        raise ValueError(f"responses: {path}: already scored; `python -m decode diagnose page {path}` shows it")
    found = (
        _in_order(at.glob("seed*.json"))
        or _in_order(at.glob("step_*.jsonl"))
        or _in_order((at / "rollouts").glob("step_*.jsonl"))
        or [
            file
            for setting in sorted(at.glob("*/setting.json"))
            for file in _in_order(setting.parent.glob("seed*.json"))
        ]
    )
    if not found:
        raise ValueError(
            f"responses: {path}: no responses in this folder; expected that of a decoding run with a finished setting "
            "(seedN.json) or of a training run (rollouts/step_N.jsonl)"
        )
    return found


def _in_order(found: Iterator[Path]) -> list[Path]:
    """seed2 before seed10."""
    return sorted(
        found, key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]
    )


def read_file(path: Path, tokenizer: Tokenizer, template_arguments: Mapping[str, Any]) -> Iterator[Read]:
    """The responses of one file. What it has as messages is rendered by the chat template with these arguments.

    Raises:
      ValueError: one sentence naming the file and the row.
    """
    if path.suffix == ".json":
        try:
            content = parse_json(path.read_bytes(), path)
        except ValueError:  # then it may be lines
            content = None
        if isinstance(content, list):
            yield from _published(path, content)
            return
    step = re.fullmatch(r"step_(\d+)\.jsonl", path.name)
    for number, row in read_rows(path, KEYS):
        where = f"{path} row {number}"
        if "sampled_at" in row or "prompt_ids" in row:
            yield _trained(where, row, f"step {int(step.group(1))}" if step else "given")
        else:
            yield _row(where, row, tokenizer, template_arguments)


def _published(path: Path, content: list[Any]) -> Iterator[Read]:
    """`prompt, gt, generated_texts, accs` of each problem, as decoding runs and the paper's code write it."""
    problems: Any = (
        read_record(path.parent.parent / "problems.json") if re.fullmatch(r"seed\d+\.json", path.name) else {}
    )
    indices = [p["index"] for p in problems] if isinstance(problems, list) and len(problems) == len(content) else None
    setting = read_record(path.parent / "setting.json")
    alone = setting.get("model") == "pair" and setting.get("criterion") == "none"
    source = setting.get("sample_from" if alone else "model", "given")
    tokens = _token_ids(path)
    for place, entry in enumerate(content):
        where = f"{path} entry {place}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object with prompt and generated_texts")
        for key, kind in (("prompt", str), ("generated_texts", list)):
            if not isinstance(entry.get(key), kind):
                raise ValueError(f"{where}: {key} = {entry.get(key)!r:.100}: expected a {kind.__name__}")
        texts = entry["generated_texts"]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: generated_texts has something that is not a text")
        right, lengths = (_as_many(where, key, entry, len(texts)) for key in ("accs", "lengths"))
        problem = place if indices is None else indices[place]
        for sample, (text, correct, length) in enumerate(zip(texts, right, lengths, strict=True)):
            yield Read(
                where=f"{where}, response {sample}",
                prompt=entry["prompt"],
                response=text,
                tokens=tokens.get((problem, sample)),
                answer=None if entry.get("gt") is None else str(entry["gt"]),
                correct=None if correct is None else bool(correct),
                problem=problem,
                sample=None,  # files of several seeds number theirs anew
                source=source if source in ("base", "rl") else "given",
                length=_length(length),
            )


def _as_many(where: str, key: str, entry: Mapping[str, Any], count: int) -> list[Any]:
    """A list of the entry with something for each text, None for each where it is missing."""
    values = entry.get(key) or [None] * count
    if not isinstance(values, list):
        raise ValueError(f"{where}: {key} = {values!r:.100}: expected a list")
    if len(values) != count:
        raise ValueError(f"{where}: {len(values)} {key} and {count} generated_texts: expected as many")
    return values


def _token_ids(path: Path) -> dict[tuple[int, int], list[int]]:
    """The ids that a decoding run drew for seedN.json: its rows have them, of older runs tokens.parquet may."""
    named = re.fullmatch(r"seed(\d+)\.json", path.name)
    if not named:
        return {}
    rows = RowLog(path.with_suffix(".rows.jsonl"), repair=False).rows
    found = {key: unpack_ids(row.ids) for key, row in rows.items() if row.ids}
    beside = path.parent / "tokens.parquet"
    if not beside.is_file() or "seed" not in pq.read_schema(beside).names:
        return found
    table = pq.read_table(beside, columns=["problem", "sample", "tokens"], filters=[("seed", "=", int(named.group(1)))])
    return {(row["problem"], row["sample"]): row["tokens"] for row in table.to_pylist()} | found


def _trained(where: str, row: Mapping[str, Any], source: str) -> Read:
    """A row of a training run's rollouts or evaluations, whose `problem` is a name and `tokens` are for reading."""
    for key in ("prompt", "response"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{where}: {key} = {row.get(key)!r:.100}: expected a text")
    return Read(
        where=where,
        prompt=row["prompt"],
        response=row["response"],
        tokens=_unpacked(where, row, "ids"),
        answer=_answer(row),
        correct=_correct(where, row),
        problem=None,
        sample=None,
        source=source,
        prompt_ids=_unpacked(where, row, "prompt_ids"),
        length=_length(row.get("length")),
    )


def _unpacked(where: str, row: Mapping[str, Any], key: str) -> list[int] | None:
    if row.get(key) is None:
        return None
    try:
        return unpack_ids(str(row[key]))
    except ValueError as error:
        raise ValueError(f"{where}: {key} = {error}") from error


def _row(where: str, row: Mapping[str, Any], tokenizer: Tokenizer, template_arguments: Mapping[str, Any]) -> Read:
    if "messages" in row:
        prompt = render_chat(tokenizer, row["messages"], **template_arguments)
    elif isinstance(row.get("prompt"), str):
        prompt = row["prompt"]
    else:
        raise ValueError(f"{where}: expected prompt, a text as the model reads it, or messages")
    tokens = row.get("tokens")
    if tokens is not None and not (isinstance(tokens, list) and all(isinstance(t, int) and t >= 0 for t in tokens)):
        raise ValueError(f"{where}: tokens = {tokens!r:.100}: expected a list of token ids")
    if tokens is None and not isinstance(row.get("response"), str):
        raise ValueError(f"{where}: response = {row.get('response')!r:.100}: expected a text")
    for key in ("problem", "sample"):
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"{where}: {key} = {value!r:.100}: expected a number from 0 (a question goes in messages)")
    source = row.get("source", "given")
    if source not in SOURCES:
        raise ValueError(f"{where}: source = {source!r}: expected one of {', '.join(SOURCES)}")
    return Read(
        *(where, prompt, row.get("response") or "", tokens),
        answer=_answer(row),
        correct=_correct(where, row),
        problem=row.get("problem"),
        sample=row.get("sample"),
        source=source,
        length=_length(row.get("length")),
    )


def _answer(row: Mapping[str, Any]) -> str | None:
    return None if row.get("answer") is None else str(row["answer"])


def _correct(where: str, row: Mapping[str, Any]) -> bool | None:
    correct = row.get("correct")
    if correct is not None and not isinstance(correct, (bool, int)):
        raise ValueError(f"{where}: correct = {correct!r:.100}: expected true or false")
    return None if correct is None else bool(correct)


def _length(value: Any) -> int | None:
    return value if isinstance(value, int) else None
