"""A researcher's own criterion, re-weighting, mask, loss and aggregation, as "module:name" takes them."""

import jax.numpy as jnp

from rlvr_jax.criteria import Criterion
from rlvr_jax.objectives.policy import aggregate
from rlvr_jax.objectives.reweight import Reweighting


def surprise(logp_base_BV, logp_rl_BV, token_B):
    """How unlikely the base model finds the drawn token, in nats."""
    return -jnp.take_along_axis(logp_base_BV, token_B[:, None], axis=-1)[:, 0]


shrunk = Criterion(of_delta=lambda delta: delta / 2, below=True, signed=True)


def _by_dlogp(tokens, alpha):
    return 1 + alpha * jnp.tanh(tokens.old_logp_BT - tokens.ref_logp_BT)


# Weighs a token by what the update has done to it so far.
by_dlogp = Reweighting(_by_dlogp, needs=("ref_logp_BT",))


by_the_current_policy = Reweighting(lambda tokens, alpha: 1 + alpha * tokens.rest_BT**2, current=True)


def every_other(tokens, quantile):
    """Every second token of a row, whatever the quantile."""
    return jnp.broadcast_to(jnp.arange(tokens.response_BT.shape[1]) % 2 == 0, tokens.response_BT.shape)


def reinforce(logp_BT, tokens, clips):
    """REINFORCE, and how far the sampler is from the trainer: an array that no built-in loss looks at."""
    gap_BT = tokens.rollout_logp_BT - tokens.old_logp_BT
    return -tokens.advantages_BT * logp_BT, {"gap": aggregate(gap_BT, tokens.loss_mask_BT)}


def half(values_BT, mask_BT, max_length, segment_BT):
    """Half of the mean over tokens."""
    return jnp.sum(values_BT * mask_BT) / 2, jnp.sum(mask_BT)


def wrong_shape(logp_BT, tokens, clips):
    return logp_BT.sum(), {}


def wrong_metric(logp_BT, tokens, clips):
    return logp_BT, {"one_number": jnp.sum(logp_BT)}


def wrong_arguments(tokens):
    return tokens
