"""Re-weighting of token advantages by the token's probability (arXiv 2603.22117, section 4.2, and its rivals)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import not_negative, positive, require, require_same_shape
from rlvr_jax.direction import widen
from rlvr_jax.objectives.advantages import group_deviations, group_ids
from rlvr_jax.objectives.masks import Mask, Values, masked
from rlvr_jax.typing import Array, Float, Integer

REWEIGHTINGS = (
    "none",
    "low_prob",
    "high_prob",
    "ppl",
    "ppl_norm",
    "ppl_norm_clamp",
    "middle",
    "inverse",
    "current_linear",
    "current_focal",
    "uniform",
    "shuffled",
)

# These weigh by the policy being trained, so they are called inside the loss, with its log-probabilities.
CURRENT_REWEIGHTINGS = ("current_linear", "current_focal")


def reweight(
    kind: str,
    advantages_BT: Values,
    old_logp_BT: Values,
    mask_BT: Mask,
    *,
    alpha: ArrayLike,
    where: str = "all",
    group_B: Integer[Array, " B"] | None = None,
    key: jax.Array | np.ndarray | None = None,
    token_mask_BT: Mask | None = None,
) -> Float[jax.Array, "B T"]:
    """weight * advantage on the selected response tokens, the advantage unchanged on all others.

    With p = exp(old_logp), a = `alpha`, nll the mean -old_logp over the response's tokens:

    | kind | weight |
    |---|---|
    | none | 1 |
    | low_prob | 1 + a (1 - p): the paper's; a = 0.1 to 0.2 |
    | high_prob | a p + 1 - a ("Dominate", 2505.12929) |
    | ppl | 1 - a nll (2508.02260) |
    | ppl_norm | 1 - a (nll - mean) / (std + 1e-6), over the responses of the prompt (needs `group_B`), ddof 0 |
    | ppl_norm_clamp | ppl_norm clipped to [0.8, 1.2] |
    | middle | a + p (1 - p) |
    | inverse | 1 / (1 + a - p), a > 0 |
    | current_linear, current_focal | 1 + a (1 - p), (1 - p)^a with p of the *current* policy |
    | uniform | the mean of low_prob's weights over all response tokens (control: size without place) |
    | shuffled | low_prob's weights permuted over all response tokens (control; needs `key`) |

    `where` = "all", "positive" (only tokens with A > 0) or "negative" (A < 0), and `token_mask_BT` (see `token_mask`)
    select the tokens; the statistics of ppl, uniform and shuffled are over all tokens of `mask_BT` either way. Those of
    ppl_norm, uniform and shuffled want the whole batch, not a micro-batch. For the kinds in `CURRENT_REWEIGHTINGS` call
    this inside the loss with the current policy's log-probabilities as `old_logp_BT`. No gradient flows through any
    weight. Rows with an empty mask, and rows with a negative group id, enter no statistic. The result is at least
    float32, whatever the advantages are.
    """
    if kind not in REWEIGHTINGS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(REWEIGHTINGS)}")
    if where not in ("all", "positive", "negative"):
        raise ValueError(f"where={where!r}: expected 'all', 'positive' or 'negative'")
    require("alpha", alpha, "a finite number", np.isfinite)
    if kind == "inverse":
        require("alpha", alpha, "a number > 0, without which re-weighting 'inverse' is unbounded", positive)
    if kind == "current_focal":
        require("alpha", alpha, "a number >= 0, without which re-weighting 'current_focal' is unbounded", not_negative)
    require_same_shape(
        advantages_BT=advantages_BT, old_logp_BT=old_logp_BT, mask_BT=mask_BT, token_mask_BT=token_mask_BT
    )
    advantages_BT, mask_BT = widen(advantages_BT), jnp.asarray(mask_BT)
    counted_BT = mask_BT > 0
    logp_BT = jax.lax.stop_gradient(masked(old_logp_BT, counted_BT))
    weight_BT = _weights(kind, logp_BT, counted_BT, alpha, group_B, key)

    chosen_BT = counted_BT
    if token_mask_BT is not None:
        chosen_BT &= jnp.asarray(token_mask_BT) > 0
    if where != "all":
        chosen_BT &= advantages_BT > 0 if where == "positive" else advantages_BT < 0
    return advantages_BT * jnp.where(chosen_BT, weight_BT, 1.0)


def _weights(kind: str, logp_BT, counted_BT, alpha, group_B, key) -> jax.Array:
    p_BT = jnp.exp(logp_BT)
    rest_BT = jnp.maximum(-jnp.expm1(logp_BT), 0.0)  # 1 - p without cancellation; a log-prob may round above 0
    if kind == "none":
        return jnp.ones_like(p_BT)
    if kind in ("low_prob", "current_linear"):
        return 1 + alpha * rest_BT
    if kind == "current_focal":
        return rest_BT**alpha
    if kind == "high_prob":
        return alpha * p_BT + 1 - alpha
    if kind == "middle":
        return alpha + p_BT * rest_BT
    if kind == "inverse":
        return 1 / (alpha + rest_BT)
    if kind == "uniform":
        return jnp.full_like(p_BT, 1 + alpha * jnp.sum(masked(rest_BT, counted_BT)) / jnp.maximum(counted_BT.sum(), 1))
    if kind == "shuffled":
        if key is None:
            raise ValueError("key=None: re-weighting 'shuffled' needs a jax random key")
        return _shuffle(1 + alpha * rest_BT, counted_BT, jnp.asarray(key))

    length_B = counted_BT.sum(axis=-1)
    nll_B = -logp_BT.sum(axis=-1) / jnp.maximum(length_B, 1)
    if kind == "ppl":
        return jnp.broadcast_to((1 - alpha * nll_B)[:, None], p_BT.shape)
    if group_B is None:
        raise ValueError(f"group_B=None: re-weighting {kind!r} compares the responses of a prompt")
    group_B = group_ids(group_B)
    centred_B, sum_squares_B, count_B = group_deviations(nll_B, group_B, (length_B > 0) & (group_B >= 0))
    z_B = centred_B / (jnp.sqrt(sum_squares_B / jnp.maximum(count_B, 1)) + 1e-6)
    weight_B = 1 - alpha * jnp.where((length_B > 0) & (group_B >= 0), z_B, 0.0)
    if kind == "ppl_norm_clamp":
        weight_B = jnp.clip(weight_B, 0.8, 1.2)
    return jnp.broadcast_to(weight_B[:, None], p_BT.shape)


def _shuffle(values_BT: jax.Array, counted_BT: jax.Array, key: jax.Array) -> jax.Array:
    """A uniformly random permutation of the counted values among the counted places."""
    order_N = jax.random.permutation(key, values_BT.size)
    places_N = jnp.argsort(~counted_BT.ravel(), stable=True)
    sources_N = order_N[jnp.argsort(~counted_BT.ravel()[order_N], stable=True)]
    values_N = values_BT.ravel()
    return values_N.at[places_N].set(values_N[sources_N]).reshape(values_BT.shape)
