"""Which response tokens count: what a mask means, and masks that keep a share of the tokens.

A mask is 1 (or True, or a positive weight) on response tokens that count and 0 elsewhere. Whatever an array holds where
its mask is 0, infinities and NaN included, never reaches a result.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.direction import delta_logp, widen
from rlvr_jax.typing import Array, Bool, Float, Int

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

Mask = Float[Array, "B T"] | Int[Array, "B T"] | Bool[Array, "B T"]

# Quantiles with a denominator up to this are exact: its square, the largest product below, still fits 32 bits.
_DENOMINATOR = 40_000


def token_mask(
    kind: str,
    mask_BT: Mask,
    *,
    quantile: ArrayLike,
    old_logp_BT: Float[Array, "B T"] | None = None,
    entropy_BT: Float[Array, "B T"] | None = None,
    ref_logp_BT: Float[Array, "B T"] | None = None,
) -> Float[jax.Array, "B T"] | Int[jax.Array, "B T"] | Bool[jax.Array, "B T"]:
    """`mask_BT` with only the selected tokens left, for the loss or as `reweight(token_mask_BT=)`; dtype of the mask.

    With q = `quantile` and n response tokens in the whole batch (call it before splitting into micro-batches):

    | kind | keeps |
    |---|---|
    | all | everything |
    | lowest_logp, lowest_delta_logp | the floor(q n) lowest |
    | highest_logp, highest_entropy, highest_delta_logp | the n - floor(q n) highest (0.8: the top fifth, 2506.01939) |
    | middle_delta_logp | neither the floor((1 - q) n) lowest nor the n - floor(q n) highest |
    | ends_delta_logp | both of those: the complement of the middle (q >= 0.5) |
    | prob_below | probability exp(old_logp) <= q |
    | prob_between | 1 - q <= exp(old_logp) <= q |

    dlogp = old_logp - ref_logp, the change against the reference (base) model. The ranks q n are exact: 0.29 of 100
    tokens is 29. Among equal values the token earlier in row-major order ranks lower, so counts are exact and results
    reproducible. Raises ValueError when an array the kind needs is missing. A traced quantile is precise to float32.
    """
    if kind not in TOKEN_MASKS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(TOKEN_MASKS)}")
    if isinstance(quantile, int | float) and not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile}: expected a number between 0 and 1")
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
    if kind == "all":
        return mask_BT
    if kind in ("prob_below", "prob_between"):
        p_BT = jnp.exp(needed[0])
        chosen_BT = p_BT <= quantile
        if kind == "prob_between":
            chosen_BT &= p_BT >= 1 - quantile
        return jnp.where(chosen_BT, mask_BT, 0).astype(mask_BT.dtype)

    values_BT = delta_logp(*needed) if kind.endswith("delta_logp") else needed[0]
    rank_BT = _ranks(values_BT, counted_BT)
    count = jnp.sum(counted_BT)
    below, above = _rank_at(count, quantile, complement=True), _rank_at(count, quantile)
    if kind.startswith("lowest"):
        chosen_BT = rank_BT < above
    elif kind.startswith("highest"):
        chosen_BT = rank_BT >= above
    elif kind.startswith("middle"):
        chosen_BT = (rank_BT >= below) & (rank_BT < above)
    else:
        chosen_BT = (rank_BT < below) | (rank_BT >= above)
    return jnp.where(chosen_BT & counted_BT, mask_BT, 0).astype(mask_BT.dtype)


def masked(values: ArrayLike, mask: ArrayLike) -> jax.Array:
    """`values` in at least float32, with exact zeros (and zero gradients) where the mask is 0, whatever was there."""
    return jnp.where(jnp.asarray(mask) > 0, widen(values), 0.0)


def require_same_shape(**arrays: ArrayLike | None) -> None:
    """Refuses arrays that would broadcast against each other by accident; None is skipped."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items() if array is not None}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def _needs(kind: str) -> tuple[str, ...]:
    if kind == "all":
        return ()
    if kind == "highest_entropy":
        return ("entropy_BT",)
    return ("ref_logp_BT", "old_logp_BT") if kind.endswith("delta_logp") else ("old_logp_BT",)


def _ranks(values_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """0-based rank of every counted token by (value, index); the others rank behind them."""
    index_N = jnp.arange(values_BT.size, dtype=jnp.int32)
    *_, order_N = jax.lax.sort(((~counted_BT).ravel(), values_BT.ravel(), index_N), num_keys=2, is_stable=True)
    return jnp.zeros_like(index_N).at[order_N].set(index_N).reshape(values_BT.shape)


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
