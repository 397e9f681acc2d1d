"""Which response tokens count: what a mask means, and masks that keep a share of the tokens.

A mask is 1 (or True, or a positive weight) on response tokens that count and 0 elsewhere. Whatever an array holds where
its mask is 0, infinities and NaN included, never reaches a result.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import require, require_same_shape
from rlvr_jax.direction import delta_logp, widen
from rlvr_jax.typing import Array, Bool, Real

TOKEN_MASKS = (
    "all",
    "lowest_logp",
    "highest_logp",
    "prob_below",
    "prob_between",
    "highest_entropy",
    "highest_delta_logp",
    "lowest_delta_logp",
    "middle_delta_logp",
    "ends_delta_logp",
)

# One number per token; integers and booleans are computed with as float32.
Values = Real[Array, "B T"] | Bool[Array, "B T"]
Mask = Values

# Quantiles with a denominator up to this are exact: its square, the largest product below, still fits 32 bits.
_DENOMINATOR = 40_000


def token_mask(
    kind: str,
    mask_BT: Mask,
    *,
    quantile: ArrayLike,
    old_logp_BT: Values | None = None,
    entropy_BT: Values | None = None,
    ref_logp_BT: Values | None = None,
) -> Real[jax.Array, "B T"] | Bool[jax.Array, "B T"]:
    """`mask_BT` with only the selected tokens left, for the loss or as `reweight(token_mask_BT=)`; dtype of the mask.

    With q = `quantile` and n response tokens in the whole batch (call it before splitting into micro-batches), t(q) is
    the k-th smallest of their values v, where k = floor(q n), and at least 1:

    | kind | keeps |
    |---|---|
    | all | everything |
    | lowest_logp, lowest_delta_logp | v <= t(q) |
    | highest_logp, highest_entropy, highest_delta_logp | v >= t(q) (0.8: the top fifth, 2506.01939) |
    | middle_delta_logp | t(1 - q) <= v <= t(q) |
    | ends_delta_logp | v <= t(1 - q) or v >= t(q) |
    | prob_below | probability exp(old_logp) <= q |
    | prob_between | 1 - q <= exp(old_logp) <= q |

    dlogp = old_logp - ref_logp, the change against the reference (base) model. The token at a threshold is kept, and
    so is every token of the same value: the order of the rows changes nothing, but many equal values (log-probs of
    exactly 0, say) make the kept share larger than asked. The ranks q n are exact: 0.29 of 100 tokens is 29. A traced
    quantile is precise to float32. Raises ValueError when an array the kind needs is missing.
    """
    if kind not in TOKEN_MASKS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(TOKEN_MASKS)}")
    require("quantile", quantile, "a number between 0 and 1", lambda q: (q >= 0) & (q <= 1))
    given = {"old_logp_BT": old_logp_BT, "entropy_BT": entropy_BT, "ref_logp_BT": ref_logp_BT}
    require_same_shape(mask_BT=mask_BT, **given)
    mask_BT = jnp.asarray(mask_BT)
    counted_BT = mask_BT > 0
    needed = []
    for name in _needs(kind):
        array_BT = given[name]
        if array_BT is None:
            raise ValueError(f"{name}=None: token mask {kind!r} needs it")
        needed.append(masked(array_BT, counted_BT))
    if kind == "all" or mask_BT.size == 0:
        return mask_BT
    if kind in ("prob_below", "prob_between"):
        p_BT = jnp.exp(needed[0])
        chosen_BT = p_BT <= quantile
        if kind == "prob_between":
            chosen_BT &= p_BT >= 1 - quantile
        return jnp.where(chosen_BT, mask_BT, 0).astype(mask_BT.dtype)

    values_BT = delta_logp(*needed) if kind.endswith("delta_logp") else needed[0]
    # What does not count lies behind the rest.
    ordered_N, count = jnp.sort(jnp.where(counted_BT, values_BT, jnp.inf), axis=None), jnp.sum(counted_BT)
    low, high = (ordered_N[jnp.maximum(_rank_at(count, quantile, complement=c), 1) - 1] for c in (True, False))
    if kind.startswith("lowest"):
        chosen_BT = values_BT <= high
    elif kind.startswith("highest"):
        chosen_BT = values_BT >= high
    elif kind.startswith("middle"):
        chosen_BT = (values_BT >= low) & (values_BT <= high)
    else:
        chosen_BT = (values_BT <= low) | (values_BT >= high)
    return jnp.where(chosen_BT & counted_BT, mask_BT, 0).astype(mask_BT.dtype)


def masked(values: ArrayLike, mask: ArrayLike) -> jax.Array:
    """`values` in at least float32, with exact zeros (and zero gradients) where the mask is 0, whatever was there."""
    return jnp.where(jnp.asarray(mask) > 0, widen(values), 0.0)


def _needs(kind: str) -> tuple[str, ...]:
    if kind == "all":
        return ()
    if kind == "highest_entropy":
        return ("entropy_BT",)
    return ("ref_logp_BT", "old_logp_BT") if kind.endswith("delta_logp") else ("old_logp_BT",)


def _rank_at(count: Array, quantile: ArrayLike, complement: bool = False) -> Array:
    """floor(q * count), or of (1 - q) * count, where a product meant to be whole is not lost to rounding."""
    if isinstance(quantile, int | float | np.number):
        q = Fraction(float(quantile)).limit_denominator(_DENOMINATOR)
        q = 1 - q if complement else q
        whole, rest = count // q.denominator, count % q.denominator
        return whole * q.numerator + rest * q.numerator // q.denominator
    q = 1 - quantile if complement else quantile
    product = count * q
    nearest = jnp.round(product)
    slack = 1e-6 * count + 1e-6
    return jnp.where(jnp.abs(product - nearest) <= slack, nearest, jnp.floor(product)).astype(count.dtype)
