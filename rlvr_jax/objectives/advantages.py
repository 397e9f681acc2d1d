"""Advantages of responses relative to the other responses of their prompt (GRPO form)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax.checks import not_negative, require, require_same_shape
from rlvr_jax.direction import widen
from rlvr_jax.scatter import scatter_sum, wide_ids
from rlvr_jax.typing import Array, Bool, Float, Integer, Real


def group_advantages(
    scores_B: Real[Array, " B"] | Bool[Array, " B"],
    group_B: Integer[Array, " B"],
    *,
    normalize_by_std: bool = True,
    epsilon: ArrayLike = 1e-6,
    num_groups: int | None = None,
) -> Float[jax.Array, " B"]:
    """A = (score - mean) / (std + epsilon) inside each prompt's group, std with ddof = 1 (DeepSeekMath, 2402.03300).

    `group_B` names each response's prompt. With `num_groups` (static) the ids are 0 .. num_groups - 1 and an id beyond
    them gives NaN; without it any ids do, at the cost of a sort. A negative id marks a padding row: it belongs to no
    group and gets 0. A group of one has mean 0 and std 1, so it keeps its score. A group whose scores are all equal
    gets exactly 0. `normalize_by_std=False` leaves out the division (Dr. GRPO, 2503.20783).

    Ids have 32 bits (64 with `jax_enable_x64`). Larger ones in a numpy array are refused. But jit cuts its own
    arguments to 32 bits, before this function sees them: number hashes first, `np.unique(ids, return_inverse=True)[1]`.
    """
    require("epsilon", epsilon, "a number >= 0", not_negative)
    require_same_shape(scores_B=scores_B, group_B=group_B)
    scores_B, group_B = widen(scores_B), group_ids(group_B)
    counted_B = group_B >= 0
    centred_B, sum_squares_B, count_B = group_deviations(scores_B, group_B, counted_B, num_groups=num_groups)
    alone_B = count_B == 1
    centred_B = jnp.where(alone_B, scores_B, centred_B)
    if normalize_by_std:
        std_B = jnp.sqrt(sum_squares_B / jnp.maximum(count_B - 1, 1))
        spread_B = jnp.where(alone_B, 1.0, std_B) + epsilon
        centred_B = centred_B / jnp.where(spread_B == 0, 1.0, spread_B)  # epsilon = 0: equal scores stay 0
    return jnp.where(counted_B, centred_B, 0.0)


def group_ids(group_B: ArrayLike) -> Integer[jax.Array, " B"]:
    """The ids as a jax array; refuses 64-bit ids (hashes) that its integers would silently cut down and mix up."""
    if not isinstance(group_B, jax.Array):
        group_B = np.asarray(group_B)
        if group_B.dtype.kind not in "iub":
            raise ValueError(f"group_B has dtype {group_B.dtype}: expected integers, so number them")
        kept = jax.dtypes.canonicalize_dtype(group_B.dtype)
        if not np.array_equal(group_B.astype(kept), group_B):
            raise ValueError(f"group_B holds ids up to {group_B.max()}: expected ids that fit {kept}, so number them")
    return wide_ids(group_B)


def group_deviations(
    values_B: Float[Array, " B"], group_B: Integer[Array, " B"], counted_B: ArrayLike, *, num_groups: int | None = None
) -> tuple[Float[jax.Array, " B"], Float[jax.Array, " B"], Float[jax.Array, " B"]]:
    """(value - group mean, group sum of its squares, group size), each given to every row; uncounted rows are left out.

    Two passes, and exact zeros where a group's values are all equal: the mean of equal floats need not equal them.
    """
    B = values_B.shape[0]
    counted_B = jnp.asarray(counted_B, bool)
    if num_groups is None:
        # At most B different ids: a static size, so this traces.
        segments, segment_B = B, jnp.unique(group_B, size=B, return_inverse=True)[1].reshape(B)
    else:
        # One segment more collects the uncounted rows; the one after it does not exist.
        segments, segment_B = num_groups, jnp.where(jnp.asarray(group_B) < num_groups, group_B, num_groups + 1)
    segment_B = jnp.where(counted_B, segment_B, segments)

    def total(x_B):
        return _spread(scatter_sum(jnp.where(counted_B, x_B, 0.0), segment_B, segments + 1), segment_B)

    count_B = total(jnp.ones_like(values_B))
    safe_count_B = jnp.maximum(count_B, 1.0)
    centred_B = values_B - total(values_B) / safe_count_B
    centred_B = centred_B - total(centred_B) / safe_count_B  # takes out the rounding of the first mean
    highest_B = _spread(jax.ops.segment_max(values_B, segment_B, num_segments=segments + 1), segment_B)
    lowest_B = _spread(jax.ops.segment_min(values_B, segment_B, num_segments=segments + 1), segment_B)
    # The second pass leaves exact zeros already where division rounds correctly; not every accelerator's does.
    centred_B = jnp.where(highest_B == lowest_B, 0.0, centred_B)
    return centred_B, total(centred_B**2), count_B


def _spread(x_G: jax.Array, segment_B: jax.Array) -> jax.Array:
    """Each row's group value; NaN, hence visible, for an id no group has."""
    return x_G.at[segment_B].get(mode="fill", fill_value=jnp.nan)
