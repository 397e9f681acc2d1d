"""Responses to be diagnosed, from files that decoding runs or others left; all of it checked, none of it scored."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from decode.results import read_json
from rlvr_jax.data.rows import parse_json, read_rows
from rlvr_jax.data.text import Tokenizer, encode_text, render_chat
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.remote import local

KEYS = ("prompt", "messages", "response", "answer", "correct", "problem", "sample", "source", "tokens")
SOURCES = ("base", "rl", "given")


class Given(NamedTuple):
    """A response to score; the fields are those of `rlvr_jax.microscope.columns.ScoredResponse`, as token ids."""

    problem: int
    sample: int
    source: str
    prompt: str
    prompt_ids: list[int]
    tokens: list[int]
    answer: str | None
    correct: bool | None

    @property
    def key(self) -> tuple[int, int, str]:
        """What a response is known by."""
        return self.problem, self.sample, self.source


class _Read(NamedTuple):
    """A response as a file has it; what it does not say is None."""

    where: str
    prompt: str
    response: str
    tokens: list[int] | None
    answer: str | None
    correct: bool | None
    problem: int | None
    sample: int | None
    source: str


def read_given(
    paths: Sequence[str], tokenizer: Tokenizer, limit: int | None = None, **template_arguments: Any
) -> list[Given]:
    """The responses of all files, sorted by problem, sample and source.

    A response without a problem number belongs to the problem of its prompt; one without a sample number is the next of
    its problem and source. Text is tokenized as it stands; token ids are taken where the file has them, or where a
    decoding run's tokens.parquet lies beside it. The chat template renders what the file has as messages.

    Raises:
      ValueError: one sentence naming the file and the row.
    """
    found = []
    for path in paths:
        rows = list(_read_file(Path(local(path)), tokenizer, template_arguments))
        if not rows:
            raise ValueError(f"{path}: no responses in this file")
        found += rows[:limit]
    numbered = [one for one in found if one.problem is not None]
    if numbered and len(numbered) < len(found):
        without = next(one for one in found if one.problem is None)
        raise ValueError(f"{without.where}: no problem number, and {numbered[0].where} has one: expected all or none")
    prompts: dict[str, int] = {}
    prompt_ids: dict[str, list[int]] = {}
    given: dict[tuple[int, int, str], Given] = {}
    for one in found:
        problem = prompts.setdefault(one.prompt, len(prompts)) if one.problem is None else one.problem
        sample = one.sample
        if sample is None:
            sample = 0
            while (problem, sample, one.source) in given:
                sample += 1
        if (problem, sample, one.source) in given:
            raise ValueError(f"{one.where}: problem {problem}, sample {sample} of {one.source} is there twice")
        if one.prompt not in prompt_ids:
            prompt_ids[one.prompt] = encode_text(tokenizer, one.prompt)
        if not prompt_ids[one.prompt]:
            raise ValueError(f"{one.where}: its prompt is empty")
        tokens = encode_text(tokenizer, one.response) if one.tokens is None else one.tokens
        given[problem, sample, one.source] = Given(
            *(problem, sample, one.source, one.prompt, prompt_ids[one.prompt], tokens, one.answer, one.correct)
        )
    return sorted(given.values(), key=lambda one: one.key)


def check_given(given: Sequence[Given], models: Mapping[str, QwenConfig]) -> None:
    """Refuses token ids outside the vocabulary and texts longer than the models' positions."""
    for one in given:
        where = f"problem {one.problem}, sample {one.sample} of {one.source}"
        for role, model in models.items():
            length = len(one.prompt_ids) + len(one.tokens)
            if length > model.max_position_embeddings:
                raise ValueError(
                    f"{where}: {length} tokens with its prompt, the {role} model has {model.max_position_embeddings} "
                    "positions (max_position_embeddings)"
                )
            highest = max((*one.prompt_ids, *one.tokens))
            if highest >= model.vocab_size:
                raise ValueError(f"{where}: token {highest}, the {role} model has {model.vocab_size}")


def fingerprint(given: Sequence[Given]) -> str:
    """Tells whether a later run scores the same tokens."""
    digest = hashlib.sha256()
    for one in given:
        digest.update(repr((*one.key, one.prompt_ids, one.tokens, one.answer, one.correct)).encode())
    return digest.hexdigest()


def _read_file(path: Path, tokenizer: Tokenizer, template_arguments: Mapping[str, Any]) -> Iterator[_Read]:
    if path.name.endswith(".rows.jsonl"):  # which has no prompts; the file that is assembled from it has
        path = path.with_name(path.name.removesuffix(".rows.jsonl") + ".json")
        if not path.is_file():
            raise ValueError(f"{path}: no such file; rows have no prompts, this file has them when the run has ended")
    if not path.is_file():
        raise ValueError(f"responses: {path}: no such file")
    if path.suffix == ".json":
        try:
            content = parse_json(path.read_bytes(), path)
        except ValueError:  # then it may be lines
            content = None
        if isinstance(content, list):
            yield from _published(path, content)
            return
    for number, row in read_rows(path, KEYS):
        yield _row(f"{path} row {number}", row, tokenizer, template_arguments)


def _published(path: Path, content: list[Any]) -> Iterator[_Read]:
    """`prompt, gt, generated_texts, accs` of each problem, as decoding runs and the paper's code write it."""
    problems: Any = read_json(path.parent.parent / "problems.json") if re.fullmatch(r"seed\d+\.json", path.name) else {}
    indices = [p["index"] for p in problems] if isinstance(problems, list) and len(problems) == len(content) else None
    setting = read_json(path.parent / "setting.json")
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
        texts, right = entry["generated_texts"], entry.get("accs") or [None] * len(entry["generated_texts"])
        if not isinstance(right, list):
            raise ValueError(f"{where}: accs = {right!r:.100}: expected a list")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: generated_texts has something that is not a text")
        if len(right) != len(texts):
            raise ValueError(f"{where}: {len(right)} accs and {len(texts)} generated_texts: expected as many")
        problem = place if indices is None else indices[place]
        for sample, (text, correct) in enumerate(zip(texts, right, strict=True)):
            yield _Read(
                where=f"{where}, response {sample}",
                prompt=entry["prompt"],
                response=text,
                tokens=tokens.get((problem, sample)),
                answer=None if entry.get("gt") is None else str(entry["gt"]),
                correct=None if correct is None else bool(correct),
                problem=problem,
                sample=None,  # files of several seeds number theirs anew
                source=source if source in ("base", "rl") else "given",
            )


def _token_ids(path: Path) -> dict[tuple[int, int], list[int]]:
    """The ids that a decoding run drew for seedN.json, where it saved them."""
    named, beside = re.fullmatch(r"seed(\d+)\.json", path.name), path.parent / "tokens.parquet"
    if not named or not beside.is_file() or "seed" not in pq.read_schema(beside).names:
        return {}
    table = pq.read_table(beside, columns=["problem", "sample", "tokens"], filters=[("seed", "=", int(named.group(1)))])
    return {(row["problem"], row["sample"]): row["tokens"] for row in table.to_pylist()}


def _row(where: str, row: Mapping[str, Any], tokenizer: Tokenizer, template_arguments: Mapping[str, Any]) -> _Read:
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
    source, correct = row.get("source", "given"), row.get("correct")
    if source not in SOURCES:
        raise ValueError(f"{where}: source = {source!r}: expected one of {', '.join(SOURCES)}")
    if correct is not None and not isinstance(correct, (bool, int)):
        raise ValueError(f"{where}: correct = {correct!r:.100}: expected true or false")
    return _Read(
        *(where, prompt, row.get("response") or "", tokens),
        answer=None if row.get("answer") is None else str(row["answer"]),
        correct=None if correct is None else bool(correct),
        problem=row.get("problem"),
        sample=row.get("sample"),
        source=source,
    )
