"""Arrays in, arrays out: log-probabilities, advantages, re-weightings, masks, the policy loss and its reduction."""

from rlvr_jax.objectives.advantages import group_advantages
from rlvr_jax.objectives.logprobs import chunked_logprobs, token_logprobs
from rlvr_jax.objectives.masks import TOKEN_MASKS, token_mask
from rlvr_jax.objectives.policy import AGGREGATIONS, aggregate, policy_loss
from rlvr_jax.objectives.reweight import CURRENT_REWEIGHTINGS, REWEIGHTINGS, reweight

__all__ = [
    "AGGREGATIONS",
    "CURRENT_REWEIGHTINGS",
    "REWEIGHTINGS",
    "TOKEN_MASKS",
    "aggregate",
    "chunked_logprobs",
    "group_advantages",
    "policy_loss",
    "reweight",
    "token_logprobs",
    "token_mask",
]
