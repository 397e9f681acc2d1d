"""Criteria: what is measured at a position, and where a selective decode redraws the token because of it.

`CRITERIA` is the whole list. Wherever the name of a criterion is taken, so is a `Criterion` of your own, a function
that measures, or "module:name" of either. Everything here takes log-probabilities, as `rlvr_jax.direction`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import require, require_per_row, require_same_shape
from rlvr_jax.direction import (
    checked_tokens,
    delta_logp,
    distributions,
    entropy,
    js_average,
    js_divergence,
    kl_divergence,
    token_values,
)
from rlvr_jax.entries import entry
from rlvr_jax.top_logprobs import TopList, by_role
from rlvr_jax.typing import Array, Bool, Float, Int

Measure = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A number at each position, and the side on which it selects the position.

    Attributes:
      measure: `(logp_base_BV, logp_rl_BV, token_B) -> value_B`: of both models' log-probabilities and the drawn token.
      of_delta: `delta_B -> value_B`, in place of `measure`, where dlogp of the drawn token is all that is looked at.
      below: fires where value <= tau; else where value >= tau.
      signed: values below 0 occur, and so a tau below 0 has a meaning.
      published: `(base, rl) -> value_B` over two `TopList`s, the form of the published code; None: it has none.
      constant: in place of a number, fires everywhere (True) or nowhere (False). With none of the three it fires by
        chance, with probability tau.
    """

    measure: Measure | None = None
    of_delta: Callable[[jax.Array], jax.Array] | None = None
    below: bool = False
    signed: bool = False
    published: Callable[[TopList, TopList], jax.Array] | None = None
    constant: bool | None = None

    @property
    def measures(self) -> bool:
        """Whether there is a number to compare with tau."""
        return self.measure is not None or self.of_delta is not None

    @property
    def by_chance(self) -> bool:
        """Whether it draws a random number in place of a measurement."""
        return not self.measures and self.constant is None

    @property
    def takes_top_logprobs(self) -> bool:
        """Whether it has a form over the k best log-probabilities; true where nothing is measured."""
        return self.measure is None or self.published is not None


def _kl_of_lists(p: TopList, q: TopList) -> jax.Array:
    """KL over the list of p, both sides renormalised over it."""
    return kl_divergence(p.logp, jax.nn.log_softmax(p.aligned(q)))


CRITERIA: dict[str, Criterion] = {
    "delta_logp": Criterion(of_delta=lambda delta: delta, below=True, signed=True),
    "neg_delta_logp": Criterion(of_delta=lambda delta: -delta, below=True, signed=True),
    "abs_delta_logp": Criterion(of_delta=jnp.abs),
    "entropy_base": Criterion(
        lambda base, rl, token: entropy(base),
        published=lambda base, rl: entropy(base.logp),
    ),
    "entropy_rl": Criterion(
        lambda base, rl, token: entropy(rl),
        published=lambda base, rl: entropy(rl.logp),
    ),
    "kl": Criterion(
        lambda base, rl, token: kl_divergence(rl, base),
        published=lambda base, rl: _kl_of_lists(rl, base),
    ),
    "kl_reverse": Criterion(
        lambda base, rl, token: kl_divergence(base, rl),
        published=lambda base, rl: _kl_of_lists(base, rl),
    ),
    "js": Criterion(
        lambda base, rl, token: js_average(rl, base),
        published=lambda base, rl: (_kl_of_lists(rl, base) + _kl_of_lists(base, rl)) / 2,
    ),
    "js_true": Criterion(lambda base, rl, token: js_divergence(rl, base)),
    "random": Criterion(),
    "none": Criterion(constant=False),
    "all": Criterion(constant=True),
}

MEASURED = tuple(name for name, one in CRITERIA.items() if one.measures)

Named = str | Criterion | Measure


def criterion_of(criterion: Named) -> Criterion:
    """The criterion that a name stands for; a function becomes one that fires at value >= tau, of either sign.

    Raises:
      ValueError: a name that is none of `CRITERIA` and cannot be imported as "module:name" either.
    """
    return entry("criterion", CRITERIA, criterion, of=lambda measure: Criterion(measure, signed=True))


def criterion_value(
    criterion: Named,
    logp_base_BV: Float[Array, "B V"],
    logp_rl_BV: Float[Array, "B V"],
    token_B: Int[Array, " B"],
    *,
    top_logprobs: int | None = None,
    sample_from: str = "base",
) -> Float[jax.Array, " B"]:
    """The number `fires` compares with its threshold, for a histogram or to choose tau from a wanted share.

    `criterion` is any that measures something: not random, none and all. `top_logprobs`, `sample_from` as in `fires`.
    A token outside the vocabulary raises where it can be seen. Where it is traced, what depends on it is NaN, which
    never fires.
    """
    how = criterion_of(criterion)
    if not how.measures:
        raise ValueError(f"criterion={criterion!r} measures nothing; expected one of {', '.join(MEASURED)}")
    base, rl = distributions(logp_base_BV=logp_base_BV, logp_rl_BV=logp_rl_BV)
    token_B = checked_tokens(token_B, base.shape)
    if how.of_delta is not None:
        sampled, other = by_role(base, rl, sample_from)
        sampled_B = token_values(sampled, token_B)
        if top_logprobs is None:
            other_B = token_values(other, token_B)
        else:
            other_B = TopList(other, top_logprobs).lookup(token_B[:, None])[:, 0]
        value_B = how.of_delta(delta_logp(*by_role(sampled_B, other_B, sample_from)))
    elif top_logprobs is None and how.measure is not None:
        value_B = how.measure(base, rl, token_B)
    elif top_logprobs is None or how.published is None:
        raise ValueError(f"criterion={criterion!r} with top_logprobs: the published rule has no such form")
    else:
        drawn = by_role(token_B, None, sample_from)
        lists = (TopList(logp, top_logprobs, token) for logp, token in zip((base, rl), drawn, strict=True))
        value_B = how.published(*lists)
    if np.shape(value_B) != token_B.shape:
        raise ValueError(f"criterion={criterion!r} gave an array {np.shape(value_B)}: expected {token_B.shape}")
    return jnp.asarray(value_B)


def fires(
    criterion: Named,
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
    | a `Criterion`, a function, "module:name" | what it measures <= or >= tau |

    `tau` is a scalar or [B], `key` ("random" alone) one key, or [B] keys so that a row's draw does not depend on its
    companions; typed keys or raw uint32. The criterion's name is resolved when tracing, everything else may be traced.

    The default looks at whole distributions. `top_logprobs=k` is the rule of the published code, which sees each
    model's k best log-probabilities: entropies and divergences run over the *first* distribution's own list, both
    sides renormalised over it; a token missing from the other list gets that list's minimum; the model named by
    `sample_from` ("base" or "rl") also lists the drawn token. (The published engine draws a token from the other model
    too and adds it to that list; there is no such draw here.) js_true has no published form and raises.

    Raises ValueError, under jit too, for shapes that would broadcast: vocabularies of different size, tau as [B, 1].
    """
    how = criterion_of(criterion)
    require_same_shape(logp_base_BV=logp_base_BV, logp_rl_BV=logp_rl_BV)
    rows = np.shape(logp_base_BV)[:-1]
    checked_tokens(token_B, np.shape(logp_base_BV))
    if how.constant is not None:
        return jnp.full(rows, how.constant)
    if tau is None:
        raise ValueError(f"tau=None: criterion {criterion!r} needs a threshold, a number or one per row")
    require_per_row("tau", tau, rows)
    require("tau", tau, "a number that is not NaN", lambda x: ~np.isnan(x))
    if how.by_chance:
        if key is None:
            raise ValueError(f"key=None: criterion {criterion!r} needs a jax random key, one or one per row")
        return _uniform(key, rows) < tau
    value = criterion_value(
        criterion, logp_base_BV, logp_rl_BV, token_B, top_logprobs=top_logprobs, sample_from=sample_from
    )
    return fires_at(how, value, tau)


def fires_at(criterion: Named, value: Float[Array, "*S"], tau: ArrayLike) -> Bool[jax.Array, "*S"]:
    """Whether a position of this `criterion_value` is selected: value <= tau or value >= tau."""
    value = jnp.asarray(value)
    if np.broadcast_shapes(value.shape, np.shape(tau)) != value.shape:
        raise ValueError(f"tau has shape {np.shape(tau)}: expected one that broadcasts to {value.shape}, as value")
    return value <= tau if criterion_of(criterion).below else value >= tau


class Threshold(NamedTuple):
    """A threshold and what it does to the values it was chosen from.

    Attributes:
      tau: the threshold.
      share_selected: the share of the values that `fires` selects at tau.
      tied: the share of the values that are equal to the last one selected: with many (exact zeros, say) no threshold
        selects the wanted share.
    """

    tau: float
    share_selected: float
    tied: float


def threshold_for_share(criterion: Named, values: ArrayLike | Sequence[float], share: float) -> Threshold:
    """The threshold at which a criterion selects the share of `values` that is nearest to the wanted one.

    It lies halfway between two neighbouring values where float32 has a number between them, so that rounding does not
    flip a token. "random" needs no values: its threshold is the share itself.

    Args:
      criterion: any but none and all.
      values: [tokens], from `criterion_value`.
      share: above 0 and below 1.
    """
    how = criterion_of(criterion)
    if how.constant is not None:
        raise ValueError(f"criterion={criterion!r}: expected one of {', '.join((*MEASURED, 'random'))}")
    require("share", share, "a number above 0 and below 1", lambda x: (x > 0) & (x < 1))
    if how.by_chance:
        return Threshold(share, share, 0.0)
    values_N = np.asarray(values, np.float32)
    if values_N.ndim != 1 or values_N.size == 0 or np.isnan(values_N).any():
        raise ValueError(f"values has shape {values_N.shape}: expected one number a token, at least one, no NaN")
    # The values from the one that is selected first; those that are equal are selected together.
    distinct_M, count_M = np.unique(values_N if how.below else -values_N, return_counts=True)
    shares_M = np.cumsum(count_M) / values_N.size
    last = int(np.argmin(np.abs(shares_M - share)))
    tau = distinct_M[last]
    if last + 1 < len(distinct_M) and np.isfinite(distinct_M[last : last + 2]).all():
        middle = np.float32((np.float64(tau) + np.float64(distinct_M[last + 1])) / 2)
        tau = middle if tau <= middle < distinct_M[last + 1] else tau
    tau = float(tau if how.below else -tau)
    selected_N = np.asarray(fires_at(how, values_N, tau))
    return Threshold(tau, float(selected_N.mean()), float(count_M[last] / values_N.size))


def _uniform(key: jax.Array | np.ndarray, rows: tuple[int, ...]) -> jax.Array:
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.random.uniform(key, rows, jnp.float32)
    if key.shape != rows:
        raise ValueError(f"key has shape {key.shape}: expected one key, or one for each of the {math.prod(rows)} rows")
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(key.ravel()).reshape(rows)
