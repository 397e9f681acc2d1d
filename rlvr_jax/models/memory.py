"""How many bytes a model's parameters take, from its configuration alone."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.decode_weights import prepared_shapes
from rlvr_jax.models.kernels.attention import resolved_attention
from rlvr_jax.models.qwen import Params, ParamSpec, hidden_states, param_specs
from rlvr_jax.sharding.rules import DEFAULT_RULES
from rlvr_jax.typing import Array


def weight_bytes(model: QwenConfig, dtype: str, mesh: Mesh | AbstractMesh | None) -> int:
    """Bytes a device of a model's parameters in this dtype."""
    specs = jax.tree.leaves(param_specs(model), is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    parts = 0
    for spec in specs:
        ways = 1
        if mesh is not None:
            placed = DEFAULT_RULES.fitting_spec(mesh, spec.axes, spec.shape)
            names = [
                name for axes in placed if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)
            ]
            ways = math.prod(mesh.shape[name] for name in names)
        parts += math.prod(spec.shape) // ways
    return parts * jnp.dtype(dtype).itemsize


def decode_weight_bytes(model: QwenConfig, dtype: str, mesh: Mesh | AbstractMesh | None) -> int:
    """Bytes a device of the parameters as decoding keeps them on its mesh (`decode_layout.decode_mesh`)."""
    if mesh is None:
        return weight_bytes(model, dtype, None)
    shapes = jax.tree.leaves(prepared_shapes(model, mesh))
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in shapes) * jnp.dtype(dtype).itemsize


def kept_bytes(model: QwenConfig, rows: int, length: int) -> int:
    """Bytes that a training forward of `rows` rows keeps for its backward pass, as `model.remat` says, weights apart.

    They are those of the arrays that `jax.vjp` holds, from shapes: nothing is computed and no device is needed. The
    attention of accelerators keeps what "chunked" keeps.
    """
    kind = {"splash": "chunked", "cudnn": "chunked"}.get(model.attention, model.attention)
    kind = resolved_attention(kind, "cpu", tokens=length, head_dim=model.head_dim, dtype=model.dtype)
    model = dataclasses.replace(model, attention=kind)
    weights = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32),
        param_specs(model),
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def held(weights: Params, tokens_BT: Array, segment_BT: Array) -> object:
        return jax.vjp(lambda w: hidden_states(model, w, tokens_BT, None, segment_BT), weights)[1]

    held_arrays = jax.tree.leaves(jax.eval_shape(held, weights, tokens, tokens))
    count = Counter((x.shape, x.dtype.itemsize) for x in held_arrays)
    for shape in (x.shape for x in jax.tree.leaves(weights)):  # those are held too, some in the compute dtype
        for size in (model.compute_dtype("float32").itemsize, 4):
            if count[shape, size]:
                count[shape, size] -= 1
                break
    return sum(number * math.prod(shape) * size for (shape, size), number in count.items())


def layer_bytes(model: QwenConfig, rows: int, length: int) -> int:
    """Bytes that the backward pass of one layer takes beside what is kept: an estimate.

    As much as a layer without rematerialisation keeps. Twice that in float32 where the layer is computed again: the
    compiler for CPUs, on which float32 is computed, fuses little.
    """
    layer = kept_bytes(dataclasses.replace(model, remat="none", num_layers=1), rows, length)
    return 2 * layer if model.remat != "none" and model.dtype == "float32" else layer
