"""Bytes to and from memory, and from them a time where a compiler estimates none (CUDA): a roofline, so a lower bound.

An instruction reads its operands and writes its result. What a fusion only slices counts as the slice, and what it
updates in place as the update.
"""

import functools
import math
from typing import Any

from rlvr_jax.planning.hlo import Computation, Instruction, Module, called, shapes

_NAMING = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "domain", "custom-call", "async-start", "copy-start"),
}
_SLICES = {"dynamic-slice", "gather", "slice"}


class Traffic:
    """Bytes that the instructions of a module move; keeps what it has found out of fusions."""

    def __init__(self, module: Module):
        self._module = module
        self._fused = functools.cache(self._of_fused)

    def bytes(self, computation: str, x: Instruction) -> int:
        """Bytes of one execution; kernels and collectives are counted elsewhere."""
        if x.opcode in _NAMING or x.opcode.endswith("-done") or x.opcode.endswith("-start"):
            return 0
        inside = self._module.computations[computation]
        if x.opcode == "fusion":
            fused = dict(called(x))["calls"]
            reads, written = self._fused(fused)
            sizes = [_size(inside.get(name)) for name in x.operands]
            read = sum(min(size, reads.get(i, math.inf)) for i, size in enumerate(sizes))
            return int(read + (_size(x) if written is None else written))
        if x.opcode in _SLICES:
            return 2 * _size(x)
        if x.opcode == "dynamic-update-slice":
            return 2 * _size(inside.get(x.operands[1]))
        return _size(x) + sum(_size(inside.get(name)) for name in x.operands)

    def _of_fused(self, name: str) -> tuple[dict[int, int], int | None]:
        """(by parameter: bytes read where that is not all of it, bytes written where that is not the whole result)."""
        inside = self._module.computations[name]
        users: dict[str, list[Instruction]] = {}
        for x in inside.values():
            for operand in x.operands if x.opcode != "parameter" else ():
                users.setdefault(operand, []).append(x)
        reads: dict[int, int] = {}
        for x in inside.values():
            if x.opcode == "parameter":
                parts = [_part(user, x.name) for user in _seen_through(users, x.name)]
                if None not in parts:
                    reads[int(x.rest[: x.rest.index(")")])] = sum(part or 0 for part in parts)
        root = next(x for x in inside.values() if x.root)
        results = [inside[operand] for operand in root.operands] if root.opcode == "tuple" else [root]
        return reads, sum(_written(inside, x) for x in results)


def _seen_through(users: dict[str, list[Instruction]], name: str) -> list[Instruction]:
    """The users of a value, bitcasts replaced by their users."""
    found: list[Instruction] = []
    for user in users.get(name, []):
        found += _seen_through(users, user.name) if user.opcode == "bitcast" else [user]
    return found


def _part(user: Instruction, name: str) -> int | None:
    """Bytes that a user reads of an operand; None: all of it."""
    if user.opcode in _SLICES:
        return _size(user)
    if user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
        return 0
    return None


def _written(inside: Computation, x: Instruction) -> int:
    while x.opcode in ("bitcast", "copy"):
        x = inside[x.operands[0]]
    if x.opcode in ("dynamic-update-slice", "scatter"):
        return _size(inside[x.operands[1 if x.opcode == "dynamic-update-slice" else -1]])
    return _size(x)


def _size(x: Any) -> int:
    return 0 if x is None else sum(shape.size for shape in shapes(x.result))
