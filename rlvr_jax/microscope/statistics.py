"""Histograms, overlaps, tails and agreements of per-token numbers, with intervals over problems. Host code: numpy only.

Tokens of a problem are alike, so whatever is claimed is resampled by problem: a statistic is a function of sums over
tokens, the sums are kept a problem ([P, ...]), and a resample adds up those of the problems that it drew.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from rlvr_jax.criteria import fires_at, threshold_for_share
from rlvr_jax.evaluation import Interval

_TOGETHER = 100  # resamples, or problems that are left out in turn: so that wide sums need little memory


def histogram(
    values: ArrayLike, edges: ArrayLike, *, groups: ArrayLike | None = None, weights: ArrayLike | None = None
) -> np.ndarray:
    """Tokens (or the sum of their weights) in each bin, `[bins]`, or `[groups, bins]` where `groups` is given.

    Bins are half open, [edge, next edge), the last one closed; what lies below or above counts in the first or last
    bin, so nothing is lost. `groups` is each value's group, an integer from 0.

    Raises:
      ValueError: a NaN, edges that do not increase.
    """
    values_N, edges = np.asarray(values, float), np.asarray(edges, float)
    if np.isnan(values_N).any():
        raise ValueError(f"values has {int(np.isnan(values_N).sum())} NaN: expected numbers")
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError(f"edges = {edges}: expected two or more increasing numbers")
    bins = len(edges) - 1
    bin_N = np.clip(np.searchsorted(edges, values_N, side="right") - 1, 0, bins - 1)
    group_N = np.zeros(len(values_N), int) if groups is None else np.asarray(groups, int)
    G = int(group_N.max(initial=-1)) + 1 if groups is not None else 1
    weights_N = None if weights is None else np.asarray(weights, float)
    counts = np.bincount(group_N * bins + bin_N, weights_N, minlength=G * bins).reshape(G, bins)
    return counts[0] if groups is None else counts


def overlap(counts_a: ArrayLike, counts_b: ArrayLike) -> np.ndarray | float:
    """Mass that two histograms over the same bins share: sum of min(a / sum a, b / sum b), over the last axis.

    1 where they are alike, 0 where no bin has both. It grows as bins get wider. NaN where one of them is empty.
    """
    a, b = np.asarray(counts_a, float), np.asarray(counts_b, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.minimum(a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)).sum(-1)


def overlap_if_alike(
    counts_a: ArrayLike, counts_b: ArrayLike, *, confidence: float = 0.95, draws: int = 500, seed: int = 0
) -> Interval:
    """Mean and central range of the `overlap` of these tokens if it did not matter which of the two they are from.

    Few tokens over many bins overlap by less than 1 even then, so an overlap has to be read beside this. Each draw
    swaps a and b in a random half of the problems. NaN where fewer than two problems have tokens.

    Args:
      counts_a, counts_b: `[P, bins]`, a problem's counts.
    """
    a_PK, b_PK = np.asarray(counts_a, float), np.asarray(counts_b, float)
    swapped_RP = np.random.default_rng(seed).integers(0, 2, (draws, len(a_PK))).astype(float)
    drawn = overlap(swapped_RP @ a_PK + (1 - swapped_RP) @ b_PK, swapped_RP @ b_PK + (1 - swapped_RP) @ a_PK)
    kept = np.asarray(drawn)[~np.isnan(drawn)]
    if not (kept.size and a_PK.any() and b_PK.any()) or (a_PK + b_PK).any(1).sum() < 2:
        return Interval(np.nan, np.nan, np.nan)
    return Interval(np.mean(kept), *np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2]))


def tail_mass(values: ArrayLike, threshold: float, *, side: str = "above") -> float:
    """Share of the values at or beyond a threshold: "above" counts value >= threshold, "below" value <= threshold."""
    if side not in ("above", "below"):
        raise ValueError(f"side={side!r}: expected 'above' or 'below'")
    values_N = np.asarray(values, float)
    if values_N.size == 0:
        raise ValueError("values is empty: expected at least one number")
    return float((values_N >= threshold if side == "above" else values_N <= threshold).mean())


def sum_by_group(values: ArrayLike, groups: ArrayLike, count: int) -> np.ndarray:
    """[count, ...]: the sum of `values` [N, ...] in each group, an integer from 0 to count - 1."""
    values_N, group_N = np.asarray(values, float), np.asarray(groups, int)
    flat = values_N.reshape(len(values_N), int(np.prod(values_N.shape[1:])))
    sums = [np.bincount(group_N, column, minlength=count) for column in flat.T]
    return np.stack(sums, axis=1).reshape(count, *values_N.shape[1:])


def bootstrap(
    statistic: Callable[..., np.ndarray | float],
    *sums: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over problems of a function of sums over tokens.

    It suits any statistic, but it is too narrow for few problems (below about 20) and for shares near 0 and 1. For a
    mean or a share take `rlvr_jax.evaluation.mean_interval`.

    Args:
      statistic: maps sums `[R, ...]`, one array each of `sums`, to `[R, ...]`. A resample that leaves it NaN (no token
        to look at) is left out.
      sums: `[P, ...]`, a problem's share of each sum. A resample draws P problems, the same for all of them.
      confidence: of the interval.
      resamples: how many; the numbers depend on `seed` alone.

    Returns:
      The estimate and its interval. The ends are NaN where a single problem carries the estimate, that is where it is
      NaN without that problem: one problem says nothing of others.
    """
    arrays = [np.asarray(x, float) for x in sums]
    counts = {len(x) for x in arrays}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"sums have {sorted(counts)} problems: expected the same number, at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
    (count,) = counts
    totals = [x.sum(0, keepdims=True) for x in arrays]
    rng = np.random.default_rng(seed)
    without, drawn = [], []
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.asarray(statistic(*totals))[0]
        for start in range(0, count, _TOGETHER):
            rows = slice(start, start + _TOGETHER)
            without.append(statistic(*(total - x[rows] for total, x in zip(totals, arrays, strict=True))))
        for start in range(0, resamples, _TOGETHER):
            size = min(_TOGETHER, resamples - start)
            drawn_RP = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
            drawn.append(statistic(*(np.tensordot(drawn_RP, x, axes=1) for x in arrays)))
    known = np.logical_and(~np.isnan(np.concatenate(without)).any(0), count > 1)
    resampled = np.concatenate(drawn)
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    for at in np.ndindex(value.shape):
        column = resampled[(slice(None), *at)]
        kept = column[~np.isnan(column)]
        if known[at] and kept.size:
            low[at], high[at] = np.quantile(kept, quantiles)
    return Interval(value, low, high)


def gradient_by_probability(
    logp: ArrayLike, edges: ArrayLike, *, groups: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mass) by the token's probability, each `[bins]` or `[groups, bins]`.

    Mass is the sum of 1 - p: by lemma 3.1 of arXiv 2603.22117 the l1 norm of a token's gradient in the logits is
    2 abs(w) (1 - p), so with equal weights abs(w) this is where the gradient is.

    Args:
      logp: of each token under the model that drew it.
      edges: probabilities from 0 to 1.
    """
    p_N = np.exp(np.minimum(np.asarray(logp, float), 0.0))
    return histogram(p_N, edges, groups=groups), histogram(p_N, edges, groups=groups, weights=1 - p_N)


class Selection(NamedTuple):
    """What a criterion selects at a wanted share: its threshold, the share that it gives, and which tokens."""

    tau: float
    share: float
    selected: np.ndarray


def select_share(criterion: str, values: ArrayLike, share: float) -> Selection:
    """The tokens that a criterion selects at the share nearest to the wanted one (ties go together)."""
    values_N = np.asarray(values, np.float32)
    threshold = threshold_for_share(criterion, values_N, share)
    selected_N = np.asarray(fires_at(criterion, values_N, np.float32(threshold.tau)))
    return Selection(threshold.tau, float(selected_N.mean()), selected_N)


def agreement(selections: Sequence[ArrayLike], groups: ArrayLike, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(both, either), each `[count, C, C]`: tokens of each problem that both of two criteria, or at least one, select.

    The Jaccard index of two criteria is the sum of `both` over problems by that of `either`. Of two that select a share
    s at random it would be near s / (2 - s).
    """
    chosen_NC = np.stack([np.asarray(x, float) for x in selections], axis=1)
    group_N = np.asarray(groups, int)
    C = chosen_NC.shape[1]
    both = np.zeros((count, C, C))
    order_N = np.argsort(group_N, kind="stable")
    bounds = np.searchsorted(group_N[order_N], np.arange(count + 1))
    for g in range(count):
        rows = chosen_NC[order_N[bounds[g] : bounds[g + 1]]]
        both[g] = rows.T @ rows
    alone = np.einsum("gcc->gc", both)
    return both, alone[:, :, None] + alone[:, None, :] - both
