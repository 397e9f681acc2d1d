"""Numbers of a trainer step beside the loss's own: weights, gradient by probability, time by phase, memory."""

import collections
import functools
import itertools
import resource
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlvr_jax.objectives.diagnostics import (
    PROBABILITY_EDGES,
    logit_gradient_l1,
    shares_by_probability,
    token_weights,
    weight_statistics,
)
from rlvr_jax.objectives.policy import aggregate
from rlvr_jax.objectives.reweight import reweight, reweighting_of
from train.config import AlgorithmConfig

BINS = tuple(f"p{low:g}-{high:g}" for low, high in itertools.pairwise(PROBABILITY_EDGES))
STEP_PHASES = ("rollout", "grade", "score", "update")
OUTSIDE_PHASES = ("eval", "save", "export", "log", "microscope")
_GIB = 2**30


def at_ratio_one(
    algorithm: AlgorithmConfig,
    each_NR: np.ndarray,
    old_logp_NR: np.ndarray,
    response_NR: np.ndarray,
    reweight_mask_NR: np.ndarray,
) -> np.ndarray:
    """What multiplies the ratio of each token at the first update of a step, where the current policy is the old one.

    That is `each_NR`, but for the re-weightings by the current policy, which wait for the loss.
    """
    how = algorithm.reweight
    if not reweighting_of(how.kind).current:
        return each_NR
    return np.asarray(
        reweight(
            how.kind,
            each_NR,
            old_logp_NR,
            response_NR,
            alpha=how.alpha,
            where=how.where,
            token_mask_BT=reweight_mask_NR,
        )
    )


def token_metrics(
    algorithm: AlgorithmConfig,
    advantage_N: np.ndarray,
    weighed_NR: np.ndarray,
    old_logp_NR: np.ndarray,
    response_NR: np.ndarray,
    loss_mask_NR: np.ndarray,
) -> tuple[dict[str, float], np.ndarray]:
    """Statistics of the weights, and where the gradient of a step's first update lies by the token's probability.

    The gradient of a token is its l1 norm in the logits (`logit_gradient_l1` at ratio 1), as the loss counts the token:
    once, or 1 / length for seq-mean-token-mean: the slope of `aggregate`.

    Args:
      advantage_N: of each response, before re-weighting.
      weighed_NR: see `at_ratio_one`.

    Returns:
      The metrics, and the weight [N, R] of each response token: NaN where the advantage is 0, and off the responses.
    """
    weight_NR = token_weights(weighed_NR, np.broadcast_to(advantage_N[:, None], weighed_NR.shape), response_NR)
    statistics = weight_statistics(weight_NR)
    metrics = {"advantage_weight": statistics.pop("mean")}
    metrics |= {f"advantage_weight_{name}": x for name, x in statistics.items()}
    size_NR = logit_gradient_l1(weighed_NR, old_logp_NR)
    counted_NR = _counts(algorithm.aggregation, np.asarray(loss_mask_NR > 0, np.float32))
    gradient_K, tokens_K = shares_by_probability(size_NR, old_logp_NR, counted_NR)
    here_NR = counted_NR > 0
    metrics["gradient_l1"] = float(size_NR[here_NR].mean(dtype=np.float64)) if here_NR.any() else 0.0
    metrics |= {f"gradient_share_{name}": float(x) for name, x in zip(BINS, gradient_K, strict=True)}
    metrics |= {f"token_share_{name}": float(x) for name, x in zip(BINS, tokens_K, strict=True)}
    return metrics, weight_NR


@functools.partial(jax.jit, static_argnums=0)
def _slopes(aggregation: str, mask_NR: jax.Array) -> jax.Array:
    return jax.grad(lambda x_NR: aggregate(x_NR, mask_NR, aggregation)[0])(jnp.zeros_like(mask_NR))


def _counts(aggregation: str, mask_NR: np.ndarray) -> np.ndarray:
    """What one more unit of a token's loss adds to the sum of the step's."""
    return np.asarray(_slopes(aggregation, mask_NR))


def memory_metrics() -> dict[str, float]:
    """Memory in GiB: of the fullest local device (in use now, and at most so far) where it says so; the host's peak."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    metrics = {}
    for name, key in {"device_memory_gib": "bytes_in_use", "device_memory_peak_gib": "peak_bytes_in_use"}.items():
        if values := [found[key] for found in stats if key in found]:
            metrics[name] = max(values) / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return metrics | {"host_memory_peak_gib": peak / _GIB}


class PhaseClock:
    """Wall time by phase: naming a phase ends the one before it.

    A phase is the first word of its name, so "rollout 3/8 rows" is "rollout". Names from other threads than the one
    that made the clock are not counted: their work goes on beside.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._thread = now, threading.get_ident()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._phase, self._since = "other", now()

    def phase(self, name: str) -> None:
        """A phase begins."""
        if threading.get_ident() == self._thread:
            self._add()
            self._phase = name.split(maxsplit=1)[0]

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; the phase goes on."""
        self._add()
        taken, self._seconds = self._seconds, collections.defaultdict(float)
        return taken

    def _add(self) -> None:
        now = self._now()
        self._seconds[self._phase] += now - self._since
        self._since = now


def phase_metrics(
    outside: dict[str, float], collecting: dict[str, float], training: dict[str, float]
) -> dict[str, float]:
    """Seconds by phase, from what a `PhaseClock` counted since the step before, while collecting and while training.

    `seconds_other` is the step's total (collecting and training) less rollout, grade, score and update.
    """
    total = sum(collecting.values()) + sum(training.values())
    metrics = {f"seconds_{name}": collecting.get(name, 0.0) + training.get(name, 0.0) for name in STEP_PHASES}
    metrics["seconds_other"] = total - sum(metrics.values())
    metrics |= {f"seconds_{name}": outside.get(name, 0.0) for name in OUTSIDE_PHASES}
    return metrics | {"seconds": total}


def importance_metrics(weight_NR: np.ndarray, mask_NR: np.ndarray, cap: float) -> dict[str, float]:
    """Mean of the importance weights over response tokens, and the share of them that the cap holds."""
    weights = weight_NR[mask_NR > 0].astype(np.float64)
    return {
        "importance_weight": float(weights.mean()),
        "importance_capped_share": float((weights >= np.float32(cap)).mean()),
    }


def gap_metrics(rollout_logp_NR: np.ndarray, old_logp_NR: np.ndarray, mask_NR: np.ndarray) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, over response tokens; NaN where there are none."""
    gap = np.abs(rollout_logp_NR - old_logp_NR)[mask_NR > 0].astype(np.float64)
    if not gap.size:
        return {"mean_abs": float("nan"), "max_abs": float("nan")}
    return {"mean_abs": float(gap.mean()), "max_abs": float(gap.max())}
