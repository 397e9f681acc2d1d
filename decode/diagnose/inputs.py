"""Responses to be diagnosed, from files that decoding runs or others left; all of it checked, none of it scored."""

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from decode.diagnose.files import Read, read_file, response_files
from rlvr_jax.data.text import Tokenizer, encode_text
from rlvr_jax.models.config import QwenConfig

log = logging.getLogger(__name__)


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


def read_given(
    paths: Sequence[str], tokenizer: Tokenizer, limit: int | None = None, **template_arguments: Any
) -> list[Given]:
    """The responses of all files and folders (`response_files`), sorted by problem, sample and source.

    A response without a problem number belongs to the problem of its prompt. One without a sample number is the next of
    its problem and source. The ids that were drawn are taken where a file has them. Else the text is tokenized as it
    stands, and a warning says where that gives another number of tokens than were drawn. The chat template renders what
    a file has as messages.

    Raises:
      ValueError: one sentence naming the file and the row.
    """
    found = []
    # A file may be named twice: seed0* is seed0.json and its rows.
    for path in dict.fromkeys(file for one in paths for file in response_files(one)):
        rows = list(itertools.islice(read_file(path, tokenizer, template_arguments), limit))
        if not rows:
            raise ValueError(f"{path}: no responses in this file")
        found += _with_tokens(path, rows, tokenizer)
    numbered = [one for one in found if one.problem is not None]
    if numbered and len(numbered) < len(found):
        without = next(one for one in found if one.problem is None)
        raise ValueError(f"{without.where}: no problem number, and {numbered[0].where} has one: expected all or none")
    prompts: dict[str, int] = {}
    prompt_ids: dict[str, list[int]] = {}
    given: dict[tuple[int, int, str], Given] = {}
    following: dict[tuple[int, str], int] = {}
    for one in found:
        problem = prompts.setdefault(one.prompt, len(prompts)) if one.problem is None else one.problem
        sample = one.sample
        if sample is None:
            sample = following.get((problem, one.source), 0)
            while (problem, sample, one.source) in given:
                sample += 1
            following[problem, one.source] = sample + 1
        if (problem, sample, one.source) in given:
            raise ValueError(f"{one.where}: problem {problem}, sample {sample} of {one.source} is there twice")
        ids = one.prompt_ids
        if ids is None:
            if one.prompt not in prompt_ids:
                prompt_ids[one.prompt] = encode_text(tokenizer, one.prompt)
            ids = prompt_ids[one.prompt]
        if not ids:
            raise ValueError(f"{one.where}: its prompt is empty")
        given[problem, sample, one.source] = Given(
            *(problem, sample, one.source, one.prompt, ids, one.tokens or [], one.answer, one.correct)
        )
    return sorted(given.values(), key=lambda one: one.key)


def _with_tokens(path: Path, rows: Sequence[Read], tokenizer: Tokenizer) -> list[Read]:
    """The same with the tokens of all; those of a text as the tokenizer splits it."""
    texts = [place for place, one in enumerate(rows) if one.tokens is None]
    out = list(rows)
    for place in texts:
        out[place] = rows[place]._replace(tokens=encode_text(tokenizer, rows[place].response))
    others = [one for one in map(out.__getitem__, texts) if one.length not in (None, len(one.tokens or ()))]
    if others:
        drawn, scored = sum(one.length or 0 for one in others), sum(len(one.tokens or ()) for one in others)
        log.warning(
            "%s: it has no token ids, and %d of its %d responses are tokenized in another way than they were drawn "
            "(%d tokens drawn, %d scored), so the numbers are of tokens that no model drew; newer runs keep the ids",
            *(path, len(others), len(rows), drawn, scored),
        )
    return out


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
