"""The numbers that two models give every token of a response, as the page, the findings and the files hold them.

Log-probabilities are natural logarithms at temperature 1, entropies and divergences are in nats.
"""

from typing import NamedTuple

import numpy as np

from rlvr_jax.typing import Array, Float, Int


class TokenColumns(NamedTuple):
    """One response of T tokens, judged by both models given the tokens before each; K best tokens of either.

    Attributes:
      token: the token's id.
      logp_base, logp_rl: log pi_Base and log pi_RL of the token.
      entropy_base, entropy_rl: of the next-token distribution that the token was drawn from.
      kl, kl_reverse: KL(rl ‖ base) and KL(base ‖ rl) of the two distributions.
      js: their average, which the published code calls "js"; js_true: the Jensen-Shannon divergence.
      rank_base, rank_rl: 1 where the token is the most probable: tokens that are strictly more probable, plus one.
      gradient_share: (1 - p) over the response's sum of it, p of the model that wrote the response; 0 where that
        sum is 0. The l1 norm of a token's gradient in the logits is 2 abs(w) (1 - p) (arXiv 2603.22117, lemma 3.1).
      top_base_ids, top_base_logp, top_rl_ids, top_rl_logp: the most probable tokens, best first.
    """

    token: Int[Array, " T"]
    logp_base: Float[Array, " T"]
    logp_rl: Float[Array, " T"]
    entropy_base: Float[Array, " T"]
    entropy_rl: Float[Array, " T"]
    kl: Float[Array, " T"]
    kl_reverse: Float[Array, " T"]
    js: Float[Array, " T"]
    js_true: Float[Array, " T"]
    rank_base: Int[Array, " T"]
    rank_rl: Int[Array, " T"]
    gradient_share: Float[Array, " T"]
    top_base_ids: Int[Array, "T K"]
    top_base_logp: Float[Array, "T K"]
    top_rl_ids: Int[Array, "T K"]
    top_rl_logp: Float[Array, "T K"]

    @property
    def delta_logp(self) -> np.ndarray:
        """[T] log pi_RL - log pi_Base of the token."""
        return np.asarray(self.logp_rl) - np.asarray(self.logp_base)


class ScoredResponse(NamedTuple):
    """A response with its columns.

    Attributes:
      problem, sample: which problem, and which response to it.
      source: who wrote it: "base", "rl", "given", or "step 120" for a rollout of training.
      prompt, text: as a reader sees them.
      answer: the problem's answer, None where it is not known.
      correct: whether the response is right, None where that is not known.
      pieces: the text of each token; together they are `text`.
      columns: T numbers each.
    """

    problem: int
    sample: int
    source: str
    prompt: str
    text: str
    answer: str | None
    correct: bool | None
    pieces: list[str]
    columns: TokenColumns


class Figure(NamedTuple):
    """A figure of the findings: `svg` is a whole svg element."""

    title: str
    caption: str
    svg: str
