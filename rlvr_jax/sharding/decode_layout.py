"""Where decoding keeps its arrays: weights split over the whole tensor axis, caches over rows and kv heads.

A decode step reads every weight and every live position of the cache once, so both should lie in as many parts as there
are devices, and no weight should be gathered. Kv heads are few (8, or 4) and the tensor axis may be longer. So a decode
mesh takes that axis apart: `tensor`, the part that splits kv heads, and `rows`, the rest, over which attention splits
the *rows* of the batch. No head of the cache is kept twice; what changes hands is the queries and results of a step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from rlvr_jax.sharding.rules import DEFAULT_RULES, ROWS, MeshAxes, ShardingRules

AnyMesh = TypeVar("AnyMesh", Mesh, AbstractMesh)
AXES = ("data", "fsdp", "tensor", ROWS)


@dataclasses.dataclass(frozen=True)
class DecodeRules(ShardingRules):
    """Rules of the weights that decoding reads: none is split over the batch's axes.

    Axes that neither heads, feed-forward width nor vocabulary can use, since they do not divide them, split the model
    dimension instead. Each device then multiplies its part of the sum, which moves a row's numbers and not the weights.
    """

    embed: MeshAxes = None

    def fitting_spec(
        self, mesh: Mesh | AbstractMesh, names: Sequence[str | None], shape: Sequence[int]
    ) -> PartitionSpec:
        """See `ShardingRules.fitting_spec`."""
        entries = list(super().fitting_spec(mesh, names, shape))
        if "embed" not in names:
            return PartitionSpec(*entries)
        used = {axis for entry in entries if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
        place, spare = list(names).index("embed"), []
        for axis in self.axes("heads"):
            ways = mesh.shape.get(axis, 1) * math.prod(mesh.shape[a] for a in spare)
            if axis not in used and mesh.shape.get(axis, 1) > 1 and shape[place] % ways == 0:
                spare.append(axis)
        if spare:
            entries[place] = spare[0] if len(spare) == 1 else tuple(spare)
        return PartitionSpec(*entries)


DECODE_RULES = DecodeRules()


def decode_mesh(mesh: AnyMesh, kv_heads: Sequence[int], tensor: int | None = None) -> AnyMesh:
    """The same devices in the same order, with the axes that decoding wants.

    Args:
      mesh: any mesh of `sharding.make_mesh`, or one that this function made.
      kv_heads: of the models that decode together.
      tensor: in how many parts the weights are split; by default as `mesh` splits them. With more of them each device
        holds fewer weights, and more of them share a row.

    Returns:
      A mesh of axes data, fsdp, tensor and, where the kv heads do not split so far, rows; `mesh` itself if that is it.

    Raises:
      ValueError: `tensor` does not divide the number of devices.
    """
    parts = mesh.shape.get("tensor", 1) * mesh.shape.get(ROWS, 1) if tensor is None else tensor
    if parts < 1 or mesh.size % parts:
        raise ValueError(f"tensor={parts} for decoding: expected a divisor of the mesh's {mesh.size} devices")
    heads = math.gcd(parts, *kv_heads)
    batch = mesh.size // parts
    data = math.gcd(mesh.shape.get("data", 1), batch)
    sizes = {"data": data, "fsdp": batch // data, "tensor": heads, ROWS: parts // heads}
    if sizes == {axis: mesh.shape.get(axis, 1) for axis in AXES}:
        return mesh
    if sizes[ROWS] == 1:
        del sizes[ROWS]
    types = (AxisType.Auto,) * len(sizes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return Mesh(np.reshape(mesh.devices, tuple(sizes.values())), tuple(sizes), axis_types=types)


def cache_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """In how many parts a decode mesh splits the rows of its caches, where they divide; 1 without a mesh."""
    axes = DEFAULT_RULES.axes("cache_rows")
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in axes)


def parts_of(mesh: Mesh | AbstractMesh | None, name: str, size: int) -> int:
    """In how many parts a decode mesh splits a dimension of this logical name and size; 1 without a mesh."""
    if mesh is None:
        return 1
    (axes,) = DECODE_RULES.fitting_spec(mesh, (name,), (size,))
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
