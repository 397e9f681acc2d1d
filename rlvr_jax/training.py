"""The train step: any loss function, any optimizer; a result that neither micro-batching nor the mesh changes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rlvr_jax.runs.distributed import place
from rlvr_jax.sharding.rules import training_options

Tree = Any
Scalar = jax.Array
Metrics = Mapping[str, tuple[Scalar, Scalar]]
LossFn = Callable[[Any, Tree, Tree], tuple[tuple[Scalar, Scalar], Metrics]]


class TrainState(flax.struct.PyTreeNode):
    """Everything an update reads and writes.

    Attributes:
      step: int32 [], optimizer steps made (a skipped update is not one).
      params: the master weights, float32 for training in earnest.
      opt_state: the optimizer's state, laid out over the mesh as the params are.
    """

    step: Any
    params: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Tree, optimizer: optax.GradientTransformation) -> "TrainState":
        """State at step 0. Moments lie where their params lie; counters are replicated over the params' mesh."""
        state = cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
        homes = {leaf.sharding.mesh for leaf in jax.tree.leaves(params) if _on_mesh(leaf)}
        if len(homes) > 1:
            raise ValueError(f"params lie on {len(homes)} different meshes, expected one")
        if not homes:
            return state
        replicated = NamedSharding(homes.pop(), PartitionSpec())
        return jax.tree.map(lambda x: x if _on_mesh(x) else jax.device_put(x, replicated), state)


def make_train_step(
    apply: Any,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn,
    *,
    micro_batches: int = 1,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Tree], tuple[TrainState, dict[str, Scalar]]]:
    """Compiled `step(state, batch) -> (state, metrics)`; the state is donated.

    The objective is (sum of sums) / (sum of weights) over the micro-batches of `batch` and over the devices: sums and
    gradients of sums are accumulated in float32 and divided once, so the loss and its gradient do not depend on how
    the batch is cut (a mean of means would: verl issues #5625, #906 and #2776).

    Args:
      apply: handed to `loss_fn` as it is; ours is `(params, tokens_BT, positions_BT, mask_BT) -> (hidden, unembed)`.
      optimizer: an optax transformation; gradient clipping is part of it.
      loss_fn: `(apply, params, batch) -> ((sum, weight), metrics)`, each metric a `(sum, weight)` as well. The weight
        must not depend on params.
      micro_batches: every array of `batch` has B rows first, or is a scalar, which all share; micro-batch i takes the
        rows i, i + micro_batches, ... (strided, so a batch dimension that is sharded over devices stays so).
      shardings: placement of the state (`jax.tree.map(lambda x: x.sharding, state)`); gradients and the new state are
        kept there. Without it the compiler chooses.

    Returns:
      The step. Its metrics are `loss` (the mean), `weight`, `grad_norm` (global, before clipping), `skipped` (1 where
      a non-finite loss, gradient norm or update left the state unchanged) and loss_fn's own, each sum / weight (0 where
      the weight is 0). A batch of weight 0 leaves the state unchanged too.

    Raises:
      ValueError: micro_batches < 1, or (when first called) rows that micro_batches does not divide.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, got {micro_batches}")
    sums, finish = _make_sums(apply, loss_fn, shardings), _make_finish(optimizer, shardings)

    def accumulated(params: Tree, batch: Tree) -> Sums:
        if micro_batches == 1:
            return sums(params, batch)
        parts = jax.tree.map(lambda x: _strided(x, micro_batches), batch)
        zeros = _zeros(sums, params, jax.tree.map(lambda x: x[0], parts))
        return jax.lax.scan(lambda carry, part: (_add(carry, sums(params, part)), None), zeros, parts)[0]

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, Scalar]]:
        return finish(state, accumulated(state.params, batch))

    return _jit_update(step, shardings)


class AccumulatingStep(NamedTuple):
    """A train step taken apart, for a number of micro-batches that differs from step to step. All are compiled once.

    Attributes:
      begin: `begin(params, batch) -> sums` of nothing; the batch gives shapes alone.
      add: `add(params, sums, batch) -> sums` with those of a micro-batch added; the old sums are donated.
      finish: `finish(state, sums) -> (state, metrics)`: the update as `make_train_step` makes it; donates the state.
      whole: `whole(state, batch) -> (state, metrics)`: the same for a single micro-batch, without sums to add to;
        donates the state.
    """

    begin: Callable[[Tree, Tree], Any]
    add: Callable[[Tree, Any, Tree], Any]
    finish: Callable[[TrainState, Any], tuple[TrainState, dict[str, Scalar]]]
    whole: Callable[[TrainState, Tree], tuple[TrainState, dict[str, Scalar]]]


def make_accumulating_step(
    apply: Any, optimizer: optax.GradientTransformation, loss_fn: LossFn, *, shardings: TrainState | None = None
) -> AccumulatingStep:
    """`make_train_step` in compiled parts; arguments, objective and metrics are the same."""
    sums = _make_sums(apply, loss_fn, shardings)
    placement = None if shardings is None else Sums(None, None, None, shardings.params)

    def add(params: Tree, carry: Sums, batch: Tree) -> Sums:
        return _add(carry, sums(params, batch))

    return AccumulatingStep(
        jax.jit(lambda params, batch: _zeros(sums, params, batch), out_shardings=placement),
        jax.jit(add, donate_argnums=1, out_shardings=placement, compiler_options=training_options()),
        _jit_update(_make_finish(optimizer, shardings), shardings),
        make_train_step(apply, optimizer, loss_fn, shardings=shardings),
    )


class Sums(NamedTuple):
    """What micro-batches add up to, in float32; nothing is divided yet."""

    total: Any
    weight: Any
    metrics: Any
    grads: Any


def _make_sums(apply: Any, loss_fn: LossFn, shardings: TrainState | None) -> Callable[[Tree, Tree], Sums]:
    def summed(params: Tree, batch: Tree) -> tuple[Scalar, tuple[Scalar, Metrics]]:
        (total, weight), metrics = loss_fn(apply, params, batch)
        return total, (weight, metrics)

    def sums(params: Tree, batch: Tree) -> Sums:
        (total, (weight, metrics)), grads = jax.value_and_grad(summed, has_aux=True)(params, batch)
        made = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), Sums(total, weight, metrics, grads))
        return made._replace(grads=_placed(made.grads, shardings))

    return sums


def _make_finish(
    optimizer: optax.GradientTransformation, shardings: TrainState | None
) -> Callable[[TrainState, Sums], tuple[TrainState, dict[str, Scalar]]]:
    def finish(state: TrainState, made: Sums) -> tuple[TrainState, dict[str, Scalar]]:
        divisor = _divisor(made.weight)
        grads = jax.tree.map(lambda g, p: (g / divisor).astype(p.dtype), made.grads, state.params)
        grads = _placed(grads, shardings)
        loss, grad_norm = made.total / divisor, optax.global_norm(grads)
        updates, _ = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.global_norm(updates))
        # Made once more when that is known, so that no array of the new state waits beside the old one for the others.
        kept, grads, state = jax.lax.optimization_barrier((finite & (made.weight > 0), grads, state))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(kept, a, b), new, state)
        metrics = {name: value / _divisor(count) for name, (value, count) in made.metrics.items()}
        return new, metrics | {
            "loss": loss,
            "weight": made.weight,
            "grad_norm": grad_norm,
            "skipped": 1.0 - finite.astype(jnp.float32),
        }

    return finish


def _jit_update(function: Callable, shardings: TrainState | None) -> Callable:
    placement = None if shardings is None else (shardings, None)
    return jax.jit(function, donate_argnums=0, out_shardings=placement, compiler_options=training_options())


def _zeros(sums: Callable[[Tree, Tree], Sums], params: Tree, batch: Tree) -> Sums:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sums, params, batch))


def _add(carry: Sums, made: Sums) -> Sums:
    return jax.tree.map(jnp.add, carry, made)


def _placed(grads: Tree, shardings: TrainState | None) -> Tree:
    return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings.params)


def adamw(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.1, clip_norm: float | None = 1.0
) -> optax.GradientTransformation:
    """Gradient clip by global norm, then AdamW, with the learning rate in the state: see `with_learning_rate`."""

    def build(learning_rate: Any) -> optax.GradientTransformation:
        clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
        return optax.chain(clip, optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))

    return optax.inject_hyperparams(build)(learning_rate=0.0)


def with_learning_rate(state: TrainState, learning_rate: float) -> TrainState:
    """The state of an `adamw()` optimizer with another learning rate; nothing is compiled again."""
    hyper = state.opt_state.hyperparams
    old = hyper["learning_rate"]
    # Committed to its devices or not, as the old one: the difference alone would compile the step again.
    new = np.asarray(learning_rate, old.dtype)
    new = place(new, old.sharding) if old.committed else jax.device_put(new)
    return state.replace(opt_state=state.opt_state._replace(hyperparams=hyper | {"learning_rate": new}))


def warmup_constant(step: int, *, peak: float, warmup: int) -> float:
    """Learning rate of trainer step `step`, counted from 0: min(1, step / warmup) * peak.

    As in the published runs, so the first trainer step of a warmed-up run has learning rate 0.
    """
    return peak if warmup <= 0 else min(1.0, step / warmup) * peak


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """`(step + 1) / warmup * peak` for the first `warmup` steps, then half a cosine from peak to `final` at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (peak - final) * 0.5 * (1.0 + float(np.cos(np.pi * share)))


def _strided(x: jax.Array, parts: int) -> jax.Array:
    if np.ndim(x) == 0:
        return jnp.broadcast_to(x, (parts,))
    if x.shape[0] % parts:
        raise ValueError(f"micro_batches={parts} does not divide the {x.shape[0]} rows of a batch array {x.shape}")
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _divisor(weight: Scalar) -> Scalar:
    return jnp.where(weight == 0, 1.0, weight)


def _on_mesh(x: Any) -> bool:
    return isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)
