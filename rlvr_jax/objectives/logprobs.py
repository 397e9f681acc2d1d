"""Log-probabilities of given tokens under logits / temperature, with and without the [B, T, V] array.

Alignment, here and everywhere: `logits_BTV[:, t]` (or `hidden_BTD[:, t]`) predicts `targets_BT[:, t]`, so the caller
shifts once and `logp_BT[:, t]` scores token t given the tokens before it. Targets lie in [0, V), on padding too.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rlvr_jax.direction import widen
from rlvr_jax.typing import Array, Float, Int


def token_logprobs(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], *, temperature: ArrayLike = 1.0
) -> Float[jax.Array, "B T"]:
    """log softmax(logits / temperature)[target], in at least float32. Temperature: a number > 0, may be traced."""
    _check_temperature(temperature)
    logits_BTV, targets_BT = widen(logits_BTV), jnp.asarray(targets_BT)
    if logits_BTV.shape[:-1] != targets_BT.shape:
        raise ValueError(f"targets_BT has shape {targets_BT.shape}: expected {logits_BTV.shape[:-1]}, as logits_BTV")
    scores_BTV = logits_BTV / temperature
    # The largest score goes first, so that large scores near one another keep their digits.
    scores_BTV -= jax.lax.stop_gradient(jnp.max(scores_BTV, axis=-1, keepdims=True))
    chosen_BT = jnp.take_along_axis(scores_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jnp.log(jnp.sum(jnp.exp(scores_BTV), axis=-1))


def chunked_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    unembed_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
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
    (logp_BT, entropy_BT), the entropy in nats of the tempered distribution.

    `chunk` counts tokens over the whole (global) batch. A chunk is a slice of time that takes every row, so a batch
    sharded over devices stays sharded inside each chunk. Under `jax.shard_map` it may be called on a device's rows,
    with `unembed_DV` made varying first (`jax.lax.pcast`): its gradient is then summed over devices once, not in every
    chunk.
    """
    _check_temperature(temperature)
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1 token")
    hidden_BTD, unembed_DV, targets_BT = jnp.asarray(hidden_BTD), jnp.asarray(unembed_DV), jnp.asarray(targets_BT)
    if hidden_BTD.shape[:2] != targets_BT.shape or hidden_BTD.shape[2] != unembed_DV.shape[0]:
        raise ValueError(
            f"shapes hidden_BTD {hidden_BTD.shape}, unembed_DV {unembed_DV.shape}, targets_BT {targets_BT.shape}: "
            "expected [B, T, D], [D, V] and [B, T]"
        )
    temperature = jnp.asarray(temperature, _accumulator(hidden_BTD))
    scored = _score(hidden_BTD, unembed_DV, targets_BT, temperature, chunk=int(chunk), entropy=bool(entropy))
    return scored if entropy else scored[0]


@functools.partial(jax.jit, static_argnames=("chunk", "entropy"))
def _score(hidden_BTD, unembed_DV, targets_BT, temperature, *, chunk: int, entropy: bool) -> tuple[jax.Array, ...]:
    """Lays the tokens out as [rows R, steps S] so that `width` steps of all rows make one chunk, and back."""
    (B, T), D = targets_BT.shape, hidden_BTD.shape[-1]
    if B * T == 0:
        empty = jnp.zeros((B, T), temperature.dtype)
        return (empty, empty) if entropy else (empty,)
    # More rows than a chunk holds: `fold` neighbouring rows follow one another in time.
    fold = -(-B // chunk)
    R, S = -(-B // fold), fold * T
    chunks = -(-S // max(1, chunk // R))
    width = -(-S // chunks)
    hidden_RSD = jnp.pad(hidden_BTD, ((0, R * fold - B), (0, 0), (0, 0))).reshape(R, S, D)
    targets_RS = jnp.pad(targets_BT, ((0, R * fold - B), (0, 0))).reshape(R, S)
    extra = ((0, 0), (0, chunks * width - S))
    hidden_RSD, targets_RS = jnp.pad(hidden_RSD, (*extra, (0, 0))), jnp.pad(targets_RS, extra)
    # One temperature a row, because under shard_map its gradient varies over devices as the rows do.
    temperature_R11 = temperature + jnp.zeros_like(hidden_RSD[:, :1, :1], temperature.dtype)
    scored = _scan_chunks(hidden_RSD, unembed_DV, targets_RS, temperature_R11, width, entropy)
    return tuple(x_RS[:, :S].reshape(R * fold, T)[:B] for x_RS in scored)


def _forward(hidden_RSD, unembed_DV, targets_RS, temperature_R11, width: int, entropy: bool):
    unembed = unembed_DV.astype(hidden_RSD.dtype)

    def score_chunk(_, start):
        scores_RCV = _scores(_slice(hidden_RSD, start, width), unembed, temperature_R11)
        top_RC = jnp.max(scores_RCV, axis=-1)
        shifted_RCV = scores_RCV - top_RC[..., None]
        log_sum_RC = jnp.log(jnp.sum(jnp.exp(shifted_RCV), axis=-1))
        # A comparison fuses with the sums and splits over a sharded vocabulary; a gather does neither.
        chosen_RC = jnp.sum(jnp.where(_is_target(targets_RS, start, width, scores_RCV), shifted_RCV, 0.0), axis=-1)
        entropy_RC = None
        if entropy:
            p_RCV = jnp.exp(shifted_RCV - log_sum_RC[..., None])
            entropy_RC = log_sum_RC - jnp.sum(p_RCV * shifted_RCV, axis=-1)
        kept_RCV = scores_RCV if width == targets_RS.shape[1] else None
        return None, (chosen_RC - log_sum_RC, top_RC, log_sum_RC, entropy_RC, kept_RCV)

    _, stacked = jax.lax.scan(score_chunk, None, jnp.arange(0, targets_RS.shape[1], width))
    logp_RS, top_RS, log_sum_RS, entropy_RS, scores_RSV = jax.tree.map(_unstack, stacked)
    saved = (hidden_RSD, unembed_DV, targets_RS, temperature_R11, top_RS, log_sum_RS, entropy_RS, scores_RSV)
    return (logp_RS, entropy_RS) if entropy else (logp_RS,), saved


def _backward(width: int, entropy: bool, saved, cotangents):
    hidden_RSD, unembed_DV, targets_RS, temperature_R11, top_RS, log_sum_RS, entropy_RS, scores_RSV = saved
    unembed, accumulator = unembed_DV.astype(hidden_RSD.dtype), _accumulator(hidden_RSD)
    d_logp_RS, *d_entropy_RS = cotangents

    def chunk_gradient(d_unembed_DV, start):
        hidden_RCD = _slice(hidden_RSD, start, width)
        scores_RCV = _scores(hidden_RCD, unembed, temperature_R11) if scores_RSV is None else scores_RSV
        top_RC1, log_sum_RC1 = (_slice(x_RS, start, width)[..., None] for x_RS in (top_RS, log_sum_RS))
        logp_RCV = scores_RCV - top_RC1 - log_sum_RC1
        p_RCV = jnp.exp(logp_RCV)
        one_hot_RCV = _is_target(targets_RS, start, width, scores_RCV)
        d_scores_RCV = _slice(d_logp_RS, start, width)[..., None] * (one_hot_RCV - p_RCV)
        if entropy:
            entropy_RC1 = _slice(entropy_RS, start, width)[..., None]
            d_scores_RCV -= _slice(d_entropy_RS[0], start, width)[..., None] * p_RCV * (logp_RCV + entropy_RC1)
        d_temperature_R11 = -jnp.sum(d_scores_RCV * scores_RCV, axis=(1, 2), keepdims=True) / temperature_R11
        d_logits_RCV = (d_scores_RCV / temperature_R11).astype(hidden_RSD.dtype)
        d_hidden_RCD = _product("rcv,dv->rcd", d_logits_RCV, unembed)
        d_unembed_DV += _product("rcd,rcv->dv", hidden_RCD, d_logits_RCV)
        return d_unembed_DV, (d_hidden_RCD.astype(hidden_RSD.dtype), d_temperature_R11)

    starts = jnp.arange(0, targets_RS.shape[1], width)
    zeros_DV = jnp.zeros_like(unembed_DV, accumulator)
    d_unembed_DV, (d_hidden_nRCD, d_temperature_nR11) = jax.lax.scan(chunk_gradient, zeros_DV, starts)
    return _unstack(d_hidden_nRCD), d_unembed_DV.astype(unembed_DV.dtype), None, d_temperature_nR11.sum(axis=0)


_scan_chunks = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(4, 5))
_scan_chunks.defvjp(_forward, _backward)


def _scores(hidden_RCD, unembed_DV, temperature_R11):
    return _product("rcd,dv->rcv", hidden_RCD, unembed_DV) / temperature_R11


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


def _is_target(targets_RS, start, width: int, scores_RCV):
    vocabulary_V = jnp.arange(scores_RCV.shape[-1], dtype=targets_RS.dtype)
    return _slice(targets_RS, start, width)[..., None] == vocabulary_V


def _slice(x_RS, start, width: int):
    return jax.lax.dynamic_slice_in_dim(x_RS, start, width, axis=1)


def _unstack(x_nRC):
    """[chunks, R, width, ...] -> [R, chunks * width, ...]."""
    x_RnC = jnp.moveaxis(x_nRC, 0, 1)
    return x_RnC.reshape(x_RnC.shape[0], -1, *x_RnC.shape[3:])


def _accumulator(hidden: jax.Array):
    return jnp.promote_types(hidden.dtype, jnp.float32)


def _check_temperature(temperature: ArrayLike) -> None:
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number > 0")
