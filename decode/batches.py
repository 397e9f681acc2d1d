"""Which responses of one seed are decoded together."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Unit:
    """One prompt of a batch: its place among the problems, and the first of the samples drawn from it."""

    place: int
    first: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Batches of equal shape: every unit stands for `group` consecutive samples of its prompt, prefilled once.

    A last batch with too few units is filled up by repeating one, and samples from n on are surplus: neither is kept.
    The plan does not depend on what is finished, so that a resumed run computes the very same batches.
    """

    n: int
    group: int
    units: int
    batches: tuple[tuple[Unit, ...], ...]

    def kept(self, batch: Sequence[Unit]) -> list[tuple[int, int, int]]:
        """What is kept of a batch: (row of the batch, place of the problem, sample)."""
        rows = [(i, unit, j) for i, unit in enumerate(batch) for j in range(self.group) if unit.first + j < self.n]
        return [(i * self.group + j, unit.place, unit.first + j) for i, unit, j in rows]

    def filled(self, batch: Sequence[Unit]) -> list[Unit]:
        """The batch with its last unit repeated up to the common size."""
        return [*batch, *[batch[-1]] * (self.units - len(batch))]


def plan(problems: int, n: int, batch_rows: int) -> Plan:
    """n samples of every problem in as few batches as hold at most `batch_rows` responses, all nearly full."""
    group = _even(n, batch_rows)
    units = [Unit(place, first) for place in range(problems) for first in range(0, n, group)]
    size = _even(len(units), batch_rows // group)
    return Plan(n, group, size, tuple(tuple(units[i : i + size]) for i in range(0, len(units), size)))


def _even(total: int, most: int) -> int:
    """Size of the parts when `total` is cut into as few parts of at most `most` as it takes."""
    parts = -(-total // most)
    return -(-total // parts)
