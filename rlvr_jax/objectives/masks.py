"""Masks that keep a share of the response tokens, by their probability, entropy or dlogp."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import require, require_same_shape
from rlvr_jax.direction import delta_logp
from rlvr_jax.entries import entry
from rlvr_jax.objectives.tokens import Mask, Tokens, Values, masked
from rlvr_jax.typing import Array, Bool, Real

# Quantiles with a denominator up to this are exact: its square, the largest product below, still fits 32 bits.
_DENOMINATOR = 40_000


Keep = Callable[[Tokens, Any], Any]


@dataclasses.dataclass(frozen=True)
class TokenMask:
    """Which response tokens are kept.

    Attributes:
      keep: `(tokens, quantile) -> bool_BT`; what it says off the responses does not count.
      needs: names of the `Tokens` that must be there; "ref_logp_BT" makes a run score the reference (base) model.
    """

    keep: Keep
    needs: tuple[str, ...] = ()


def _logp(tokens: Tokens) -> jax.Array:
    return masked(tokens.old_logp_BT, tokens.counted_BT)


def _entropy(tokens: Tokens) -> jax.Array:
    return masked(tokens.entropy_BT, tokens.counted_BT)


def _delta_logp(tokens: Tokens) -> jax.Array:
    return delta_logp(masked(tokens.ref_logp_BT, tokens.counted_BT), _logp(tokens))


def _ranked(values: Callable[[Tokens], jax.Array], keep: Callable[..., jax.Array]) -> Keep:
    """Keeps by `keep(values_BT, t(1 - q), t(q))`."""

    def kept(tokens: Tokens, quantile: ArrayLike) -> jax.Array:
        values_BT = values(tokens)
        return keep(values_BT, *_thresholds(values_BT, tokens, quantile))

    return kept


def _lowest(values_BT: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return values_BT <= high


def _highest(values_BT: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return values_BT >= high


def _middle(values_BT: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return (values_BT >= low) & (values_BT <= high)


def _ends(values_BT: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return (values_BT <= low) | (values_BT >= high)


def _between(tokens: Tokens, quantile: Any) -> jax.Array:
    p_BT = jnp.exp(_logp(tokens))
    return (p_BT <= quantile) & (p_BT >= 1 - quantile)


_LOGP, _ENTROPY, _PAIR = ("old_logp_BT",), ("entropy_BT",), ("ref_logp_BT", "old_logp_BT")

TOKEN_MASKS: dict[str, TokenMask] = {
    "all": TokenMask(lambda tokens, quantile: tokens.counted_BT),
    "lowest_logp": TokenMask(_ranked(_logp, _lowest), _LOGP),
    "highest_logp": TokenMask(_ranked(_logp, _highest), _LOGP),
    "prob_below": TokenMask(lambda tokens, quantile: jnp.exp(_logp(tokens)) <= quantile, _LOGP),
    "prob_between": TokenMask(_between, _LOGP),
    "highest_entropy": TokenMask(_ranked(_entropy, _highest), _ENTROPY),
    "highest_delta_logp": TokenMask(_ranked(_delta_logp, _highest), _PAIR),
    "lowest_delta_logp": TokenMask(_ranked(_delta_logp, _lowest), _PAIR),
    "middle_delta_logp": TokenMask(_ranked(_delta_logp, _middle), _PAIR),
    "ends_delta_logp": TokenMask(_ranked(_delta_logp, _ends), _PAIR),
}

Named = str | TokenMask | Keep


def token_mask_of(kind: Named) -> TokenMask:
    """The mask that a name stands for; a function `(tokens, quantile) -> bool_BT` becomes one.

    Raises:
      ValueError: a name that is none of `TOKEN_MASKS` and cannot be imported as "module:name" either.
    """
    return entry("kind", TOKEN_MASKS, kind, of=TokenMask)


def token_mask(
    kind: Named,
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
    | a `TokenMask`, a function `(tokens, quantile) -> bool_BT`, "module:name" | your own |

    dlogp = old_logp - ref_logp, the change against the reference (base) model. The token at a threshold is kept, and
    so is every token of the same value: the order of the rows changes nothing, but many equal values (log-probs of
    exactly 0, say) make the kept share larger than asked. The ranks q n are exact: 0.29 of 100 tokens is 29. A traced
    quantile is precise to float32. Raises ValueError when an array the kind needs is missing.
    """
    tokens = Tokens(mask_BT, old_logp_BT, entropy_BT=entropy_BT, ref_logp_BT=ref_logp_BT)
    return kept_tokens(kind, tokens, quantile=quantile)


def kept_tokens(kind: Named, tokens: Tokens, *, quantile: ArrayLike) -> Real[jax.Array, "B T"] | Bool[jax.Array, "B T"]:
    """`token_mask` of a `Tokens`."""
    how = token_mask_of(kind)
    require("quantile", quantile, "a number between 0 and 1", lambda q: (q >= 0) & (q <= 1))
    require_same_shape(
        mask_BT=tokens.response_BT,
        old_logp_BT=tokens.old_logp_BT,
        entropy_BT=tokens.entropy_BT,
        ref_logp_BT=tokens.ref_logp_BT,
    )
    tokens.require(how.needs, f"token mask {kind!r}")
    mask_BT = jnp.asarray(tokens.response_BT)
    if mask_BT.size == 0:
        return mask_BT
    keep_BT = how.keep(tokens, quantile)
    if np.shape(keep_BT) != mask_BT.shape:
        raise ValueError(f"kind={kind!r} gave an array {np.shape(keep_BT)}: expected {mask_BT.shape}, one per token")
    return jnp.where(jnp.asarray(keep_BT, bool) & tokens.counted_BT, mask_BT, 0).astype(mask_BT.dtype)


def _thresholds(values_BT: jax.Array, tokens: Tokens, quantile: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """t(1 - q) and t(q) of the response tokens' values."""
    counted_BT = tokens.counted_BT
    # What does not count lies behind the rest.
    ordered_N, count = jnp.sort(jnp.where(counted_BT, values_BT, jnp.inf), axis=None), jnp.sum(counted_BT)
    low, high = (ordered_N[jnp.maximum(_rank_at(count, quantile, complement=c), 1) - 1] for c in (True, False))
    return low, high


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
