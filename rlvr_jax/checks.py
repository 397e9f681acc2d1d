"""Checks of arguments: of shapes always, of values where they can be seen, which inside jit they cannot."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

# bfloat16 keeps two or three digits of a log-probability, so its rows sum to 1 within some percent.
_NEARLY_NORMALISED = 0.1
_ROWS_LOOKED_AT = 4


def seen(value: Any) -> np.ndarray | None:
    """The numbers of `value` as numpy; None where it is traced or lies on devices of other processes too."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)


def require(name: str, value: Any, expected: str, holds: Callable[[np.ndarray], Any]) -> None:
    """Refuses a number, or an array with numbers, for which `holds` is not true, as far as they can be seen.

    Python, numpy and jax numbers are treated alike. Comparisons are false for NaN, so `x > 0` refuses it too.
    """
    known = seen(value)
    if known is None:
        return
    try:
        numbers = known.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r}: expected {expected}") from error
    good = np.asarray(holds(numbers))
    if not good.all():
        raise ValueError(f"{name}={known[~good][0]}: expected {expected}")


def require_per_row(name: str, value: ArrayLike | Sequence[float], rows: tuple[int, ...]) -> None:
    """Refuses what is neither one number nor one per row; [B, 1] would broadcast to a table."""
    if np.shape(value) not in ((), rows):
        raise ValueError(f"{name} has shape {np.shape(value)}: expected a number, or one per row, {rows}")


def require_logprobs(name: str, array: ArrayLike) -> None:
    """Refuses logits where log-probabilities [..., V] are wanted, as far as they can be seen.

    Of a few rows exp is summed, which gives 1 for log-probabilities and anything for logits. Rows that allow no token,
    and rows with NaN, pass.
    """
    shape = np.shape(array)
    if 0 in shape:
        return
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    rows = seen(array if len(shape) == 1 else array[(0,) * (len(shape) - 2)][:_ROWS_LOOKED_AT])
    if rows is None:
        return
    rows = np.atleast_2d(rows).astype(np.float64)
    rows = rows[~np.isneginf(rows).all(axis=-1)]
    with np.errstate(over="ignore", divide="ignore"):
        total = np.exp(rows).sum(axis=-1)
        wrong = np.abs(np.log(total)) > _NEARLY_NORMALISED
    if wrong.any():
        raise ValueError(
            f"{name}: exp of a row sums to {total[wrong][0]:.4g}: expected log-probabilities, whose exp sums to 1 "
            "(jax.nn.log_softmax makes them of logits)"
        )


def positive(x: np.ndarray) -> np.ndarray | np.bool_:
    return x > 0


def not_negative(x: np.ndarray) -> np.ndarray | np.bool_:
    return x >= 0


def require_same_shape(**arrays: ArrayLike | None) -> None:
    """Refuses arrays that would broadcast against each other by accident; None is skipped."""
    shapes = {name: np.shape(array) for name, array in arrays.items() if array is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
