"""Decoding with two models: selective replacement and extrapolation (ICLR 2026, arXiv 2603.22117, section 4.1).

Each step draws a token y from the *sampled* model. A criterion looks at both models' next-token log-probabilities
(temperature 1, before top-k and top-p). Where it fires, the token is drawn again from
softmax(((1 + gamma) log pi_RL - gamma log pi_Base) / temperature) with the same top-k and top-p. The token that is kept
feeds both models. gamma = 0 is selective replacement.
"""

import contextlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlvr_jax.decoding.batch import Ids, Numbers, Prompts, make_batch, per_row
from rlvr_jax.decoding.generate import (
    CHUNK,
    CRITERION,
    DRAW,
    REDRAW,
    DecodeState,
    LanguageModel,
    OnChunk,
    Params,
    active_sampling,
    commit,
    drive,
    next_logits,
    run_chunk,
    step_keys,
)
from rlvr_jax.decoding.sampling import draw, log_normaliser, token_logprob
from rlvr_jax.direction import CRITERIA, delta_logp, extrapolate, fires, published_top_logprobs
from rlvr_jax.typing import Array, Bool, Float, Int

_OUTPUTS = {
    "tokens": jnp.int32,
    "logp": jnp.float32,
    "fired": jnp.bool_,
    "delta_logp": jnp.float32,
    "sampled_token": jnp.int32,
}


class SelectiveGeneration(NamedTuple):
    """A `Generation`, and what the criterion saw and did at every position. R rows, row = prompt * n + sample.

    Attributes:
      tokens, logp, lengths, finished: as in `Generation`; logp is that of the emitted token under the *sampled* model.
      fired: bool [R, max_new_tokens], the criterion selected this position and its token was drawn again.
      delta_logp: float32 [R, max_new_tokens], log pi_RL(y) - log pi_Base(y) at temperature 1, y the token first drawn.
      sampled_token: int32 [R, max_new_tokens], y; differs from `tokens` only where `fired`.
    """

    tokens: Int[np.ndarray, "R T"]
    logp: Float[np.ndarray, "R T"]
    lengths: Int[np.ndarray, " R"]
    finished: Bool[np.ndarray, " R"]
    fired: Bool[np.ndarray, "R T"]
    delta_logp: Float[np.ndarray, "R T"]
    sampled_token: Int[np.ndarray, "R T"]


class Rule(NamedTuple):
    """What is compiled into the program of a selective decode. Hashable.

    Attributes:
      criterion: one of `direction.CRITERIA`.
      sample_from: "base" or "rl", the model that y is drawn from.
      top_logprobs: None for whole distributions; k for the published code's rule, which sees each model's k best.
    """

    criterion: str
    sample_from: str
    top_logprobs: int | None


class Selection(NamedTuple):
    """What the rule is applied with; traced. Attributes: tau and gamma, float32 [B]."""

    tau: Array
    gamma: Array


def decode_selective(
    models: tuple[LanguageModel, LanguageModel],
    params: tuple[Params, Params],
    prompts: Prompts,
    *,
    criterion: str,
    tau: Numbers | None,
    gamma: Numbers,
    sample_from: str = "base",
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
    chunk: int = CHUNK,
    mesh: Mesh | None = None,
    on_chunk: OnChunk | None = None,
) -> SelectiveGeneration:
    """Draws `n` responses to each prompt by selective replacement / extrapolation between two models.

    With criterion "none" this is `decode` of the sampled model, token for token.

    Args:
      models, params: (base, rl).
      criterion: one of `direction.CRITERIA`, see `direction.fires`.
      tau: its threshold, a number or one a row; None for "none" and "all".
      gamma: the weight of the extrapolation, a number or one a row; 0 redraws from rl.
      sample_from: the model that each token is first drawn from, "base" or "rl".
      top_logprobs: None, or k: criterion and candidates as in the published code, which sees the k best
        log-probabilities of each model (50 there). `delta_logp` and `logp` of the result stay exact.
      The others are those of `generate.decode`.

    Returns:
      The responses and the record of the criterion.

    Raises:
      ValueError: naming the argument, its value and what was expected; nothing was compiled by then.
    """
    rule = _check_rule(criterion, sample_from, top_logprobs, tau)
    batch = make_batch(
        prompts,
        max_new_tokens=max_new_tokens,
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        problem_ids=problem_ids,
        sample_ids=sample_ids,
        stop_tokens=stop_tokens,
        prompt_length=prompt_length,
        chunk=chunk,
    )
    rows = len(batch.limit_R)
    selection = Selection(
        tau=per_row("tau", 0.0 if tau is None else tau, rows, "a number", np.isfinite),
        gamma=per_row("gamma", gamma, rows, "a number", np.isfinite),
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        params = tuple(model.prepare(p) for model, p in zip(models, params, strict=True))
        advance = partial(_advance, models, rule, chunk, params, selection, batch.stop_S)
        drawn, lengths, finished = drive(models, params, batch, advance, chunk, on_chunk)
    return SelectiveGeneration(lengths=lengths, finished=finished, **drawn)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames=("state",))
def _advance(
    models: tuple[LanguageModel, LanguageModel],
    rule: Rule,
    chunk: int,
    params: tuple[Params, Params],
    selection: Selection,
    stop_S: Array,
    state: DecodeState,
) -> tuple:
    def step(state: DecodeState) -> tuple[DecodeState, dict[str, jax.Array]]:
        base_BV, base_cache = next_logits(models[0], params[0], state, 0)
        rl_BV, rl_cache = next_logits(models[1], params[1], state, 1)
        token_B, out = choose(rule, selection, state, base_BV, rl_BV)
        return commit(state, token_B, (base_cache, rl_cache), stop_S, out)

    return run_chunk(step, state, chunk, _OUTPUTS)


def choose(
    rule: Rule, selection: Selection, state: DecodeState, base_BV: jax.Array, rl_BV: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One step's token from both models' logits [B, V], and what the step reports about it."""
    sampled_BV, other_BV = (base_BV, rl_BV) if rule.sample_from == "base" else (rl_BV, base_BV)
    temperature_B = state.sampling.temperature
    y_B, log_z_B = draw(sampled_BV, step_keys(state, DRAW), active_sampling(state))
    # At temperature 1 the draw has already summed this; elsewhere it takes another pass.
    sampled_z_B = jax.lax.cond(
        jnp.all((temperature_B == 1) | (temperature_B == 0)), lambda: log_z_B, lambda: log_normaliser(sampled_BV)
    )
    sampled_logp_BV = sampled_BV - sampled_z_B[:, None]
    other_logp_BV = other_BV - log_normaliser(other_BV)[:, None]
    pair = _base_and_rl(rule, sampled_logp_BV, other_logp_BV)
    fired_B = state.active_B & fires(
        rule.criterion,
        *pair,
        y_B,
        selection.tau,
        step_keys(state, CRITERION) if rule.criterion == "random" else None,
        top_logprobs=rule.top_logprobs,
        sample_from=rule.sample_from,
    )

    def redraw() -> jax.Array:
        candidates = pair
        if rule.top_logprobs is not None:
            cut = published_top_logprobs(sampled_logp_BV, other_logp_BV, rule.top_logprobs, y_B)
            candidates = _base_and_rl(rule, *cut)
        extra_BV = extrapolate(*candidates, selection.gamma)
        z_B, _ = draw(extra_BV, step_keys(state, REDRAW), active_sampling(state, fired_B))
        return jnp.where(fired_B, z_B, y_B)

    token_B = jax.lax.cond(jnp.any(fired_B), redraw, lambda: y_B)
    base_y_B, rl_y_B = (jnp.take_along_axis(logp_BV, y_B[:, None], axis=-1)[:, 0] for logp_BV in pair)
    return token_B, {
        "logp": token_logprob(sampled_BV, token_B, temperature_B, log_z_B),
        "fired": fired_B,
        "delta_logp": delta_logp(base_y_B, rl_y_B),
        "sampled_token": y_B,
    }


def _base_and_rl(rule: Rule, sampled: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (sampled, other) if rule.sample_from == "base" else (other, sampled)


def _check_rule(criterion: str, sample_from: str, top_logprobs: int | None, tau: Numbers | None) -> Rule:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r}: expected one of {', '.join(CRITERIA)}")
    if sample_from not in ("base", "rl"):
        raise ValueError(f"sample_from={sample_from!r}: expected 'base' or 'rl'")
    if tau is None and criterion not in ("none", "all"):
        raise ValueError(f"tau=None: criterion {criterion!r} needs a threshold, a number or one for each row")
    if top_logprobs is not None:
        if isinstance(top_logprobs, bool) or not isinstance(top_logprobs, (int, np.integer)) or top_logprobs < 1:
            raise ValueError(f"top_logprobs={top_logprobs!r}: expected None or an integer of at least 1")
        if criterion == "js_true":
            raise ValueError("criterion='js_true' with top_logprobs: the published rule has no such form")
        top_logprobs = int(top_logprobs)
    return Rule(criterion, sample_from, top_logprobs)
