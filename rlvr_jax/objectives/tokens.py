"""The per-token arrays of a step: what masks, re-weightings and losses may look at, as one value.

A mask is 1 (or True, or a positive weight) on tokens that count and 0 elsewhere. Whatever an array holds where its mask
is 0, infinities and NaN included, never reaches a result.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlvr_jax.direction import widen
from rlvr_jax.typing import Array, Bool, Real

# One number per token; integers and booleans are computed with as float32.
Values = Real[Array, "B T"] | Bool[Array, "B T"]
Mask = Values


class Tokens(NamedTuple):
    """Arrays [B, T] of the responses of a step; those that are not there are None.

    Before a step is cut into mini-batches a row is a response, and every row is there. Inside the loss rows may hold
    several responses (`segment_BT`), and a micro-batch has a part of them. An array more is a field more: what a
    compiled function does not use costs it nothing.

    Attributes:
      response_BT: 1 on response tokens, the stop token included.
      old_logp_BT: log-probs under the policy before the update, in nats.
      entropy_BT: its entropy at each token, in nats.
      ref_logp_BT: log-probs under the reference (base) model; None unless something needs it.
      rollout_logp_BT: the sampler's own log-probs.
      advantages_BT: advantages, re-weighted.
      loss_mask_BT: 1 on the tokens that enter the loss.
      reweight_mask_BT: 1 on the tokens that are re-weighted.
      importance_BT: weight of each token's loss for a sampler that disagrees with the trainer.
      segment_BT: number of the sequence inside its row, from 1; 0 on padding. None: a row is a response.
      group_B: the prompt of each row, negative for padding rows; None inside the loss.
      key: a jax random key of the step; None inside the loss.
    """

    response_BT: Any
    old_logp_BT: Any
    entropy_BT: Any = None
    ref_logp_BT: Any = None
    rollout_logp_BT: Any = None
    advantages_BT: Any = None
    loss_mask_BT: Any = None
    reweight_mask_BT: Any = None
    importance_BT: Any = None
    segment_BT: Any = None
    group_B: Any = None
    key: Any = None

    @property
    def counted_BT(self) -> jax.Array:
        """bool: the response tokens."""
        return jnp.asarray(self.response_BT) > 0

    @property
    def p_BT(self) -> jax.Array:
        """Probability of each response token under the policy before the update, 1 elsewhere."""
        return jnp.exp(masked(self.old_logp_BT, self.counted_BT))

    @property
    def rest_BT(self) -> jax.Array:
        """1 - p without cancellation, 0 elsewhere; a log-prob may round above 0."""
        return jnp.maximum(-jnp.expm1(masked(self.old_logp_BT, self.counted_BT)), 0.0)

    def arrays(self) -> dict[str, Any]:
        """The arrays [B, T] that are there, by name: what goes to the loss, which drops those it does not use."""
        return {k: x for k, x in self._asdict().items() if k.endswith("_BT") and k != "segment_BT" and x is not None}

    def require(self, names: Iterable[str], by: str) -> None:
        """Raises ValueError where one of these fields is not there."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None: {by} needs it")


def masked(values: ArrayLike, mask: ArrayLike) -> jax.Array:
    """`values` in at least float32, with exact zeros (and zero gradients) where the mask is 0, whatever was there."""
    return jnp.where(jnp.asarray(mask) > 0, widen(values), 0.0)
