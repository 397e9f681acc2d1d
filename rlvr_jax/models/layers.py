"""The decoder's arithmetic as functions on arrays: norm, rotary embeddings, attention, gated MLP.

Weights are cast to the dtype of the activations where they are used, so the caller's activations decide the compute
dtype; norms, rotary embeddings and softmax are float32 throughout. float32 matmuls ask for full precision, which on
TPU and recent GPUs is not the default.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from rlvr_jax.models.config import YarnConfig
from rlvr_jax.sharding.rules import constrain, gather
from rlvr_jax.typing import Array, Bool, Float, Int, Num

LayerParams = Mapping[str, Array]


@runtime_checkable
class Layout(Protocol):
    """Where the arrays of a layer lie on a mesh: see `tokens`."""

    def place(self, x: Array, name: str | None = None) -> Array: ...

    def enter(self, x: Array) -> Array: ...

    def leave(self, x: Array) -> Array: ...

    def weight(self, *names: str | None) -> tuple[str | None, ...] | None: ...


_FEW_ROWS = 256  # up to here reading the weights, or copying them, is a visible part of a matmul on CPU
_MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite, forward and backward


def einsum(spec: str, x: Array, w: Array, out_dtype: Any = None) -> jax.Array:
    """`jnp.einsum` in the dtype of `x`, accumulated in float32, returned in `out_dtype` (that of `x` by default)."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    return jnp.einsum(spec, x, w.astype(x.dtype), precision=_precision(x), preferred_element_type=out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(
    x: Float[Array, "*B I"], w: Float[Array, "*IO"], names: tuple[str | None, ...] | None
) -> Float[jax.Array, "*B O"]:
    """`x w` as `einsum` does it, w of shape [*I, *O] taken as a matrix [I, O]; reverse mode only.

    On a mesh w is gathered as it is used, and its gradient is summed into parts laid out as w is: `names` are the
    logical names of its dimensions (None: w is used as it lies).

    On CPU the gradient in w moves as little as possible: XLA's CPU matmul wants its left operand with the summed
    dimension last, so one of x and the gradient is transposed; left to itself the compiler takes the wider one, and
    computes what made it again, column by column.
    """
    return einsum("...I,IO->...O", x, _matrix(x, w, names))


def _matrix(x: Array, w: Array, names: tuple[str | None, ...] | None) -> jax.Array:
    w = jnp.asarray(w).astype(x.dtype)
    return jnp.asarray(w if names is None else gather(w, *names)).reshape(x.shape[-1], -1)


def _dense_forward(x: jax.Array, w: jax.Array, names: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `dense` again: a remat policy that keeps products would not see one in it.
    return einsum("...I,IO->...O", x, _matrix(x, w, names)), (x, w)


def _dense_backward(names: Any, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    dy = jax.lax.platform_dependent(dy, cpu=jax.lax.optimization_barrier, default=lambda dy: dy)
    dx = einsum("...O,IO->...I", dy, _matrix(x, w, names))
    dw_IO = jax.lax.platform_dependent(x, dy, cpu=_weight_gradient_cpu, default=_weight_gradient)
    dw = dw_IO.reshape(w.shape)
    return dx, jnp.asarray(dw if names is None else constrain(dw, *names)).astype(w.dtype)


def _weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    return einsum("...I,...O->IO", x, dy)


def _weight_gradient_cpu(x: jax.Array, dy: jax.Array) -> jax.Array:
    x_RI, dy_RO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if x_RI.shape[1] <= dy_RO.shape[1]:
        return einsum("IR,RO->IO", jax.lax.optimization_barrier(x_RI.T), dy_RO)
    return einsum("OR,RI->OI", jax.lax.optimization_barrier(dy_RO.T), x_RI).T


dense.defvjp(_dense_forward, _dense_backward)


def _dense(x: Array, w: Array, names: tuple[str | None, ...] | None) -> jax.Array:
    return jnp.asarray(dense(x, w, names))


def _precision(x: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def linear(x: Float[Array, "*B I"], w_OI: Float[Array, "O I"], out_dtype: Any = None) -> Float[jax.Array, "*B O"]:
    """`x w^T` for a matrix stored [out, in], the layout of `decode_weights`; otherwise as `einsum`.

    XLA's CPU matmul copies its right operand into panels and reads the left one in place. So for few rows, where
    reading the matrix is what costs, it is the left one; the barrier keeps the compiler from swapping them back.
    """
    rows_RI = x.reshape(-1, x.shape[-1])
    w_OI = w_OI.astype(x.dtype)
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=_precision(x),
        preferred_element_type=x.dtype if out_dtype is None else out_dtype,
    )
    if rows_RI.shape[0] <= _FEW_ROWS:
        y_RO = jax.lax.optimization_barrier(product(w_OI, rows_RI)).T
    else:
        y_RO = product(rows_RI, w_OI)
    return y_RO.reshape(*x.shape[:-1], -1)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32, returned in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, yarn: YarnConfig | None) -> tuple[np.ndarray, float]:
    """Rotary frequencies and the factor on cos and sin.

    Plain: `theta ** (-2 i / H)`. YaRN (arXiv 2309.00071, section 3): a ramp over i between these (dimensions that turn
    more than beta_fast times over the original context) and the same divided by the factor (fewer than beta_slow).

    Returns:
      float32 [H / 2] frequencies in radians a token, and the factor (1.0 without YaRN).
    """
    half = head_dim // 2
    # The exponent rounded to float32 and the power once more: the reference's bits, which far positions need.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
    plain = (1.0 / wavelengths).astype(np.float32)
    if yarn is None:
        return plain, 1.0

    def dimension_of(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = (1.0 / (np.float32(yarn.factor) * wavelengths)).astype(np.float32)
    return interpolated * ramp + plain * (1 - ramp), yarn.cos_sin_factor


def rope_tables(
    positions_BT: Int[Array, "B T"], frequencies: np.ndarray, factor: float
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """cos and sin of position times frequency, times `factor`: float32, h = H / 2."""
    angles_BTh = positions_BT.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)
    return jnp.cos(angles_BTh) * factor, jnp.sin(angles_BTh) * factor


def apply_rope(
    x_NH: Float[Array, "*B N H"], cos_h: Float[Array, "*B h"], sin_h: Float[Array, "*B h"]
) -> Float[Array, "*B N H"]:
    """Turns the pairs (i, i + H/2) of every head by the tables' angles, in float32, returned in the dtype of `x`."""
    first, second = jnp.split(x_NH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_h[..., None, :], sin_h[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_NH.dtype)


def causal_mask(mask_BT: Int[Array, "B T"] | Bool[Array, "B T"] | Float[Array, "B T"] | None, length: int) -> jax.Array:
    """bool [B, T, T] (or [1, T, T] without padding): query t may see key s when s <= t and s is not padding.

    Nor what has another value in `mask_BT`: rows that hold several sequences number them 1, 2, 3, ... there.
    """
    causal_1TT = jnp.tril(jnp.ones((length, length), bool))[None]
    if mask_BT is None:
        return causal_1TT
    same_BTT = (mask_BT[:, None, :] == mask_BT[:, :, None]) | (mask_BT == 0)[:, :, None]
    return causal_1TT & (mask_BT != 0)[:, None, :] & same_BTT


def attention_scores(
    q_BKGTH: Float[Array, "B K G T H"], k_BKSH: Num[Array, "B K S H"]
) -> Float[jax.Array, "B K G T S"]:
    """q k^T in float32, neither scaled nor masked; G query heads share a kv head."""
    if q_BKGTH.shape[3] > 1:
        return _scores(q_BKGTH, k_BKSH)
    return jax.lax.platform_dependent(q_BKGTH, k_BKSH, cpu=_single_query_scores_cpu, default=_scores)


def _scores(q_BKGTH: Array, k_BKSH: Array) -> jax.Array:
    return einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, jnp.float32)


def _single_query_scores_cpu(q_BKGTH: Array, k_BKSH: Array) -> jax.Array:
    # XLA's CPU matmul packs its right operand: as the left one the cache is read in place, up to twice as fast. The
    # barrier keeps the compiler from swapping the operands back.
    scores_BKSG = einsum("BKSH,BKGH->BKSG", k_BKSH.astype(q_BKGTH.dtype), q_BKGTH[:, :, :, 0], jnp.float32)
    return jnp.swapaxes(jax.lax.optimization_barrier(scores_BKSG), 2, 3)[:, :, :, None]


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: `softmax(q k^T / sqrt(H)) v` where the mask is true; head n uses kv head n // (N / K).

    Scores and softmax are float32. A query that may see nothing gives a finite, meaningless row (the mean of v).
    The mask is broadcast over heads.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q_BKGTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))
    scores = attention_scores(q_BKGTH, jnp.asarray(k_BKSH))
    scores = jnp.where(mask_BTS[:, None, None], scores * (head_dim**-0.5), _MASKED)
    # Divided after the product with v: forward and backward, the sum then costs passes over [T, H] and not [T, S].
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out_BKGTH = einsum("BKGTS,BKSH->BKGTH", weights.astype(q_BTNH.dtype), v_BKSH, jnp.float32) / total
    out_BKGTH = out_BKGTH.astype(q_BTNH.dtype)
    return jnp.transpose(out_BKGTH, (0, 3, 1, 2, 4)).reshape(q_BTNH.shape)


def project_qkv(
    p: LayerParams, x: Float[Array, "*B D"], cos: Array, sin: Array, eps: float, layout: Layout
) -> tuple[Array, Array, Array]:
    """Pre-norm, the three projections with whichever extras `p` holds (bias, q/k norm), rotary embeddings on q and k.

    Args:
      p: a layer's parameters.
      x: activations of tokens, in one dimension or more. cos, sin: [*B, H / 2].
      eps: of the norms.
      layout: where activations and weights lie on the mesh.

    Returns:
      q [*B, N, H], k and v [*B, K, H].
    """
    y = layout.enter(rms_norm(x, p["attn_norm"], eps))
    if "qkv" in p:
        q, k, v = _joined_qkv(p, y, head_dim=2 * cos.shape[-1])
    else:
        names = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}
        q, k, v = (_to_heads(y, p[f"{x}_proj"], name, 2 * cos.shape[-1], layout) for x, name in names.items())
    if "q_bias" in p:
        q, k, v = (_biased(y, p[f"{name}_bias"]) for name, y in zip("qkv", (q, k, v), strict=True))
    if "q_norm" in p:
        q, k = rms_norm(q, p["q_norm"], eps), rms_norm(k, p["k_norm"], eps)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def _to_heads(y: Array, w: Array, heads: str, head_dim: int, layout: Layout) -> Array:
    """For w [D, N, H], or [D, N H] as decoding keeps it."""
    projected = _dense(y, w, layout.weight("embed", heads, "head_dim"))
    return layout.place(projected.reshape(*y.shape[:-1], -1, head_dim), heads)


def _biased(y: Array, bias: Array) -> jax.Array:
    """`y + bias`, both in the dtype of `y`. The gradient of the bias, a sum over all tokens, is made in float32."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.asarray(y.astype(wide) + bias.astype(y.dtype).astype(wide), y.dtype)


def _joined_qkv(p: LayerParams, y_BTD: Array, head_dim: int) -> list[jax.Array]:
    y = linear(y_BTD, p["qkv"])
    if "qkv_bias" in p:
        y = y + p["qkv_bias"].astype(y.dtype)
    heads = y.reshape(*y.shape[:-1], -1, head_dim)
    num_heads = p["attn_out"].shape[1] // head_dim
    return jnp.split(heads, [num_heads, (num_heads + heads.shape[2]) // 2], axis=2)


def finish_block(
    p: LayerParams, x: Float[Array, "*B D"], attended: Float[Array, "*B N H"], eps: float, layout: Layout
) -> Array:
    """The rest of a decoder layer after attention: output projection, residual, and the gated MLP with its residual.

    Arguments are those of `project_qkv`.
    """
    if "gate_up" in p:
        x = x + linear(attended.reshape(*x.shape[:-1], -1), p["attn_out"])
        gate_up = linear(rms_norm(x, p["mlp_norm"], eps), p["gate_up"])
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return x + linear(jax.nn.silu(gate) * up, p["mlp_out"])
    attended = layout.place(attended, "heads").reshape(*x.shape[:-1], -1)
    projected = _dense(attended, p["o_proj"], layout.weight("heads", "head_dim", "embed"))
    x = x + layout.leave(projected)
    y = layout.enter(rms_norm(x, p["mlp_norm"], eps))
    into = layout.weight("embed", "ffn")
    hidden = jax.nn.silu(_dense(y, p["gate_proj"], into)) * _dense(y, p["up_proj"], into)
    down = _dense(layout.place(hidden, "ffn"), p["down_proj"], layout.weight("ffn", "embed"))
    return x + layout.leave(down)
