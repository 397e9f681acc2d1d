"""Arrays in, arrays out: log-probabilities, advantages, re-weightings, masks, policy losses and their reduction."""

from rlvr_jax.objectives.advantages import group_advantages
from rlvr_jax.objectives.correction import IMPORTANCE_WEIGHTS, importance_weights, kl_penalty
from rlvr_jax.objectives.logprobs import chunked_logprobs, token_logprobs
from rlvr_jax.objectives.masks import TOKEN_MASKS, token_mask
from rlvr_jax.objectives.policy import AGGREGATIONS, POLICY_LOSSES, aggregate, cispo_loss, gspo_loss, policy_loss
from rlvr_jax.objectives.reweight import CURRENT_REWEIGHTINGS, REWEIGHTINGS, reweight

__all__ = [
    "AGGREGATIONS",
    "CURRENT_REWEIGHTINGS",
    "IMPORTANCE_WEIGHTS",
    "POLICY_LOSSES",
    "REWEIGHTINGS",
    "TOKEN_MASKS",
    "aggregate",
    "chunked_logprobs",
    "cispo_loss",
    "group_advantages",
    "gspo_loss",
    "importance_weights",
    "kl_penalty",
    "policy_loss",
    "reweight",
    "token_logprobs",
    "token_mask",
]
