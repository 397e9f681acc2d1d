"""Meshes, and the one table that says which array dimension lies on which mesh axis.

Arrays are described by *logical* names ("batch", "heads", ...). `ShardingRules` maps each name to a mesh axis. A name
that the table does not know raises, so a typing slip cannot quietly leave an array unsharded.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rlvr_jax.typing import Array

log = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = "rows"  # of a decode mesh alone: see `decode_layout`
MeshAxes = str | tuple[str, ...] | None
_TILE = 3 * 128
# For programs that train: products that pass their operands around while they compute took longer, by the compiler's
# own account (4 layers of Qwen3-8B on v5p:4x4x4).
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical dimension name -> mesh axis, tuple of axes, or None (replicated).

    The defaults are FSDP x sequence x tensor parallelism. Parameters are split over `fsdp` along the model dimension
    and over `tensor` and `sequence` along heads, feed-forward width and vocabulary; where a layer of a training forward
    uses them they are gathered over the axes `gathered`. The batch is split over `data` and `fsdp`, its tokens over
    `sequence`, between layers over `residual` too. Within attention, which needs all tokens, `sequence` splits heads
    instead (arXiv 2309.14509). The axis `rows` is there in decode meshes alone, where it is the part of the tensor axis
    that kv heads are too few for.
    """

    batch: MeshAxes = ("data", "fsdp")
    time: MeshAxes = "sequence"
    residual: MeshAxes = "tensor"
    act_embed: MeshAxes = None
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = ("tensor", "sequence", ROWS)
    kv_heads: MeshAxes = ("tensor", "sequence")
    head_dim: MeshAxes = None
    ffn: MeshAxes = ("tensor", "sequence", ROWS)
    vocab: MeshAxes = ("tensor", "sequence", ROWS)
    cache_rows: MeshAxes = ("data", "fsdp", ROWS)
    layers: MeshAxes = None
    gathered: MeshAxes = ("data", "fsdp", "sequence")

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of one logical name. Raises ValueError for a name that is not a field of the table."""
        if name is None:
            return ()
        if name not in self.__dataclass_fields__:
            raise ValueError(f"unknown logical axis {name!r}; expected one of {', '.join(self.__dataclass_fields__)}")
        return _axes(getattr(self, name))

    def spec(self, *names: str | None) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions carry these logical names (None: replicated)."""
        return PartitionSpec(*(_entry(self.axes(name)) for name in names))

    def sharding(self, mesh: Mesh, names: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        """Placement of an array of `shape` on `mesh`.

        Mesh axes that do not divide a dimension (2 kv heads over 4 tensor shards, say) are left out for that
        dimension, which is then replicated over them; this is logged once per case.
        """
        return NamedSharding(mesh, self.fitting_spec(mesh, names, shape))

    def fitting_spec(
        self, mesh: Mesh | AbstractMesh, names: Sequence[str | None], shape: Sequence[int]
    ) -> PartitionSpec:
        """`spec` less the mesh axes that do not divide their dimension or that another dimension already uses."""
        if len(names) != len(shape):
            raise ValueError(f"{len(names)} logical names {tuple(names)} for an array of shape {tuple(shape)}")
        used: set[str] = set()
        entries = []
        for name, size in zip(names, shape, strict=True):
            kept: list[str] = []
            for axis in self.axes(name):
                if axis in used or axis not in mesh.shape or mesh.shape[axis] == 1 or size == 1:
                    continue
                if size % (mesh.shape[axis] * math.prod(mesh.shape[a] for a in kept)):
                    _log_replicated(name, size, axis, mesh.shape[axis])
                    continue
                kept.append(axis)
                used.add(axis)
            entries.append(_entry(tuple(kept)))
        return PartitionSpec(*entries)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, *, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Mesh with the axes `data`, `fsdp`, `sequence` and `tensor` (Auto axis types) over all devices, or over `devices`.

    At most one size may be -1: it takes what the others leave. Use it as `with jax.set_mesh(make_mesh(...)):`. Devices
    of one tensor group are near one another; where there are several TPU slices, `data` (else `fsdp`) runs over them.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or axes that cannot run over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    bad = [f"{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        raise ValueError(f"mesh sizes must be positive, at most one of them -1; got {sizes}")
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {sizes} needs {known} devices (or a multiple, with a -1), there are {len(devices)}")
    return Mesh(_grid(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _grid(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours in the interconnect next to each other."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = tuple(sizes.values())
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = next((name for name in ("data", "fsdp") if sizes[name] % slices == 0), None)
    if outer is None:
        raise ValueError(f"mesh {sizes}: data or fsdp must be a multiple of the {slices} slices")
    inside = tuple(size // slices if name == outer else size for name, size in sizes.items())
    across = tuple(slices if name == outer else 1 for name in sizes)
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def training_options() -> dict[str, str] | None:
    """Compiler options of programs that train, on the platform there is."""
    return TPU_OPTIONS if jax.default_backend() == "tpu" else None


def batch_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """In how many parts the mesh splits the rows of a batch that they divide; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in DEFAULT_RULES.axes("batch"))


def constrain(x: Array, *names: str | None, rules: ShardingRules | None = None) -> Array:
    """Inside jit: keep `x` laid out by the logical `names` of its dimensions. Without an ambient mesh, `x` itself.

    Axes that are not the compiler's to lay out are left alone: those of a `jax.shard_map` around it, Explicit ones.
    """
    rules = rules or DEFAULT_RULES
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        rules.spec(*names)  # a mistyped name fails on one device too
        return x
    entries = rules.fitting_spec(mesh, names, np.shape(x))
    kept = (tuple(axis for axis in _axes(entry) if axis in mesh.auto_axes) for entry in entries)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(_entry, kept)))


DEFAULT_RULES = ShardingRules()


def gather(w: Array, *names: str | None) -> Array:
    """Inside jit: a weight as the layer that uses it wants it, split by those axes alone that are not `gathered`."""
    mesh = ambient_mesh()
    if mesh is None:
        return w
    away = DEFAULT_RULES.axes("gathered")
    entries = DEFAULT_RULES.fitting_spec(mesh, names, np.shape(w))
    kept = (tuple(axis for axis in _axes(entry) if axis not in away) for entry in entries)
    return jax.lax.with_sharding_constraint(w, PartitionSpec(*map(_entry, kept)))


def ambient_mesh() -> AbstractMesh | None:
    """The mesh over which a function may split its work by `jax.shard_map`: None on one device and inside of one.

    Nor is there one where axes are Explicit: arrays then lie as their types say.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes or mesh.explicit_axes else mesh


def fitting_axes(mesh: Mesh | AbstractMesh | None, name: str, size: int) -> tuple[str, ...]:
    """The mesh axes that split a dimension of this logical name and size; none without a mesh."""
    if mesh is None:
        return ()
    (axes,) = DEFAULT_RULES.fitting_spec(mesh, (name,), (size,))
    return _axes(axes)


def ways(axes: tuple[str, ...]) -> int:
    """In how many parts the ambient mesh's `axes` split something."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def dividing_axes(size: int, name: str, among: tuple[str, ...]) -> tuple[str, ...]:
    """Those axes of a logical name that are `among` others, if together they divide `size`; else none."""
    kept = tuple(axis for axis in DEFAULT_RULES.axes(name) if axis in among)
    return kept if kept and size % ways(kept) == 0 else ()


def whole_tiles(size: int) -> int:
    """What a long dimension is filled up to so that the TPU compiler can sum an array into parts.

    On a torus of three dimensions it wants a multiple of three times 128 lanes, and else sums the whole array.
    """
    return -(-size // _TILE) * _TILE if size >= 16 * _TILE else size


def sum_into(x: Array, dimension: int, scattered: tuple[str, ...], axes: tuple[str, ...]) -> jax.Array:
    """Inside `jax.shard_map`: the sum over mesh axes; `scattered` ones leave each device its part of a dimension."""
    summed = jnp.asarray(x)
    if scattered:
        summed = jax.lax.psum_scatter(summed, scattered, scatter_dimension=dimension, tiled=True)
    whole = tuple(axis for axis in axes if axis not in scattered)
    return jnp.asarray(jax.lax.psum(summed, whole)) if whole else summed


def _axes(entry: MeshAxes) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: tuple[str, ...]) -> MeshAxes:
    return None if not axes else axes[0] if len(axes) == 1 else axes


@functools.cache
def _log_replicated(name: str | None, size: int, axis: str, axis_size: int) -> None:
    log.warning(
        "dimension %r of size %d does not divide by mesh axis %s=%d: replicated over it", name, size, axis, axis_size
    )
