"""How the tokens of a training forward lie on a mesh: in one dimension M = B T, in the order that devices keep them.

Between the layers every device has tokens of its own, over the axis "tensor" too (arXiv 2205.05198); inside of them the
devices of a tensor group have the same tokens and different heads. Arrays are [M, D] and not [B, T, D], since the TPU
compiler sums into parts along the first of two dimensions, but not along the second of three.
"""

import functools
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from rlvr_jax.sharding.rules import DEFAULT_RULES, ambient_mesh, constrain, fitting_axes, ways
from rlvr_jax.typing import Array

Names = tuple[str | None, ...]


class Batched:
    """How decoding lays out [B, T, ...]: rows over the devices, weights as they are."""

    @staticmethod
    def place(x: Array, name: str | None = None) -> Array:
        """[B, T, name, ...] kept in place."""
        return constrain(x, "batch", None, name, *[None] * (x.ndim - 3))

    enter = leave = place

    @staticmethod
    def weight(*names: str | None) -> Names | None:
        """Logical names by which a weight is gathered where it is used: none is."""
        del names
        return None


class TokenLayout(NamedTuple):
    """Where tokens lie. Attributes: batch, time: mesh axes of rows and of their tokens; part: more between layers."""

    rows: int
    length: int
    batch: tuple[str, ...]
    time: tuple[str, ...]
    part: tuple[str, ...]

    @classmethod
    def of(cls, rows: int, length: int) -> "TokenLayout":
        """The layout of [rows, length] on the ambient mesh."""
        mesh = ambient_mesh()
        batch, time = fitting_axes(mesh, "batch", rows), fitting_axes(mesh, "time", length)
        part = tuple(
            axis for axis in DEFAULT_RULES.axes("residual") if mesh is not None and mesh.shape.get(axis, 1) > 1
        )
        whole = rows * length // (ways(batch) * ways(time) if mesh is not None else 1)
        return cls(rows, length, batch, time, part if part and whole % ways(part) == 0 else ())

    @property
    def local_rows(self) -> int:
        """Rows of a device."""
        return self.rows // ways(self.batch)

    def flat(self, x_BT: Array) -> Array:
        """[B, T, ...] as [M, ...]."""
        if ambient_mesh() is None:
            return x_BT.reshape(-1, *x_BT.shape[2:])
        return self._mapped(x_BT, PartitionSpec(self.batch or None, self.time or None), self.tokens, ())

    def apart(self, x_M: Array) -> Array:
        """[M, ...] from between layers as [B, T, ...]."""
        if ambient_mesh() is None:
            return x_M.reshape(self.rows, self.length, *x_M.shape[1:])
        return _apart(x_M, self)

    def _mapped(self, x: Array, within: PartitionSpec, out: PartitionSpec, rows: tuple[int, ...]) -> Array:
        rest = x.shape[1 if rows else 2 :]
        return jax.shard_map(lambda x: x.reshape(*rows, -1, *rest), in_specs=within, out_specs=out, check_vma=False)(x)

    @property
    def tokens(self) -> PartitionSpec:
        """Of [M, ...] within a layer."""
        return PartitionSpec((*self.batch, *self.time) or None)

    def place(self, x: Array, name: str | None = None) -> Array:
        """[M, name, ...] kept in place within a layer."""
        return self._placed(x, name, ())

    def between(self, x_M: Array) -> Array:
        """[M, ...] kept in place between layers."""
        return self._placed(x_M, None, self.part)

    def enter(self, x: Array) -> Array:
        """[M, ...] from between layers to within one: gathered, its gradient summed into parts."""
        return _enter(x, self)

    def leave(self, x: Array) -> Array:
        """[M, ...] from within a layer to between two: summed into parts, its gradient gathered."""
        return _leave(x, self)

    def _placed(self, x_M: Array, name: str | None, part: tuple[str, ...]) -> Array:
        mesh = ambient_mesh()
        if mesh is None:
            return x_M
        tokens = (*self.batch, *self.time, *part)
        second = () if name is None else fitting_axes(mesh, name, x_M.shape[1])
        second = tuple(axis for axis in second if axis not in tokens)
        return jax.lax.with_sharding_constraint(x_M, PartitionSpec(tokens or None, second or None))

    @staticmethod
    def weight(*names: str | None) -> Names | None:
        """Logical names by which a weight is gathered where it is used, and its gradient summed into parts."""
        return names


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x_M: Array, layout: TokenLayout) -> Array:
    return layout.place(x_M)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _apart(x_M: Array, layout: TokenLayout) -> Array:
    out = PartitionSpec(layout.batch or None, layout.time or None)
    return layout._mapped(layout.place(x_M), layout.tokens, out, (layout.local_rows,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(x_M: Array, layout: TokenLayout) -> Array:
    return layout.between(x_M)


# A constraint's own gradient is laid out as its result, which would sum whole arrays, or gather none.
_enter.defvjp(lambda x_M, layout: (layout.place(x_M), None), lambda layout, _, d_M: (layout.between(d_M),))
# The gradient at `_apart` is whole in every device of a tensor group already: it is cut, not summed.
_apart.defvjp(
    lambda x_M, layout: (_apart(x_M, layout), None), lambda layout, _, d_BT: (layout.between(layout.flat(d_BT)),)
)
_leave.defvjp(lambda x_M, layout: (layout.between(x_M), None), lambda layout, _, d_M: (layout.place(d_M),))
