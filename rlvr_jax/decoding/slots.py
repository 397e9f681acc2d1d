"""The compiled programs that fill slots: an empty state, prompts prefilled, rows put into slots."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlvr_jax.decoding.batch import PREFILL_PIECE
from rlvr_jax.decoding.sampling import Sampling
from rlvr_jax.decoding.state import Cache, DecodeState, LanguageModel, Params, Selection, row_keys
from rlvr_jax.sharding.rules import constrain
from rlvr_jax.typing import Array


class SlotRows(NamedTuple):
    """What a row brings into its slot, an entry a slot: see `DecodeState` and `batch.Queue`."""

    last_B: Array
    position_B: Array
    limit_B: Array
    problem_B: Array
    sample_B: Array
    seed_B2: Array
    sampling: Sampling
    selection: Selection


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_slots(models: tuple[LanguageModel, ...], slots: int, size: int) -> DecodeState:
    """A state whose slots hold no rows."""

    def zeros(dtype: Any, *shape: int) -> jax.Array:
        return jnp.zeros((slots, *shape), dtype)

    state = DecodeState(
        last_B=zeros(jnp.int32),
        position_B=zeros(jnp.int32),
        length_B=zeros(jnp.int32),
        limit_B=zeros(jnp.int32),
        finished_B=zeros(bool),
        invalid_B=zeros(bool),
        key_B2=zeros(jnp.uint32, 2),
        sampling=Sampling(zeros(jnp.float32), zeros(jnp.float32), zeros(jnp.int32)),
        selection=Selection(zeros(jnp.float32), zeros(jnp.float32)),
        caches=(),
    )
    state = jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), state)
    return state._replace(caches=tuple(model.init_cache(slots, size) for model in models))


@partial(jax.jit, static_argnums=(0,), donate_argnums=(1,))
def insert_rows(
    models: tuple[LanguageModel, ...],
    state: DecodeState,
    prompts: tuple[Cache, ...],
    source_B: Array,
    rows: SlotRows,
) -> DecodeState:
    """The state with new rows in the slots of `source_B` >= 0, which are rows of the prefilled `prompts`."""
    new_B = jnp.asarray(source_B) >= 0
    new = DecodeState(
        last_B=jnp.asarray(rows.last_B),
        position_B=jnp.asarray(rows.position_B),
        length_B=jnp.zeros_like(state.length_B),
        limit_B=jnp.asarray(rows.limit_B),
        finished_B=jnp.zeros_like(state.finished_B),
        invalid_B=jnp.zeros_like(state.invalid_B),
        key_B2=row_keys(rows.seed_B2, rows.problem_B, rows.sample_B),
        sampling=rows.sampling,
        selection=rows.selection,
        caches=(),
    )

    def put(x: jax.Array, y: jax.Array) -> Array:
        return constrain(jnp.where(new_B.reshape(-1, *[1] * (x.ndim - 1)), y, x), "batch", *[None] * (x.ndim - 1))

    caches = [
        m.insert_cache(c, p, jnp.asarray(source_B)) for m, c, p in zip(models, state.caches, prompts, strict=True)
    ]
    return jax.tree.map(put, state._replace(caches=()), new)._replace(caches=tuple(caches))


@partial(jax.jit, static_argnums=(0,))
def prefill_prompts(
    models: tuple[LanguageModel, ...], params: tuple[Params, ...], tokens_PL: Array, length_P: Array
) -> tuple[tuple[Cache, ...], jax.Array]:
    """Caches of right-padded prompts, and bool [P], whether every number of a prompt's hidden states is finite."""
    rows, width = tokens_PL.shape
    piece = min(width, PREFILL_PIECE)
    pieces = -(-jnp.max(length_P, initial=0) // piece)  # beyond the longest prompt there is nothing to do
    tokens_PL = constrain(tokens_PL, "batch", None)
    caches, valid_P = [], jnp.ones(rows, bool)
    for model, p in zip(models, params, strict=True):

        def write(index: jax.Array, carry: tuple, model: LanguageModel = model, p: Params = p) -> tuple:
            cache, valid_P = carry
            position_T = index * piece + jnp.arange(piece, dtype=jnp.int32)
            tokens_PT = jax.lax.dynamic_slice_in_dim(tokens_PL, index * piece, piece, axis=1)
            position_PT = jnp.broadcast_to(position_T, tokens_PT.shape)
            hidden_PTD, cache = model.forward(p, tokens_PT, position_PT, cache)
            finite_PT = jnp.all(jnp.isfinite(hidden_PTD), axis=-1) | (position_PT >= length_P[:, None])
            return cache, valid_P & jnp.all(finite_PT, axis=1)

        cache, valid_P = jax.lax.fori_loop(0, pieces, write, (model.init_cache(rows, width), valid_P))
        caches.append(cache)
    # Replicated, so that every process of a cluster can read all of it.
    return tuple(caches), jnp.asarray(constrain(valid_P, None))
