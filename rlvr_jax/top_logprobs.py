"""The published code's view of two models: of each the k best log-probabilities, as an inference engine reports them.

arXiv 2603.22117 measures its criteria and extrapolates on such lists (k = 50). The functions of `direction` look at
whole distributions; this is what `top_logprobs=k` adds to `criteria.fires` and to selective decoding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import require_same_shape
from rlvr_jax.direction import checked_tokens, token_values, widen
from rlvr_jax.typing import Array, Float, Int


class TopList:
    """One model's k best log-probabilities a row, and the drawn token where it is given.

    Attributes:
      logp_BV: the whole distributions.
      ids_BK, values_BK: the tokens that are listed and their log-probabilities; -inf for a token that is there twice.
    """

    def __init__(self, logp_BV: jax.Array, k: int, token_B: ArrayLike | None = None):
        if k < 1:
            raise ValueError(f"top_logprobs={k}: expected at least 1")
        self.logp_BV = logp_BV
        self.values_BK, self.ids_BK = jax.lax.top_k(logp_BV, min(k, logp_BV.shape[-1]))
        self._least_B1 = self._cut_B1 = self.values_BK[:, -1:]
        if token_B is not None:
            token_B1 = jnp.asarray(token_B)[:, None].astype(self.ids_BK.dtype)
            drawn_B1 = token_values(logp_BV, jnp.asarray(token_B))[:, None]
            listed_B1 = jnp.any(self.ids_BK == token_B1, axis=-1, keepdims=True)
            self.ids_BK = jnp.concatenate([self.ids_BK, token_B1], axis=-1)
            self.values_BK = jnp.concatenate([self.values_BK, jnp.where(listed_B1, -jnp.inf, drawn_B1)], axis=-1)
            self._least_B1 = jnp.where(listed_B1, self._cut_B1, drawn_B1)

    @property
    def logp(self) -> jax.Array:
        """[B, K]: the listed log-probabilities, renormalised."""
        return jax.nn.log_softmax(self.values_BK)

    def lookup(self, ids_BK: jax.Array) -> jax.Array:
        """The listed log-probability of each id, the list's minimum for an id that is not in it.

        The drawn token, when it is not among the k best, is itself that minimum.
        """
        logp_BK = jnp.take_along_axis(self.logp_BV, ids_BK, axis=-1)
        return jnp.where(logp_BK >= self._cut_B1, logp_BK, self._least_B1)

    def aligned(self, other: "TopList") -> jax.Array:
        """[B, K]: what `other` says of the tokens of this list, -inf where this list is; not renormalised."""
        return jnp.where(jnp.isneginf(self.values_BK), -jnp.inf, other.lookup(self.ids_BK))


def by_role(first, second, sample_from: str):
    """(base, rl) <-> (sampled, other): the same swap both ways."""
    if sample_from not in ("base", "rl"):
        raise ValueError(f"sample_from={sample_from!r}: expected 'base' or 'rl'")
    return (first, second) if sample_from == "base" else (second, first)


def published_top_logprobs(
    logp_sampled_BV: Float[Array, "B V"],
    logp_other_BV: Float[Array, "B V"],
    k: int,
    token_B: Int[Array, " B"] | None = None,
) -> tuple[Float[jax.Array, "B V"], Float[jax.Array, "B V"]]:
    """The pair the published code extrapolates between: the candidates are the sampled model's k best tokens.

    Elsewhere both are -inf. The other model's value is its log-probability where the token is in its own k best, else
    the least of those. Neither is renormalised (`extrapolate` does). `token_B`, the drawn tokens, joins the candidates
    when it is not among them, as the published engine reports it. Equal log-probabilities at the cut: the lower
    token id is kept. Criteria under the same rule: `fires(..., top_logprobs=k)`, not `fires` on this pair, because
    KL(rl ‖ base) and H(rl) run over rl's own list whichever model is sampled.
    """
    require_same_shape(logp_sampled_BV=logp_sampled_BV, logp_other_BV=logp_other_BV)
    token_B = None if token_B is None else checked_tokens(token_B, np.shape(logp_sampled_BV))
    sampled = TopList(widen(logp_sampled_BV), k, token_B)
    other = TopList(widen(logp_other_BV), k)
    rows_B1 = jnp.arange(sampled.ids_BK.shape[0])[:, None]

    def scatter(values_BK):
        # `max`, because the drawn token may be listed twice, the second time as -inf.
        return jnp.full_like(sampled.logp_BV, -jnp.inf).at[rows_B1, sampled.ids_BK].max(values_BK)

    return scatter(sampled.values_BK), scatter(sampled.aligned(other))
