"""The compiled programs of a run and the shapes they are called with: what the trainer runs, `--plan` compiles."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlvr_jax.dapo import make_scorer
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.qwen import model_apply
from rlvr_jax.training import AccumulatingStep, TrainState, adamw, make_accumulating_step
from train.config import Config, OptimConfig
from train.step.objective import make_loss


class Programs(NamedTuple):
    """Compiled functions: `rlvr_jax.dapo.make_scorer`'s and `training.make_accumulating_step`'s."""

    score: Callable[..., tuple[jax.Array, jax.Array]]
    step: AccumulatingStep


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
    """Gradient clip and AdamW, as configured."""
    return adamw(b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, clip_norm=optim.clip_norm)


def make_programs(
    config: Config, model_config: QwenConfig, optimizer: optax.GradientTransformation, shardings: TrainState
) -> Programs:
    """The programs that score and update a policy whose state lies as `shardings` says."""
    apply, chunk = model_apply(model_config), config.model.logprob_chunk
    loss = make_loss(config.algorithm, chunk=chunk, max_response=config.rollout.max_response)
    return Programs(
        make_scorer(apply, chunk=chunk), make_accumulating_step(apply, optimizer, loss, shardings=shardings)
    )


def row_length(config: Config, prompt_length: int) -> int:
    """Tokens of the rows into which responses are packed, for prompts of up to `prompt_length` tokens."""
    return config.algorithm.row_length or prompt_length + config.rollout.max_response


def placed_like_params(optimizer: optax.GradientTransformation, params: Any, other: Any) -> TrainState:
    """Shapes of `TrainState.create` of placed `params` (shapes too): moments lie as they do, the rest as `other`."""

    def beside(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other)

    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=beside,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step=beside(step), params=params, opt_state=moments)
