"""Decoding with two models: selective replacement and extrapolation (ICLR 2026, arXiv 2603.22117, section 4.1).

Each step draws a token y from the *sampled* model. A criterion looks at both models' next-token log-probabilities
(temperature 1, before top-k and top-p). Where it fires, the token is drawn again from
softmax(((1 + gamma) log pi_RL - gamma log pi_Base) / temperature) with the same top-k and top-p. The token that is kept
feeds both models. gamma = 0 is selective replacement.
"""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from rlvr_jax.criteria import Named, criterion_of
from rlvr_jax.decoding.batch import Ids, Prompts, make_queue
from rlvr_jax.decoding.checks import Numbers, check_count
from rlvr_jax.decoding.engine import CHUNK, OnChunk, serve
from rlvr_jax.decoding.state import LanguageModel, Params
from rlvr_jax.decoding.steps import Rule
from rlvr_jax.typing import Bool, Float, Int

_OUTPUTS = {
    "tokens": np.int32,
    "logp": np.float32,
    "fired": np.bool_,
    "delta_logp": np.float32,
    "sampled_token": np.int32,
}


class SelectiveGeneration(NamedTuple):
    """A `Generation`, and what the criterion saw and did at every position. R rows, row = prompt * n + sample.

    Attributes:
      tokens, logp, lengths, finished, invalid: as in `Generation`; logp is that of the emitted token under the
        *sampled* model, and a row is invalid when either model's logits are not finite.
      fired: bool [R, max_new_tokens], the criterion selected this position and its token was drawn again.
      delta_logp: float32 [R, max_new_tokens], log pi_RL(y) - log pi_Base(y) at temperature 1, y the token first drawn.
      sampled_token: int32 [R, max_new_tokens], y; differs from `tokens` only where `fired`.
      passes_sampled, passes_other: int32 [R], forward passes of each model while the row was being decoded, one after
        the other; their sum over the row's length is what a token costs in sequence (2 with block = 1).
    """

    tokens: Int[np.ndarray, "R T"]
    logp: Float[np.ndarray, "R T"]
    lengths: Int[np.ndarray, " R"]
    finished: Bool[np.ndarray, " R"]
    invalid: Bool[np.ndarray, " R"]
    fired: Bool[np.ndarray, "R T"]
    delta_logp: Float[np.ndarray, "R T"]
    sampled_token: Int[np.ndarray, "R T"]
    passes_sampled: Int[np.ndarray, " R"]
    passes_other: Int[np.ndarray, " R"]


def decode_selective(
    models: tuple[LanguageModel, LanguageModel],
    params: tuple[Params, Params],
    prompts: Prompts,
    *,
    criterion: Named,
    tau: Numbers | None,
    gamma: Numbers,
    sample_from: str = "base",
    block: int | None = None,
    top_logprobs: int | None = None,
    max_new_tokens: int,
    n: int = 1,
    temperature: Numbers = 1.0,
    top_p: Numbers = 1.0,
    top_k: Numbers = 0,
    seed: int = 0,
    problem_ids: Ids | None = None,
    sample_ids: Ids | None = None,
    stop_tokens: Ids = (),
    prompt_length: int | None = None,
    slots: int | None = None,
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
    on_chunk: OnChunk | None = None,
) -> SelectiveGeneration:
    """Draws `n` responses to each prompt by selective replacement / extrapolation between two models.

    With criterion "none" this is `decode` of the sampled model, token for token.

    Args:
      models, params: (base, rl).
      criterion: one of `criteria.CRITERIA`, or your own: see `criteria.fires`.
      tau: its threshold, a number or one a row; None for "none" and "all".
      gamma: the weight of the extrapolation, a number or one a row; 0 redraws from rl.
      sample_from: the model that each token is first drawn from, "base" or "rl".
      block: tokens that the sampled model drafts before the other one scores them all in one pass. The tokens drawn do
        not depend on it. None chooses, and goes on choosing from the rate at which the criterion fires.
      top_logprobs: None, or k: criterion and candidates as in the published code, which sees the k best
        log-probabilities of each model (50 there). `delta_logp` and `logp` of the result stay exact.
      The others are those of `generate.decode`.

    Returns:
      The responses and the record of the criterion.

    Raises:
      ValueError: naming the argument, its value and what was expected; nothing was compiled by then.
    """
    rule = make_rule(criterion, tau, sample_from=sample_from, top_logprobs=top_logprobs)
    queue = make_queue(
        prompts,
        max_new_tokens=max_new_tokens,
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        tau=0.0 if tau is None else tau,
        gamma=gamma,
        seed=seed,
        problem_ids=problem_ids,
        sample_ids=sample_ids,
        stop_tokens=stop_tokens,
        prompt_length=prompt_length,
    )
    if block is not None:
        check_count("block", block)
    rows = queue.rows
    arrays = {name: np.zeros((rows, max_new_tokens), dtype) for name, dtype in _OUTPUTS.items()}
    lengths, passes_R2 = np.zeros(rows, np.int32), np.zeros((rows, 2), np.int32)
    finished, invalid = np.zeros(rows, bool), np.zeros(rows, bool)
    for row in serve(
        models, params, queue, rule=rule, slots=slots, block=block, chunk=chunk, mesh=mesh, on_chunk=on_chunk
    ):
        length = lengths[row.row] = len(row.tokens)
        finished[row.row], invalid[row.row], passes_R2[row.row] = row.finished, row.invalid, row.passes
        for name, array in arrays.items():
            array[row.row, :length] = getattr(row, name)
    return SelectiveGeneration(
        lengths=lengths,
        finished=finished,
        invalid=invalid,
        passes_sampled=passes_R2[:, 0],
        passes_other=passes_R2[:, 1],
        **arrays,
    )


def make_rule(
    criterion: Named, tau: Numbers | None, *, sample_from: str = "base", top_logprobs: int | None = None
) -> Rule:
    """The checked rule of a selective decode; see `decode_selective`. `tau` is only looked at for being there."""
    how = criterion_of(criterion)
    if sample_from not in ("base", "rl"):
        raise ValueError(f"sample_from={sample_from!r}: expected 'base' or 'rl'")
    if tau is None and how.constant is None:
        raise ValueError(f"tau=None: criterion {criterion!r} needs a threshold, a number or one for each row")
    if top_logprobs is not None:
        if isinstance(top_logprobs, bool) or not isinstance(top_logprobs, (int, np.integer)) or top_logprobs < 1:
            raise ValueError(f"top_logprobs={top_logprobs!r}: expected None or an integer of at least 1")
        if not how.takes_top_logprobs:
            raise ValueError(f"criterion={criterion!r} with top_logprobs: the published rule has no such form")
        top_logprobs = int(top_logprobs)
    return Rule(criterion, sample_from, top_logprobs)
