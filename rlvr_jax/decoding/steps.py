"""The compiled part of decoding: blocks of drafted tokens, scored by the second model where there is one.

With one model a block is K steps. With two, the *sampled* model drafts K tokens; the other model scores all of them in
one pass, so its weights and its cache are read once a block; at the first position where the criterion fires the token
is drawn again from the extrapolated distribution, what was drafted after it is dropped, and both caches roll back,
which only means that the next position is an earlier one. Every random number is keyed by row, place and role, so the
tokens are those of K = 1, whatever K.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlvr_jax.criteria import Named, criterion_of, fires, fires_at
from rlvr_jax.decoding.sampling import draw, log_normaliser, token_logprob
from rlvr_jax.decoding.state import (
    CRITERION,
    DRAW,
    NOWHERE,
    REDRAW,
    Cache,
    DecodeState,
    LanguageModel,
    Params,
    sampling_of,
    step_keys,
)
from rlvr_jax.direction import delta_logp, extrapolate
from rlvr_jax.sharding.rules import constrain
from rlvr_jax.top_logprobs import published_top_logprobs
from rlvr_jax.typing import Array

Report = dict[str, jax.Array]


class Rule(NamedTuple):
    """What is compiled into the program of a selective decode. Hashable.

    Attributes:
      criterion: one of `criteria.CRITERIA`, or the user's own.
      sample_from: "base" or "rl", the model that y is drawn from.
      top_logprobs: None for whole distributions; k for the published code's rule, which sees each model's k best.
    """

    criterion: Named
    sample_from: str
    top_logprobs: int | None

    @property
    def sampled(self) -> int:
        """Index of the sampled model in (base, rl)."""
        return 0 if self.sample_from == "base" else 1

    def by_role(self, sampled: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sampled, other) as (base, rl)."""
        return (sampled, other) if self.sample_from == "base" else (other, sampled)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames=("state",))
def advance(
    models: tuple[LanguageModel, ...],
    rule: Rule | None,
    block: int,
    blocks: int,
    params: tuple[Params, ...],
    stop_S: Array,
    leave_at: Array,
    state: DecodeState,
) -> tuple[DecodeState, Report]:
    """Up to `blocks` blocks of `block` tokens; fewer as soon as `leave_at` rows are done that were not when it began.

    Args:
      models, params: one model, or (base, rl).
      rule: None for one model.
      block, blocks: sizes, static.
      stop_S: int32 stop tokens; entries of -1 are none.
      leave_at: number of newly finished rows that the host wants to hear of.
      state: where to begin; donated.

    Returns:
      The state, and what the host reads: for each block its draft `steps` [blocks], the number of tokens each row
      `emitted` [blocks, B], the steps it was `drafting` in [blocks, B] (what was dropped, and one that gave nothing,
      included), and [blocks, B, block] arrays of which each row's first `emitted` entries count: `tokens`, `logp`, and
      for two models `fired`, `delta_logp`, `sampled_token`. `finished`, `invalid` [B] are the state's.
    """
    rows = state.last_B.shape[0]
    outputs = {"tokens": jnp.int32, "logp": jnp.float32}
    if rule is not None:
        outputs |= {"fired": jnp.bool_, "delta_logp": jnp.float32, "sampled_token": jnp.int32}
    buffers = {name: jnp.zeros((blocks, rows, block), dtype) for name, dtype in outputs.items()}
    buffers |= {name: jnp.zeros((blocks, rows), jnp.int32) for name in ("emitted", "drafting")}
    buffers |= {"steps": jnp.zeros(blocks, jnp.int32)}
    active_at_start = jnp.sum(state.active_B)

    def leave(active_B: jax.Array) -> jax.Array:
        active = jnp.sum(active_B)
        return (active == 0) | (active_at_start - active >= leave_at)

    def body(carry: tuple) -> tuple:
        index, state, buffers = carry
        if rule is None:
            state, out = _draft_alone(models[0], params[0], block, stop_S, leave, state)
        else:
            state, out = _block(models, rule, params, block, stop_S, state)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return index + 1, state, {name: write(buffer, out[name]) for name, buffer in buffers.items()}

    carry = (0, state, buffers)
    if blocks == 1:
        carry = body(carry)
    else:
        carry = jax.lax.while_loop(lambda carry: (carry[0] < blocks) & ~leave(carry[1].active_B), body, carry)
    _, state, buffers = carry
    report = buffers | {"finished": state.finished_B, "invalid": state.invalid_B}
    # Replicated, so that every process of a cluster can read all of it.
    return state, {name: jnp.asarray(constrain(value, *[None] * value.ndim)) for name, value in report.items()}


class _Drafts(NamedTuple):
    """Tokens drafted by one model, K a row at most.

    Attributes:
      count_B: tokens drafted; the others of a row's K entries mean nothing.
      steps: forward passes made.
      last_B: the newest token.
      live_B: whether the row could go on.
      invalid_B: whether it ended because the logits of the next token were not finite.
      cache: the model's cache.
      token_BK, logp_BK: the tokens, and their log-probabilities at the row's temperature.
      kept: for a second model: the logits [B, K, V], their normalisers at temperature 1 and at the row's, and the
        token's log-probability at temperature 1, [B, K].
    """

    count_B: jax.Array
    steps: jax.Array
    last_B: jax.Array
    live_B: jax.Array
    invalid_B: jax.Array
    cache: Cache
    token_BK: jax.Array
    logp_BK: jax.Array
    kept: tuple[jax.Array, ...]

    @property
    def report(self) -> Report:
        """What the host counts steps by."""
        return {"steps": self.steps, "drafting": self.count_B + self.invalid_B}


def _draft(
    model: LanguageModel,
    params: Params,
    cache: Cache,
    block: int,
    stop_S: Array,
    state: DecodeState,
    leave: Callable[[jax.Array], jax.Array] | None,
) -> _Drafts:
    """Draws up to `block` tokens a row, until no row can go on or `leave(live_B)`; keeps logits if `leave` is None."""
    rows = state.last_B.shape[0]
    keep = leave is None
    temperature_B = state.sampling.temperature
    plain = jnp.all((temperature_B == 1) | (temperature_B == 0))
    shape = (rows, block)
    kept = ()
    if keep:
        vocabulary = jax.eval_shape(
            lambda: model.logits(params, model.forward(params, state.last_B[:, None], state.last_B[:, None], cache)[0])
        ).shape[-1]
        logits_BKV = jnp.asarray(constrain(jnp.zeros((*shape, vocabulary), jnp.float32), "batch", None, "vocab"))
        kept = (logits_BKV, *(jnp.zeros(shape, jnp.float32) for _ in range(3)))
    drafts = _Drafts(
        count_B=jnp.zeros(rows, jnp.int32),
        steps=jnp.int32(0),
        last_B=state.last_B,
        live_B=state.active_B,
        invalid_B=jnp.zeros(rows, bool),
        cache=cache,
        token_BK=jnp.zeros(shape, jnp.int32),
        logp_BK=jnp.zeros(shape, jnp.float32),
        kept=kept,
    )

    def step(drafts: _Drafts) -> _Drafts:
        live_B, place_B = drafts.live_B, state.length_B + drafts.count_B
        position_B = jnp.where(live_B, state.position_B + drafts.count_B, NOWHERE)
        hidden_BTD, cache = model.forward(params, drafts.last_B[:, None], position_B[:, None], drafts.cache)
        logits_BV = jnp.asarray(model.logits(params, hidden_BTD[:, 0]))
        token_B, log_z_B = draw(logits_BV, step_keys(state.key_B2, place_B, DRAW), sampling_of(state, live_B))
        out = [token_B, token_logprob(logits_BV, token_B, temperature_B, log_z_B)]
        if keep:
            # At temperature 1 the draw has already summed this; elsewhere it takes another pass.
            plain_z_B = jax.lax.cond(plain, lambda: log_z_B, lambda: log_normaliser(logits_BV))
            plain_B = token_logprob(logits_BV, token_B, jnp.ones_like(log_z_B), plain_z_B)
            out += [logits_BV, plain_z_B, log_z_B, plain_B]
        write = partial(jax.lax.dynamic_update_index_in_dim, index=drafts.steps, axis=1)
        buffers = [write(x, y) for x, y in zip((drafts.token_BK, drafts.logp_BK, *drafts.kept), out, strict=True)]
        valid_B = live_B & jnp.isfinite(log_z_B)
        count_B = drafts.count_B + valid_B
        stopped_B = jnp.any(token_B[:, None] == stop_S, axis=-1)
        return _Drafts(
            count_B=count_B,
            steps=drafts.steps + 1,
            last_B=jnp.where(valid_B, token_B, drafts.last_B),
            live_B=valid_B & ~stopped_B & (state.length_B + count_B < state.limit_B),
            invalid_B=drafts.invalid_B | (live_B & ~valid_B),
            cache=cache,
            token_BK=buffers[0],
            logp_BK=buffers[1],
            kept=tuple(buffers[2:]),
        )

    def go_on(drafts: _Drafts) -> jax.Array:
        enough = ~jnp.any(drafts.live_B) if leave is None else leave(drafts.live_B)
        return (drafts.steps < block) & ~enough

    return jax.lax.while_loop(go_on, step, drafts)


def _draft_alone(
    model: LanguageModel, params: Params, block: int, stop_S: Array, leave: Callable, state: DecodeState
) -> tuple[DecodeState, Report]:
    """`block` steps of one model."""
    drafts = _draft(model, params, state.caches[0], block, stop_S, state, leave)
    out = {"tokens": drafts.token_BK, "logp": drafts.logp_BK, "emitted": drafts.count_B, **drafts.report}
    after = _after(state, drafts.count_B, drafts.last_B, stop_S, drafts.invalid_B, (drafts.cache,))
    return after, out


def _after(
    state: DecodeState,
    emitted_B: jax.Array,
    last_B: jax.Array,
    stop_S: Array,
    invalid_B: jax.Array,
    caches: tuple[Cache, ...],
) -> DecodeState:
    """The state once every row has `emitted_B` more tokens, the newest of them `last_B`."""
    stopped_B = (emitted_B > 0) & jnp.any(last_B[:, None] == stop_S, axis=-1)
    return state._replace(
        last_B=last_B,
        position_B=state.position_B + emitted_B,
        length_B=state.length_B + emitted_B,
        finished_B=state.finished_B | stopped_B,
        invalid_B=state.invalid_B | invalid_B,
        caches=caches,
    )


def _block(
    models: tuple[LanguageModel, ...],
    rule: Rule,
    params: tuple[Params, ...],
    block: int,
    stop_S: Array,
    state: DecodeState,
) -> tuple[DecodeState, Report]:
    """Drafts, scores, redraws at the first position that fires and drops what was drafted after it."""
    mine, other = rule.sampled, 1 - rule.sampled
    drafts = _draft(models[mine], params[mine], state.caches[mine], block, stop_S, state, None)
    logits_BKV, plain_z_BK, log_z_BK, mine_BK = drafts.kept
    index_K = jnp.arange(block, dtype=jnp.int32)

    fed_BK = jnp.concatenate([state.last_B[:, None], drafts.token_BK[:, :-1]], axis=1)
    drafted_BK = index_K < drafts.count_B[:, None]
    position_BK = jnp.where(drafted_BK, state.position_B[:, None] + index_K, NOWHERE)
    hidden_BKD, other_cache = models[other].forward(params[other], fed_BK, position_BK, state.caches[other])
    other_BKV = jnp.asarray(models[other].logits(params[other], hidden_BKD))
    other_z_BK = log_normaliser(_flat(other_BKV)).reshape(drafted_BK.shape)
    other_BK = jnp.take_along_axis(other_BKV, drafts.token_BK[:, :, None], axis=-1)[:, :, 0] - other_z_BK
    delta_BK = delta_logp(*rule.by_role(mine_BK, other_BK))

    fired_BK = _fires(rule, state, drafts, (logits_BKV, plain_z_BK), (other_BKV, other_z_BK), delta_BK)
    valid_BK = drafted_BK & jnp.isfinite(other_z_BK)
    # Tokens up to the first that could not be scored.
    valid_B = jnp.sum(jnp.cumprod(valid_BK, axis=1), axis=1, dtype=jnp.int32)
    first_B = _first(fired_BK & (index_K < valid_B[:, None]))
    fired_B = first_B < block
    emitted_B = jnp.where(fired_B, first_B + 1, valid_B)
    at_B = jnp.minimum(first_B, block - 1)

    def redraw() -> tuple[jax.Array, jax.Array]:
        mine_BV, other_BV = (jnp.take_along_axis(x, at_B[:, None, None], axis=1)[:, 0] for x in (logits_BKV, other_BKV))
        plain_z_B, other_z_B, log_z_B = (_at(x, at_B) for x in (plain_z_BK, other_z_BK, log_z_BK))
        pair = mine_BV - plain_z_B[:, None], other_BV - other_z_B[:, None]
        if rule.top_logprobs is not None:
            pair = published_top_logprobs(*pair, rule.top_logprobs, _at(drafts.token_BK, at_B))
        extra_BV = extrapolate(*rule.by_role(*pair), state.selection.gamma)
        keys_B = step_keys(state.key_B2, state.length_B + at_B, REDRAW)
        token_B, _ = draw(extra_BV, keys_B, sampling_of(state, fired_B))
        return token_B, token_logprob(mine_BV, token_B, state.sampling.temperature, log_z_B)

    new_B, new_logp_B = jax.lax.cond(
        jnp.any(fired_B), redraw, lambda: (_at(drafts.token_BK, at_B), _at(drafts.logp_BK, at_B))
    )
    here_BK = (index_K == first_B[:, None]) & fired_B[:, None]
    tokens_BK = jnp.where(here_BK, new_B[:, None], drafts.token_BK)
    last_B = jnp.where(emitted_B > 0, _at(tokens_BK, jnp.maximum(emitted_B - 1, 0)), state.last_B)
    invalid_B = ~fired_B & ((valid_B < drafts.count_B) | drafts.invalid_B)
    caches = (drafts.cache, other_cache) if mine == 0 else (other_cache, drafts.cache)
    return _after(state, emitted_B, last_B, stop_S, invalid_B, caches), {
        "tokens": tokens_BK,
        "logp": jnp.where(here_BK, new_logp_B[:, None], drafts.logp_BK),
        "fired": here_BK,
        "delta_logp": delta_BK,
        "sampled_token": drafts.token_BK,
        "emitted": emitted_B,
        **drafts.report,
    }


def _fires(
    rule: Rule, state: DecodeState, drafts: _Drafts, mine: tuple, other: tuple, delta_BK: jax.Array
) -> jax.Array:
    """bool [B, K]: where the criterion selects the drafted token."""
    rows, block = delta_BK.shape
    how = criterion_of(rule.criterion)
    if how.of_delta is not None and rule.top_logprobs is None:
        return fires_at(how, how.of_delta(delta_BK), state.selection.tau[:, None])
    token_N = drafts.token_BK.reshape(-1)
    keys_N = None
    if how.by_chance:
        place_N = (state.length_B[:, None] + jnp.arange(block, dtype=jnp.int32)).reshape(-1)
        keys_N = step_keys(jnp.repeat(state.key_B2, block, axis=0), place_N, CRITERION)
    logp_NV = (_flat(logits_BKV) - z_BK.reshape(-1, 1) for logits_BKV, z_BK in (mine, other))
    fired_N = fires(
        rule.criterion,
        *rule.by_role(*logp_NV),
        token_N,
        jnp.repeat(state.selection.tau, block),
        keys_N,
        top_logprobs=rule.top_logprobs,
        sample_from=rule.sample_from,
    )
    return fired_N.reshape(rows, block)


def _flat(x_BKV: jax.Array) -> jax.Array:
    return x_BKV.reshape(-1, x_BKV.shape[-1])


def _first(flags_BK: jax.Array) -> jax.Array:
    """The index of each row's first true entry, K where there is none."""
    block = flags_BK.shape[1]
    return jnp.min(jnp.where(flags_BK, jnp.arange(block, dtype=jnp.int32), block), axis=1)


def _at(x_BK: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BK, index_B[:, None], axis=1)[:, 0]
