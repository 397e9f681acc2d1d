"""Sequences of different lengths, one behind the other in rows of one length, so that little padding is computed."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlvr_jax.typing import Int, Num


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


def scatter(values: Num[np.ndarray, " M"], at: np.ndarray, shape: tuple[int, int]) -> Num[np.ndarray, "R T"]:
    """An array of `shape`, zero but for `values` at the flat places `at`."""
    made = np.zeros(shape, values.dtype)
    made.reshape(-1)[at] = values
    return made
