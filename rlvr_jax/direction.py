"""The direction of an RLVR update, read from two models' next-token log-probabilities.

`base` is the model before reinforcement learning and `rl` the one after; dlogp(y) = log pi_RL(y) - log pi_Base(y).
Selective replacement and extrapolation (ICLR 2026, arXiv 2603.22117, section 4.1) draw a token from one model, ask a
criterion whether the position matters, and where it fires draw again from the extrapolated distribution.

Everything here takes *log-probabilities*, of which exp sums to 1 over the vocabulary: `jax.nn.log_softmax(logits)`, not
logits. They are taken at temperature 1 and may be -inf outside a truncated support: 0 log 0 counts as 0 and no function
here returns NaN for it. Where values can be seen (outside jit), rows whose exp does not sum to 1 raise.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import require, require_logprobs, require_per_row, require_same_shape
from rlvr_jax.typing import Array, Bool, Float, Int

CRITERIA = (
    "delta_logp",
    "neg_delta_logp",
    "abs_delta_logp",
    "entropy_base",
    "entropy_rl",
    "kl",
    "kl_reverse",
    "js",
    "js_true",
    "random",
    "none",
    "all",
)

FIRES_BELOW = ("delta_logp", "neg_delta_logp")  # the criteria that select small values

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
    (logp,) = _distributions(logp=logp)
    return _entropy(logp)


def kl_divergence(logp_p: Float[Array, "*B V"], logp_q: Float[Array, "*B V"]) -> Float[jax.Array, "*B"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) in nats; +inf where q excludes a token that p allows.

    Both arguments are log-probabilities (not logits) over one vocabulary, as in `js_average` and `js_divergence`.
    """
    return _kl(*_distributions(logp_p=logp_p, logp_q=logp_q))


def js_average(logp_p: Float[Array, "*B V"], logp_q: Float[Array, "*B V"]) -> Float[jax.Array, "*B"]:
    """(KL(p || q) + KL(q || p)) / 2: what the published code of arXiv 2603.22117 calls "js" (half of Jeffreys')."""
    return _js_average(*_distributions(logp_p=logp_p, logp_q=logp_q))


def js_divergence(logp_p: Float[Array, "*B V"], logp_q: Float[Array, "*B V"]) -> Float[jax.Array, "*B"]:
    """The Jensen-Shannon divergence (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; between 0 and log 2."""
    return _js_divergence(*_distributions(logp_p=logp_p, logp_q=logp_q))


def criterion_value(
    criterion: str,
    logp_base_BV: Float[Array, "B V"],
    logp_rl_BV: Float[Array, "B V"],
    token_B: Int[Array, " B"],
    *,
    top_logprobs: int | None = None,
    sample_from: str = "base",
) -> Float[jax.Array, " B"]:
    """The number `fires` compares with its threshold, for a histogram or to choose tau from a wanted share.

    `criterion` is any of `CRITERIA` but random, none and all. `top_logprobs` and `sample_from` as in `fires`. A token
    outside the vocabulary raises where it can be seen. Where it is traced, what depends on it is NaN, which never
    fires.
    """
    _check_criterion(criterion)
    if criterion in ("random", "none", "all"):
        raise ValueError(f"criterion={criterion!r} measures nothing; expected one of {CRITERIA[:-3]}")
    base, rl = _distributions(logp_base_BV=logp_base_BV, logp_rl_BV=logp_rl_BV)
    token_B = _checked_tokens(token_B, base.shape)
    if criterion.endswith("delta_logp"):
        if top_logprobs is not None:
            sampled, other = _by_role(base, rl, sample_from)
            other_list = _TopList(other, top_logprobs)
            sampled_B, other_B = token_values(sampled, token_B), other_list.lookup(token_B[:, None])[:, 0]
            value = delta_logp(*_by_role(sampled_B, other_B, sample_from))
        else:
            value = delta_logp(token_values(base, token_B), token_values(rl, token_B))
        return delta_value(criterion, value)
    if top_logprobs is not None:
        return _published_value(criterion, base, rl, token_B, top_logprobs, sample_from)
    if criterion == "entropy_base":
        return _entropy(base)
    if criterion == "entropy_rl":
        return _entropy(rl)
    if criterion == "kl":
        return _kl(rl, base)
    if criterion == "kl_reverse":
        return _kl(base, rl)
    return _js_average(rl, base) if criterion == "js" else _js_divergence(rl, base)


def fires(
    criterion: str,
    logp_base_BV: Float[Array, "B V"],
    logp_rl_BV: Float[Array, "B V"],
    token_B: Int[Array, " B"],
    tau: ArrayLike | None,
    key: jax.Array | np.ndarray | None = None,
    *,
    top_logprobs: int | None = None,
    sample_from: str = "base",
) -> Bool[jax.Array, " B"]:
    """Whether each row's position is selected, given the drawn `token_B` and both models' log-probabilities.

    | criterion | fires when |
    |---|---|
    | delta_logp | dlogp(y) <= tau (the paper's; tau around -0.3) |
    | neg_delta_logp | -dlogp(y) <= tau |
    | abs_delta_logp | abs(dlogp(y)) >= tau (control: size without direction) |
    | entropy_base, entropy_rl | H(.) >= tau |
    | kl, kl_reverse | KL(rl ‖ base), KL(base ‖ rl) >= tau |
    | js, js_true | `js_average`, `js_divergence` >= tau |
    | random | u < tau, u uniform on [0, 1) |
    | none, all | never, always (tau unused, may be None) |

    `tau` is a scalar or [B], `key` ("random" alone) one key, or [B] keys so that a row's draw does not depend on its
    companions; typed keys or raw uint32. The criterion's name is resolved when tracing, everything else may be traced.

    The default looks at whole distributions. `top_logprobs=k` is the rule of the published code, which sees each
    model's k best log-probabilities: entropies and divergences run over the *first* distribution's own list, both
    sides renormalised over it; a token missing from the other list gets that list's minimum; the model named by
    `sample_from` ("base" or "rl") also lists the drawn token. (The published engine draws a token from the other model
    too and adds it to that list; there is no such draw here.) js_true has no published form and raises.

    Raises ValueError, under jit too, for shapes that would broadcast: vocabularies of different size, tau as [B, 1].
    """
    _check_criterion(criterion)
    require_same_shape(logp_base_BV=logp_base_BV, logp_rl_BV=logp_rl_BV)
    rows = np.shape(logp_base_BV)[:-1]
    _checked_tokens(token_B, np.shape(logp_base_BV))
    if criterion in ("none", "all"):
        return jnp.full(rows, criterion == "all")
    if tau is None:
        raise ValueError(f"tau=None: criterion {criterion!r} needs a threshold, a number or one per row")
    require_per_row("tau", tau, rows)
    require("tau", tau, "a number that is not NaN", lambda x: ~np.isnan(x))
    if criterion == "random":
        if key is None:
            raise ValueError("key=None: criterion 'random' needs a jax random key, one or one per row")
        return _uniform(key, rows) < tau
    value = criterion_value(
        criterion, logp_base_BV, logp_rl_BV, token_B, top_logprobs=top_logprobs, sample_from=sample_from
    )
    return fires_at(criterion, value, tau)


def delta_value(criterion: str, delta: Float[Array, "*S"]) -> Float[jax.Array, "*S"]:
    """The `criterion_value` of delta_logp, neg_delta_logp or abs_delta_logp where dlogp is `delta`."""
    delta = jnp.asarray(delta)
    if criterion == "abs_delta_logp":
        return jnp.abs(delta)
    return -delta if criterion == "neg_delta_logp" else delta


def fires_at(criterion: str, value: Float[Array, "*S"], tau: ArrayLike) -> Bool[jax.Array, "*S"]:
    """Whether a position of this `criterion_value` is selected: value <= tau in `FIRES_BELOW`, else value >= tau."""
    value = jnp.asarray(value)
    if np.broadcast_shapes(value.shape, np.shape(tau)) != value.shape:
        raise ValueError(f"tau has shape {np.shape(tau)}: expected one that broadcasts to {value.shape}, as value")
    return value <= tau if criterion in FIRES_BELOW else value >= tau


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


def published_top_logprobs(
    logp_sampled_BV: Float[Array, "B V"],
    logp_other_BV: Float[Array, "B V"],
    k: int,
    token_B: Int[Array, " B"] | None = None,
) -> tuple[Float[jax.Array, "B V"], Float[jax.Array, "B V"]]:
    """The pair the published code extrapolates between: the candidates are the sampled model's k best tokens.

    Elsewhere both are -inf. The other model's value is its log-probability where the token is in its own k best, else
    the least of those. Neither is renormalised (`extrapolate` does). `token_B`, the drawn tokens, joins the candidates
    when it is not among them, as the published engine reports it. Equal log-probabilities at the cut: the lower
    token id is kept. Criteria under the same rule: `fires(..., top_logprobs=k)`, not `fires` on this pair, because
    KL(rl ‖ base) and H(rl) run over rl's own list whichever model is sampled.
    """
    require_same_shape(logp_sampled_BV=logp_sampled_BV, logp_other_BV=logp_other_BV)
    token_B = None if token_B is None else _checked_tokens(token_B, np.shape(logp_sampled_BV))
    sampled = _TopList(widen(logp_sampled_BV), k, token_B)
    other = _TopList(widen(logp_other_BV), k)
    rows_B1 = jnp.arange(sampled.ids_BK.shape[0])[:, None]
    aligned_BK = jnp.where(jnp.isneginf(sampled.values_BK), -jnp.inf, other.lookup(sampled.ids_BK))

    def scatter(values_BK):
        # `max`, because the drawn token may be listed twice, the second time as -inf.
        return jnp.full_like(sampled.logp_BV, -jnp.inf).at[rows_B1, sampled.ids_BK].max(values_BK)

    return scatter(sampled.values_BK), scatter(aligned_BK)


class _TopList:
    """One model's k best log-probabilities a row (and the drawn token), as an inference engine reports them."""

    def __init__(self, logp_BV: jax.Array, k: int, token_B: ArrayLike | None = None):
        if k < 1:
            raise ValueError(f"top_logprobs={k}: expected at least 1")
        self.logp_BV = logp_BV
        self.values_BK, self.ids_BK = jax.lax.top_k(logp_BV, min(k, logp_BV.shape[-1]))
        self.least_B1 = self.cut_B1 = self.values_BK[:, -1:]
        if token_B is not None:
            token_B1 = jnp.asarray(token_B)[:, None].astype(self.ids_BK.dtype)
            drawn_B1 = token_values(logp_BV, jnp.asarray(token_B))[:, None]
            listed_B1 = jnp.any(self.ids_BK == token_B1, axis=-1, keepdims=True)
            self.ids_BK = jnp.concatenate([self.ids_BK, token_B1], axis=-1)
            self.values_BK = jnp.concatenate([self.values_BK, jnp.where(listed_B1, -jnp.inf, drawn_B1)], axis=-1)
            self.least_B1 = jnp.where(listed_B1, self.cut_B1, drawn_B1)

    def lookup(self, ids_BK: jax.Array) -> jax.Array:
        """The listed log-probability of each id, the list's minimum for an id that is not in it.

        The drawn token, when it is not among the k best, is itself that minimum.
        """
        logp_BK = jnp.take_along_axis(self.logp_BV, ids_BK, axis=-1)
        return jnp.where(logp_BK >= self.cut_B1, logp_BK, self.least_B1)


def _published_value(criterion: str, base, rl, token_B, k: int, sample_from: str) -> jax.Array:
    """Entropies and divergences over top-k lists, renormalised."""
    if criterion == "js_true":
        raise ValueError("criterion='js_true' with top_logprobs: the published rule has no such form; drop one of them")
    drawn_base, drawn_rl = _by_role(token_B, None, sample_from)

    def over_own_list(p: _TopList, q: _TopList) -> tuple[jax.Array, jax.Array]:
        q_BK = jnp.where(jnp.isneginf(p.values_BK), -jnp.inf, q.lookup(p.ids_BK))
        return jax.nn.log_softmax(p.values_BK), jax.nn.log_softmax(q_BK)

    base, rl = _TopList(base, k, drawn_base), _TopList(rl, k, drawn_rl)
    if criterion == "entropy_base":
        return _entropy(jax.nn.log_softmax(base.values_BK))
    if criterion == "entropy_rl":
        return _entropy(jax.nn.log_softmax(rl.values_BK))
    if criterion == "kl":
        return _kl(*over_own_list(rl, base))
    if criterion == "kl_reverse":
        return _kl(*over_own_list(base, rl))
    return (_kl(*over_own_list(rl, base)) + _kl(*over_own_list(base, rl))) / 2


def _by_role(first, second, sample_from: str):
    """(base, rl) <-> (sampled, other): the same swap both ways."""
    if sample_from not in ("base", "rl"):
        raise ValueError(f"sample_from={sample_from!r}: expected 'base' or 'rl'")
    return (first, second) if sample_from == "base" else (second, first)


def _entropy(logp: jax.Array) -> jax.Array:
    p = jnp.exp(logp)
    return -jnp.sum(p * jnp.where(p > 0, logp, 0.0), axis=-1)


def _kl(logp_p: jax.Array, logp_q: jax.Array) -> jax.Array:
    p = jnp.exp(logp_p)
    # The test is on p, not on log p: a probability that underflowed must not meet an infinite ratio.
    return jnp.sum(p * jnp.where(p > 0, logp_p - logp_q, 0.0), axis=-1)


def _js_average(logp_p: jax.Array, logp_q: jax.Array) -> jax.Array:
    return (_kl(logp_p, logp_q) + _kl(logp_q, logp_p)) / 2


def _js_divergence(logp_p: jax.Array, logp_q: jax.Array) -> jax.Array:
    logp_m = jnp.logaddexp(logp_p, logp_q) - jnp.log(2.0)
    return (_kl(logp_p, logp_m) + _kl(logp_q, logp_m)) / 2


def _distributions(**logp: ArrayLike) -> list[jax.Array]:
    """The named log-probabilities in at least float32, after checks."""
    require_same_shape(**logp)
    for name, array in logp.items():
        require_logprobs(name, array)
    return [widen(array) for array in logp.values()]


def _checked_tokens(token_B: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """One token per row of an array [B, V]; outside the vocabulary they raise where they can be seen."""
    if np.shape(token_B) != shape[:-1]:
        raise ValueError(f"token_B has shape {np.shape(token_B)}: expected {shape[:-1]}, one token per row")
    require("token_B", token_B, f"token ids from 0 to {shape[-1] - 1}", lambda x: (x >= 0) & (x < shape[-1]))
    return jnp.asarray(token_B)


def _uniform(key: jax.Array | np.ndarray, rows: tuple[int, ...]) -> jax.Array:
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.random.uniform(key, rows, jnp.float32)
    if key.shape != rows:
        raise ValueError(f"key has shape {key.shape}: expected one key, or one for each of the {math.prod(rows)} rows")
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(key.ravel()).reshape(rows)


def _check_criterion(criterion: str) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r}: expected one of {', '.join(CRITERIA)}")
