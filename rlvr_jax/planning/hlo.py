"""A compiled program as text (`compiled.as_text()`): computations, instructions, and how often each one runs.

`cost_analysis()` counts the body of a loop once. Here every instruction knows how many times it runs: the trip counts
of the loops around it, multiplied. Texts of 8B programs have tens of MB, so lines are read once and operands are
looked at only where they are asked for.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?(%[\w.\-$]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.\-$]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", re.DOTALL)
_SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_NAME = re.compile(r"%[\w.\-$]+")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.\-$]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Operations whose called computation runs as a part of the program; that of a reduce or a sort is its operator.
_CALLERS = {"fusion", "while", "conditional", "call", "async-start"}


class Shape(NamedTuple):
    """An array's element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def size(self) -> int:
        """Bytes."""
        return -(-self.elements * _bits(self.dtype) // 8)


class Instruction(NamedTuple):
    """One instruction. `rest` is what follows the opening parenthesis: operands, then attributes."""

    name: str
    result: str
    opcode: str
    rest: str
    root: bool

    @property
    def shapes(self) -> list[Shape]:
        """The arrays of the result."""
        return shapes(self.result)

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _NAME.findall(self.rest[: _closing(self.rest)])

    @property
    def attributes(self) -> str:
        """What follows the operands."""
        return self.rest[_closing(self.rest) + 1 :]

    @property
    def op_name(self) -> str:
        """The Python operation that it comes from."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate of one execution, in clock cycles; 0 where it gives none."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else 0


Computation = dict[str, Instruction]


class Use(NamedTuple):
    """How often a computation runs, and whether it is the inside of a fusion (or another kernel)."""

    times: int
    fused: bool


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program.

    Attributes:
      computations: by name, callees before callers.
      entry: name of the computation that is the program.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations that are the inside of a fusion."""
        every = (x for computation in self.computations.values() for x in computation.values())
        return frozenset(name for x in every if x.opcode == "fusion" for _, name in called(x))

    def operand_shapes(self, computation: str, instruction: Instruction) -> list[list[Shape]]:
        """The arrays of each operand."""
        inside = self.computations[computation]
        return [inside[name].shapes for name in instruction.operands if name in inside]

    def uses(self, unknown_trips: int = 1, *, smallest_branch: bool = False) -> tuple[dict[str, Use], list[str]]:
        """How often each computation runs, and the loops whose trip count nobody knows (`unknown_trips` is taken).

        Of the branches of a conditional only the one with the largest estimate (else the most instructions) counts; or
        the smallest.
        """
        choose = min if smallest_branch else max
        times: dict[str, int] = defaultdict(int, {self.entry: 1})
        fused, unknown = set(self.fused), []
        for name in reversed(self.computations):
            if not times[name]:
                continue
            for x in self.computations[name].values():
                if x.opcode not in _CALLERS:
                    continue
                factor = 1
                if x.opcode == "while":
                    factor = trip_count(self, name, x)
                    if factor is None:
                        unknown.append(x.name)
                        factor = unknown_trips
                targets = [target for _, target in called(x)]
                if x.opcode == "conditional":
                    targets = [choose(targets, key=self._weight)]
                for target in targets:
                    times[target] += times[name] * factor
                    if name in fused:
                        fused.add(target)
        return {name: Use(count, name in fused) for name, count in times.items() if count}, unknown

    def _weight(self, name: str) -> tuple[int, int]:
        inside = self.computations[name]
        below = [self._weight(target) for x in inside.values() if x.opcode in _CALLERS for _, target in called(x)]
        cycles = sum(x.cycles for x in inside.values()) + sum(weight[0] for weight in below)
        return cycles, len(inside) + sum(weight[1] for weight in below)


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`. Raises ValueError where the text has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, inside, begun = "", None, ""

    def keep() -> None:
        if inside is not None and (found := _INSTRUCTION.match(begun)):
            root, name, result, opcode, rest = found.groups()
            inside[name] = Instruction(name, result, opcode, rest, bool(root))

    for line in text.splitlines():
        if inside is None:
            if header := _HEADER.match(line):
                inside = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line == "}":
            keep()
            inside, begun = None, ""
        elif line.startswith(("  %", "  ROOT ")):
            keep()
            begun = line
        else:  # attributes of kernels have line breaks
            begun += "\n" + line
    if not entry:
        raise ValueError("no ENTRY computation: expected the text of a compiled program")
    return Module(computations, entry)


def shapes(text: str) -> list[Shape]:
    """The arrays in a type: one, or those of a tuple, nested ones included."""
    return [
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(text)
        if dtype not in ("token", "opaque")
    ]


def called(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """(role, computation) of what an instruction calls."""
    attributes = instruction.attributes
    yield from _CALLED.findall(attributes)
    if found := _BRANCHES.search(attributes):
        yield from (("branch", name) for name in _NAME.findall(found[1]))


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, at most: as the compiler notes it, else from the counter in its condition.

    A condition may end the loop earlier (`i < n and ...`).
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    roles = dict(called(loop))
    ends = [_root_node(module, roles["condition"])]
    while ends and ends[0].instruction.opcode == "and":
        ends = ends[0].operands(module) + ends[1:]
    for end in ends:
        direction = re.search(r"direction=(LT|LE)", end.instruction.attributes)
        if end.instruction.opcode != "compare" or direction is None:
            continue
        counter, limit = end.operands(module)
        bound, index = limit.constant, counter.tuple_index
        if bound is not None and index is not None:
            begin = _element(module, _node(module, computation, loop.operands[0]), index)
            step = _step(module, roles["body"], index)
            first = (begin and begin.constant) or 0
            return max(0, -(-(bound + (direction[1] == "LE") - first) // (step or 1)))
    return None


class _Node(NamedTuple):
    """A value, seen through copies and into fusions. `given` are the operands of the fusion that it is in."""

    computation: str
    instruction: Instruction
    given: tuple

    def operands(self, module: Module) -> list["_Node"]:
        return [_node(module, self.computation, name, self.given) for name in self.instruction.operands]

    @property
    def constant(self) -> int | None:
        if self.instruction.opcode != "constant":
            return None
        value = self.instruction.rest[: _closing(self.instruction.rest)]
        return int(value) if value.lstrip("-").isdigit() else None

    @property
    def tuple_index(self) -> int | None:
        found = self.instruction.opcode == "get-tuple-element" and re.search(
            r"index=(\d+)", self.instruction.attributes
        )
        return int(found[1]) if found else None


def _node(module: Module, computation: str, name: str, given: tuple = ()) -> _Node:
    x = module.computations[computation][name]
    if x.opcode in ("copy", "bitcast", "convert", "reshape"):
        return _node(module, computation, x.operands[0], given)
    if x.opcode == "parameter" and given:
        return given[int(x.rest[: _closing(x.rest)])]
    if x.opcode == "fusion":
        return _root_node(module, dict(called(x))["calls"], _Node(computation, x, given).operands(module))
    return _Node(computation, x, given)


def _root_node(module: Module, computation: str, given: Sequence[_Node] = ()) -> _Node:
    root = next(x for x in module.computations[computation].values() if x.root)
    return _node(module, computation, root.name, tuple(given))


def _element(module: Module, whole: _Node, index: int) -> _Node | None:
    """An element of a tuple that is made in the same computation."""
    if whole.instruction.opcode != "tuple" or index >= len(whole.instruction.operands):
        return None
    return _node(module, whole.computation, whole.instruction.operands[index], whole.given)


def _step(module: Module, body: str, index: int) -> int | None:
    """What the body adds to its counter."""
    new = _element(module, _root_node(module, body), index)
    if new is None or new.instruction.opcode != "add":
        return None
    return next((x.constant for x in new.operands(module) if x.constant is not None), None)


def _closing(rest: str) -> int:
    """Where the parenthesis closes that is open at the beginning."""
    depth, at = 1, -1
    while depth:
        close, opened = rest.find(")", at + 1), rest.find("(", at + 1)
        if close < 0:
            return len(rest)
        if 0 <= opened < close:
            depth, at = depth + 1, opened
        else:
            depth, at = depth - 1, close
    return at


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+?(\d+)", dtype)
    return int(found[1]) if found else 0
