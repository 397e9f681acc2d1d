"""Conversations of an optimizer step, packed side by side into rows, so that a long one costs its own step alone."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlvr_jax.data.packing import PackedRows, pack
from rlvr_jax.data.sft import encode_conversation, read_conversations
from rlvr_jax.data.shards import Source, names
from rlvr_jax.data.text import Tokenizer

log = logging.getLogger(__name__)

_SHORTEST_ROW = 128  # tokens
_SAMPLE = 256  # batches
_PART = 1 / 8  # what a part costs besides its rows, in the rows of a step: a compiled call, and a gradient to add


class Conversation(NamedTuple):
    """Token ids int32 [T], and how many of the first ones are context: the others enter the loss."""

    tokens: np.ndarray
    context: int


def encode(tokenizer: Tokenizer, source: Source, max_tokens: int, **template_arguments: Any) -> list[Conversation]:
    """The conversations of a source, cut on the right to `max_tokens`; those with nothing left to learn are dropped.

    Raises:
      ValueError: as `read_conversations`; no conversation with something to learn.
    """
    read = read_conversations(source)
    kept = []
    for messages in read:
        tokens, mask = encode_conversation(tokenizer, messages, max_tokens, **template_arguments)
        context = max(1, mask.count(0))  # nothing predicts the first token
        if context < len(tokens):
            kept.append(Conversation(np.array(tokens, np.int32), context))
    if not kept:
        raise ValueError(f"{names(source)}: no conversation has an assistant token within max_tokens={max_tokens}")
    if len(kept) < len(read):
        log.warning("%s: %d conversations dropped, nothing to learn in their first %d tokens",
                    names(source), len(read) - len(kept), max_tokens)  # fmt: skip
    return kept


class Rows:
    """How the conversations of each step lie in rows.

    A step's rows are as long as the longest conversation of all, or half, a quarter, ... of it, as short as the step's
    own conversations allow. They pass through the model in parts of one number of rows per length, the cheapest for
    random batches. So few shapes are compiled. Nothing depends on the steps before: a resumed run packs alike.

    Args:
      conversations: all of them.
      batch: how many a step has.
      most_rows: rows of the longest length that may be in a part, a multiple of `shards`.
      shards: a part has a multiple of so many rows.
    """

    def __init__(self, conversations: Sequence[Conversation], batch: int, *, most_rows: int, shards: int):
        self._conversations, self._most_rows, self._shards = conversations, most_rows, shards
        self.lengths_N = np.array([len(one.tokens) for one in conversations])
        random, epochs = np.random.default_rng(0), -(-_SAMPLE * batch // len(conversations))
        order = np.concatenate([random.permutation(self.lengths_N) for _ in range(epochs)])
        self._sample = order[: _SAMPLE * batch].reshape(_SAMPLE, batch)  # the lengths of so many batches
        self._part_rows: dict[int, int] = {}

    def of(self, batch: np.ndarray) -> PackedRows:
        """The rows of a batch of indices."""
        chosen = [self._conversations[i] for i in batch]
        learnt_N = np.array([len(one.tokens) - one.context for one in chosen])
        response_NR = np.arange(learnt_N.max()) < learnt_N[:, None]
        tokens_NR = np.zeros(response_NR.shape, np.int32)
        tokens_NR[response_NR] = np.concatenate([one.tokens[one.context :] for one in chosen])
        length = self._row_length(self.lengths_N[batch])
        return PackedRows.of(
            [one.tokens[: one.context] for one in chosen],
            tokens_NR,
            response_NR,
            row_length=length,
            micro_rows=self._rows_of_a_part(length),
        )

    def _row_length(self, lengths_B: np.ndarray) -> int:
        length = int(self.lengths_N.max())
        while (half := -(-length // 2)) >= max(_SHORTEST_ROW, lengths_B.max()):
            length = half
        return length

    def _rows_of_a_part(self, length: int) -> int:
        """Of the sizes that memory allows, the one by which the sampled batches cost least in all."""
        if length not in self._part_rows:
            shards = self._shards
            rows_S = np.array([pack(x, length).rows for x in self._sample if x.max() <= length] or [shards])
            most = max(shards, self._most_rows * int(self.lengths_N.max()) // length // shards * shards)
            sizes = np.arange(shards, min(most, -(-rows_S.max() // shards) * shards) + 1, shards)
            cost = (-(-rows_S[:, None] // sizes) * (sizes + rows_S.mean() * _PART)).sum(axis=0)
            self._part_rows[length] = int(sizes[cost.argmin()])
        return self._part_rows[length]
