"""DAPO as array functions: a batch of graded groups, its old log-probs, its advantages, the loss of a mini-batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
from train.config import AlgorithmConfig

Apply = Callable[..., tuple[jax.Array, jax.Array]]


class Rows(NamedTuple):
    """The responses of one trainer step, group after group. Every array has N = train_batch * n rows.

    A prompt stands right-aligned in the first P columns, its response left-aligned in the R after them, so that the
    response's log-probs are one slice. Rows of groups that are missing (a partly filled batch) have empty masks.

    Attributes:
      tokens_NT: int32 [N, P + R].
      mask_NT: 1 on prompt and response tokens.
      response_NR: 1 on response tokens, the stop token included.
      group_N: number of the row's group, -1 for padding rows.
      score_N: shaped reward: +1 or -1 plus the overlong punishment; 0 for padding rows.
    """

    tokens_NT: np.ndarray
    mask_NT: np.ndarray
    response_NR: np.ndarray
    group_N: np.ndarray
    score_N: np.ndarray


def model_apply(config: QwenConfig) -> Apply:
    """`apply(params, tokens_BT, positions_BT, mask_BT) -> (hidden_BTD, unembed_DV)` of a Qwen model."""

    def apply(params: Any, tokens_BT: jax.Array, positions_BT: jax.Array | None, mask_BT: jax.Array) -> tuple:
        return hidden_states(config, params, tokens_BT, positions_BT, mask_BT), unembedding(config, params)

    return apply


def response_logprobs(
    apply: Apply, params: Any, tokens_BT: jax.Array, mask_BT: jax.Array, responses: int, **options: Any
) -> Any:
    """`chunked_logprobs` of the last `responses` columns; the hidden state before a token predicts it."""
    hidden_BTD, unembed_DV = apply(params, tokens_BT, None, mask_BT)
    return chunked_logprobs(hidden_BTD[:, -responses - 1 : -1], unembed_DV, tokens_BT[:, -responses:], **options)


def make_scorer(apply: Apply, *, chunk: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled `score(params, tokens_BT, mask_BT, response_BR, temperature) -> (logp_BR, entropy_BR)`, no gradient."""

    @jax.jit
    def score(
        params: Any, tokens_BT: jax.Array, mask_BT: jax.Array, response_BR: jax.Array, temperature: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        logp_BR, entropy_BR = response_logprobs(
            apply, params, tokens_BT, mask_BT, response_BR.shape[1], temperature=temperature, chunk=chunk, entropy=True
        )
        return jnp.where(response_BR > 0, logp_BR, 0.0), jnp.where(response_BR > 0, entropy_BR, 0.0)

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


def make_loss(algorithm: AlgorithmConfig, *, chunk: int, max_response: int | None = None) -> Callable[..., tuple]:
    """The loss of a (micro-)batch, for `make_train_step`: policy loss x importance weight + kl_coef x KL penalty.

    The batch is a dict: tokens_BT, mask_BT, old_logp_BR, advantages_BR, loss_mask_BR, reweight_mask_BR, and the
    scalars of `scalars`. With a KL penalty it has ref_logp_BR too, with importance weights importance_BR. No entropy
    bonus. `max_response` is the length in tokens that "seq-mean-token-sum-norm" divides by; None: R.
    """
    policy = _policy(algorithm)

    def loss_fn(apply: Apply, params: Any, batch: dict) -> tuple:
        R = batch["old_logp_BR"].shape[1]
        logp_BR = response_logprobs(
            apply, params, batch["tokens_BT"], batch["mask_BT"], R, temperature=batch["temperature"], chunk=chunk
        )
        advantages_BR, mask_BR = batch["advantages_BR"], batch["loss_mask_BR"]
        if algorithm.reweight.kind in CURRENT_REWEIGHTINGS:
            advantages_BR = reweight(
                algorithm.reweight.kind,
                advantages_BR,
                logp_BR,
                mask_BR,
                alpha=batch["alpha"],
                where=algorithm.reweight.where,
                token_mask_BT=batch["reweight_mask_BR"],
            )
        loss_BR, metrics = policy(batch, logp_BR, advantages_BR)
        if algorithm.importance != "none":
            loss_BR = loss_BR * batch["importance_BR"]
        if algorithm.kl_coef:
            kl_BR = kl_penalty(logp_BR, batch["ref_logp_BR"], mask_BR)
            loss_BR = loss_BR + batch["kl_coef"] * kl_BR
            metrics = metrics | {"ref_kl": jax.lax.stop_gradient(aggregate(kl_BR, mask_BR))}
        return aggregate(loss_BR, mask_BR, algorithm.aggregation, max_length=max_response or R), metrics

    return loss_fn


def _policy(algorithm: AlgorithmConfig) -> Callable[[dict, jax.Array, jax.Array], tuple]:
    """`policy(batch, logp_BR, advantages_BR) -> (loss_BR, metrics)` of the configuration's loss."""
    loss = {"dapo": policy_loss, "gspo": gspo_loss, "cispo": cispo_loss}[algorithm.loss]

    def policy(batch: dict, logp_BR: jax.Array, advantages_BR: jax.Array) -> tuple:
        options: dict[str, Any] = {name: batch[name] for name in ("clip_low", "clip_high")}
        if algorithm.loss == "dapo":
            options["clip_dual"] = batch.get("clip_dual")
        elif algorithm.loss == "gspo":  # a mask for the loss does not change what a response is
            options["response_BT"] = batch["mask_BT"][:, -logp_BR.shape[1] :]
        return loss(logp_BR, batch["old_logp_BR"], advantages_BR, batch["loss_mask_BR"], **options)

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
