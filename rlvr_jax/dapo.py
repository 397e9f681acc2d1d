"""DAPO with low-probability re-weighting (arXiv 2503.14476, 2603.22117), assembled: from scores to a loss.

    score_BT = make_scorer(apply)                  log-probs and entropies of packed rows, no gradient
    step_advantages(tokens, score_B, ...)          advantages, weights and masks of a whole trainer step
    make_loss("dapo", ...)                         the loss of a (micro-)batch, for `make_train_step`

`apply(params, tokens_BT, positions_BT, segment_BT) -> (hidden_BTD, unembed_DV)` is the model: `models.qwen.model_apply`
makes it of a config. Every choice is a name in a table of `rlvr_jax.objectives`, a function of your own, or its
"module:name". `tests/test_compose.py` runs the whole of it in 40 lines.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.entries import entry
from rlvr_jax.objectives.advantages import group_advantages
from rlvr_jax.objectives.correction import importance_weights, kl_penalty
from rlvr_jax.objectives.logprobs import chunked_logprobs
from rlvr_jax.objectives.masks import kept_tokens
from rlvr_jax.objectives.policy import LOSSES, Clips, aggregate
from rlvr_jax.objectives.reweight import reweighted, reweighting_of
from rlvr_jax.objectives.tokens import Tokens
from rlvr_jax.sharding.rules import training_options
from rlvr_jax.typing import Array, Integer, Real

Apply = Callable[..., tuple[jax.Array, jax.Array]]
Choice = str | Callable[..., Any]


def sequence_logprobs(
    apply: Apply, params: Any, tokens_BT: Integer[Array, "B T"], segment_BT: Integer[Array, "B T"], **options: Any
) -> Any:
    """`chunked_logprobs` of every token given those before it; the first column, which has none, gets 0.

    `segment_BT` is 0 on padding and numbers the sequences of a row from 1; what stands at the first token of a
    sequence means nothing, for it is scored after another sequence's last.
    """
    hidden_BTD, unembed_DV = apply(params, tokens_BT, None, segment_BT)
    # The last column has no target; it is scored all the same, so that the length stays one that devices can share.
    scored = chunked_logprobs(hidden_BTD, unembed_DV, jnp.roll(tokens_BT, -1, axis=1), **options)
    return jax.tree.map(lambda x_BT: jnp.roll(x_BT, 1, axis=1).at[:, 0].set(0.0), scored)


def make_scorer(apply: Apply, *, chunk: int = 1024) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled `score(params, tokens_BT, segment_BT, temperature) -> (logp_BT, entropy_BT)`, no gradient."""

    @functools.partial(jax.jit, compiler_options=training_options())
    def score(
        params: Any, tokens_BT: Integer[Array, "B T"], segment_BT: Integer[Array, "B T"], temperature: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        return sequence_logprobs(
            apply, params, tokens_BT, segment_BT, temperature=temperature, chunk=chunk, entropy=True
        )

    return score


def step_advantages(
    tokens: Tokens,
    score_B: Real[Array, " B"],
    *,
    normalize_by_std: bool = True,
    num_groups: int | None = None,
    reweighting: Choice = "low_prob",
    alpha: ArrayLike = 0.1,
    where: str = "all",
    reweight_mask: tuple[Choice, ArrayLike] = ("all", 1.0),
    loss_mask: tuple[Choice, ArrayLike] = ("all", 1.0),
    importance: Choice = "none",
    importance_cap: ArrayLike = 2.0,
) -> tuple[jax.Array, Tokens]:
    """Advantages and masks of a whole trainer step, before it is cut into mini-batches; a row is a response.

    Group advantage, then the masks over the step's response tokens, then re-weighting. Re-weightings by the current
    policy wait for the loss (`Reweighting.current`).

    Args:
      tokens: response_BT, old_logp_BT and group_B, and what the masks and the re-weighting need.
      score_B: reward of each response; 0 for padding rows.
      reweighting, alpha, where: as in `reweight`.
      reweight_mask, loss_mask: kind and quantile, as in `token_mask`: the tokens that are re-weighted, and those that
        enter the loss.
      importance, importance_cap: as in `importance_weights`, of rollout_logp_BT; "none": the loss has none.
      normalize_by_std, num_groups: as in `group_advantages`.

    Returns:
      advantage_B of each response, and `tokens` with advantages_BT, loss_mask_BT, reweight_mask_BT (and importance_BT).
    """
    advantage_B = group_advantages(score_B, tokens.group_B, normalize_by_std=normalize_by_std, num_groups=num_groups)
    tokens = tokens._replace(
        advantages_BT=jnp.broadcast_to(advantage_B[:, None], np.shape(tokens.response_BT)),
        reweight_mask_BT=kept_tokens(reweight_mask[0], tokens, quantile=reweight_mask[1]),
        loss_mask_BT=kept_tokens(loss_mask[0], tokens, quantile=loss_mask[1]),
    )
    kind = "none" if reweighting_of(reweighting).current else reweighting
    tokens = tokens._replace(advantages_BT=reweighted(kind, tokens, alpha=alpha, where=where))
    if importance != "none":
        tokens.require(["rollout_logp_BT"], "importance weighting")
        pair = tokens.old_logp_BT, tokens.rollout_logp_BT
        weight_BT = importance_weights(*pair, tokens.response_BT, kind=importance, cap=importance_cap)
        tokens = tokens._replace(importance_BT=weight_BT)
    return advantage_B, tokens


def make_loss(
    loss: Choice = "dapo",
    *,
    reweighting: Choice = "none",
    where: str = "all",
    aggregation: Choice = "token-mean",
    chunk: int = 1024,
    max_response: int | None = None,
) -> Callable[..., tuple]:
    """The loss of a (micro-)batch, for `make_train_step`: policy loss x importance weight + kl_coef x KL penalty.

    The batch is a dict. It has tokens_BT and segment_BT (0 on padding, the sequences of a row numbered from 1), then
    arrays of `Tokens` by name, which are 0 off the response tokens: old_logp_BT, advantages_BT, loss_mask_BT at least.
    And it has the numbers of `scalars`. With importance_BT the loss is weighted, with kl_coef it has the penalty, which
    needs ref_logp_BT. No entropy bonus.

    Args:
      loss: a name in `objectives.policy.LOSSES`, or `(logp_BT, tokens, clips) -> (loss_BT, metrics)`, where each metric
        is a (sum, weight) pair.
      reweighting, where: of a re-weighting by the current policy; others were made by `step_advantages`.
      aggregation: as in `aggregate`.
      chunk: tokens whose logits exist at one time.
      max_response: the length in tokens that "seq-mean-token-sum-norm" divides by.
    """
    policy, how = entry("loss", LOSSES, loss), reweighting_of(reweighting)

    def loss_fn(apply: Apply, params: Any, batch: dict) -> tuple:
        temperature = batch["temperature"]
        logp_BT = sequence_logprobs(
            apply, params, batch["tokens_BT"], batch["segment_BT"], temperature=temperature, chunk=chunk
        )
        tokens = Tokens(**{"response_BT": batch["loss_mask_BT"]} | {k: batch[k] for k in Tokens._fields if k in batch})
        mask_BT = tokens.loss_mask_BT
        if how.current:
            seen = tokens._replace(old_logp_BT=logp_BT)
            tokens = tokens._replace(advantages_BT=reweighted(how, seen, alpha=batch["alpha"], where=where))
        clips = Clips(batch["clip_low"], batch["clip_high"], batch.get("clip_dual"))
        loss_BT, metrics = policy(logp_BT, tokens, clips)
        if np.shape(loss_BT) != logp_BT.shape:
            raise ValueError(f"loss={loss!r} gave an array {np.shape(loss_BT)}: expected {logp_BT.shape}, as logp_BT")
        if tokens.importance_BT is not None:
            loss_BT = loss_BT * tokens.importance_BT
        if "kl_coef" in batch:
            tokens.require(["ref_logp_BT"], "the KL penalty")
            kl_BT = kl_penalty(logp_BT, tokens.ref_logp_BT, mask_BT)
            loss_BT = loss_BT + batch["kl_coef"] * kl_BT
            metrics = metrics | {"ref_kl": jax.lax.stop_gradient(aggregate(kl_BT, mask_BT))}
        segment_BT = tokens.segment_BT
        return aggregate(loss_BT, mask_BT, aggregation, max_length=max_response, segment_BT=segment_BT), metrics

    return loss_fn


def scalars(
    *,
    temperature: float = 1.0,
    alpha: float = 0.1,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    clip_dual: float | None = 10.0,
    kl_coef: float = 0.0,
) -> dict[str, np.float32]:
    """The numbers in a batch of `make_loss`: arguments of the compiled step, so another value compiles nothing.

    They are `temperature` of the rollouts, `alpha` of the re-weighting, the clips of the ratio (`clip_dual=None`: none)
    and `kl_coef`, the weight of the KL penalty; 0 leaves it out.
    """
    values = {"temperature": temperature, "alpha": alpha, "clip_low": clip_low, "clip_high": clip_high}
    values |= {} if clip_dual is None else {"clip_dual": clip_dual}
    values |= {"kl_coef": kl_coef} if kl_coef else {}
    return {name: np.float32(value) for name, value in values.items()}
