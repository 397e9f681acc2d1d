"""The clipped policy objective of DAPO and the reduction of per-token values."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlvr_jax.objectives.masks import Mask, masked, require_same_shape
from rlvr_jax.objectives.segments import response_begins, response_sums
from rlvr_jax.typing import Array, Float, Int

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")

Metrics = dict[str, tuple[jax.Array, jax.Array]]

# Beyond e^20 a ratio says nothing, and its gradient is cut.
_LOG_RATIO_LIMIT = 20.0


def policy_loss(
    logp_BT: Float[Array, "B T"],
    old_logp_BT: Float[Array, "B T"],
    advantages_BT: Float[Array, "B T"],
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
    if isinstance(clip_dual, int | float) and not clip_dual > 1:
        raise ValueError(f"clip_dual={clip_dual}: expected a number > 1, or None")
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
    metrics = {
        "clip_fraction_low": held_BT & (ratio_BT < 1),
        "clip_fraction_high": held_BT & (ratio_BT > 1),
        "clip_fraction_dual": dual_BT,
        "approx_kl": -log_ratio_BT,
        "ratio": ratio_BT,
    }
    return loss_BT, {name: jax.lax.stop_gradient(aggregate(x_BT, mask_BT)) for name, x_BT in metrics.items()}


def aggregate(
    values_BT: Mask,
    mask_BT: Mask,
    mode: str = "token-mean",
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

    So the loss depends neither on micro-batching nor on the mesh (public issues verl #5625, #906). A response is a row
    with at least one token in its mask: an empty row adds nothing to sum or weight, and a batch of none gives (0, 0).
    Where a row holds several responses, `segment_BT` numbers them from 1 (0: padding). `max_length` in tokens is a
    constant of the run; it defaults to T, which depends on padding. Float masks act as token weights.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(AGGREGATIONS)}")
    require_same_shape(values_BT=values_BT, mask_BT=mask_BT)
    values_BT, mask_BT = masked(values_BT, mask_BT), jnp.asarray(mask_BT)
    mask_BT = jnp.where(mask_BT > 0, mask_BT, 0).astype(values_BT.dtype)
    if mode == "token-mean":
        return jnp.sum(values_BT * mask_BT), jnp.sum(mask_BT)
    tokens_BT = response_sums(mask_BT, segment_BT)
    responses = jnp.sum((tokens_BT > 0) & response_begins(segment_BT, mask_BT.shape)).astype(values_BT.dtype)
    if mode == "seq-mean-token-mean":
        values_BT = values_BT / jnp.where(tokens_BT > 0, tokens_BT, 1)
    elif mode == "seq-mean-token-sum-norm":
        values_BT = values_BT / (mask_BT.shape[1] if max_length is None else max_length)
    return jnp.sum(values_BT * mask_BT), responses
