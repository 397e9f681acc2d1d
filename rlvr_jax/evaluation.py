"""Avg@k, Pass@k and maj@k over problems, with intervals. Host code: numpy only.

`correct[p, s]` is whether sample s of problem p was graded correct; rows are problems by their row id, never by text.
Results are fractions of 1. The `*_per_problem` forms give one number a problem, for `bootstrap_interval` and paired
comparisons; on 30 problems the interval is usually wider than the gain that is claimed.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike


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
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
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


def bootstrap_interval(
    values: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda values_RP: values_RP.mean(axis=-1),
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-problem `values`, resampling problems.

    For two methods on the same problems pass the differences. `statistic` maps [resamples, problems] to [resamples].
    """
    values_P = np.asarray(values, float)
    if values_P.ndim != 1 or values_P.size == 0 or not np.isfinite(values_P).all():
        raise ValueError(f"values has shape {values_P.shape}: expected one finite number a problem")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected at least 1")
    drawn_RP = np.random.default_rng(seed).integers(values_P.size, size=(resamples, values_P.size))
    low, high = np.quantile(statistic(values_P[drawn_RP]), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _checked(correct: ArrayLike, k: int) -> np.ndarray:
    try:
        correct_PN = np.asarray(correct, float)
    except (TypeError, ValueError) as error:
        raise ValueError("correct: expected problems x samples, as many samples for every problem") from error
    if correct_PN.ndim != 2 or correct_PN.size == 0:
        raise ValueError(f"correct has shape {correct_PN.shape}: expected problems x samples, neither of them 0")
    if not np.isin(correct_PN, (0.0, 1.0)).all():
        raise ValueError("correct: expected only True / False or 1 / 0")
    if not 1 <= k <= correct_PN.shape[1]:
        raise ValueError(f"k={k}: expected 1 to {correct_PN.shape[1]}, the samples a problem has")
    return correct_PN
