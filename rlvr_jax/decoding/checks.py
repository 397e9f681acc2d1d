"""The settings of a decode and what each may be: checked in one place, wherever their values can be seen."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

Numbers = ArrayLike | Sequence[float]  # a number, or one for each row

_LARGEST = float(np.finfo(np.float32).max)
# What is expected of each setting, in words and as a test of finite numbers.
_SETTINGS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "temperature": ("a number of at least 0", lambda x: x >= 0),
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
    each = f"or one for each row, of shape {rows}"
    seen = not isinstance(value, jax.core.Tracer) and (not isinstance(value, jax.Array) or value.is_fully_addressable)
    try:
        numbers = np.asarray(value) if seen else value
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={short(value)}: expected {expected}, {each}") from error
    if not (jax.dtypes.issubdtype(numbers.dtype, np.integer) or jax.dtypes.issubdtype(numbers.dtype, np.floating)):
        raise ValueError(f"{name}={short(value)}: expected {expected}, {each}")
    if numbers.shape not in ((), rows):
        raise ValueError(f"{name} has shape {numbers.shape}: expected one number, {each}")
    if seen:
        wide = numbers.astype(np.float64)
        if not np.all((np.abs(wide) <= _LARGEST) & valid(wide)):
            raise ValueError(f"{name}={short(value)}: expected {expected}")
    return value


def check_count(name: str, value: int) -> int:
    """`value` if it is an integer of at least 1, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    return int(value)


def check_tokens(name: str, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
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
