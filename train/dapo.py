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
from rlvr_jax.objectives.correction import importance_weights, kl_penalty
from rlvr_jax.objectives.logprobs import chunked_logprobs
from rlvr_jax.objectives.masks import token_mask
from rlvr_jax.objectives.policy import aggregate, cispo_loss, gspo_loss, policy_loss
from rlvr_jax.objectives.reweight import CURRENT_REWEIGHTINGS, reweight
from rlvr_jax.sharding import training_options
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
    # The last column has no target; it is scored all the same, so that the length stays one that devices can share.
    scored = chunked_logprobs(hidden_BTD, unembed_DV, jnp.roll(tokens_BT, -1, axis=1), **options)
    return jax.tree.map(lambda x_BT: jnp.roll(x_BT, 1, axis=1).at[:, 0].set(0.0), scored)


def make_scorer(apply: Apply, *, chunk: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled `score(params, tokens_BT, segment_BT, temperature) -> (logp_BT, entropy_BT)`, no gradient."""

    @functools.partial(jax.jit, compiler_options=training_options())
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


def make_loss(algorithm: AlgorithmConfig, *, chunk: int, max_response: int) -> Callable[..., tuple]:
    """The loss of a (micro-)batch, for `make_train_step`: policy loss x importance weight + kl_coef x KL penalty.

    The batch is a dict: tokens_BT, segment_BT (0 on padding, the sequences of a row numbered from 1), and at each
    response token old_logp_BT, advantages_BT, loss_mask_BT, reweight_mask_BT, which are 0 elsewhere; and the scalars of
    `scalars`. With a KL penalty it has ref_logp_BT too, with importance weights importance_BT, for GSPO response_BT,
    which is 1 on every response token. No entropy bonus. `max_response` is the length in tokens that
    "seq-mean-token-sum-norm" divides by.
    """
    policy = _policy(algorithm)

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
        loss_BT, metrics = policy(batch, logp_BT, advantages_BT)
        if algorithm.importance != "none":
            loss_BT = loss_BT * batch["importance_BT"]
        if algorithm.kl_coef:
            kl_BT = kl_penalty(logp_BT, batch["ref_logp_BT"], mask_BT)
            loss_BT = loss_BT + batch["kl_coef"] * kl_BT
            metrics = metrics | {"ref_kl": jax.lax.stop_gradient(aggregate(kl_BT, mask_BT))}
        summed = aggregate(loss_BT, mask_BT, algorithm.aggregation, max_length=max_response, segment_BT=segment_BT)
        return summed, metrics

    return loss_fn


def _policy(algorithm: AlgorithmConfig) -> Callable[[dict, jax.Array, jax.Array], tuple]:
    """`policy(batch, logp_BT, advantages_BT) -> (loss_BT, metrics)` of the configuration's loss."""
    loss = {"dapo": policy_loss, "gspo": gspo_loss, "cispo": cispo_loss}[algorithm.loss]

    def policy(batch: dict, logp_BT: jax.Array, advantages_BT: jax.Array) -> tuple:
        options: dict[str, Any] = {name: batch[name] for name in ("clip_low", "clip_high")}
        if algorithm.loss == "dapo":
            options["clip_dual"] = batch.get("clip_dual")
        elif algorithm.loss == "gspo":  # a mask for the loss does not change what a response is
            options |= {name: batch[name] for name in ("response_BT", "segment_BT")}
        return loss(logp_BT, batch["old_logp_BT"], advantages_BT, batch["loss_mask_BT"], **options)

    return policy


def scalars(algorithm: AlgorithmConfig, temperature: float) -> dict[str, np.float32]:
    """The batch's scalars. They are arguments of the compiled step, so another value compiles nothing."""
    values = {
        "temperature": temperature,
        "alpha": algorithm.reweight.alpha,
        "clip_low": algorithm.clip_low,
        "clip_high": algorithm.clip_high,
    }
    if algorithm.clip_dual is not None:
        values["clip_dual"] = algorithm.clip_dual
    if algorithm.kl_coef:
        values["kl_coef"] = algorithm.kl_coef
    return {name: np.float32(value) for name, value in values.items()}


@functools.partial(jax.jit, static_argnames="kind")
def importance(
    kind: str, old_logp_NR: jax.Array, rollout_logp_NR: jax.Array, response_NR: jax.Array, cap: ArrayLike
) -> jax.Array:
    """`importance_weights` of a whole trainer step, before it is cut into mini-batches."""
    return importance_weights(old_logp_NR, rollout_logp_NR, response_NR, kind=kind, cap=cap)


def importance_metrics(weight_NR: np.ndarray, mask_NR: np.ndarray, cap: float) -> dict[str, float]:
    """Mean of the importance weights over response tokens, and the share of them that the cap holds."""
    weights = weight_NR[mask_NR > 0].astype(np.float64)
    return {
        "importance_weight": float(weights.mean()),
        "importance_capped_share": float((weights >= np.float32(cap)).mean()),
    }


def gap_metrics(rollout_logp_NR: np.ndarray, old_logp_NR: np.ndarray, mask_NR: np.ndarray) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, over response tokens; NaN where there are none."""
    gap = np.abs(rollout_logp_NR - old_logp_NR)[mask_NR > 0].astype(np.float64)
    if not gap.size:
        return {"mean_abs": float("nan"), "max_abs": float("nan")}
    return {"mean_abs": float(gap.mean()), "max_abs": float(gap.max())}
