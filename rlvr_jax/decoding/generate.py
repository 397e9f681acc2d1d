"""Decoding with one model: prompts prefilled once, then compiled chunks of steps with the state donated.

`decode` is the host function that the trainer, the batch decoder and `rlvr_jax.generation` call. It compiles one
program for the prefill and one a cache size for the chunks; parameters, seeds and sampling settings are arguments of
those, so another value compiles nothing. Between chunks the host reads what was drawn, once, and grows the cache by
powers of two.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlvr_jax.decoding.batch import PREFILL_PIECE, Batch, Ids, Numbers, Prompts, capacity, make_batch
from rlvr_jax.decoding.sampling import Sampling, draw, token_logprob
from rlvr_jax.sharding import constrain
from rlvr_jax.typing import Array, Bool, Float, Int

CHUNK = 32
DRAW, REDRAW, CRITERION = range(3)  # what a random number is for: the role in `step_keys`

Params = Any
Cache = Any
OnChunk = Callable[[int, int], None]


def _as_they_are(params: Params) -> Params:
    return params


class LanguageModel(NamedTuple):
    """A model as pure functions: all that the decoders know of it. Hashable, a static argument of the programs.

    The index of a token in the cache is its position, row by row, and a query at position p sees indices up to p, so
    no mask is passed: prompts are right-padded, and what padding wrote is overwritten before it is seen.

    Attributes:
      forward: (params, tokens_BT, positions_BT, cache) -> (hidden_BTD, cache).
      logits: (params, hidden [..., D]) -> float32 [..., V].
      init_cache: (batch, length) -> cache for `length` tokens a row.
      grow_cache: (cache, length) -> the same content with room for `length` tokens.
      repeat_cache: (cache, n) -> every row n times, neighbours together.
      prepare: params -> params in the form that is fastest to decode with; on the host, once a decode. Called on its
        own result it changes nothing, so a caller may prepare parameters that many decodes share.
    """

    forward: Callable[..., tuple[jax.Array, Cache]]
    logits: Callable[..., Array]
    init_cache: Callable[[int, int], Cache]
    grow_cache: Callable[[Cache, int], Cache]
    repeat_cache: Callable[[Cache, int], Cache]
    prepare: Callable[[Params], Params] = _as_they_are


class DecodeState(NamedTuple):
    """All that a decode carries from step to step and from chunk to chunk; donated to each chunk. B rows.

    A row that has drawn a stop token or reached its limit is frozen: it is still computed, and nothing of it changes.

    Attributes:
      last_B: int32, the newest token, not yet in the cache; at first the prompt's last token.
      position_B: int32, the position of `last`, which is the cache index it will be written to.
      length_B: int32, response tokens drawn so far.
      limit_B: int32, the most response tokens to draw.
      finished_B: bool, a stop token was drawn.
      key_B2: uint32, the row's random key (`row_keys`). A draw folds in `length` and what the draw is for.
      sampling: temperature, top-p and top-k of each row.
      caches: one cache a model.
    """

    last_B: jax.Array
    position_B: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    finished_B: jax.Array
    key_B2: jax.Array
    sampling: Sampling
    caches: tuple[Cache, ...]

    @property
    def active_B(self) -> jax.Array:
        """Rows that still draw."""
        return ~self.finished_B & (self.length_B < self.limit_B)


class Generation(NamedTuple):
    """Responses as numpy arrays. R rows, problem-major: row = prompt * n + sample.

    Attributes:
      tokens: int32 [R, max_new_tokens], the stop token included, 0 after it.
      logp: float32, the emitted token's log-probability under softmax(logits / temperature) of the sampled model,
        before top-k and top-p (temperature 0: at temperature 1); 0 beyond the length.
      lengths: int32 [R], in tokens, the stop token included.
      finished: bool [R], a stop token was drawn (otherwise the response was cut at max_new_tokens).
    """

    tokens: Int[np.ndarray, "R T"]
    logp: Float[np.ndarray, "R T"]
    lengths: Int[np.ndarray, " R"]
    finished: Bool[np.ndarray, " R"]


def decode(
    model: LanguageModel,
    params: Params,
    prompts: Prompts,
    *,
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
) -> Generation:
    """Draws `n` responses to each prompt from one model.

    A row depends on its prompt, seed, problem id, sample id and settings alone: not on the other rows, the padding, the
    chunk size or (up to the order of float sums) the mesh.

    Args:
      model: the functions of the model.
      params: its parameters.
      prompts: lists of token ids, of any lengths.
      max_new_tokens: the most tokens of a response.
      n: responses a prompt. The prompt is prefilled once.
      temperature, top_p, top_k: numbers, or one for each of the prompts * n rows; see `sampling.filtered_logprobs`.
      seed: from 0 to 2**64 - 1.
      problem_ids: [prompts], identify a prompt whatever batch it is decoded in; by default 0, 1, ...
      sample_ids: [n] or [prompts, n]; by default 0, 1, ...
      stop_tokens: ids that end a response.
      prompt_length: pads the prompts to this many tokens, for programs that must not differ from batch to batch; by
        default to a bucket above the longest.
      chunk: steps between two looks of the host.
      mesh: rows are split over its data and fsdp axes; None uses the ambient mesh, if there is one.
      on_chunk: called after each chunk with the rows that are done and the tokens drawn so far, over all rows.

    Returns:
      The responses.

    Raises:
      ValueError: naming the argument, its value and what was expected; nothing was compiled by then.
    """
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
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        params = model.prepare(params)
        advance = partial(_advance, model, chunk, params, batch.stop_S)
        drawn, lengths, finished = drive((model,), (params,), batch, advance, chunk, on_chunk)
    return Generation(drawn["tokens"], drawn["logp"], lengths, finished)


def row_keys(seed_2: Array, problem_B: Array, sample_B: Array) -> jax.Array:
    """uint32 [B, 2]: the key of each row, key(seed) with the problem and then the sample folded in."""
    key = jax.random.wrap_key_data(jnp.asarray(seed_2), impl="threefry2x32")

    def row_key(problem: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, problem), sample))

    return jax.vmap(row_key)(jnp.asarray(problem_B), jnp.asarray(sample_B))


def step_keys(state: DecodeState, role: int) -> jax.Array:
    """Typed keys [B] of this step: the row's key with 4 * (place in the response) + role folded in."""
    keys_B = jax.random.wrap_key_data(state.key_B2, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys_B, 4 * state.length_B + role)


def next_logits(model: LanguageModel, params: Params, state: DecodeState, index: int) -> tuple[jax.Array, Cache]:
    """Feeds each row's newest token to model number `index`: float32 logits [B, V] and the model's new cache."""
    hidden_BTD, cache = model.forward(params, state.last_B[:, None], state.position_B[:, None], state.caches[index])
    return jnp.asarray(model.logits(params, hidden_BTD[:, 0])), cache


def active_sampling(state: DecodeState, rows_B: jax.Array | None = None) -> Sampling:
    """The settings, without the search for a nucleus where nothing needs it: in frozen rows, or outside `rows_B`."""
    needed_B = state.active_B if rows_B is None else rows_B
    return state.sampling._replace(
        top_p=jnp.where(needed_B, state.sampling.top_p, 1.0), top_k=jnp.where(needed_B, state.sampling.top_k, 0)
    )


def commit(
    state: DecodeState, token_B: jax.Array, caches: tuple[Cache, ...], stop_S: Array, out: dict[str, jax.Array]
) -> tuple[DecodeState, dict[str, jax.Array]]:
    """Ends a step: the state after `token_B`, and what the step reports, 0 in frozen rows."""
    active_B = state.active_B
    stopped_B = jnp.any(token_B[:, None] == stop_S, axis=-1)
    out = {"tokens": token_B} | out
    after = state._replace(
        last_B=jnp.where(active_B, token_B, state.last_B),
        position_B=state.position_B + active_B,
        length_B=state.length_B + active_B,
        finished_B=state.finished_B | (active_B & stopped_B),
        caches=caches,
    )
    return after, {name: jnp.where(active_B, value, jnp.zeros_like(value)) for name, value in out.items()}


def run_chunk(
    step: Callable[[DecodeState], tuple[DecodeState, dict[str, jax.Array]]],
    state: DecodeState,
    chunk: int,
    outputs: dict[str, type],
) -> tuple[DecodeState, dict[str, jax.Array]]:
    """Up to `chunk` steps in one compiled loop, fewer when every row is done.

    Args:
      step: state -> (state, outputs by name, each [B]).
      state: where to begin.
      chunk: the most steps.
      outputs: the dtype of each of the step's outputs.

    Returns:
      The state, and what the host reads: each of the step's outputs as [chunk, B], and `lengths` and `finished` [B].
    """
    buffers = {name: jnp.zeros((chunk, *state.last_B.shape), dtype) for name, dtype in outputs.items()}

    def body(carry: tuple) -> tuple:
        index, state, buffers = carry
        state, out = step(state)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        return index + 1, state, {name: write(buffer, out[name]) for name, buffer in buffers.items()}

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[0] < chunk) & jnp.any(carry[1].active_B)

    _, state, buffers = jax.lax.while_loop(unfinished, body, (0, state, buffers))
    report = buffers | {"lengths": state.length_B, "finished": state.finished_B}
    # Replicated, so that every process of a cluster can read all of it.
    return state, {name: jnp.asarray(constrain(value, *[None] * value.ndim)) for name, value in report.items()}


@partial(jax.jit, static_argnums=(0, 1), donate_argnames=("state",))
def _advance(model: LanguageModel, chunk: int, params: Params, stop_S: Array, state: DecodeState) -> tuple:
    def step(state: DecodeState) -> tuple[DecodeState, dict[str, jax.Array]]:
        logits_BV, cache = next_logits(model, params, state, 0)
        token_B, log_z_B = draw(logits_BV, step_keys(state, DRAW), active_sampling(state))
        logp_B = token_logprob(logits_BV, token_B, state.sampling.temperature, log_z_B)
        return commit(state, token_B, (cache,), stop_S, {"logp": logp_B})

    return run_chunk(step, state, chunk, {"tokens": jnp.int32, "logp": jnp.float32})


def drive(
    models: tuple[LanguageModel, ...],
    params: tuple[Params, ...],
    batch: Batch,
    advance: Callable[[DecodeState], tuple[DecodeState, dict[str, jax.Array]]],
    chunk: int,
    on_chunk: OnChunk | None,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The host loop: prefill, then chunks until every row is done, one look at the device after each.

    Returns:
      The steps' outputs as [R, max_new_tokens], the lengths and the finished flags.
    """
    rows, max_new = len(batch.limit_R), int(batch.limit_R.max())
    prefix = batch.prefix_BP.shape[1]
    full = prefix + -(-max_new // chunk) * chunk
    size = capacity(prefix + chunk, full)
    state = _start(models, size, params, batch)
    drawn: dict[str, np.ndarray] = {}
    for begin in range(0, max_new, chunk):
        if prefix + begin + chunk > size:
            size = capacity(prefix + begin + chunk, full)
            state = state._replace(caches=_grow(models, size, state.caches))
        state, report = advance(state)
        report = jax.device_get(report)
        lengths, finished = report.pop("lengths"), report.pop("finished")
        width = min(chunk, max_new - begin)
        for name, value in report.items():
            drawn.setdefault(name, np.zeros((rows, max_new), value.dtype))[:, begin : begin + width] = value[:width].T
        done_R = finished | (lengths >= batch.limit_R)
        if on_chunk is not None:
            on_chunk(int(done_R.sum()), int(lengths.sum()))
        if done_R.all():
            break
    return drawn, lengths, finished


@partial(jax.jit, static_argnums=(0, 1))
def _start(models: tuple[LanguageModel, ...], size: int, params: tuple[Params, ...], batch: Batch) -> DecodeState:
    """The state before the first step: every prompt but its last token in the caches, its rows repeated n times."""
    n = batch.n
    state = DecodeState(
        last_B=jnp.repeat(batch.last_B, n),
        position_B=jnp.repeat(batch.length_B - 1, n),
        length_B=jnp.zeros_like(batch.limit_R),
        limit_B=jnp.asarray(batch.limit_R),
        finished_B=jnp.zeros(batch.limit_R.shape, bool),
        key_B2=row_keys(batch.seed_2, batch.problem_R, batch.sample_R),
        sampling=Sampling(*map(jnp.asarray, (batch.temperature_R, batch.top_p_R, batch.top_k_R))),
        caches=(),
    )
    state = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), state)
    caches = (_prefill(model, p, batch.prefix_BP) for model, p in zip(models, params, strict=True))
    caches = (model.repeat_cache(cache, n) if n > 1 else cache for model, cache in zip(models, caches, strict=True))
    return state._replace(caches=tuple(m.grow_cache(cache, size) for m, cache in zip(models, caches, strict=True)))


def _prefill(model: LanguageModel, params: Params, tokens_BP: Array) -> Cache:
    rows, length = tokens_BP.shape
    cache = model.init_cache(rows, length)

    def write(cache: Cache, begin: jax.Array | int, tokens_BT: Array) -> Cache:
        positions_T = begin + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        return model.forward(params, tokens_BT, jnp.broadcast_to(positions_T, tokens_BT.shape), cache)[1]

    if length <= PREFILL_PIECE:
        return write(cache, 0, constrain(tokens_BP, "batch", None))
    pieces_IBT = jnp.swapaxes(jnp.reshape(tokens_BP, (rows, -1, PREFILL_PIECE)), 0, 1)
    pieces_IBT = constrain(pieces_IBT, None, "batch", None)
    begins_I = jnp.arange(0, length, PREFILL_PIECE, dtype=jnp.int32)
    return jax.lax.scan(lambda cache, x: (write(cache, *x), None), cache, (begins_I, pieces_IBT))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _grow(models: tuple[LanguageModel, ...], size: int, caches: tuple[Cache, ...]) -> tuple[Cache, ...]:
    return tuple(model.grow_cache(cache, size) for model, cache in zip(models, caches, strict=True))
