"""Collectives of a compiled program: what kind, over which axes of the mesh, how many bytes a chip sends."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from rlvr_jax.planning.hlo import Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: of `KINDS`; an all-reduce whose result is at once cut into shards (one fusion on TPUs) is a reduce-scatter.
      axes: the mesh axes along which the chips of a group differ.
      group: position in the mesh (flat) of the chips of one group; of a permutation a source and its target.
      payload: bytes a chip of the whole array: what is gathered, reduced, scattered or passed on.
      sent: bytes that each chip sends in one execution, if the chips of a group pass parts around a ring.
      times: executions.
      overlapped: it is started and waited for apart, so other work may run meanwhile.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    payload: int
    sent: float
    times: int
    overlapped: bool
    name: str
    op_name: str

    @property
    def bytes(self) -> float:
        """Bytes that each chip sends in all executions."""
        return self.sent * self.times


def kind_of(x: Instruction) -> str | None:
    """The kind of a collective instruction (the start of an asynchronous one); None for anything else."""
    kind = x.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def collective(
    module: Module, computation: str, x: Instruction, times: int, fused: bool, mesh_shape: dict[str, int]
) -> Collective:
    """Reads a collective instruction. `mesh_shape`: axis names and sizes, in the order of the mesh's devices."""
    kind = kind_of(x) or ""
    groups = device_groups(x, math.prod(mesh_shape.values()))
    size = len(groups[0])
    operand = sum(shape.size for shapes in module.operand_shapes(computation, x) for shape in shapes)
    scattered = fused and any(y.opcode == "dynamic-slice" for y in module.computations[computation].values())
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    payload = operand * size if kind == "all-gather" else operand
    share = (size - 1) / size if size else 0.0
    sent = payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return Collective(
        kind, _axes(groups, mesh_shape), tuple(groups[0]), payload, sent, times, x.opcode.endswith("-start"),
        x.name, x.op_name,
    )  # fmt: skip


def device_groups(x: Instruction, devices: int) -> list[list[int]]:
    """The groups of a collective, of a permutation its (source, target) pairs with different ends.

    Understands `{{0,1},{2,3}}`, `[groups,size]<=[dims]T(order)` and `mesh['a'=2,...] {'a'}`; the device numbers are
    positions in the mesh.
    """
    attributes = x.attributes
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        pairs = [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])]
        return [pair for pair in pairs if pair[0] != pair[1]] or pairs[:1] or [[0]]
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return groups or [list(range(devices))]
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(found[1]).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        return _named(*found.groups())
    raise ValueError(f"{x.name}: replica groups are not understood: {attributes[:200]}")


def _iota(text: str) -> np.ndarray:
    """`[groups,size]<=[dims]T(order)`: 0, 1, 2, ... as `dims`, transposed, then as rows; without `<=` a flat list."""
    found = re.fullmatch(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"{text!r}: expected [groups,size]<=[dims]T(order)")
    result, dims, order = ([int(i) for i in part.split(",")] if part else [] for part in found.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(result) if result else ids.reshape(-1)


def _named(mesh: str, ids: str | None, axes: str) -> list[list[int]]:
    """`mesh['a'=2,'b'=4], device_ids=(...) {'a'}`; an axis may be a part of one: 'a':(before)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    flat = np.arange(math.prod(sizes.values()))
    if ids:
        flat = _iota(ids) if "[" in ids else np.array(ids.split(","), int)
    dims: list[int] = []
    chosen: list[int] = []
    wanted = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in sizes.items():
        before, part = wanted.get(name, ("", ""))
        if name in wanted and not part:
            chosen.append(len(dims))
            dims.append(size)
        elif part:
            chosen.append(len(dims) + 1)
            dims += [int(before), int(part), size // (int(before) * int(part))]
        else:
            dims.append(size)
    grid = np.moveaxis(flat.reshape(dims), chosen, range(-len(chosen), 0)) if chosen else flat.reshape(-1, 1)
    return grid.reshape(-1, math.prod(dims[i] for i in chosen)).tolist()


def _axes(groups: Sequence[Sequence[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Axes along which the members of any group differ."""
    sizes = tuple(mesh_shape.values())
    found: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.asarray(group), sizes))
        found |= set(np.nonzero((places != places[:, :1]).any(axis=1))[0].tolist())
        if len(found) == len(sizes):
            break
    return tuple(name for i, name in enumerate(mesh_shape) if i in found)
