"""What a compiled program takes a chip: memory, FLOPs, collectives, and an estimate of its time from these.

The time is never measured: the compiler's own cycles of the fusions, the FLOPs of the kernels at a stated share of the
chip's peak, and the bytes of the collectives at the links' rate. Nothing here runs anything.
"""

import dataclasses
import math
from collections import defaultdict
from typing import Any

from jax.sharding import Mesh

from rlvr_jax.planning import hlo
from rlvr_jax.planning.chips import Chip
from rlvr_jax.planning.collectives import Collective, collective, kind_of
from rlvr_jax.planning.flops import dot_flops, kernel
from rlvr_jax.planning.interconnect import Interconnect
from rlvr_jax.planning.traffic import Traffic

# Share of the peak FLOP/s that kernels, and matrix products where the compiler estimates no time, are taken to reach:
# an assumption, not a measurement.
KERNEL_EFFICIENCY = 0.6


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a chip, by the compiler's account.

    Attributes:
      argument: of the arguments. alias: of those whose memory the results take over. output: of the results.
      temporary: of everything in between. peak: the most at any time, arguments included.
    """

    argument: int
    output: int
    alias: int
    temporary: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Instructions that come from one Python operation, summed over their executions: what they take a chip."""

    op_name: str
    kind: str
    times: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """Executions of a kernel: FLOPs and bytes of all of them; `known` False where its FLOPs are not counted."""

    name: str
    times: int
    flops: float
    size: int
    known: bool


@dataclasses.dataclass(frozen=True)
class Account:
    """A program on one chip of a mesh, everything weighted by how often it runs.

    Attributes:
      memory: the compiler's account.
      dot_flops: of matrix products and convolutions. kernels: those that XLA does not see into.
      fusion_s: everything but kernels and collectives: the compiler's estimate, where it gives none `roofline_s`.
      roofline_s: the same, each instruction by its FLOPs at `KERNEL_EFFICIENCY` of the peak or its bytes at the
        memory's bandwidth, whichever takes longer. traffic: these bytes.
      kernel_s: FLOPs of the kernels at `KERNEL_EFFICIENCY` of the peak, or their bytes at the memory's bandwidth.
      collective_s: bytes of the collectives at the links' rate, one after the other.
      hidden_s: of those, what is started and waited for apart, so that other work may run meanwhile.
      collectives, collective_each_s: each instruction, and the estimate of all its executions.
      parts: the largest by estimated time, of fusions and matrix products.
      unknown_loops: loops whose trip count the program does not tell; one trip was counted.
    """

    memory: Memory
    dot_flops: float
    kernels: tuple[KernelUse, ...]
    fusion_s: float
    roofline_s: float
    traffic: float
    kernel_s: float
    collective_s: float
    hidden_s: float
    collectives: tuple[Collective, ...]
    collective_each_s: tuple[float, ...]
    parts: tuple[Part, ...]
    unknown_loops: tuple[str, ...]

    @property
    def flops(self) -> float:
        """FLOPs a chip, kernels included."""
        return self.dot_flops + sum(kernel.flops for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        """The estimate: fusions, then kernels, then collectives, nothing at the same time as anything else."""
        return self.fusion_s + self.kernel_s + self.collective_s

    def by_axis(self) -> dict[tuple[str, tuple[str, ...]], tuple[int, float, float]]:
        """(kind, axes) -> (executions, bytes that a chip sends, seconds) of the collectives."""
        table: dict[tuple[str, tuple[str, ...]], tuple[int, float, float]] = defaultdict(lambda: (0, 0.0, 0.0))
        for x, seconds in zip(self.collectives, self.collective_each_s, strict=True):
            times, size, before = table[x.kind, x.axes]
            table[x.kind, x.axes] = (times + x.times, size + x.bytes, before + seconds)
        return dict(table)


def account(
    compiled: Any, mesh: Mesh, chip: Chip, *, unknown_trips: int = 1, smallest_branch: bool = False, largest: int = 12
) -> Account:
    """Accounts for `jit(f).lower(...).compile()` on a mesh of `chip`s.

    Args:
      compiled: the compiled program, for a topology's description or for devices that are there.
      mesh: the mesh that it was compiled for.
      chip: what its devices are.
      unknown_trips: executions of a loop whose trip count depends on data.
      smallest_branch: of a conditional the smallest branch runs, not the largest.
      largest: how many `parts` are kept.
    """
    memory = compiled.memory_analysis()
    sizes = Memory(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
    )
    return account_text(
        compiled.as_text() or "",
        sizes,
        mesh,
        chip,
        unknown_trips=unknown_trips,
        smallest_branch=smallest_branch,
        largest=largest,
    )


def account_text(
    text: str,
    memory: Memory,
    mesh: Mesh,
    chip: Chip,
    *,
    unknown_trips: int = 1,
    smallest_branch: bool = False,
    largest: int = 12,
) -> Account:
    """As `account`, from the program's text."""
    module = hlo.parse(text)
    uses, unknown = module.uses(unknown_trips, smallest_branch=smallest_branch)
    shape = dict(mesh.shape)
    flops = cycles = roofline = moved = 0.0
    traffic, inner = Traffic(module), _inner_flops(module)
    found: dict[str, Collective] = {}
    kernels: dict[str, KernelUse] = {}
    parts: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for name, use in uses.items():
        for x in module.computations[name].values():
            if x.opcode in ("dot", "convolution"):
                once = dot_flops(module, name, x)
                flops += once * use.times
                parts[x.op_name, ""][1] += once * use.times
            elif kind_of(x):
                made = collective(module, name, x, use.times, use.fused, shape)
                found.setdefault(_channel(x), made)
            elif x.opcode == "custom-call" and (one := kernel(module, name, x)):
                before = kernels.get(one.name, KernelUse(one.name, 0, 0.0, 0, one.known))
                kernels[one.name] = dataclasses.replace(
                    before,
                    times=before.times + use.times,
                    flops=before.flops + one.flops * use.times,
                    size=before.size + one.size * use.times,
                )
            if not use.fused and not kind_of(x):
                size = traffic.bytes(name, x)
                once = dot_flops(module, name, x) + (
                    inner[dict(hlo.called(x))["calls"]] if x.opcode == "fusion" else 0.0
                )
                seconds = max(once / (KERNEL_EFFICIENCY * chip.flops), size / chip.bandwidth) * use.times
                moved, roofline = moved + float(size) * use.times, roofline + seconds
                if not chip.clock and seconds:
                    part = parts[x.op_name, ""]
                    part[0], part[2] = part[0] + use.times, part[2] + seconds
            if not use.fused and x.cycles:
                cycles += x.cycles * use.times
                part = parts[x.op_name, ""]
                part[0], part[2] = part[0] + use.times, part[2] + x.cycles * use.times
    interconnect = Interconnect.of(mesh, chip)
    times = {key: interconnect.seconds(x) for key, x in found.items()}
    clock = chip.clock or 1.0
    every = [Part(op, kind, int(n), f, c / clock) for (op, kind), (n, f, c) in parts.items()]
    return Account(
        memory=memory,
        dot_flops=flops,
        kernels=tuple(kernels.values()),
        fusion_s=float(cycles / clock) if chip.clock else roofline,
        roofline_s=roofline,
        traffic=moved,
        kernel_s=math.fsum(
            max(x.flops / (KERNEL_EFFICIENCY * chip.flops), x.size / chip.bandwidth) for x in kernels.values()
        ),
        collective_s=math.fsum(times.values()),
        hidden_s=math.fsum(times[key] for key, x in found.items() if x.overlapped),
        collectives=tuple(found.values()),
        collective_each_s=tuple(times[key] for key in found),
        parts=tuple(sorted(every, key=lambda part: (-part.seconds, -part.flops))[:largest]),
        unknown_loops=tuple(unknown),
    )


def _inner_flops(module: hlo.Module) -> dict[str, float]:
    """FLOPs inside of each fusion, those of fusions in it included."""
    found: dict[str, float] = defaultdict(float)
    for name, inside in module.computations.items():  # callees first
        if name in module.fused:
            for x in inside.values():
                found[name] += dot_flops(module, name, x)
                found[name] += found[dict(hlo.called(x))["calls"]] if x.opcode == "fusion" else 0.0
    return found


def _channel(x: hlo.Instruction) -> str:
    """What tells collectives apart: parts of one that is spread over several fusions have one channel."""
    at = x.rest.find("channel_id=")
    return x.rest[at : x.rest.find(",", at)] if at >= 0 else x.name
