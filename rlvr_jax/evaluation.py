"""Avg@k, Pass@k and maj@k over problems, with intervals. Host code: numpy and scipy.

`correct[p, s]` is whether sample s of problem p was graded correct; rows are problems by their row id, never by text.
Results are fractions of 1. The `*_per_problem` forms give one number a problem, for `mean_interval` and paired
comparisons; on 30 problems the interval is usually wider than the gain that is claimed.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit


def avg_at_k(correct: ArrayLike, k: int) -> float:
    """Mean over each problem's first k samples, then over problems."""
    return float(avg_per_problem(correct, k).mean())


def pass_at_k(correct: ArrayLike, k: int) -> float:
    """Mean over problems of the unbiased 1 - C(n - c, k) / C(n, k), c correct among n samples (2107.03374)."""
    return float(pass_per_problem(correct, k).mean())


def maj_at_k(
    correct: ArrayLike, answers: Sequence[Sequence[str | None]], k: int, *, resamples: int = 1000, seed: int = 0
) -> float:
    """Accuracy of the majority vote over the answers of k samples, averaged over the k-subsets of the n samples.

    `answers[p][s]` is the extracted answer; equal strings are one candidate, so normalise them first. None (nothing
    extracted) has no vote; where nobody votes the problem counts as wrong. Candidates tied for the lead share the
    problem evenly: the expectation of a random choice among them. All subsets are visited when there are at most
    `resamples` (k = n has one), else `resamples` seeded random ones a problem.
    """
    return float(maj_per_problem(correct, answers, k, resamples=resamples, seed=seed).mean())


def avg_per_problem(correct: ArrayLike, k: int) -> np.ndarray:
    """[problems]: see `avg_at_k`."""
    return _checked(correct, k)[:, :k].mean(axis=1)


def pass_per_problem(correct: ArrayLike, k: int) -> np.ndarray:
    """[problems]: see `pass_at_k`. Summed in logs, so it is accurate for any n and for small values."""
    correct_PN = _checked(correct, k)
    n = correct_PN.shape[1]
    pass_P = np.empty(len(correct_PN))
    for p, c in enumerate(correct_PN.sum(axis=1).astype(int)):
        # C(n - c, k) / C(n, k) = prod_{j < c} (1 - k / (n - j)), which no factor <= 0 may enter.
        pass_P[p] = 1.0 if n - c < k else -np.expm1(np.log1p(-k / (n - np.arange(c))).sum())
    return pass_P


def maj_per_problem(
    correct: ArrayLike, answers: Sequence[Sequence[str | None]], k: int, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """[problems]: see `maj_at_k`. Samples that give one answer but were graded differently count by their mean."""
    correct_PN = _checked(correct, k)
    P, n = correct_PN.shape
    lengths = [len(row) for row in answers]
    if lengths != [n] * P:
        raise ValueError(f"answers has {len(lengths)} rows of lengths {sorted(set(lengths))}: expected {P} rows of {n}")
    if not isinstance(resamples, int | np.integer) or resamples < 1:
        raise ValueError(f"resamples={resamples}: expected an integer of at least 1")
    exhaustive = math.comb(n, k) <= resamples
    subsets_RK = np.array(list(itertools.combinations(range(n), k))) if exhaustive else None
    maj_P = np.zeros(P)
    for p in range(P):
        if not exhaustive:
            order_RN = np.tile(np.arange(n), (resamples, 1))
            subsets_RK = np.random.default_rng((seed, p)).permuted(order_RN, axis=1)[:, :k]
        candidates = sorted({answer for answer in answers[p] if answer is not None})
        if not candidates:
            continue
        votes_NA = np.array([[answer == candidate for candidate in candidates] for answer in answers[p]], float)
        right_A = correct_PN[p] @ votes_NA / votes_NA.sum(axis=0)
        votes_RA = votes_NA[subsets_RK].sum(axis=1)
        leads_RA = (votes_RA == votes_RA.max(axis=1, keepdims=True)) & (votes_RA > 0)
        maj_P[p] = (leads_RA @ right_A / np.maximum(leads_RA.sum(axis=1), 1)).mean()
    return maj_P


NOT_KNOWN = "not known"  # said in the place of an interval that a single problem would give


class Interval(NamedTuple):
    """An estimate from all problems, and its interval. The ends are NaN where the interval is not known."""

    value: Any
    low: Any
    high: Any

    @property
    def ends(self) -> list[float] | None:
        """[low, high] as JSON has them; None: not known."""
        return None if np.isnan(self.low) or np.isnan(self.high) else [float(self.low), float(self.high)]


def mean_interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    confidence: float = 0.95,
) -> Interval:
    """Interval over problems of a mean: how far it may move if other problems of the same kind are drawn.

    The estimate is r = sum(values) / sum(weights). Its variance v is the jackknife's over problems. For equal weights
    that is s^2 / P. With t from Student's distribution of P - 1 degrees of freedom:

    * Without `bounds`, the ends are r -+ t sqrt(v).
    * With bounds [a, b], they are Wilson's, the two solutions mu of
      (r - mu)^2 = t^2 v (mu - a) (b - mu) / ((r - a) (b - r)). So they stay inside the bounds. Of right and wrong
      answers this is Wilson's score interval.
    * Where all problems agree, the spread between problems cannot be seen. Then a share q of all problems may differ as
      far as the bounds allow, with (1 - q)^P = (1 - confidence) / 2. For 0 of P this is Clopper and Pearson's limit.

    A single problem says nothing of others, so the ends are NaN. The simulated coverage of the 95% interval is 0.93 or
    more from 2 problems on, at means from 0.02 to 0.98. It is less where a few problems differ much from all others and
    none of them is drawn: no method that reads the spread from the data can see these.

    Args:
      values: `[P]`, a problem's value, or with `weights` its sum (of right tokens, say).
      weights: `[P]`, what the sum is over (the problem's tokens), at least 0. Problems of weight 0 do not count.
      bounds: of a problem's value: (0, 1) for shares, (-1, 1) for differences of shares, None: not known.
      confidence: of the interval.

    Raises:
      ValueError: values that are not one finite number per problem, or lie outside the bounds.
    """
    values_P = np.asarray(values, float)
    weights_P = np.ones(values_P.shape) if weights is None else np.asarray(weights, float)
    if values_P.ndim != 1 or values_P.size == 0 or not np.isfinite(values_P).all():
        raise ValueError(f"values has shape {values_P.shape}: expected one finite number per problem")
    if weights_P.shape != values_P.shape or not (np.isfinite(weights_P).all() and (weights_P >= 0).all()):
        raise ValueError(f"weights has shape {weights_P.shape}: expected {values_P.shape[0]} numbers of at least 0")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0 and 1")
    there_P = weights_P > 0
    values_P, weights_P = values_P[there_P], weights_P[there_P]
    P, total = len(values_P), weights_P.sum()
    rest_P = total - weights_P
    if P == 0:
        return Interval(np.nan, np.nan, np.nan)
    low, high = bounds or (-np.inf, np.inf)
    slack = 1e-9 * weights_P
    if (values_P < low * weights_P - slack).any() or (values_P > high * weights_P + slack).any():
        raise ValueError(f"values from {values_P.min()} to {values_P.max()}: expected means within {bounds}")
    r = values_P.sum() / total
    if not (rest_P > 0).all():  # one problem carries it
        return Interval(float(r), np.nan, np.nan)
    # How far the mean moves when a problem is left out.
    moved_P = (values_P - r * weights_P) / rest_P
    v = (P - 1) / P * (moved_P**2).sum()
    t = stdtrit(P - 1, (1 + confidence) / 2)
    if bounds is None:
        return Interval(float(r), float(r - t * np.sqrt(v)), float(r + t * np.sqrt(v)))
    below, above = r - low, high - r
    if np.abs(moved_P).max() <= 1e-12 * (high - low):
        q = 1 - ((1 - confidence) / 2) ** (1 / P)
        return Interval(float(r), float(r - q * below), float(r + q * above))
    c = t**2 * v / (below * above)
    middle = r + c / 2 * (low + high)
    half = (high - low) * np.sqrt(c * below * above / (high - low) ** 2 + c**2 / 4)
    ends = np.clip([(middle - half) / (1 + c), (middle + half) / (1 + c)], low, high)  # of rounding
    return Interval(float(r), *ends.tolist())


def bracketed(low: float | None, high: float | None, form: str) -> str:
    """An interval for a line of text, its ends formatted by `form`; None and NaN: not known."""
    if low is None or high is None or np.isnan([low, high]).any():
        return f"[{NOT_KNOWN}]"
    return f"[{low:{form}}, {high:{form}}]"


def _checked(correct: ArrayLike, k: int) -> np.ndarray:
    try:
        correct_PN = np.asarray(correct, float)
    except (TypeError, ValueError) as error:
        raise ValueError("correct: expected problems x samples, as many samples for every problem") from error
    if correct_PN.ndim != 2 or correct_PN.size == 0:
        raise ValueError(f"correct has shape {correct_PN.shape}: expected problems x samples, neither of them 0")
    if not np.isin(correct_PN, (0.0, 1.0)).all():
        raise ValueError("correct: expected only True / False or 1 / 0")
    if not isinstance(k, int | np.integer) or not 1 <= k <= correct_PN.shape[1]:
        raise ValueError(f"k={k}: expected 1 to {correct_PN.shape[1]}, the samples a problem has")
    return correct_PN
