"""DAPO as array functions: log-probs of packed sequences, advantages of a trainer step, the loss of a mini-batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.qwen import hidden_states, unembedding
from rlvr_jax.objectives.advantages import group_advantages
from rlvr_jax.objectives.logprobs import chunked_logprobs
from rlvr_jax.objectives.masks import token_mask
from rlvr_jax.objectives.policy import aggregate, policy_loss
from rlvr_jax.objectives.reweight import CURRENT_REWEIGHTINGS, reweight
from train.config import AlgorithmConfig

Apply = Callable[..., tuple[jax.Array, jax.Array]]


def model_apply(config: QwenConfig) -> Apply:
    """`apply(params, tokens_BT, positions_BT, mask_BT) -> (hidden_BTD, unembed_DV)` of a Qwen model."""

    def apply(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array | None, mask_BT: jax.Array) -> tuple:
        return hidden_states(config, params, tokens_BT, positions_BT, mask_BT), unembedding(config, params)

    return apply


def sequence_logprobs(apply: Apply, params: Any, tokens_BT: jax.Array, segment_BT: jax.Array, **options: Any) -> Any:
    """`chunked_logprobs` of every token given those before it; the first column, which has none, gets 0.

    `segment_BT` is 0 on padding and numbers the sequences of a row from 1; what stands at the first token of a
    sequence means nothing, for it is scored after another sequence's last.
    """
    hidden_BTD, unembed_DV = apply(params, tokens_BT, None, segment_BT)
    scored = chunked_logprobs(hidden_BTD[:, :-1], unembed_DV, tokens_BT[:, 1:], **options)
    return jax.tree.map(lambda x_BT: jnp.pad(x_BT, ((0, 0), (1, 0))), scored)


def make_scorer(apply: Apply, *, chunk: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled `score(params, tokens_BT, segment_BT, temperature) -> (logp_BT, entropy_BT)`, no gradient."""

    @jax.jit
    def score(
        params: Any, tokens_BT: jax.Array, segment_BT: jax.Array, temperature: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        return sequence_logprobs(
            apply, params, tokens_BT, segment_BT, temperature=temperature, chunk=chunk, entropy=True
        )

    return score


@functools.partial(jax.jit, static_argnames="algorithm")
def advantages(
    algorithm: AlgorithmConfig,
    score_N: jax.Array,
    group_N: jax.Array,
    response_NR: jax.Array,
    old_logp_NR: jax.Array,
    entropy_NR: jax.Array,
    ref_logp_NR: jax.Array | None,
    alpha: ArrayLike,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Advantages and masks of a whole trainer step, before it is cut into mini-batches.

    Group advantage, then re-weighting (but for the kinds that need the current policy: those wait for the loss), then
    the masks by quantile over the step's response tokens.

    Returns:
      advantage_N of each response; the re-weighted advantage_NR of each token; mask_NR of the tokens that enter the
      loss; mask_NR of the tokens that are re-weighted.
    """
    alone_N = group_advantages(
        score_N, group_N, normalize_by_std=algorithm.normalize_by_std, num_groups=algorithm.train_batch
    )
    sources = {"old_logp_BT": old_logp_NR, "entropy_BT": entropy_NR, "ref_logp_BT": ref_logp_NR}

    def select(mask: Any) -> jax.Array:
        return token_mask(mask.kind, response_NR, quantile=mask.quantile, **sources)

    how = algorithm.reweight
    chosen_NR = select(how.mask)
    each_NR = jnp.broadcast_to(alone_N[:, None], response_NR.shape)
    kind = "none" if how.kind in CURRENT_REWEIGHTINGS else how.kind
    each_NR = reweight(
        kind,
        each_NR,
        old_logp_NR,
        response_NR,
        alpha=alpha,
        where=how.where,
        group_B=group_N,
        key=key,
        token_mask_BT=chosen_NR,
    )
    return alone_N, each_NR, select(algorithm.loss_mask), chosen_NR


def make_loss(algorithm: AlgorithmConfig, *, chunk: int, max_length: int) -> Callable[..., tuple]:
    """The DAPO loss of a (micro-)batch, for `make_train_step`: a clipped policy loss; no KL term, no entropy bonus.

    The batch is a dict: tokens_BT, segment_BT (0 on padding, the sequences of a row numbered from 1), and at each
    response token old_logp_BT, advantages_BT, loss_mask_BT, reweight_mask_BT, which are 0 elsewhere; and the
    scalars temperature, alpha, clip_low, clip_high, clip_dual. `max_length` is the longest response in tokens.
    """

    def loss_fn(apply: Apply, params: Any, batch: dict) -> tuple:
        segment_BT = batch["segment_BT"]
        logp_BT = sequence_logprobs(
            apply, params, batch["tokens_BT"], segment_BT, temperature=batch["temperature"], chunk=chunk
        )
        advantages_BT, mask_BT = batch["advantages_BT"], batch["loss_mask_BT"]
        if algorithm.reweight.kind in CURRENT_REWEIGHTINGS:
            advantages_BT = reweight(
                algorithm.reweight.kind,
                advantages_BT,
                logp_BT,
                mask_BT,
                alpha=batch["alpha"],
                where=algorithm.reweight.where,
                token_mask_BT=batch["reweight_mask_BT"],
            )
        clips = {name: batch[name] for name in ("clip_low", "clip_high", "clip_dual")}
        loss_BT, metrics = policy_loss(logp_BT, batch["old_logp_BT"], advantages_BT, mask_BT, **clips)
        summed = aggregate(loss_BT, mask_BT, algorithm.aggregation, max_length=max_length, segment_BT=segment_BT)
        return summed, metrics

    return loss_fn


def scalars(algorithm: AlgorithmConfig, temperature: float) -> dict[str, np.float32]:
    """The batch's scalars. They are arguments of the compiled step, so another value compiles nothing."""
    values = {
        "temperature": temperature,
        "alpha": algorithm.reweight.alpha,
        "clip_low": algorithm.clip_low,
        "clip_high": algorithm.clip_high,
        "clip_dual": algorithm.clip_dual,
    }
    return {name: np.float32(value) for name, value in values.items()}


def gap_metrics(rollout_logp_NR: np.ndarray, old_logp_NR: np.ndarray, mask_NR: np.ndarray) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, over response tokens; NaN where there are none."""
    gap = np.abs(rollout_logp_NR - old_logp_NR)[mask_NR > 0].astype(np.float64)
    if not gap.size:
        return {"mean_abs": float("nan"), "max_abs": float("nan")}
    return {"mean_abs": float(gap.mean()), "max_abs": float(gap.max())}
