"""Log-probabilities of given tokens under logits / temperature, with and without the [B, T, V] array.

Alignment, here and everywhere: `logits_BTV[:, t]` (or `hidden_BTD[:, t]`) predicts `targets_BT[:, t]`, so the caller
shifts once and `logp_BT[:, t]` scores token t given the tokens before it.

Targets lie in [0, V). A target of -100, Hugging Face's mark of a token that does not count, gives exactly 0 and lets no
gradient through, whatever the logits are. Other targets raise where they can be seen, which means outside jit; where
they are traced they give NaN. On padding that a mask leaves out, any of these may stand.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from rlvr_jax.checks import positive, require, seen
from rlvr_jax.direction import token_ids, token_values, widen
from rlvr_jax.sharding.rules import (
    DEFAULT_RULES,
    ambient_mesh,
    constrain,
    dividing_axes,
    fitting_axes,
    sum_into,
    ways,
    whole_tiles,
)
from rlvr_jax.typing import Array, Float, Integer

IGNORED = -100  # a target that does not count, as in Hugging Face's losses
_MASKED = -1e30  # the score of what pads a vocabulary: finite, its weight is 0


def token_logprobs(
    logits_BTV: Float[Array, "B T V"], targets_BT: Integer[Array, "B T"], *, temperature: ArrayLike = 1.0
) -> Float[jax.Array, "B T"]:
    """log softmax(logits / temperature)[target] from logits, in at least float32.

    Temperature: a number > 0, may be traced. Targets of -100 give 0; see the module for others outside [0, V).
    """
    require("temperature", temperature, "a number > 0", positive)
    if np.shape(logits_BTV)[:-1] != np.shape(targets_BT):
        raise ValueError(
            f"targets_BT has shape {np.shape(targets_BT)}: expected {np.shape(logits_BTV)[:-1]}, as logits_BTV"
        )
    targets = _Targets(targets_BT, logits_BTV.shape[-1])
    logits_BTV = targets.counted(widen(logits_BTV))
    scores_BTV = logits_BTV / temperature
    # The largest score goes first, so that large scores near one another keep their digits.
    scores_BTV -= jax.lax.stop_gradient(jnp.max(scores_BTV, axis=-1, keepdims=True))
    chosen_BT = token_values(scores_BTV, targets.ids_BT)
    return targets.result(chosen_BT - jnp.log(jnp.sum(jnp.exp(scores_BTV), axis=-1)))


def chunked_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    unembed_DV: Float[Array, "D V"],
    targets_BT: Integer[Array, "B T"],
    *,
    temperature: ArrayLike = 1.0,
    chunk: int = 1024,
    entropy: bool = False,
) -> Float[jax.Array, "B T"] | tuple[Float[jax.Array, "B T"], Float[jax.Array, "B T"]]:
    """`token_logprobs(hidden @ unembed, ...)` holding the logits of at most `chunk` tokens at a time; entropy too.

    The backward pass computes each chunk's logits again (those of a single chunk are kept), so neither direction stores
    a [B, T, V] array of more than `chunk` tokens (public issues trl #3456, verl #1100). Matrix products run in the
    dtype of `hidden_BTD` with float32 results, and the gradient of `unembed_DV` is summed over chunks in float32.
    Gradients flow to hidden, unembed and temperature, from both outputs; reverse mode only. `entropy=True` returns
    (logp_BT, entropy_BT), the entropy in nats of the tempered distribution. A target of -100 gives 0 in both, and
    another one outside [0, V) NaN in both if it does not raise.

    `chunk` counts tokens over the whole (global) batch. A chunk is a slice of time that takes every row, so a batch
    sharded over devices stays sharded inside each chunk. Under an ambient mesh each device scores its own rows against
    its part of the vocabulary: the unembedding is gathered once and its gradient summed over devices once, not in every
    chunk, as the compiler would do it by itself. Inside a `jax.shard_map` it scores the rows it is given, with
    `unembed_DV` made varying first (`jax.lax.pcast`).
    """
    require("temperature", temperature, "a number > 0", positive)
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1 token")
    hidden_BTD, unembed_DV = jnp.asarray(hidden_BTD), jnp.asarray(unembed_DV)
    if hidden_BTD.shape[:2] != targets_BT.shape or hidden_BTD.shape[2] != unembed_DV.shape[0]:
        raise ValueError(
            f"shapes hidden_BTD {hidden_BTD.shape}, unembed_DV {unembed_DV.shape}, targets_BT {targets_BT.shape}: "
            "expected [B, T, D], [D, V] and [B, T]"
        )
    targets = _Targets(targets_BT, unembed_DV.shape[1])
    temperature = jnp.asarray(temperature, _accumulator(hidden_BTD))
    options = {"chunk": int(chunk), "entropy": bool(entropy)}
    split = _split(hidden_BTD.shape[0])
    scored = _score(targets.counted(hidden_BTD), unembed_DV, targets.ids_BT, temperature, split=split, **options)
    logp_BT = targets.result(scored[0])
    return (logp_BT, targets.result(scored[1])) if entropy else logp_BT


class _Targets:
    """Targets, and what stands for those that are outside the vocabulary: see the module."""

    def __init__(self, targets_BT: ArrayLike, vocabulary: int):
        known = seen(targets_BT)
        if known is not None:
            wrong = known[((known < 0) | (known >= vocabulary)) & (known != IGNORED)]
            if wrong.size:
                raise ValueError(
                    f"targets_BT has {wrong[0]}: expected token ids from 0 to {vocabulary - 1}, or {IGNORED} where "
                    "nothing counts"
                )
        self.ids_BT = token_ids(targets_BT)
        self.ignored_BT = self.ids_BT == IGNORED
        self.inside_BT = (self.ids_BT >= 0) & (self.ids_BT < vocabulary)

    def counted(self, x_BTD: jax.Array) -> jax.Array:
        """Zeros where nothing counts, so that no NaN gets from there into a gradient."""
        return jnp.where(self.ignored_BT[..., None], 0, x_BTD)

    def result(self, x_BT: jax.Array) -> jax.Array:
        """0 where nothing counts, NaN elsewhere outside; no gradient flows through either."""
        return jnp.where(self.inside_BT, x_BT, jnp.where(self.ignored_BT, 0.0, jnp.nan))


class _Split(NamedTuple):
    """How a mesh takes the work apart: mesh axes of the rows, of the vocabulary, and their sizes."""

    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    row_ways: int = 1
    vocab_ways: int = 1


def _split(rows: int) -> _Split:
    mesh = ambient_mesh()
    if mesh is None:
        return _Split()
    of_rows = fitting_axes(mesh, "batch", rows)
    of_vocab = tuple(axis for axis in DEFAULT_RULES.axes("vocab") if mesh.shape.get(axis, 1) > 1)
    return _Split(of_rows, of_vocab, ways(of_rows), ways(of_vocab))


@functools.partial(jax.jit, static_argnames=("chunk", "entropy", "split"))
def _score(hidden_BTD, unembed_DV, targets_BT, temperature, *, chunk: int, entropy: bool, split: _Split) -> tuple:
    if targets_BT.size == 0:
        empty = jnp.zeros(targets_BT.shape, temperature.dtype)
        return (empty, empty) if entropy else (empty,)
    # Under shard_map its gradient varies over devices as the rows do.
    temperature += jnp.zeros_like(hidden_BTD[0, 0, 0], temperature.dtype)
    plan = _Plan(max(1, chunk // split.row_ways), entropy, unembed_DV.shape[1], split)
    return _scored(hidden_BTD, unembed_DV, targets_BT, temperature, plan)


class _Plan(NamedTuple):
    """What does not change under differentiation. `chunk`: tokens a device; `vocabulary`: without padding."""

    chunk: int
    entropy: bool
    vocabulary: int
    split: _Split


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scored(hidden_BTD, unembed_DV, targets_BT, temperature, plan: _Plan) -> tuple[jax.Array, ...]:
    return _forward(hidden_BTD, unembed_DV, targets_BT, temperature, plan)[0]


def _forward(hidden_BTD, unembed_DV, targets_BT, temperature, plan: _Plan):
    # Gathered here, once, and not where the gradient would be gathered too.
    # As [V, D], which is how the TPU compiler lays [D, V] out where D fills its tiles and V does not.
    gathered_VD = constrain(unembed_DV.T.astype(hidden_BTD.dtype), "vocab", "embed")
    if plan.vocabulary % plan.split.vocab_ways:
        gathered_VD = jnp.pad(gathered_VD, ((0, -plan.vocabulary % plan.split.vocab_ways), (0, 0)))
    gathered_VD = jax.lax.optimization_barrier(constrain(gathered_VD, "vocab", None))
    rows, vocab = plan.split.rows or None, plan.split.vocab or None
    of_BT, (B, T) = PartitionSpec(rows, None), targets_BT.shape
    single = _Chunks(B // plan.split.row_ways, T, plan.chunk).chunks == 1
    kept = PartitionSpec(rows, None, vocab) if single else None
    specs = PartitionSpec(rows, None, None), PartitionSpec(vocab, None), of_BT, PartitionSpec()
    outs = ((of_BT,) * (2 if plan.entropy else 1), (of_BT, of_BT), kept)
    local = functools.partial(_forward_local, plan=plan)
    scored, sums, scores = _on_mesh(local, plan, specs, outs)(hidden_BTD, gathered_VD, targets_BT, temperature)
    like = jnp.zeros((0,), unembed_DV.dtype)
    return scored, (like, (hidden_BTD, gathered_VD, targets_BT, temperature, scored, sums, scores))


def _backward(plan: _Plan, saved, cotangents):
    like, saved = saved
    hidden_BTD = saved[0]
    rows, vocab = plan.split.rows or None, plan.split.vocab or None
    of_BT, of_BTD, of_VD = PartitionSpec(rows, None), PartitionSpec(rows, None, None), PartitionSpec(vocab, None)
    many = (of_BT,) * (2 if plan.entropy else 1)
    kept = None if saved[-1] is None else PartitionSpec(rows, None, vocab)
    specs = ((of_BTD, of_VD, of_BT, PartitionSpec(), many, (of_BT, of_BT), kept), many)
    # Summed over devices into parts, where they divide: half the traffic, and what the rest of the backward pass wants.
    over_time = dividing_axes(hidden_BTD.shape[1], "time", plan.split.vocab)
    over_width = dividing_axes(hidden_BTD.shape[2], "embed", plan.split.rows)
    outs = (PartitionSpec(rows, over_time or None, None), PartitionSpec(vocab, over_width or None), PartitionSpec())
    local = functools.partial(_backward_local, plan=plan, over_time=over_time, over_width=over_width)
    d_hidden_BTD, d_unembed_VD, d_temperature = _on_mesh(local, plan, specs, outs)(saved, cotangents)
    return d_hidden_BTD, d_unembed_VD[: plan.vocabulary].T.astype(like.dtype), None, d_temperature


_scored.defvjp(_forward, _backward)


def _on_mesh(local, plan: _Plan, in_specs, out_specs):
    if not plan.split.rows and not plan.split.vocab:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


class _Chunks:
    """A device's arrays [B, T, ...] laid out as [chunks, R, width, ...], so that `width` steps of all rows are one."""

    def __init__(self, rows: int, length: int, chunk: int):
        self.B, self.T = rows, length
        self.fold = -(-rows // chunk)  # more rows than a chunk holds: neighbouring rows follow one another in time
        self.R = -(-rows // self.fold)
        steps = self.fold * length
        self.chunks = -(-steps // max(1, chunk // self.R))
        self.width = -(-steps // self.chunks)

    def cut(self, x_BT: jax.Array) -> jax.Array:
        rest = x_BT.shape[2:]
        x_BT = jnp.pad(x_BT, ((0, self.R * self.fold - self.B), *[(0, 0)] * (x_BT.ndim - 1)))
        x_RS = x_BT.reshape(self.R, -1, *rest)
        x_RS = jnp.pad(x_RS, ((0, 0), (0, self.chunks * self.width - x_RS.shape[1]), *[(0, 0)] * len(rest)))
        return jnp.moveaxis(x_RS.reshape(self.R, self.chunks, self.width, *rest), 1, 0)

    def join(self, x_nRC: jax.Array) -> jax.Array:
        rest = x_nRC.shape[3:]
        x_RS = jnp.moveaxis(x_nRC, 0, 1).reshape(self.R, -1, *rest)[:, : self.fold * self.T]
        return x_RS.reshape(self.R * self.fold, self.T, *rest)[: self.B]


def _forward_local(hidden_BTD, unembed_VD, targets_BT, temperature, *, plan: _Plan):
    chunks, vocab = _Chunks(targets_BT.shape[0], targets_BT.shape[1], plan.chunk), plan.split.vocab

    def score_chunk(_, part):
        hidden_RCD, targets_RC = part
        scores_RCV = _scores(hidden_RCD, unembed_VD, temperature, plan)
        top_RC = _most(jnp.max(scores_RCV, axis=-1), vocab)
        shifted_RCV = scores_RCV - top_RC[..., None]
        # A comparison fuses with the sums and splits over a sharded vocabulary; a gather does neither.
        chosen_RCV = jnp.where(_is_target(targets_RC, scores_RCV, plan), shifted_RCV, 0.0)
        parts = [jnp.sum(jnp.exp(shifted_RCV), axis=-1), jnp.sum(chosen_RCV, axis=-1)]
        if plan.entropy:
            parts.append(jnp.sum(jnp.exp(shifted_RCV) * shifted_RCV, axis=-1))
        sum_RC, chosen_RC, *weighted = _sum(parts, vocab)
        log_sum_RC = jnp.log(sum_RC)
        entropy = [log_sum_RC - weighted_RC / sum_RC for weighted_RC in weighted]
        kept = scores_RCV if chunks.chunks == 1 else None
        return None, ((chosen_RC - log_sum_RC, *entropy), (top_RC, log_sum_RC), kept)

    _, made = jax.lax.scan(score_chunk, None, (chunks.cut(hidden_BTD), chunks.cut(targets_BT)))
    return jax.tree.map(chunks.join, made)


def _backward_local(saved, cotangents, *, plan: _Plan, over_time: tuple[str, ...], over_width: tuple[str, ...]):
    hidden_BTD, unembed_VD, targets_BT, temperature, scored, (top_BT, log_sum_BT), scores_BTV = saved
    chunks, accumulator = _Chunks(targets_BT.shape[0], targets_BT.shape[1], plan.chunk), _accumulator(hidden_BTD)

    def chunk_gradient(carry, part):
        d_unembed_VD, d_temperature = carry
        hidden_RCD, targets_RC, d_scored, scored, top_RC, log_sum_RC, scores_RCV = part
        if scores_RCV is None:
            scores_RCV = _scores(hidden_RCD, unembed_VD, temperature, plan)
        logp_RCV = scores_RCV - top_RC[..., None] - log_sum_RC[..., None]
        p_RCV = jnp.exp(logp_RCV)
        d_scores_RCV = d_scored[0][..., None] * (_is_target(targets_RC, scores_RCV, plan) - p_RCV)
        if plan.entropy:
            d_scores_RCV -= d_scored[1][..., None] * p_RCV * (logp_RCV + scored[1][..., None])
        d_temperature -= jnp.sum(d_scores_RCV * scores_RCV) / temperature
        d_logits_RCV = (d_scores_RCV / temperature).astype(hidden_BTD.dtype)
        d_hidden_RCD = _product("rcv,vd->rcd", d_logits_RCV, unembed_VD)
        filled_RCV = jnp.pad(d_logits_RCV, ((0, 0), (0, 0), (0, d_unembed_VD.shape[0] - vocabulary)))
        d_unembed_VD += _product("rcv,rcd->vd", filled_RCV, hidden_RCD)
        return (d_unembed_VD, d_temperature), d_hidden_RCD.astype(hidden_BTD.dtype)

    vocabulary, width = unembed_VD.shape
    filled = whole_tiles(vocabulary) if over_width else vocabulary
    zeros = jnp.zeros_like(unembed_VD, accumulator, shape=(filled, width)), jnp.zeros_like(temperature)
    arrays = (hidden_BTD, targets_BT, cotangents, scored, top_BT, log_sum_BT, scores_BTV)
    (d_unembed_VD, d_temperature), d_hidden = jax.lax.scan(chunk_gradient, zeros, jax.tree.map(chunks.cut, arrays))
    d_hidden_BTD = sum_into(chunks.join(d_hidden), 1, over_time, plan.split.vocab)
    if plan.split.rows:  # as the gradients of other weights, it crosses devices in the compute dtype
        d_unembed_VD = d_unembed_VD.astype(hidden_BTD.dtype)
    d_unembed_VD = sum_into(d_unembed_VD, 1, over_width, plan.split.rows)[:vocabulary]
    (d_temperature,) = _sum([d_temperature], plan.split.rows + plan.split.vocab)
    return d_hidden_BTD, d_unembed_VD, d_temperature


def _sum(parts: list[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    return jax.lax.psum(parts, axes) if axes else parts


def _most(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pmax(x, axes) if axes else x


def _scores(hidden_RCD, unembed_VD, temperature, plan: _Plan):
    scores_RCV = _product("rcd,vd->rcv", hidden_RCD, unembed_VD) / temperature
    if plan.vocabulary % plan.split.vocab_ways == 0:
        return scores_RCV
    return jnp.where(_token_ids(scores_RCV, plan) < plan.vocabulary, scores_RCV, _MASKED)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum in the operands' dtype with a result of at least float32."""
    accumulator = _accumulator(x)
    direct = functools.partial(jnp.einsum, spec, preferred_element_type=accumulator)
    if x.dtype == accumulator:
        # As in the model: float32 means float32 on accelerators too, or rollout and trainer would disagree.
        return direct(x, y, precision=jax.lax.Precision.HIGHEST)

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(spec, x.astype(accumulator), y.astype(accumulator))

    # XLA's CPU backend has no bfloat16 product with a float32 result for some shapes, and fails when it runs.
    return jax.lax.platform_dependent(x, y, cpu=widened, default=direct)


def _is_target(targets_RC, scores_RCV, plan: _Plan):
    return targets_RC[..., None] == _token_ids(scores_RCV, plan)


def _token_ids(scores_RCV, plan: _Plan) -> jax.Array:
    """The tokens of this device's part of the vocabulary: int32 [V]."""
    size = scores_RCV.shape[-1]
    first = jax.lax.axis_index(plan.split.vocab) * size if plan.split.vocab else 0
    return first + jnp.arange(size, dtype=jnp.int32)


def _accumulator(hidden: jax.Array):
    return jnp.promote_types(hidden.dtype, jnp.float32)
