"""Sequences of different lengths, one behind the other in rows of one length, so that little padding is computed."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlvr_jax.typing import Int, Num, Shaped


class Packing(NamedTuple):
    """Where each of N sequences lies in `rows` rows of `capacity` tokens.

    Attributes:
      row_N: int64 [N].
      start_N: int64 [N], column of its first token.
      number_N: int64 [N], 1, 2, 3, ... from left to right inside its row.
      rows: rows in use.
      capacity: tokens a row.
    """

    row_N: Int[np.ndarray, " N"]
    start_N: Int[np.ndarray, " N"]
    number_N: Int[np.ndarray, " N"]
    rows: int
    capacity: int


def pack(lengths_N: Sequence[int] | Int[np.ndarray, " N"], capacity: int, *, several: bool = True) -> Packing:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room. Deterministic.

    At most 11/9 of the fewest rows possible, and one more (Johnson 1974). `several=False`: one a row, in order.

    Raises:
      ValueError: a length below 1 or above `capacity`.
    """
    lengths_N = np.asarray(lengths_N, np.int64)
    if lengths_N.size and not 1 <= lengths_N.min() <= lengths_N.max() <= capacity:
        raise ValueError(
            f"sequences of {lengths_N.min()} to {lengths_N.max()} tokens: expected 1 to the {capacity} tokens of a row"
        )
    if not several:
        rows_N = np.arange(lengths_N.size)
        return Packing(rows_N, np.zeros_like(rows_N), np.ones_like(rows_N), lengths_N.size, capacity)
    row_N, start_N, number_N = (np.zeros(lengths_N.size, np.int64) for _ in range(3))
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    filled: list[int] = []  # sequences a row
    for i in np.argsort(-lengths_N, kind="stable"):
        length = int(lengths_N[i])
        place = bisect.bisect_left(room, (length, 0))
        if place == len(room):
            left, row = capacity, len(filled)
            filled.append(0)
        else:
            left, row = room.pop(place)
        filled[row] += 1
        row_N[i], start_N[i], number_N[i] = row, capacity - left, filled[row]
        bisect.insort(room, (left - length, row))
    return Packing(row_N, start_N, number_N, len(filled), capacity)


def places(packing: Packing, offsets_N: Int[np.ndarray, " N"], lengths_N: Int[np.ndarray, " N"]) -> np.ndarray:
    """Flat indices into `[rows, capacity]`: of each sequence `lengths_N[i]` tokens from `offsets_N[i]`, in order."""
    begins_N = packing.row_N * packing.capacity + packing.start_N + offsets_N
    within = np.arange(lengths_N.sum()) - np.repeat(np.cumsum(lengths_N) - lengths_N, lengths_N)
    return np.repeat(begins_N, lengths_N) + within


def scatter(values: Shaped[np.ndarray, " M"], at: np.ndarray, shape: tuple[int, int]) -> Shaped[np.ndarray, "R T"]:
    """An array of `shape`, zero but for `values` at the flat places `at`."""
    made = np.zeros(shape, values.dtype)
    made.reshape(-1)[at] = values
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """N responses in packed rows, whose number is a multiple of that of a micro-batch.

    Attributes:
      tokens: int32 [rows, T]: a prompt and its response side by side, then the next ones, then zeros.
      segments: int32 [rows, T]: 1, 2, 3, ... on the sequences of a row, 0 on padding.
      response_NR: bool [N, R], where a response has a token.
      places: flat places in [rows, T] of those tokens, response after response.
      micro_rows: rows a micro-batch.
    """

    tokens: np.ndarray
    segments: np.ndarray
    response_NR: np.ndarray
    places: np.ndarray
    micro_rows: int

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[Any] | np.ndarray],
        tokens_NR: np.ndarray,
        response_NR: np.ndarray,
        *,
        row_length: int,
        micro_rows: int,
        several: bool = True,
    ) -> "PackedRows":
        """Packs N responses behind their prompts (one a response) into rows of `row_length` tokens, `several` a row."""
        response_NR = response_NR > 0
        prompt_N = np.array([len(prompt) for prompt in prompts], np.int64)
        response_N = response_NR.sum(axis=1)
        packing = pack(prompt_N + response_N, row_length, several=several)
        shape = (-(-packing.rows // micro_rows) * micro_rows, row_length)
        at = places(packing, prompt_N, response_N)
        prompt_at = places(packing, np.zeros_like(prompt_N), prompt_N)
        tokens = scatter(tokens_NR[response_NR].astype(np.int32), at, shape)
        tokens.reshape(-1)[prompt_at] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
        segments = scatter(np.repeat(packing.number_N, response_N).astype(np.int32), at, shape)
        segments.reshape(-1)[prompt_at] = np.repeat(packing.number_N, prompt_N)
        return cls(tokens, segments, response_NR, at, micro_rows)

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that are padding."""
        return float((self.segments == 0).mean())

    def spread(self, values_NR: Shaped[np.ndarray, "N R"]) -> Shaped[np.ndarray, "rows T"]:
        """Per-token values of the responses at their places in the rows, 0 elsewhere."""
        return scatter(values_NR[self.response_NR], self.places, self.tokens.shape)

    def gather(self, values: Num[np.ndarray, "rows T"]) -> Num[np.ndarray, "N R"]:
        """The inverse of `spread`."""
        made_NR = np.zeros(self.response_NR.shape, values.dtype)
        made_NR[self.response_NR] = values.reshape(-1)[self.places]
        return made_NR

    def micro_batches(self, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Tokens, segments and `arrays` [rows, T], a micro-batch at a time."""
        for begin in range(0, len(self.tokens), self.micro_rows):
            yield tuple(x[begin : begin + self.micro_rows] for x in (self.tokens, self.segments, *arrays))

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self.tokens) // self.micro_rows
