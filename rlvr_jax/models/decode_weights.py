"""The form of the parameters that decoding reads: made once, so that a step neither slices, casts nor repacks them.

Everywhere: one dict a layer, matrices in the compute dtype, on a mesh laid out by `decode_layout.DECODE_RULES`: made by
one program, so that what moves between devices is in the compute dtype too. On one CPU device in float32, further: the
matrices of one input joined (q, k, v; gate, up) and every matrix stored [out, in], because XLA's CPU matmul copies its
right operand into panels at every call and reads its left one in place (`layers.linear` puts the weight there). Joined
matrices are also what keeps both threads busy: the library splits a product by rows of its left operand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlvr_jax.models import qwen
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.sharding.decode_layout import DECODE_RULES, parts_of
from rlvr_jax.typing import Array

Params = Any
_LANES = 128  # of a tile


def prepare(config: QwenConfig, params: Params) -> Params:
    """Parameters for `cached_hidden_states` and `logits`; what is prepared already is returned as it is.

    Norms keep their dtype, since they are applied in float32. Stacked layers are converted one at a time, so that
    beside the parameters given and the result there is never more than one layer's worth of temporaries. An embedding
    that needs neither a cast nor another place is shared with the parameters given; tied embeddings stay one array.

    Under an ambient mesh (`decode_layout.decode_mesh`) the result lies on it. The parameters may lie on another mesh of
    the same devices in the same order, that of training, say.

    Args:
      config: the architecture; its `dtype` is the compute dtype (None: that of the embedding).
      params: parameters of `load_hf` or `init_params`, on the host or on devices.

    Returns:
      `layers` as a tuple of dicts. With joined matrices these hold `qkv [(N + 2 K) H, D]` (and `qkv_bias`), `attn_out
      [D, N H]`, `gate_up [2 F, D]`, `mlp_out [D, F]`, and in place of an `unembed` there is `unembed_VD`.
    """
    if isinstance(params["layers"], tuple):
        return params
    if not (mesh := jax.sharding.get_abstract_mesh()).empty and mesh.size > 1:
        moved = {name: x for name, x in params.items() if _moves(config, name, x)}
        return {**params, **layout(config, sources(config, moved), moved)}
    rest = {name: jnp.asarray(x) for name, x in params.items() if name != "layers"}
    if _suits_joined(config, params):
        layers = {name: jnp.asarray(x) for name, x in params["layers"].items()}
        matrices = {name: x for name, x in rest.items() if name == "unembed" or _cast_to(config, name, x) != x.dtype}
        per_layer = tuple(_joined_layer(config, layers, jnp.int32(i)) for i in range(config.num_layers))
        kept = {name: x for name, x in rest.items() if name not in matrices}
        return {**kept, **_joined_rest(config, matrices), "layers": per_layer}
    cast = {name: x for name, x in rest.items() if _cast_to(config, name, x) != x.dtype}
    return rest | dict(_unstack_and_cast(config, {"layers": params["layers"], **cast}))


def prepared_shapes(config: QwenConfig, mesh: Mesh | AbstractMesh) -> Params:
    """What `prepare` makes under this mesh of parameters stored in the compute dtype: shapes, dtypes and places."""
    dtype = config.compute_dtype(jnp.float32)

    def place(name: str) -> jax.ShapeDtypeStruct:
        shape, place = _form(config, name, mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, place))

    layer = {name: place(name) for name in qwen.layer_specs(config)}
    rest = {name: place(name) for name in qwen.param_specs(config) if name != "layers"}
    return rest | {"layers": (layer,) * config.num_layers}


def _spec(config: QwenConfig, name: str) -> qwen.ParamSpec:
    """Of a parameter by its name, that of a single layer."""
    layer = qwen.layer_specs(config)
    return layer[name] if name in layer else qwen.param_specs(config)[name]


def _form(config: QwenConfig, name: str, mesh: Mesh | AbstractMesh) -> tuple[tuple[int, ...], PartitionSpec]:
    """Shape and place of a prepared parameter on a mesh: see `_flat` and `_filled`."""
    spec = _spec(config, name)
    shape, place = spec.shape, DECODE_RULES.fitting_spec(mesh, spec.axes, spec.shape)
    if "ffn" in spec.axes:
        at, (parts, filled) = spec.axes.index("ffn"), _tiles(config, mesh)
        shape = (*shape[:at], parts * filled, *shape[at + 1 :])
    if name.endswith("_proj") and len(shape) == 3:
        at = spec.axes.index("head_dim")
        shape = (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
        place = PartitionSpec(*place[:at], *place[at + 1 :])
    return shape, place


def _flat(name: str, x: Array) -> Array:
    """A projection [D, N, H] as [D, N H], or [N, H, D] as [N H, D].

    A few heads a device fill no tile of an accelerator's memory, and the compiler would make a copy that does.
    """
    if not name.endswith("_proj") or x.ndim != 3:
        return x
    return x.reshape(-1, x.shape[-1]) if name == "o_proj" else x.reshape(x.shape[0], -1)


def _tiles(config: QwenConfig, mesh: Mesh | AbstractMesh) -> tuple[int, int]:
    """In how many parts the feed-forward width lies, and what each is filled up to: whole tiles where that is little.

    The TPU compiler would otherwise copy these matrices into whole tiles before a loop that uses them.
    """
    parts = parts_of(mesh, "ffn", config.intermediate_size)
    width = config.intermediate_size // parts
    more = -width % _LANES
    return parts, width + (more if more * 16 <= width else 0)


def _filled(config: QwenConfig, name: str, x: Array, mesh: Mesh | AbstractMesh) -> Array:
    """Zeros at the end of each device's part of the feed-forward width: silu(0) 0 = 0, and what multiplies it is 0."""
    axes, (parts, filled) = _spec(config, name).axes, _tiles(config, mesh)
    if "ffn" not in axes or parts * filled == config.intermediate_size:
        return x
    at = axes.index("ffn")
    apart = x.reshape(*x.shape[:at], parts, -1, *x.shape[at + 1 :])
    more = filled - apart.shape[at + 1]
    return jnp.pad(apart, [(0, more if axis == at + 1 else 0) for axis in range(apart.ndim)]).reshape(
        *x.shape[:at], -1, *x.shape[at + 1 :]
    )


def sources(config: QwenConfig, params: Params) -> tuple[tuple[str, NamedSharding], ...]:
    """Where parameters lie that are split over the model dimension, as `layout` wants to know it."""
    flat = {**params, **params.get("layers", {})}
    flat.pop("layers", None)
    places = {name: x.sharding for name, x in flat.items() if not isinstance(x, Tracer) and hasattr(x, "sharding")}
    return tuple((name, place) for name, place in places.items() if isinstance(place, NamedSharding))


def _moves(config: QwenConfig, name: str, x: Any) -> bool:
    """Whether a parameter outside the layers is not in its decoding form yet."""
    if name == "layers" or not isinstance(x, jax.Array) or isinstance(x, Tracer):
        return True
    mesh = jax.sharding.get_mesh()
    wanted = NamedSharding(mesh, _form(config, name, mesh)[1])
    return _cast_to(config, name, x) != x.dtype or not x.sharding.is_equivalent_to(wanted, x.ndim)


@functools.partial(jax.jit, static_argnums=(0, 1))
def layout(config: QwenConfig, given: tuple[tuple[str, NamedSharding], ...], params: Params) -> Params:
    """The program of `prepare` on a mesh: unstacks, casts, gathers over the axes of the model dimension, and places.

    Args:
      config: the architecture.
      given: `sources` of the parameters. From their own mesh to another one the compiler knows no way but to gather
        all of a parameter in the dtype it has; so they are told to do less, later.
      params: some or all of the parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    lies = dict(given)

    def convert(name: str, x: Array, stacked: bool = False) -> jax.Array:
        x, spec = x.astype(_cast_to(config, name, x)), _spec(config, name)
        if name in lies and "embed" in spec.axes:
            place, at = lies[name], spec.axes.index("embed")
            entries = list(place.spec[1:] if stacked else place.spec)
            entries += [None] * (x.ndim - len(entries))
            there = place.mesh.shape == mesh.shape and entries == [*DECODE_RULES.fitting_spec(mesh, spec.axes, x.shape)]
            for steps in () if there else (entries, [*entries[:at], None, *entries[at + 1 :]]):
                x = jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, PartitionSpec(*steps)))
        x = _filled(config, name, _flat(name, x), mesh)
        return jax.lax.with_sharding_constraint(x, _form(config, name, mesh)[1])

    converted = {name: convert(name, x) for name, x in params.items() if name != "layers"}
    apart = qwen.unstack_layers(config, params)["layers"] if "layers" in params else ()
    return converted | {"layers": tuple({name: convert(name, x, stacked=True) for name, x in p.items()} for p in apart)}


def _suits_joined(config: QwenConfig, params: Params) -> bool:
    """Whether the computation is float32 on one CPU device: several would need the matrices apart, to split them."""
    if config.compute_dtype(params["embed"].dtype) != jnp.float32 or jax.default_backend() != "cpu":
        return False
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
    return all(len(x.sharding.device_set) == 1 for x in arrays)


@functools.partial(jax.jit, static_argnums=0)
def _joined_layer(config: QwenConfig, layers: Params, index: Array) -> Params:
    p = {name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for name, x in layers.items()}
    p = {name: x.astype(_cast_to(config, name, x)) for name, x in p.items()}
    width = config.hidden_size
    joined = {name: x for name, x in p.items() if "norm" in name}
    joined["qkv"] = jnp.concatenate([p[f"{name}_proj"].reshape(width, -1).T for name in "qkv"])
    if config.qkv_bias:
        joined["qkv_bias"] = jnp.concatenate([p[f"{name}_bias"].reshape(-1) for name in "qkv"])
    joined["attn_out"] = p["o_proj"].reshape(-1, width).T
    joined["gate_up"] = jnp.concatenate([p["gate_proj"].T, p["up_proj"].T])
    joined["mlp_out"] = p["down_proj"].T
    return joined


@functools.partial(jax.jit, static_argnums=0)
def _joined_rest(config: QwenConfig, matrices: Params) -> Params:
    cast = {name: x.astype(_cast_to(config, name, x)) for name, x in matrices.items()}
    return {f"{name}_VD" if name == "unembed" else name: x.T if name == "unembed" else x for name, x in cast.items()}


@functools.partial(jax.jit, static_argnums=0)
def _unstack_and_cast(config: QwenConfig, params: Params) -> Params:
    def convert(path: tuple, x: Array) -> Array:
        return _flat(path[-1].key, x.astype(_cast_to(config, path[-1].key, x)))

    return jax.tree_util.tree_map_with_path(convert, qwen.unstack_layers(config, params))


def _cast_to(config: QwenConfig, name: str, x: Array) -> jnp.dtype:
    return jnp.dtype(x.dtype) if "norm" in name else config.compute_dtype(x.dtype)
