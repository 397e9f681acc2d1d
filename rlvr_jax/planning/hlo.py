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
from collections.abc import Iterator
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
    condition, body = (module.computations[roles[role]] for role in ("condition", "body"))
    root = _root(condition)
    while root.opcode == "and":
        sides = (condition[name] for name in root.operands)
        root = next((x for x in sides if x.opcode == "and" or (x.opcode == "compare" and _bounded(condition, x))), None)
        if root is None:
            return None
    if root.opcode == "fusion":  # the comparison alone in a fusion, whose operands are its parameters in order
        inner = _root(module.computations[dict(called(root))["calls"]])
        order = [int(_parameter_number(module.computations[dict(called(root))["calls"]], x)) for x in inner.operands]
        sides, root = [root.operands[i] for i in order if i >= 0], inner
    else:
        sides = root.operands
    if root.opcode != "compare" or len(sides) != 2:
        return None
    direction = re.search(r"direction=(\w\w)", root.attributes)
    bound, index = _constant(condition, sides[1]), _tuple_index(condition, sides[0])
    if bound is None or index is None or direction is None or direction[1] not in ("LT", "LE"):
        return None
    first = _operand_of_tuple(module.computations[computation], loop.operands[0], index)
    begin = None if first is None else _constant(module.computations[computation], first)
    step = _step(body, index)
    return max(0, -(-(bound + (direction[1] == "LE") - (begin or 0)) // (step or 1)))


def _bounded(computation: Computation, compare: Instruction) -> bool:
    """Whether a comparison is that of a counter with a constant."""
    counter, bound = compare.operands
    return _tuple_index(computation, counter) is not None and _constant(computation, bound) is not None


def _step(body: Computation, index: int) -> int | None:
    new = _operand_of_tuple(body, _root(body).name, index)
    if new is None or body[new].opcode != "add":
        return None
    return next((value for name in body[new].operands if (value := _constant(body, name)) is not None), None)


def _root(computation: Computation) -> Instruction:
    return next(x for x in computation.values() if x.root)


def _parameter_number(computation: Computation, name: str) -> int:
    x = computation[name]
    return int(x.rest[: _closing(x.rest)]) if x.opcode == "parameter" else -1


def _through_copies(computation: Computation, name: str) -> Instruction | None:
    while (x := computation.get(name)) is not None and x.opcode in ("copy", "bitcast", "convert", "reshape"):
        name = x.operands[0]
    return x


def _constant(computation: Computation, name: str) -> int | None:
    x = _through_copies(computation, name)
    if x is None or x.opcode != "constant":
        return None
    value = x.rest[: _closing(x.rest)]
    return int(value) if value.lstrip("-").isdigit() else None


def _tuple_index(computation: Computation, name: str) -> int | None:
    x = _through_copies(computation, name)
    found = x and x.opcode == "get-tuple-element" and re.search(r"index=(\d+)", x.attributes)
    return int(found[1]) if found else None


def _operand_of_tuple(computation: Computation, name: str, index: int) -> str | None:
    x = computation.get(name)
    return x.operands[index] if x is not None and x.opcode == "tuple" and index < len(x.operands) else None


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
