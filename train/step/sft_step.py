"""The optimizer step of supervised training, on packed rows."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlvr_jax.dapo import Apply, sequence_logprobs
from rlvr_jax.data.packing import PackedRows
from rlvr_jax.objectives.policy import aggregate
from rlvr_jax.runs.distributed import place
from rlvr_jax.sharding.rules import ShardingRules
from rlvr_jax.training import AccumulatingStep, TrainState


def make_loss(chunk: int) -> Any:
    """Negative log-likelihood of the tokens under the loss mask, as (sum, number of tokens).

    A batch has tokens_BT, segment_BT (0 on padding, the conversations of a row numbered from 1) and loss_mask_BT, which
    is 0 on the first token of each conversation.
    """

    def loss_fn(apply: Apply, params: Any, batch: dict) -> tuple:
        logp_BT = sequence_logprobs(apply, params, batch["tokens_BT"], batch["segment_BT"], chunk=chunk)
        return aggregate(-logp_BT, batch["loss_mask_BT"]), {}

    return loss_fn


def update(step: AccumulatingStep, state: TrainState, rows: PackedRows, mesh: Mesh) -> tuple[TrainState, dict]:
    """The state after an optimizer step on packed rows, part by part, and the step's metrics."""

    def placed(*arrays: np.ndarray) -> dict[str, jax.Array]:
        names = ("tokens_BT", "segment_BT", "loss_mask_BT")
        at = ShardingRules().sharding(mesh, ("batch", "time"), arrays[0].shape)
        return {name: place(x, at) for name, x in zip(names, arrays, strict=True)}

    parts = [placed(*part) for part in rows.micro_batches(rows.spread(rows.response_NR.astype(np.int32)))]
    if len(parts) == 1:
        return step.whole(state, parts[0])
    sums = step.begin(state.params, parts[0])
    for part in parts:
        sums = step.add(state.params, sums, part)
    return step.finish(state, sums)
