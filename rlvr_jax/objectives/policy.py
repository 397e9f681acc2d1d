"""Policy objectives (clipped as in PPO, GRPO and DAPO; GSPO; CISPO) and the reduction of per-token values.

GRPO is `policy_loss` with one clip on both sides and `aggregate(..., "seq-mean-token-mean")`; Dr. GRPO is
`policy_loss` on advantages without the division by the standard deviation, with "seq-mean-token-sum-norm".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlvr_jax.checks import not_negative, positive, require, require_same_shape
from rlvr_jax.entries import entry
from rlvr_jax.objectives.segments import response_begins, response_sums
from rlvr_jax.objectives.tokens import Mask, Tokens, Values, masked
from rlvr_jax.typing import Array, Float, Int

Summed = tuple[jax.Array, jax.Array]
Metrics = dict[str, Summed]

# Beyond e^20 a ratio says nothing, and its gradient is cut.
_LOG_RATIO_LIMIT = 20.0


def policy_loss(
    logp_BT: Values,
    old_logp_BT: Values,
    advantages_BT: Values,
    mask_BT: Mask,
    *,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.28,
    clip_dual: ArrayLike | None = 10.0,
) -> tuple[Float[jax.Array, "B T"], Metrics]:
    """Per-token loss with asymmetric clipping (DAPO, 2503.14476) and dual clipping (1912.09729); no KL, no entropy.

    r = exp(clip(logp - old_logp, -20, 20)); M = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));
    the loss is min(M, -A clip_dual) where A < 0 and M elsewhere; exactly 0 where the mask is 0. `clip_dual=None`
    leaves the dual clip out. Gradients flow to `logp_BT` alone. Reduce the loss with `aggregate`.

    Metrics are (sum, weight) pairs over response tokens, to be summed over micro-batches before they are divided:
    clip_fraction_low / _high (the lower / upper bound holds the token), clip_fraction_dual, approx_kl
    (old_logp - logp, an unbiased estimate of KL(old ‖ current)) and ratio.
    """
    _require_clips(clip_low, clip_high)
    if clip_dual is not None:
        require("clip_dual", clip_dual, "a number > 1, or None", lambda x: x > 1)
    require_same_shape(logp_BT=logp_BT, old_logp_BT=old_logp_BT, advantages_BT=advantages_BT, mask_BT=mask_BT)
    mask_BT = jnp.asarray(mask_BT)
    old_logp_BT = jax.lax.stop_gradient(masked(old_logp_BT, mask_BT))
    advantages_BT = jax.lax.stop_gradient(masked(advantages_BT, mask_BT))

    log_ratio_BT = jnp.clip(masked(logp_BT, mask_BT) - old_logp_BT, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio_BT = jnp.exp(log_ratio_BT)
    free_BT = -advantages_BT * ratio_BT
    # Not jnp.clip, which halves the gradient on its bounds: with a clip of 0 that is every token of a first update.
    low, high = 1 - clip_low, 1 + clip_high
    clipped_BT = -advantages_BT * jnp.where(ratio_BT < low, low, jnp.where(ratio_BT > high, high, ratio_BT))
    loss_BT = jnp.maximum(free_BT, clipped_BT)
    dual_BT = jnp.zeros(loss_BT.shape, bool)
    if clip_dual is not None:
        bound_BT = -advantages_BT * clip_dual
        dual_BT = (advantages_BT < 0) & (loss_BT > bound_BT)
        loss_BT = jnp.where(dual_BT, bound_BT, loss_BT)

    held_BT = clipped_BT > free_BT
    return loss_BT, _metrics(
        mask_BT, held_BT & (ratio_BT < 1), held_BT & (ratio_BT > 1), dual_BT, log_ratio_BT, ratio_BT
    )


def gspo_loss(
    logp_BT: Values,
    old_logp_BT: Values,
    advantages_BT: Values,
    mask_BT: Mask,
    *,
    clip_low: ArrayLike = 3e-4,
    clip_high: ArrayLike = 4e-4,
    response_BT: Mask | None = None,
    segment_BT: Int[Array, "B T"] | None = None,
) -> tuple[Float[jax.Array, "B T"], Metrics]:
    """Per-token form of the sequence-level objective GSPO (2507.18071; there "GSPO-token").

    s = exp(clip(mean over the response's tokens of (logp - old_logp), -20, 20)), one ratio a response; each token's
    loss is max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), where s_t = sg(s) exp(logp_t - sg(logp_t)) stands for
    s: its value is s and its gradient s d logp_t (sg: no gradient). So the mean over a response's tokens
    (`aggregate(..., "seq-mean-token-mean")`) has the value and, where A is the same on all tokens, the gradient of the
    sequence's own loss. A ratio uses its own response alone, so micro-batching changes nothing.

    `response_BT` are the tokens that the mean is over; None: those of `mask_BT`. Where a row holds several responses,
    `segment_BT` numbers them from 1 (0: padding). Gradients flow to `logp_BT` alone.
    The loss is exactly 0 where `mask_BT` is 0. Metrics as in `policy_loss`, per token: `ratio` is s, `approx_kl` is of
    single tokens, and clip_fraction_dual is 0, since there is no dual clip.
    """
    _require_clips(clip_low, clip_high)
    response_BT = mask_BT if response_BT is None else response_BT
    require_same_shape(
        logp_BT=logp_BT,
        old_logp_BT=old_logp_BT,
        advantages_BT=advantages_BT,
        mask_BT=mask_BT,
        response_BT=response_BT,
    )
    mask_BT, response_BT = jnp.asarray(mask_BT), jnp.asarray(response_BT) > 0
    advantages_BT = jax.lax.stop_gradient(masked(advantages_BT, mask_BT))
    either_BT = response_BT | (mask_BT > 0)
    logp_BT, old_logp_BT = masked(logp_BT, either_BT), jax.lax.stop_gradient(masked(old_logp_BT, either_BT))
    log_ratio_BT = jax.lax.stop_gradient(logp_BT) - old_logp_BT
    tokens_BT = response_sums(response_BT.astype(log_ratio_BT.dtype), segment_BT)
    mean_BT = response_sums(jnp.where(response_BT, log_ratio_BT, 0.0), segment_BT) / jnp.maximum(tokens_BT, 1)
    log_s_BT = logp_BT - jax.lax.stop_gradient(logp_BT) + mean_BT
    s_BT = jnp.exp(jnp.clip(log_s_BT, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT))
    free_BT = -advantages_BT * s_BT
    low, high = 1 - clip_low, 1 + clip_high
    clipped_BT = -advantages_BT * jnp.where(s_BT < low, low, jnp.where(s_BT > high, high, s_BT))
    held_BT = clipped_BT > free_BT
    loss_BT = jnp.where(held_BT, clipped_BT, free_BT)
    none_BT = jnp.zeros(loss_BT.shape, bool)
    log_ratio_BT = jnp.clip(log_ratio_BT, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return loss_BT, _metrics(mask_BT, held_BT & (s_BT < 1), held_BT & (s_BT > 1), none_BT, log_ratio_BT, s_BT)


def cispo_loss(
    logp_BT: Values,
    old_logp_BT: Values,
    advantages_BT: Values,
    mask_BT: Mask,
    *,
    clip_low: ArrayLike = 1.0,
    clip_high: ArrayLike = 4.0,
) -> tuple[Float[jax.Array, "B T"], Metrics]:
    """Per-token loss of CISPO (MiniMax-M1, 2506.13585): -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp.

    r = exp(clip(logp - old_logp, -20, 20)) and sg stops the gradient, so no token's gradient is lost to the clip: it is
    the REINFORCE gradient A d logp with a bounded weight. clip_low = 1 sets no lower bound, as published; the published
    upper bound is not printed. The value says little, its gradient is what counts. Exactly 0 where the mask is 0;
    reduce it with `aggregate` ("token-mean" in the paper).

    Metrics as in `policy_loss`: clip_fraction_low / _high are the tokens whose weight is on its lower / upper bound,
    whatever the sign of A; clip_fraction_dual is 0.
    """
    _require_clips(clip_low, clip_high)
    require_same_shape(logp_BT=logp_BT, old_logp_BT=old_logp_BT, advantages_BT=advantages_BT, mask_BT=mask_BT)
    mask_BT = jnp.asarray(mask_BT)
    logp_BT = masked(logp_BT, mask_BT)
    advantages_BT = jax.lax.stop_gradient(masked(advantages_BT, mask_BT))
    log_ratio_BT = jax.lax.stop_gradient(logp_BT) - jax.lax.stop_gradient(masked(old_logp_BT, mask_BT))
    log_ratio_BT = jnp.clip(log_ratio_BT, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    ratio_BT = jnp.exp(log_ratio_BT)
    low, high = 1 - clip_low, 1 + clip_high
    weight_BT = jax.lax.stop_gradient(jnp.clip(ratio_BT, low, high))
    none_BT = jnp.zeros(ratio_BT.shape, bool)
    loss_BT = -weight_BT * advantages_BT * logp_BT
    return loss_BT, _metrics(mask_BT, ratio_BT < low, ratio_BT > high, none_BT, log_ratio_BT, ratio_BT)


def _require_clips(clip_low: ArrayLike, clip_high: ArrayLike) -> None:
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        require(name, clip, "a number >= 0", not_negative)


def _metrics(mask_BT: Mask, low_BT, high_BT, dual_BT, log_ratio_BT, ratio_BT) -> Metrics:
    metrics = {
        "clip_fraction_low": low_BT,
        "clip_fraction_high": high_BT,
        "clip_fraction_dual": dual_BT,
        "approx_kl": -log_ratio_BT,
        "ratio": ratio_BT,
    }
    return {name: jax.lax.stop_gradient(aggregate(x_BT, mask_BT)) for name, x_BT in metrics.items()}


def aggregate(
    values_BT: Values,
    mask_BT: Mask,
    mode: str | Callable[..., Any] = "token-mean",
    *,
    max_length: int | None = None,
    segment_BT: Int[Array, "B T"] | None = None,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """(sum, weight) of per-token values; add both over micro-batches and devices, then divide once.

    | mode | sum | weight |
    |---|---|---|
    | token-mean | all tokens' values | number of tokens (DAPO) |
    | seq-mean-token-sum | all tokens' values | number of responses |
    | seq-mean-token-mean | each response's mean value | number of responses (GRPO) |
    | seq-mean-token-sum-norm | all tokens' values / max_length | number of responses (Dr. GRPO, 2503.20783) |
    | a function of the values, mask, max_length and segment_BT, or "module:name" | your own |

    So the loss depends neither on micro-batching nor on the mesh (public issues verl #5625, #906). A response is a row
    with at least one token in its mask: an empty row adds nothing to sum or weight, and a batch of none gives (0, 0).
    Where a row holds several responses, `segment_BT` numbers them from 1 (0: padding). `max_length` in tokens is a
    constant of the run; it defaults to T, which depends on padding. Float masks act as token weights.
    """
    how = entry("mode", AGGREGATIONS, mode)
    if max_length is not None:
        require("max_length", max_length, "a number > 0", positive)
    require_same_shape(values_BT=values_BT, mask_BT=mask_BT)
    values_BT, mask_BT = masked(values_BT, mask_BT), jnp.asarray(mask_BT)
    mask_BT = jnp.where(mask_BT > 0, mask_BT, 0).astype(values_BT.dtype)
    return how(values_BT, mask_BT, max_length, segment_BT)


def _token_mean(values_BT: jax.Array, mask_BT: jax.Array, max_length: int | None, segment_BT: Any) -> Summed:
    return jnp.sum(values_BT * mask_BT), jnp.sum(mask_BT)


def _token_sum(values_BT: jax.Array, mask_BT: jax.Array, max_length: int | None, segment_BT: Any) -> Summed:
    begins_BT = (response_sums(mask_BT, segment_BT) > 0) & response_begins(segment_BT, mask_BT.shape)
    return jnp.sum(values_BT * mask_BT), jnp.sum(begins_BT).astype(values_BT.dtype)


def _sequence_mean(values_BT: jax.Array, mask_BT: jax.Array, max_length: int | None, segment_BT: Any) -> Summed:
    tokens_BT = response_sums(mask_BT, segment_BT)
    return _token_sum(values_BT / jnp.where(tokens_BT > 0, tokens_BT, 1), mask_BT, max_length, segment_BT)


def _sum_over_length(values_BT: jax.Array, mask_BT: jax.Array, max_length: int | None, segment_BT: Any) -> Summed:
    length = mask_BT.shape[1] if max_length is None else max_length
    return _token_sum(values_BT / length, mask_BT, max_length, segment_BT)


AGGREGATIONS: dict[str, Callable[..., Summed]] = {
    "token-mean": _token_mean,
    "seq-mean-token-sum": _token_sum,
    "seq-mean-token-mean": _sequence_mean,
    "seq-mean-token-sum-norm": _sum_over_length,
}


class Clips(NamedTuple):
    """Bounds of the ratio: 1 - low, 1 + high, and `dual` where the advantage is negative (None: none)."""

    low: Any
    high: Any
    dual: Any = None


Loss = Callable[[jax.Array, Tokens, Clips], tuple[jax.Array, Metrics]]


def _dapo(logp_BT: jax.Array, tokens: Tokens, clips: Clips) -> tuple[jax.Array, Metrics]:
    bounds: dict[str, Any] = {"clip_low": clips.low, "clip_high": clips.high, "clip_dual": clips.dual}
    return policy_loss(logp_BT, tokens.old_logp_BT, tokens.advantages_BT, tokens.loss_mask_BT, **bounds)


def _gspo(logp_BT: jax.Array, tokens: Tokens, clips: Clips) -> tuple[jax.Array, Metrics]:
    # A mask for the loss does not change what a response is.
    whole: dict[str, Any] = {"response_BT": tokens.response_BT, "segment_BT": tokens.segment_BT}
    bounds: dict[str, Any] = {"clip_low": clips.low, "clip_high": clips.high}
    return gspo_loss(logp_BT, tokens.old_logp_BT, tokens.advantages_BT, tokens.loss_mask_BT, **bounds, **whole)


def _cispo(logp_BT: jax.Array, tokens: Tokens, clips: Clips) -> tuple[jax.Array, Metrics]:
    bounds: dict[str, Any] = {"clip_low": clips.low, "clip_high": clips.high}
    return cispo_loss(logp_BT, tokens.old_logp_BT, tokens.advantages_BT, tokens.loss_mask_BT, **bounds)


# `(logp_BT, tokens, clips) -> (loss_BT, metrics)`: what a loss of your own is like too.
LOSSES: dict[str, Loss] = {"dapo": _dapo, "gspo": _gspo, "cispo": _cispo}
