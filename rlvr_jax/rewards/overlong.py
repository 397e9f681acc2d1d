"""DAPO's soft punishment of responses that nearly fill their length."""

import jax.numpy as jnp

from rlvr_jax.checks import not_negative, require
from rlvr_jax.direction import widen
from rlvr_jax.typing import Array, Float, Real


def overlong_penalty(
    length_B: Real[Array, "*B"], *, max_response: int, buffer: int, factor: float | int = 1.0
) -> Float[Array, "*B"]:
    """What is added to the reward of an overlong response (DAPO, arXiv 2503.14476, section 3.4); accuracy stays.

        expected = max_response - buffer
        penalty  = clip(-(length - expected) / buffer * factor, -factor, 0)

    The published formula is not bounded below beyond `max_response`; a response cannot be longer than that, so the
    bound changes nothing in range.

    Args:
        length_B: response lengths in tokens.
        max_response: the longest response, in tokens.
        buffer: the last tokens of `max_response`, over which the penalty grows from 0 to `-factor`.
        factor: the penalty at `max_response`.

    Returns:
        float32, at most 0, shape `length_B.shape`.

    Raises:
        ValueError: buffer not in 1 .. max_response, or a negative factor.
    """
    require("buffer", buffer, f"1 to max_response={max_response} tokens", lambda x: (x > 0) & (x <= max_response))
    require("factor", factor, "0 or more, since it is subtracted", not_negative)
    exceed_B = widen(length_B) - (max_response - buffer)
    return jnp.clip(-exceed_B / buffer * factor, -factor, 0.0)
