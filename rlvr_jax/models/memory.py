"""How many bytes a model's parameters take, from its configuration alone."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.decode_weights import prepared_shapes
from rlvr_jax.models.qwen import ParamSpec, param_specs
from rlvr_jax.sharding import DEFAULT_RULES


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
