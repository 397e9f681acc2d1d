"""The objective of a run: `rlvr_jax.dapo` with the values of the configuration."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rlvr_jax import dapo
from rlvr_jax.entries import imported, is_own
from rlvr_jax.objectives.tokens import Tokens
from train.config import AlgorithmConfig, Config


@functools.partial(jax.jit, static_argnames="algorithm")
def advantages(
    algorithm: AlgorithmConfig, score_N: jax.Array, tokens: Tokens, alpha: ArrayLike
) -> tuple[jax.Array, Tokens]:
    """`dapo.step_advantages` of a whole trainer step."""
    how = algorithm.reweight
    return dapo.step_advantages(
        tokens,
        score_N,
        normalize_by_std=algorithm.normalize_by_std,
        num_groups=algorithm.train_batch,
        reweighting=how.kind,
        alpha=alpha,
        where=how.where,
        reweight_mask=(how.mask.kind, how.mask.quantile),
        loss_mask=(algorithm.loss_mask.kind, algorithm.loss_mask.quantile),
        importance=algorithm.importance,
        importance_cap=algorithm.importance_cap,
    )


def make_loss(algorithm: AlgorithmConfig, *, chunk: int, max_response: int) -> Callable[..., tuple]:
    """`dapo.make_loss`."""
    return dapo.make_loss(
        algorithm.loss,
        reweighting=algorithm.reweight.kind,
        where=algorithm.reweight.where,
        aggregation=algorithm.aggregation,
        chunk=chunk,
        max_response=max_response,
    )


def scalars(algorithm: AlgorithmConfig, temperature: float) -> dict[str, np.float32]:
    """`dapo.scalars`."""
    return dapo.scalars(
        temperature=temperature,
        alpha=algorithm.reweight.alpha,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        clip_dual=algorithm.clip_dual,
        kl_coef=algorithm.kl_coef,
    )


def own_functions(config: Config) -> Iterator[tuple[str, str]]:
    """(key, "module:name") of every choice that is a function of the user's own."""
    if is_own(config.reward.rule):
        yield "reward.rule", config.reward.rule
    yield from _of_objective(config.algorithm)


def _of_objective(algorithm: AlgorithmConfig) -> Iterator[tuple[str, str]]:
    masks = {"reweight.mask.kind": algorithm.reweight.mask.kind, "loss_mask.kind": algorithm.loss_mask.kind}
    choices = {"loss": algorithm.loss, "reweight.kind": algorithm.reweight.kind, "aggregation": algorithm.aggregation}
    for key, name in (choices | masks).items():
        if is_own(name):
            yield f"algorithm.{key}", name


def check_functions(algorithm: AlgorithmConfig) -> None:
    """Traces the objective on a tiny batch, where a choice is a function of the user's own. No device is used.

    Raises:
      ValueError: naming the functions and what went wrong in them.
    """
    own = dict(_of_objective(algorithm))
    for key, name in own.items():
        imported(key, name)
    if not own:
        return
    B, T, D, V = 2, 3, 4, 5

    def objective(hidden_BTD: jax.Array, ids_BT: jax.Array) -> Any:
        batch = {"tokens_BT": ids_BT, "segment_BT": ids_BT} | scalars(algorithm, 1.0) | _tiny_arrays(algorithm, B, T)
        loss = make_loss(algorithm, chunk=T, max_response=T)
        summed, metrics = loss(lambda *_: (hidden_BTD, jnp.ones((D, V))), None, batch)
        return summed, {name: (total, weight) for name, (total, weight) in metrics.items()}

    given = jax.ShapeDtypeStruct((B, T, D), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)
    try:
        shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(objective, *given))
    except Exception as error:  # whatever the user's function raises
        said = ", ".join(f"{key}={name}" for key, name in own.items())
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{said}: failed on a tiny batch: {type(error).__name__}: {first:.500}") from error
    wrong = [name for name, pair in shapes[1].items() if pair != ((), ())]
    if wrong:
        raise ValueError(f"algorithm.loss={algorithm.loss}: metric {wrong[0]!r} is no (sum, weight) of two numbers")


def loss_dtypes(algorithm: AlgorithmConfig) -> dict[str, np.dtype]:
    """The dtype of each array that a step of a run sends to the loss."""
    return {name: x.dtype for name, x in jax.eval_shape(lambda: _tiny_arrays(algorithm, 2, 3)).items()}


def _tiny_arrays(algorithm: AlgorithmConfig, B: int, T: int) -> dict[str, jax.Array]:
    """What a step of so many responses and tokens sends to the loss."""
    logp_BT = -jnp.ones((B, T))
    reference = logp_BT if algorithm.needs_reference else None
    tokens = Tokens(jnp.ones((B, T), jnp.int32), logp_BT, logp_BT, reference, logp_BT)
    tokens = tokens._replace(group_B=jnp.arange(B), key=jax.random.key(0))
    small, alpha = dataclasses.replace(algorithm, train_batch=B), jnp.float32(algorithm.reweight.alpha)
    return advantages(small, jnp.ones(B), tokens, alpha)[1].arrays()
