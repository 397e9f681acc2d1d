"""Re-weighting of token advantages by the token's probability (arXiv 2603.22117, section 4.2, and its rivals)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import not_negative, positive, require, require_same_shape
from rlvr_jax.direction import widen
from rlvr_jax.entries import entry
from rlvr_jax.objectives.advantages import group_deviations, group_ids
from rlvr_jax.objectives.tokens import Mask, Tokens, Values, masked
from rlvr_jax.typing import Array, Float, Integer


@dataclasses.dataclass(frozen=True)
class Reweighting:
    """What a token's advantage is multiplied with.

    Attributes:
      weight: `(tokens, alpha) -> weight_BT` of a `Tokens`, whose `old_logp_BT` is 0 off the responses.
      current: it weighs by the policy being trained. So it is called inside the loss, with that policy's log-probs as
        `old_logp_BT`, and may not compare the responses of a step.
      needs: names of the `Tokens` that must be there; "ref_logp_BT" makes a run score the reference (base) model.
      alpha: what alpha must be, in words and as a test; None: any finite number.
    """

    weight: Callable[[Tokens, Any], jax.Array]
    current: bool = False
    needs: tuple[str, ...] = ()
    alpha: tuple[str, Callable[[np.ndarray], Any]] | None = None


def _uniform(tokens: Tokens, alpha: Any) -> jax.Array:
    share = jnp.sum(tokens.rest_BT) / jnp.maximum(tokens.counted_BT.sum(), 1)
    return jnp.full_like(tokens.p_BT, 1 + alpha * share)


def _shuffled(tokens: Tokens, alpha: Any) -> jax.Array:
    """A uniformly random permutation of the counted weights among the counted places."""
    key = jnp.asarray(tokens.key)
    values_N, counted_N = (1 + alpha * tokens.rest_BT).ravel(), tokens.counted_BT.ravel()
    order_N = jax.random.permutation(key, values_N.size)
    places_N = jnp.argsort(~counted_N, stable=True)
    sources_N = order_N[jnp.argsort(~counted_N[order_N], stable=True)]
    return values_N.at[places_N].set(values_N[sources_N]).reshape(tokens.p_BT.shape)


def _mean_nll(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """(mean -old_logp, number of tokens) of each response."""
    length_B = tokens.counted_BT.sum(axis=-1)
    return -masked(tokens.old_logp_BT, tokens.counted_BT).sum(axis=-1) / jnp.maximum(length_B, 1), length_B


def _ppl(tokens: Tokens, alpha: Any) -> jax.Array:
    return jnp.broadcast_to((1 - alpha * _mean_nll(tokens)[0])[:, None], tokens.p_BT.shape)


def _ppl_norm(tokens: Tokens, alpha: Any) -> jax.Array:
    group_B = group_ids(tokens.group_B)
    nll_B, length_B = _mean_nll(tokens)
    there_B = (length_B > 0) & (group_B >= 0)
    centred_B, sum_squares_B, count_B = group_deviations(nll_B, group_B, there_B)
    z_B = centred_B / (jnp.sqrt(sum_squares_B / jnp.maximum(count_B, 1)) + 1e-6)
    return jnp.broadcast_to((1 - alpha * jnp.where(there_B, z_B, 0.0))[:, None], tokens.p_BT.shape)


def _low_prob(tokens: Tokens, alpha: Any) -> jax.Array:
    return 1 + alpha * tokens.rest_BT


REWEIGHTINGS: dict[str, Reweighting] = {
    "none": Reweighting(lambda tokens, alpha: jnp.ones_like(tokens.p_BT)),
    "low_prob": Reweighting(_low_prob),
    "high_prob": Reweighting(lambda tokens, alpha: alpha * tokens.p_BT + 1 - alpha),
    "ppl": Reweighting(_ppl),
    "ppl_norm": Reweighting(_ppl_norm, needs=("group_B",)),
    "ppl_norm_clamp": Reweighting(
        lambda tokens, alpha: jnp.clip(_ppl_norm(tokens, alpha), 0.8, 1.2), needs=("group_B",)
    ),
    "middle": Reweighting(lambda tokens, alpha: alpha + tokens.p_BT * tokens.rest_BT),
    "inverse": Reweighting(
        lambda tokens, alpha: 1 / (alpha + tokens.rest_BT),
        alpha=("a number > 0, without which re-weighting 'inverse' is unbounded", positive),
    ),
    "current_linear": Reweighting(_low_prob, current=True),
    "current_focal": Reweighting(
        lambda tokens, alpha: tokens.rest_BT**alpha,
        current=True,
        alpha=("a number >= 0, without which re-weighting 'current_focal' is unbounded", not_negative),
    ),
    "uniform": Reweighting(_uniform),
    "shuffled": Reweighting(_shuffled, needs=("key",)),
}

# Where the advantage is of the wanted sign.
SIGNS: dict[str, Callable[[jax.Array], Any]] = {
    "all": lambda advantages_BT: True,
    "positive": lambda advantages_BT: advantages_BT > 0,
    "negative": lambda advantages_BT: advantages_BT < 0,
}

Named = str | Reweighting | Callable[..., Any]


def reweighting_of(kind: Named) -> Reweighting:
    """The re-weighting that a name stands for; a function `(tokens, alpha) -> weight_BT` becomes one.

    Raises:
      ValueError: a name that is none of `REWEIGHTINGS` and cannot be imported as "module:name" either.
    """
    return entry("kind", REWEIGHTINGS, kind, of=Reweighting)


def reweight(
    kind: Named,
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
    | a `Reweighting`, a function `(tokens, alpha) -> weight_BT`, "module:name" | your own |

    `where` = "all", "positive" (only tokens with A > 0) or "negative" (A < 0), and `token_mask_BT` (see `token_mask`)
    select the tokens; the statistics of ppl, uniform and shuffled are over all tokens of `mask_BT` either way. Those of
    ppl_norm, uniform and shuffled want the whole batch, not a micro-batch. For the kinds that are `current` call this
    inside the loss with the current policy's log-probabilities as `old_logp_BT`. No gradient flows through any weight.
    Rows with an empty mask, and rows with a negative group id, enter no statistic. The result is at least float32,
    whatever the advantages are.
    """
    tokens = Tokens(
        mask_BT, old_logp_BT, advantages_BT=advantages_BT, reweight_mask_BT=token_mask_BT, group_B=group_B, key=key
    )
    return reweighted(kind, tokens, alpha=alpha, where=where)


def reweighted(kind: Named, tokens: Tokens, *, alpha: ArrayLike, where: str = "all") -> Float[jax.Array, "B T"]:
    """`reweight` of the advantages of a `Tokens`, where its `reweight_mask_BT` is 1 (None: everywhere)."""
    how, chosen = reweighting_of(kind), entry("where", SIGNS, where)
    tokens.require(how.needs, f"re-weighting {kind!r}")
    require("alpha", alpha, "a finite number", np.isfinite)
    if how.alpha is not None:
        require("alpha", alpha, *how.alpha)
    require_same_shape(
        advantages_BT=tokens.advantages_BT,
        old_logp_BT=tokens.old_logp_BT,
        mask_BT=tokens.response_BT,
        token_mask_BT=tokens.reweight_mask_BT,
    )
    advantages_BT, counted_BT = widen(tokens.advantages_BT), tokens.counted_BT
    old_logp_BT = jax.lax.stop_gradient(masked(tokens.old_logp_BT, counted_BT))
    weight_BT = jax.lax.stop_gradient(how.weight(tokens._replace(old_logp_BT=old_logp_BT), alpha))
    if np.shape(weight_BT) != np.shape(advantages_BT):
        raise ValueError(
            f"kind={kind!r} gave weights {np.shape(weight_BT)}: expected {np.shape(advantages_BT)}, one per token"
        )
    chosen_BT = counted_BT & chosen(advantages_BT)
    if tokens.reweight_mask_BT is not None:
        chosen_BT &= jnp.asarray(tokens.reweight_mask_BT) > 0
    return advantages_BT * jnp.where(chosen_BT, weight_BT, 1.0)
