"""The settings of a decode and what each may be: checked in one place, wherever their values can be seen."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import require, require_per_row

Numbers = ArrayLike | Sequence[float]  # a number, or one for each row

_LARGEST = float(np.finfo(np.float32).max)  # which the settings become
_COLDEST = 1e-20  # logits up to 1e18 divided by it are still finite
# What is expected of each setting, in words and as a test.
_SETTINGS: dict[str, tuple[str, Callable[[np.ndarray], Any]]] = {
    "temperature": ("0 (greedy), or a number of at least 1e-20", lambda x: (x == 0) | (x >= _COLDEST)),
    "top_p": ("a number in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
    "top_k": ("an integer from 0 to 2**31 - 1", lambda x: (x >= 0) & (x < 2**31) & (x == np.floor(x))),
    "tau": ("a finite number", np.isfinite),
    "gamma": ("a finite number", np.isfinite),
}


def check_setting(name: str, value: Numbers, rows: tuple[int, ...]) -> Numbers:
    """`value`, a number or one for each of the rows; of traced values the shape alone can be checked.

    Raises:
      ValueError: naming the setting, its value and what was expected.
    """
    expected, valid = _SETTINGS[name]
    require_per_row(name, value, rows)
    require(name, value, expected, lambda x: (np.abs(x) <= _LARGEST) & valid(x))
    return value


def check_count(name: str, value: int) -> int:
    """`value` if it is an integer of at least 1, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    return int(value)


def check_tokens(name: str, tokens: Sequence[Any] | np.ndarray) -> np.ndarray:
    """`tokens`, a possibly empty list of token ids, as int32 [T]; ValueError for anything else."""
    try:
        array = np.asarray(tokens)
    except ValueError:  # lists of different lengths
        array = np.array(None)
    if array.shape == (0,):
        return array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**31:
        raise ValueError(f"{name}={short(tokens)}: expected a list of token ids, integers from 0")
    return array.astype(np.int32)


def short(value: object) -> str:
    """`repr` of a value, cut to fit a message of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else text[:77] + "..."
