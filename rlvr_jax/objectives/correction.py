"""The policy against two others: the reference model (KL penalty) and the sampler (truncated importance weights)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlvr_jax.checks import positive, require, require_same_shape
from rlvr_jax.entries import entry
from rlvr_jax.objectives.tokens import Mask, Values, masked
from rlvr_jax.typing import Float

# As in `policy_loss`: beyond e^20 a ratio says nothing.
_LOG_RATIO_LIMIT = 20.0


def kl_penalty(logp_BT: Values, ref_logp_BT: Values, mask_BT: Mask) -> Float[jax.Array, "B T"]:
    """Per-token estimate of KL(policy ‖ reference) >= 0: exp(d) - d - 1, d = clip(ref_logp - logp, -20, 20).

    The "k3" estimator, in nats: unbiased for tokens drawn from the policy, never negative, 0 where both agree. GRPO
    (2402.03300) adds `kl_coef` times it to the loss of each token. The gradient, (1 - exp(d)) d logp, flows to
    `logp_BT` alone, and is 0 beyond the limits of d. Exactly 0 where the mask is 0. The log-probabilities of both
    models are at one temperature.
    """
    require_same_shape(logp_BT=logp_BT, ref_logp_BT=ref_logp_BT, mask_BT=mask_BT)
    ref_logp_BT = jax.lax.stop_gradient(masked(ref_logp_BT, mask_BT))
    d_BT = jnp.clip(ref_logp_BT - masked(logp_BT, mask_BT), -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return jnp.expm1(d_BT) - d_BT


def importance_weights(
    old_logp_BT: Values,
    rollout_logp_BT: Values,
    mask_BT: Mask,
    *,
    kind: str | Callable[..., Any] = "token",
    cap: ArrayLike = 2.0,
) -> Float[jax.Array, "B T"]:
    """Truncated importance weights for a sampler that disagrees with the trainer (verl's "TIS"; verl issue #2996).

    | kind | weight of a response token |
    |---|---|
    | none | 1 |
    | token | min(exp(old_logp - rollout_logp), cap) |
    | sequence | min(exp(sum over the response's tokens of (old_logp - rollout_logp)), cap), one a response |
    | a function `(log_ratio_BT, cap) -> weight_BT`, "module:name" | your own |

    Args:
      old_logp_BT: the trainer's log-probabilities before the update, at the sampler's temperature.
      rollout_logp_BT: the sampler's own, of the same tokens, from whole distributions at that temperature. Those of
        `Generation.logp` are so: taken before top-k and top-p, which the weights therefore do not correct. Responses
        that an older policy sampled are corrected for that too.
      mask_BT: 1 on response tokens.
      kind: as above.
      cap: the largest weight, above 0. Logarithms are limited to 20 on both sides before that.

    Returns:
      Weights to multiply the per-token loss with, 0 where the mask is 0. No gradient flows through them.
    """
    how = entry("kind", IMPORTANCE_WEIGHTS, kind)
    require("cap", cap, "a number > 0", positive)
    require_same_shape(old_logp_BT=old_logp_BT, rollout_logp_BT=rollout_logp_BT, mask_BT=mask_BT)
    log_BT = jax.lax.stop_gradient(masked(old_logp_BT, mask_BT) - masked(rollout_logp_BT, mask_BT))
    return masked(how(log_BT, cap), mask_BT)


def _capped(log_BT: jax.Array, cap: ArrayLike) -> jax.Array:
    return jnp.minimum(jnp.exp(jnp.clip(log_BT, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)), cap)


def _of_sequence(log_BT: jax.Array, cap: ArrayLike) -> jax.Array:
    return _capped(jnp.broadcast_to(log_BT.sum(axis=-1, keepdims=True), log_BT.shape), cap)


# `(log_ratio_BT, cap) -> weight_BT`, from old_logp - rollout_logp, 0 off the responses.
IMPORTANCE_WEIGHTS: dict[str, Callable[..., jax.Array]] = {
    "none": lambda log_BT, cap: jnp.ones_like(log_BT),
    "token": _capped,
    "sequence": _of_sequence,
}
