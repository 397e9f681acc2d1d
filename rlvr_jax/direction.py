"""The direction of an RLVR update, read from two models' next-token log-probabilities.

`base` is the model before reinforcement learning and `rl` the one after; dlogp(y) = log pi_RL(y) - log pi_Base(y).
Selective replacement and extrapolation (ICLR 2026, arXiv 2603.22117, section 4.1) draw a token from one model, ask a
criterion whether the position matters (`rlvr_jax.criteria`), and where it fires draw again from the extrapolated
distribution.

Everything here takes *log-probabilities*, of which exp sums to 1 over the vocabulary: `jax.nn.log_softmax(logits)`, not
logits. They are taken at temperature 1 and may be -inf outside a truncated support: 0 log 0 counts as 0 and no function
here returns NaN for it. Where values can be seen (outside jit), rows whose exp does not sum to 1 raise.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import require, require_logprobs, require_per_row, require_same_shape
from rlvr_jax.typing import Array, Float, Int

# Log-normalisers of a float32 log-softmax over a full vocabulary stay well below this.
_NORMALISED = 1e-4


def widen(values: ArrayLike) -> jax.Array:
    """`values` as a jax array of at least float32, so that sums over a vocabulary keep their digits."""
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def token_ids(token: ArrayLike) -> jax.Array:
    """Token ids in a dtype that holds every id and -100 as well, which 8 and 16 bits do not."""
    ids = jnp.asarray(token)
    return ids.astype(jnp.promote_types(ids.dtype, jnp.int32))


def token_values(x_V: Float[Array, "*B V"], token: Int[Array, "*B"]) -> Float[jax.Array, "*B"]:
    """The entry of each row that its token names; NaN for a token outside the vocabulary, negative ones too."""
    token = token_ids(token)
    known = jnp.where(token < 0, x_V.shape[-1], token)  # a negative index would count from the end
    return jnp.take_along_axis(x_V, known[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]


def delta_logp(logp_base: Float[Array, "*S"], logp_rl: Float[Array, "*S"]) -> Float[jax.Array, "*S"]:
    """dlogp = log pi_RL - log pi_Base, any shape. Where both are -inf (a token neither model allows) it is 0."""
    require_same_shape(logp_base=logp_base, logp_rl=logp_rl)
    base, rl = widen(logp_base), widen(logp_rl)
    excluded = jnp.isneginf(base) & jnp.isneginf(rl)
    return jnp.where(excluded, 0.0, rl - jnp.where(excluded, 0.0, base))


def entropy(logp: Float[Array, "*B V"]) -> Float[jax.Array, "*B"]:
    """H(p) = -sum_v p_v log p_v in nats, from log-probabilities (not logits) over the last axis."""
    (logp,) = distributions(logp=logp)
    p = jnp.exp(logp)
    return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)


def kl_divergence(logp_p: Float[Array, "*B V"], logp_q: Float[Array, "*B V"]) -> Float[jax.Array, "*B"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) in nats; +inf where q excludes a token that p allows.

    Both arguments are log-probabilities (not logits) over one vocabulary, as in `js_average` and `js_divergence`.
    """
    return _kl(*distributions(logp_p=logp_p, logp_q=logp_q))


def js_average(logp_p: Float[Array, "*B V"], logp_q: Float[Array, "*B V"]) -> Float[jax.Array, "*B"]:
    """(KL(p || q) + KL(q || p)) / 2: what the published code of arXiv 2603.22117 calls "js" (half of Jeffreys')."""
    p, q = distributions(logp_p=logp_p, logp_q=logp_q)
    return (_kl(p, q) + _kl(q, p)) / 2


def js_divergence(logp_p: Float[Array, "*B V"], logp_q: Float[Array, "*B V"]) -> Float[jax.Array, "*B"]:
    """The Jensen-Shannon divergence (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; between 0 and log 2."""
    p, q = distributions(logp_p=logp_p, logp_q=logp_q)
    m = jnp.logaddexp(p, q) - jnp.log(2.0)
    return (_kl(p, m) + _kl(q, m)) / 2


def extrapolate(
    logp_base_BV: Float[Array, "*B V"], logp_rl_BV: Float[Array, "*B V"], gamma: ArrayLike
) -> Float[jax.Array, "*B V"]:
    """log pi_Extra = (1 + gamma) log pi_RL - gamma log pi_Base + const, normalised (arXiv 2603.22117, eq. of sec. 4.1).

    `gamma` is a scalar or one per row. gamma = 0 gives back a normalised `logp_rl_BV` bit for bit. A token rl excludes
    stays excluded. Where only base excludes tokens (log pi_Base = -inf) and gamma > 0, the limit is taken: all mass on
    those tokens, shared as pi_RL^(1 + gamma).
    """
    require_same_shape(logp_base_BV=logp_base_BV, logp_rl_BV=logp_rl_BV)
    base, rl = widen(logp_base_BV), widen(logp_rl_BV)
    require_per_row("gamma", gamma, rl.shape[:-1])
    require("gamma", gamma, "a finite number", np.isfinite)
    gamma = jnp.broadcast_to(jnp.asarray(gamma, rl.dtype), rl.shape[:-1])[..., None]
    allowed = ~jnp.isneginf(rl)
    unbounded = allowed & jnp.isneginf(base)
    step = jnp.where(allowed & ~unbounded, rl - jnp.where(unbounded, 0.0, base), 0.0)
    finite = rl + gamma * step
    at_limit = jnp.where(unbounded, (1 + gamma) * rl, -jnp.inf)
    scores = jnp.where((gamma > 0) & jnp.any(unbounded, axis=-1, keepdims=True), at_limit, finite)
    scores = jnp.where((gamma < 0) & unbounded, -jnp.inf, scores)
    log_z = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    already = (gamma == 0) & (jnp.abs(log_z) < _NORMALISED)
    return scores - jnp.where(already | jnp.isneginf(log_z), 0.0, log_z)


def distributions(**logp: ArrayLike) -> list[jax.Array]:
    """The named log-probabilities in at least float32; refuses other shapes and, where they can be seen, logits."""
    require_same_shape(**logp)
    for name, array in logp.items():
        require_logprobs(name, array)
    return [widen(array) for array in logp.values()]


def checked_tokens(token_B: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """One token per row of an array [B, V]; outside the vocabulary they raise where they can be seen."""
    if np.shape(token_B) != shape[:-1]:
        raise ValueError(f"token_B has shape {np.shape(token_B)}: expected {shape[:-1]}, one token per row")
    require("token_B", token_B, f"token ids from 0 to {shape[-1] - 1}", lambda x: (x >= 0) & (x < shape[-1]))
    return jnp.asarray(token_B)


def _kl(logp_p: jax.Array, logp_q: jax.Array) -> jax.Array:
    p = jnp.exp(logp_p)
    # The test is on p, not on log p: a probability that underflowed must not meet an infinite ratio.
    return jnp.sum(p * jnp.where(p > 0, logp_p - logp_q, 0.0), axis=-1)
