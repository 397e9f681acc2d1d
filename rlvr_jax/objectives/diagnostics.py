"""What an objective does to the tokens of a batch: the gradient by probability, statistics of the weights.

Host functions on numpy arrays: they look at a whole trainer step, of which no copy need be on a device.
"""

from collections.abc import Sequence

import numpy as np

from rlvr_jax.objectives.tokens import Mask, Values
from rlvr_jax.typing import Float

PROBABILITY_EDGES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def logit_gradient_l1(
    advantages_BT: Values, logp_BT: Values, old_logp_BT: Values | None = None
) -> Float[np.ndarray, "B T"]:
    """Size of the policy objective's gradient in the logits of each token: 2 |r A| (1 - p).

    With one-hot y, d(r A)/d logits = r A (y - softmax), whose l1 norm is |r A| ((1 - p) + (1 - p)) (Lemma 3.1 of arXiv
    2603.22117). Host function.

    Args:
      advantages_BT: what multiplies the ratio, re-weighting included.
      logp_BT: log p of the token under the policy being trained, at the training temperature; the logits are those that
        the temperature has divided.
      old_logp_BT: log-probs in the ratio r = exp(logp - old_logp); None: r = 1, as at the first update of a step.

    Returns:
      Not clipped: a token that a clip holds has gradient 0 instead.
    """
    logp_BT = np.minimum(_wide(logp_BT), 0.0)  # a log-prob may round above 0
    size_BT = 2 * np.abs(_wide(advantages_BT)) * -np.expm1(logp_BT)  # 1 - p without cancellation
    return size_BT if old_logp_BT is None else size_BT * np.exp(logp_BT - _wide(old_logp_BT))


def shares_by_probability(
    values_BT: Values,
    logp_BT: Values,
    mask_BT: Mask,
    *,
    edges: Sequence[float] = PROBABILITY_EDGES,
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Shares of the values and of the tokens whose probability is in each of the bins [edges[k], edges[k + 1]).

    The last bin has its upper edge too. Host function.

    Args:
      values_BT: not negative, for example `logit_gradient_l1`.
      mask_BT: 1 on tokens that count; other positive numbers weigh a token, in both shares. Tokens whose value is not
        finite, or whose log-prob is NaN, are left out.
      edges: ascending probabilities that cover all tokens.

    Returns:
      Value shares and token shares, each with sum 1; NaN where there is nothing to share (no token; values of 0).

    Raises:
      ValueError: edges that do not ascend, or a token outside of them.
    """
    edges_K = np.asarray(edges, np.float64)
    if len(edges_K) < 2 or not (np.diff(edges_K) > 0).all():
        raise ValueError(f"edges={tuple(edges)}: expected at least two ascending probabilities")
    values_BT, logp_BT, weight_BT = _wide(values_BT), _wide(logp_BT), _wide(mask_BT)
    counted_BT = (weight_BT > 0) & np.isfinite(values_BT) & ~np.isnan(logp_BT)
    p_n = np.exp(np.minimum(logp_BT[counted_BT].astype(np.float64), 0.0))
    bins = len(edges_K) - 1
    bin_n = np.searchsorted(edges_K, p_n, side="right") - 1
    bin_n[p_n == edges_K[-1]] = bins - 1
    if ((bin_n < 0) | (bin_n >= bins)).any():
        raise ValueError(f"edges={tuple(edges)}: expected edges that cover every probability, from 0 to 1 for example")
    weight_n = weight_BT[counted_BT].astype(np.float64)
    mass_K = np.bincount(bin_n, values_BT[counted_BT] * weight_n, minlength=bins)
    tokens_K = np.bincount(bin_n, weight_n, minlength=bins)
    return _shares(mass_K), _shares(tokens_K)


def token_weights(reweighted_BT: Values, advantages_BT: Values, mask_BT: Mask) -> Float[np.ndarray, "B T"]:
    """Weight of each token, reweighted / advantage; NaN off the mask and where the advantage is 0. Host function."""
    reweighted_BT, advantages_BT = _wide(reweighted_BT), _wide(advantages_BT)
    known_BT = (np.asarray(mask_BT) > 0) & (advantages_BT != 0)
    weight_BT = np.full(known_BT.shape, np.nan, np.float32)
    return np.divide(reweighted_BT, advantages_BT, out=weight_BT, where=known_BT)


def weight_statistics(weight_BT: Values) -> dict[str, float]:
    """Of the weights that are there (not NaN): mean, std (ddof 0), min, max, and change, the mean of |weight - 1|.

    Without any the weights are 1. Host function.
    """
    weight_n = np.asarray(weight_BT, np.float64)
    weight_n = weight_n[~np.isnan(weight_n)]
    if not weight_n.size:
        return {"mean": 1.0, "std": 0.0, "min": 1.0, "max": 1.0, "change": 0.0}
    return {
        "mean": float(weight_n.mean()),
        "std": float(weight_n.std()),
        "min": float(weight_n.min()),
        "max": float(weight_n.max()),
        "change": float(np.abs(weight_n - 1).mean()),
    }


def _wide(values_BT: Values) -> np.ndarray:
    """In at least float32: integers and booleans too, whose differences and absolute values could wrap around."""
    array_BT = np.asarray(values_BT)
    return array_BT.astype(np.promote_types(array_BT.dtype, np.float32))


def _shares(values_K: np.ndarray) -> np.ndarray:
    total = values_K.sum()
    return values_K / total if total > 0 else np.full(values_K.shape, np.nan)
