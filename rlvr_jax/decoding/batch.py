"""The host side of a decode: the request checked in one place, then padded to shapes that repeat."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

PREFILL_PIECE = 256  # tokens of a prompt that are prefilled at once: attention scores take [B, N, piece, prompt]
Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray
Numbers = ArrayLike | Sequence[float]  # a number, or one for each row
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray
_SMALLEST_BUCKET = 16
_STOP_BUCKET = 4


class Batch(NamedTuple):
    """A checked request as numpy arrays. B = prompts, R = rows = B * n, problem-major: row = prompt * n + sample.

    Attributes:
      prefix_BP: int32, the prompts without their last token, right-padded to a bucket P.
      last_B: int32, the last token of each prompt: the first one that the decoding steps feed.
      length_B: int32, prompt lengths in tokens.
      limit_R: int32, the most new tokens of each row.
      problem_R, sample_R: uint32, what a row's random key is made of.
      seed_2: uint32, the seed's high and low half.
      temperature_R, top_p_R: float32. top_k_R: int32.
      stop_S: int32 stop tokens, filled up with -1 so that another number of them seldom changes the shape.
    """

    prefix_BP: np.ndarray
    last_B: np.ndarray
    length_B: np.ndarray
    limit_R: np.ndarray
    problem_R: np.ndarray
    sample_R: np.ndarray
    seed_2: np.ndarray
    temperature_R: np.ndarray
    top_p_R: np.ndarray
    top_k_R: np.ndarray
    stop_S: np.ndarray

    @property
    def n(self) -> int:
        """Rows of one prompt."""
        return self.limit_R.shape[0] // self.last_B.shape[0]


def make_batch(
    prompts: Prompts,
    *,
    max_new_tokens: int,
    n: int,
    temperature: Numbers,
    top_p: Numbers,
    top_k: Numbers,
    seed: int,
    problem_ids: Ids | None,
    sample_ids: Ids | None,
    stop_tokens: Ids,
    prompt_length: int | None,
    chunk: int,
) -> Batch:
    """Checks a request and pads it; see `generate.decode` for the arguments.

    Raises:
      ValueError: naming the argument, its value and what was expected.
    """
    arrays = check_prompts(prompts)
    check_count("chunk", chunk)
    n, max_new_tokens = check_count("n", n), check_count("max_new_tokens", max_new_tokens)
    rows = len(arrays) * n
    lengths = np.array([len(tokens) for tokens in arrays], np.int32)
    width = bucket(int(lengths.max()) - 1)
    if prompt_length is not None:
        width = check_count("prompt_length", prompt_length)
        if width < lengths.max():
            raise ValueError(f"prompt_length={width}: the longest prompt has {lengths.max()} tokens")
    if width > PREFILL_PIECE:
        width += -width % PREFILL_PIECE
    prefix_BP = np.zeros((len(arrays), width), np.int32)
    for row, tokens in enumerate(arrays):
        prefix_BP[row, : len(tokens) - 1] = tokens[:-1]
    problem_B = _ids("problem_ids", np.arange(len(arrays)) if problem_ids is None else problem_ids, (len(arrays),))
    sample_n = _ids("sample_ids", np.arange(n) if sample_ids is None else sample_ids, (n,), (len(arrays), n))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r}: expected an integer from 0 to 2**64 - 1")
    return Batch(
        prefix_BP=prefix_BP,
        last_B=np.array([tokens[-1] for tokens in arrays], np.int32),
        length_B=lengths,
        limit_R=np.full(rows, max_new_tokens, np.int32),
        problem_R=np.repeat(problem_B, n),
        sample_R=np.ascontiguousarray(np.broadcast_to(sample_n, (len(arrays), n))).reshape(-1),
        seed_2=np.array([int(seed) >> 32, int(seed) & 0xFFFFFFFF], np.uint32),
        temperature_R=per_row("temperature", temperature, rows, "at least 0", lambda x: x >= 0),
        top_p_R=per_row("top_p", top_p, rows, "in (0, 1]", lambda x: (x > 0) & (x <= 1)),
        top_k_R=per_row("top_k", top_k, rows, "an integer from 0", lambda x: (x >= 0) & (x == x // 1)).astype(np.int32),
        stop_S=check_stop_tokens(stop_tokens),
    )


def check_prompts(prompts: Prompts) -> list[np.ndarray]:
    """Prompts as integer arrays; ValueError for none at all, for an empty one and for anything but token ids."""
    if len(prompts) == 0:
        raise ValueError("prompts is empty: expected at least one list of token ids")
    arrays = []
    for index, prompt in enumerate(prompts):
        tokens = np.asarray(prompt)
        if tokens.size == 0:
            raise ValueError(f"prompts[{index}] is empty: expected at least one token id")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0:
            raise ValueError(f"prompts[{index}] is {_short(prompt)}: expected a list of token ids, integers from 0")
        arrays.append(tokens)
    return arrays


def per_row(
    name: str, value: Numbers, rows: int, expected: str, valid: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A setting as float32 [rows] from a number or one number a row; ValueError unless `valid` everywhere."""
    try:
        numbers = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r}: expected a number {expected}, or one for each of {rows} rows") from error
    if numbers.shape not in ((), (rows,)):
        raise ValueError(f"{name} has shape {numbers.shape}: expected a number, or one for each of {rows} rows")
    if not np.all(valid(numbers) & np.isfinite(numbers)):
        raise ValueError(f"{name}={_short(value)}: expected {expected}")
    return np.ascontiguousarray(np.broadcast_to(numbers, (rows,)))


def bucket(length: int) -> int:
    """The padded length: the least of 16, 24, 32, 48, 64, 96, 128, ... that is not below `length`."""
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def capacity(needed: int, full: int) -> int:
    """The size of the cache in tokens: a power of two that holds `needed`, but no more than `full`."""
    return min(2 ** math.ceil(math.log2(max(needed, 1))), full)


def check_count(name: str, value: int) -> int:
    """`value` if it is an integer of at least 1, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    return int(value)


def check_stop_tokens(stop_tokens: Ids) -> np.ndarray:
    """The stop tokens as `Batch.stop_S`."""
    stop = np.asarray(stop_tokens)
    if stop.size and (stop.ndim != 1 or stop.dtype.kind not in "iu" or stop.min() < 0):
        raise ValueError(f"stop_tokens={_short(stop_tokens)}: expected a list of token ids, integers from 0")
    filled = np.full(max(-(-stop.size // _STOP_BUCKET), 1) * _STOP_BUCKET, -1, np.int32)
    filled[: stop.size] = stop
    return filled


def _ids(name: str, value: Ids, *shapes: tuple[int, ...]) -> np.ndarray:
    ids = np.asarray(value)
    if ids.shape not in shapes or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**32:
        raise ValueError(f"{name}={_short(value)}: expected integers from 0 to 2**32 - 1 of shape {shapes[-1]}")
    return ids.astype(np.uint32)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
