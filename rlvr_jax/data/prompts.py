"""Tokenised prompts, and the endless, exactly resumable order in which training visits them."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Literal

import grain
import numpy as np

from rlvr_jax.data.problems import Problem
from rlvr_jax.data.text import Tokenizer, encode_chat
from rlvr_jax.typing import Int

logger = logging.getLogger(__name__)

_ROWS = 2**60  # the end of "without end"


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Problems with their prompts as token ids.

    Attributes:
        problems: those kept.
        tokens: the prompt of each.
        truncated: how many prompts lost tokens on the left.
        dropped: how many problems were left out because their prompt is too long.
    """

    problems: list[Problem]
    tokens: list[list[int]]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.problems)

    def summary(self, max_tokens: int | None) -> str:
        """How many rows there are, of how many problems, and what became of prompts longer than `max_tokens`."""
        problems = len({problem.id for problem in self.problems})
        kept = f"{len(self):,} prompts of {problems:,} problems"
        lost = f"{self.truncated:,} cut on the left, {self.dropped:,} dropped"
        return kept if max_tokens is None else f"{kept}; longer than {max_tokens:,} tokens: {lost}"


def tokenize_prompts(
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    max_tokens: int | None = None,
    overlong: Literal["truncate_left", "drop", "error"] = "truncate_left",
    **template_arguments: Any,
) -> PromptSet:
    """Renders every problem with the chat template and tokenises it.

    Args:
        tokenizer: with a chat template.
        problems: at least one.
        max_tokens: longest prompt in tokens; None for no limit.
        overlong: what happens to longer ones: "truncate_left" keeps their last `max_tokens` tokens (the published
            recipe), "drop" leaves the problem out, "error" refuses. Truncated and dropped ones are counted, and logged.
        template_arguments: passed to the chat template.

    Raises:
        ValueError: no problems, or none left; a limit below 1; an overlong prompt under "error".
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}: expected at least 1")
    if overlong not in ("truncate_left", "drop", "error"):
        raise ValueError(f"overlong = {overlong!r}: expected 'truncate_left', 'drop' or 'error'")
    if not problems:
        raise ValueError("no problems to tokenise")
    # Repeated rows of a file share their messages; each content is tokenised once.
    known: dict[tuple[tuple[str, str], ...], list[int]] = {}
    kept, tokens, truncated = [], [], 0
    for problem in problems:
        content = tuple((message["role"], message["content"]) for message in problem.messages)
        if content not in known:
            known[content] = encode_chat(tokenizer, problem.messages, **template_arguments)
        prompt = known[content]
        if max_tokens is not None and len(prompt) > max_tokens:
            if overlong == "error":
                raise ValueError(
                    f"problem {problem.id!r}: its prompt has {len(prompt)} tokens, max_tokens = {max_tokens}"
                )
            if overlong == "drop":
                continue
            prompt = prompt[-max_tokens:]
            truncated += 1
        kept.append(problem)
        tokens.append(prompt)
    dropped = len(problems) - len(kept)
    if not kept:
        raise ValueError(f"all {len(problems)} prompts are longer than max_tokens = {max_tokens}")
    if truncated or dropped:
        logger.warning(
            "prompts longer than %s tokens: %d cut on the left, %d problems dropped", max_tokens, truncated, dropped
        )
    return PromptSet(kept, tokens, truncated, dropped)


class PromptBatches(Iterator[Int[np.ndarray, "batch"]]):
    """An endless iterator of arrays of prompt indices; see `prompt_batches`."""

    def __init__(self, prompts: int, batch_size: int, seed: int, shard_index: int, shard_count: int, shuffle: bool):
        dataset = grain.MapDataset.range(prompts).seed(seed)
        # Endless as written, `repeat()` has sys.maxsize rows, which overflows under a batch size of 1.
        dataset = (dataset.shuffle() if shuffle else dataset).repeat(_ROWS // prompts + 1).batch(batch_size)
        # Indices cost nothing to make, so no threads read ahead of the state.
        self._batches = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        self._order = {"prompts": prompts, "batch_size": batch_size, "seed": seed, "shuffle": shuffle}
        part = batch_size // shard_count
        self._rows = slice(shard_index * part, (shard_index + 1) * part)

    def __next__(self) -> Int[np.ndarray, "batch"]:
        return np.asarray(next(self._batches), np.int32)[self._rows]

    @property
    def drawn(self) -> int:
        """Batches drawn since the very start, before any resume too."""
        return int(self._batches.get_state()["next_index"])

    @property
    def epoch(self) -> float:
        """Passes over the prompts: global indices drawn / number of prompts."""
        return self.drawn * self._order["batch_size"] / self._order["prompts"]

    def get_state(self) -> dict[str, Any]:
        """The position, as a dict that JSON can hold. The same on every shard."""
        return {**self._order, "position": dict(self._batches.get_state())}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `get_state` was called; the number of shards may differ.

        Raises:
            ValueError: a state of other prompts, another batch size, seed or order: it would not be the same sequence.
        """
        for key, value in self._order.items():
            if key not in state or state[key] != value:
                raise ValueError(f"state of the prompt order: {key} = {state.get(key)!r}, here {value!r}")
        self._batches.set_state(dict(state["position"]))


def prompt_batches(
    prompts: Sized,
    batch_size: int,
    seed: int,
    *,
    shard_index: int = 0,
    shard_count: int = 1,
    shuffle: bool = True,
) -> PromptBatches:
    """Batches of prompt indices without end: every index once an epoch, in a new order each epoch.

    The sequence depends on `len(prompts)`, `batch_size` and `seed` alone. A batch may span the end of an epoch, so
    nothing is left out and all batches have one size. Shard i of n gets rows i * batch_size / n and on of every batch,
    so the shards together give the same batches whatever their number.

    Args:
        prompts: a `PromptSet`, or anything with a length.
        batch_size: prompts a batch, over all shards.
        seed: 0 to 2^32 - 1.
        shard_index, shard_count: for several processes (`jax.process_index()`, `jax.process_count()`).
        shuffle: False keeps the file's order.

    Returns:
        An iterator of int32 arrays `[batch_size / shard_count]` with `get_state`, `set_state`, `drawn` and `epoch`.

    Raises:
        ValueError: no prompts; a batch size that is not a positive multiple of shard_count; a seed or shard out of
            range.
    """
    if len(prompts) == 0:
        raise ValueError("no prompts to draw from")
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index = {shard_index}, shard_count = {shard_count}: expected 0 <= index < count")
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(f"batch_size = {batch_size}: expected a positive multiple of shard_count = {shard_count}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: expected 0 to 2^32 - 1")
    return PromptBatches(len(prompts), batch_size, seed, shard_index, shard_count, shuffle)
