"""The host side of a decode: the request checked in one place, then padded to shapes that repeat."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlvr_jax.decoding.checks import Numbers, check_count, check_setting, check_tokens, short

PREFILL_PIECE = 256  # tokens of a prompt that are prefilled at once: attention scores take [B, N, piece, prompt]
Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray
_SMALLEST_BUCKET = 16
_STOP_BUCKET = 4


class Queue(NamedTuple):
    """Checked rows to be decoded, as numpy arrays; all but the prompts have one entry a row. R rows, in their order.

    Attributes:
      prompts: token ids, each once; rows refer to them.
      prompt_R: int32, index of the row's prompt.
      limit_R: int32, the most new tokens of the row.
      problem_R, sample_R: uint32, and seed_R2: uint32, high and low half: what the row's random key is made of.
      temperature_R, top_p_R, tau_R, gamma_R: float32. top_k_R: int32.
      stop_S: int32 stop tokens of all rows, filled up with -1 so that another number of them seldom changes the shape.
      prompt_length: tokens that the prompts without their last one are padded to.
    """

    prompts: tuple[np.ndarray, ...]
    prompt_R: np.ndarray
    limit_R: np.ndarray
    problem_R: np.ndarray
    sample_R: np.ndarray
    seed_R2: np.ndarray
    temperature_R: np.ndarray
    top_p_R: np.ndarray
    top_k_R: np.ndarray
    tau_R: np.ndarray
    gamma_R: np.ndarray
    stop_S: np.ndarray
    prompt_length: int

    @property
    def rows(self) -> int:
        """R."""
        return len(self.prompt_R)

    @property
    def length_R(self) -> np.ndarray:
        """Prompt length of each row in tokens."""
        return np.array([len(tokens) for tokens in self.prompts], np.int32)[self.prompt_R]

    @property
    def longest(self) -> int:
        """Cache positions for any row of this queue, in whole pieces where they are many.

        Made from the padded prompt length, so that other prompts of one bucket need no other program.
        """
        return whole_pieces(self.prompt_length + int(self.limit_R.max(initial=0)))


def make_queue(
    prompts: Prompts,
    *,
    max_new_tokens: int,
    n: int = 1,
    temperature: Numbers = 1.0,
    top_p: Numbers = 1.0,
    top_k: Numbers = 0,
    tau: Numbers = 0.0,
    gamma: Numbers = 0.0,
    seed: int | Sequence[int] = 0,
    problem_ids: Ids | None = None,
    sample_ids: Ids | None = None,
    stop_tokens: Ids = (),
    prompt_length: int | None = None,
) -> Queue:
    """Checks a request for n rows of every prompt, problem-major: row = prompt * n + sample; see `generate.decode`.

    `seed` may be one number, or one a sample [n]; `sample_ids` [n] or [prompts, n].

    Raises:
      ValueError: naming the argument, its value and what was expected.
    """
    arrays = tuple(check_prompts(prompts))
    n, max_new_tokens = check_count("n", n), check_count("max_new_tokens", max_new_tokens)
    rows = len(arrays) * n
    longest = max(len(tokens) for tokens in arrays)
    width = bucket(longest - 1)
    if prompt_length is not None:
        width = check_count("prompt_length", prompt_length)
        if width < longest:
            raise ValueError(f"prompt_length={width}: the longest prompt has {longest} tokens")
    width = whole_pieces(width)
    problem_B = _ids("problem_ids", np.arange(len(arrays)) if problem_ids is None else problem_ids, (len(arrays),))
    sample_n = _ids("sample_ids", np.arange(n) if sample_ids is None else sample_ids, (n,), (len(arrays), n))
    return Queue(
        prompts=arrays,
        prompt_R=np.repeat(np.arange(len(arrays), dtype=np.int32), n),
        limit_R=np.full(rows, max_new_tokens, np.int32),
        problem_R=np.repeat(problem_B, n),
        sample_R=np.ascontiguousarray(np.broadcast_to(sample_n, (len(arrays), n))).reshape(-1),
        seed_R2=np.tile(_seeds(seed, n), (len(arrays), 1)),
        temperature_R=_per_row("temperature", temperature, rows),
        top_p_R=_per_row("top_p", top_p, rows),
        top_k_R=_per_row("top_k", top_k, rows, np.int32),
        tau_R=_per_row("tau", tau, rows),
        gamma_R=_per_row("gamma", gamma, rows),
        stop_S=check_stop_tokens(stop_tokens),
        prompt_length=width,
    )


def select_rows(queue: Queue, rows: Sequence[int] | np.ndarray) -> Queue:
    """The queue of these rows alone, in this order. Its prompt length stays, so that no program is compiled anew."""
    rows = np.asarray(rows, np.int64)
    return queue._replace(**{name: getattr(queue, name)[rows] for name in Queue._fields if name[-2:] in ("_R", "R2")})


def _seeds(seed: int | Sequence[int], n: int) -> np.ndarray:
    seeds: list[Any] = [seed] * n if isinstance(seed, int) else list(seed) if np.ndim(seed) else [seed] * n
    for value in seeds:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**64:
            raise ValueError(f"seed={value!r}: expected an integer from 0 to 2**64 - 1")
    if len(seeds) != n:
        raise ValueError(f"seed has {len(seeds)} entries: expected one number, or one for each of n={n} samples")
    return np.array([(int(value) >> 32, int(value) & 0xFFFFFFFF) for value in seeds], np.uint32)


def check_prompts(prompts: Prompts) -> list[np.ndarray]:
    """Prompts as int32 arrays; ValueError for none at all, for an empty one and for anything but token ids."""
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts={short(prompts)}: expected a list of prompts, each a list of token ids")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: expected at least one list of token ids")
    arrays = [check_tokens(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)]
    for index, tokens in enumerate(arrays):
        if tokens.size == 0:
            raise ValueError(f"prompts[{index}] is empty: expected at least one token id")
    return arrays


def _per_row(name: str, value: Numbers, rows: int, dtype: type = np.float32) -> np.ndarray:
    """A checked setting as [rows] from a number or one number a row."""
    return np.ascontiguousarray(np.broadcast_to(np.asarray(check_setting(name, value, (rows,)), dtype), (rows,)))


def bucket(length: int) -> int:
    """The padded length: the least of 16, 24, 32, 48, 64, 96, 128, ... that is not below `length`."""
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def whole_pieces(length: int) -> int:
    """`length` tokens, in whole pieces where it is more than one."""
    return length if length <= PREFILL_PIECE else length + -length % PREFILL_PIECE


def cache_size(needed: int, full: int) -> int:
    """The size of the cache in tokens: a power of two that holds `needed`, but no more than `full`."""
    return min(2 ** math.ceil(math.log2(max(needed, 1))), full)


def check_stop_tokens(stop_tokens: Ids) -> np.ndarray:
    """The stop tokens as `Queue.stop_S`."""
    stop = check_tokens("stop_tokens", stop_tokens)
    filled = np.full(max(-(-stop.size // _STOP_BUCKET), 1) * _STOP_BUCKET, -1, np.int32)
    filled[: stop.size] = stop
    return filled


def _ids(name: str, value: Ids, *shapes: tuple[int, ...]) -> np.ndarray:
    ids = np.asarray(value)
    if ids.shape not in shapes or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**32:
        raise ValueError(f"{name}={short(value)}: expected integers from 0 to 2**32 - 1 of shape {shapes[-1]}")
    return ids.astype(np.uint32)
