"""A program of a run compiled for a topology, and what it takes there beside what it should.

    mesh = topology.mesh({"data": 1, "fsdp": 16, "tensor": 4})
    with jax.set_mesh(mesh):
        made = compile_program(
            "score", lambda: score.lower(params, tokens, segment, temperature), mesh, topology.chip,
            holds={"params": params}, resident={"optimizer": opt_state}, model_flops=..., ideal_flops=...,
        )

Everything goes through plain dicts (`ProgramAccount.plain`), since it crosses from the compiler's process as JSON.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlvr_jax.planning.account import Account, account
from rlvr_jax.planning.chips import CHIPS, Chip
from rlvr_jax.sharding.rules import DEFAULT_RULES, ShardingRules


@dataclasses.dataclass(frozen=True)
class ProgramAccount:
    """A compiled program of a run; all sizes in bytes a chip, all times estimates in seconds.

    Attributes:
      name: of the program. chip: name of the chip. chips: how many.
      peak: the most that is held at any time: the program's own, and what lies there meanwhile.
      kinds: what makes up the peak: each kind of argument and of resident array, and "temporaries", which is the rest.
      chip_memory: what a chip has.
      flops: FLOPs a chip, of matrix products and kernels. kernels: of the kernels alone, by name.
      model_flops, ideal_flops: what the work is by itself, and with what the remat policy computes again; a chip.
      fusion_s, kernel_s, collective_s: the parts of the estimate. roofline_s, traffic: see `account.Account`.
      overlapped_s: collectives that may run beside other work; included in collective_s.
      ideal_bytes: bytes a chip that must be read from memory at least; 0 where nobody said.
      collectives: rows of kind, axes, count, bytes that a chip sends, seconds.
      largest: rows of op_name, flops, seconds: what takes the longest among the fusions.
      compile_s: seconds that compiling took.
    """

    name: str
    chip: str
    chips: int
    peak: int
    kinds: dict[str, int]
    chip_memory: int
    flops: float
    kernels: dict[str, float]
    uncounted_kernels: list[str]
    model_flops: float
    ideal_flops: float
    fusion_s: float
    roofline_s: float
    traffic: float
    kernel_s: float
    collective_s: float
    overlapped_s: float
    ideal_bytes: float
    ideal_collectives: dict[str, float]
    collectives: list[dict[str, Any]]
    largest: list[dict[str, Any]]
    unknown_loops: list[str]
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within the chip's memory."""
        return self.peak <= self.chip_memory

    @property
    def seconds(self) -> float:
        """The estimate: fusions, kernels and collectives one after the other."""
        return self.fusion_s + self.kernel_s + self.collective_s

    @property
    def mfu(self) -> float:
        """The share of the chip's peak FLOP/s that the estimate implies, of the model's FLOPs alone."""
        return self.model_flops / CHIPS[self.chip].flops / self.seconds if self.seconds else 0.0

    @property
    def bandwidth_share(self) -> float:
        """The share of the memory's bandwidth that the estimate implies, of the ideal bytes alone."""
        return self.ideal_bytes / CHIPS[self.chip].bandwidth / self.seconds if self.seconds else 0.0

    @property
    def dominates(self) -> str:
        """What the estimated time is mostly: "fusions", "kernels" or "collectives"."""
        parts = {"fusions": self.fusion_s, "kernels": self.kernel_s, "collectives": self.collective_s}
        return max(parts, key=lambda name: parts[name])

    def plain(self) -> dict[str, Any]:
        """As JSON knows it, with what follows from the rest; `ProgramAccount.of` reads it."""
        derived = ("fits", "seconds", "mfu", "bandwidth_share", "dominates")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "ProgramAccount":
        """From `plain`."""
        return cls(**{field.name: plain[field.name] for field in dataclasses.fields(cls)})


def compile_program(
    name: str,
    lower: Callable[[], Any],
    mesh: Mesh,
    chip: Chip,
    *,
    holds: Mapping[str, Any] | None = None,
    resident: Mapping[str, Any] | None = None,
    model_flops: float = 0.0,
    ideal_flops: float = 0.0,
    ideal_bytes: float = 0.0,
    ideal_collectives: Mapping[str, float] | None = None,
    unknown_trips: int = 1,
    smallest_branch: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
    text_to: Path | None = None,
) -> ProgramAccount:
    """Lowers, compiles and accounts for one program.

    Args:
      name: what the table calls it.
      lower: gives `jit(f).lower(...)` of shapes placed on `mesh` (`placed`); called inside `jax.set_mesh(mesh)`.
      mesh, chip: what it is compiled for.
      holds: kinds of arguments and the trees (of placed shapes) that they are, to tell them apart in the peak.
      resident: kinds and trees of arrays that lie on the chips while the program runs and are no arguments of it.
      model_flops, ideal_flops: of all chips together; see `ideal`.
      ideal_bytes: bytes a chip that must be read at least.
      ideal_collectives: bytes that a chip must send, by what needs them.
      unknown_trips: executions of loops whose trip count depends on data.
      smallest_branch: of a conditional the smallest branch runs, not the largest.
      compiler_options: of `.compile`.
      text_to: a folder that gets the compiled program as NAME.txt.

    Returns:
      What it takes. Where the compiler refuses it because it does not fit, its memory alone.
    """
    arguments = {kind: bytes_a_chip(tree) for kind, tree in (holds or {}).items()}
    beside = {kind: bytes_a_chip(tree) for kind, tree in (resident or {}).items()}
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = lower().compile(compiler_options=dict(compiler_options or {}) or None)
    except jax.errors.JaxRuntimeError as error:
        if (temporaries := temporaries_refused(str(error), sum(arguments.values()))) is None:
            raise
        kinds = {**beside, **arguments, "temporaries": temporaries}
        return _refused(name, mesh, chip, kinds, time.perf_counter() - began)
    took = time.perf_counter() - began
    if text_to is not None:
        text_to.mkdir(parents=True, exist_ok=True)
        (text_to / f"{name}.txt").write_text(compiled.as_text() or "")
    got = account(compiled, mesh, chip, unknown_trips=unknown_trips, smallest_branch=smallest_branch)
    rest = max(0, got.memory.argument - sum(arguments.values()))
    unused = max(0, sum(arguments.values()) - got.memory.argument)  # no arguments in the end, but they lie there
    kinds = {**beside, **arguments, **({"other arguments": rest} if rest else {})}
    kinds["temporaries"] = max(0, got.memory.peak - got.memory.argument)
    return ProgramAccount(
        name=name,
        chip=chip.name,
        chips=mesh.size,
        peak=got.memory.peak + sum(beside.values()) + unused,
        kinds={kind: kinds[kind] for kind in kinds},
        chip_memory=chip.memory,
        flops=got.flops,
        kernels={kernel.name: kernel.flops for kernel in got.kernels if kernel.known},
        uncounted_kernels=[kernel.name for kernel in got.kernels if not kernel.known],
        model_flops=model_flops / mesh.size,
        ideal_flops=ideal_flops / mesh.size,
        fusion_s=got.fusion_s,
        roofline_s=got.roofline_s,
        traffic=got.traffic,
        kernel_s=got.kernel_s,
        collective_s=got.collective_s,
        overlapped_s=got.hidden_s,
        ideal_bytes=ideal_bytes,
        ideal_collectives=dict(ideal_collectives or {}),
        collectives=_collectives(got),
        largest=[dataclasses.asdict(part) for part in got.parts],
        unknown_loops=list(got.unknown_loops),
        compile_s=took,
    )


def temporaries_refused(message: str, arguments: int) -> int | None:
    """Bytes of temporaries that a TPU compiler gave up at, from its message; None where it says something else.

    It names the temporaries, or all that a program would use, arguments included.
    """
    found = re.search(r"(temporaries \(|Used )([\d.]+)([KMG])", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    size = int(float(found[2]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[found[3]])
    return size if found[1].startswith("temporaries") else max(0, size - arguments)


def _refused(name: str, mesh: Mesh, chip: Chip, kinds: dict[str, int], took: float) -> ProgramAccount:
    """Of a program that the compiler gave up, since it needs more than the chip has: its memory, nothing else."""
    empty: dict[str, Any] = {
        field.name: {"dict": {}, "list": []}.get(str(field.type).split("[")[0], 0.0)
        for field in dataclasses.fields(ProgramAccount)
    }
    known = {"name": name, "chip": chip.name, "chips": mesh.size, "chip_memory": chip.memory, "compile_s": took}
    peak = max(sum(kinds.values()), chip.memory + 1)
    return ProgramAccount(**(empty | known | {"kinds": kinds, "peak": peak}))


def placed(
    mesh: Mesh, shape: tuple[int, ...], dtype: Any, names: tuple[str | None, ...], rules: ShardingRules = DEFAULT_RULES
) -> jax.ShapeDtypeStruct:
    """The shape of an array whose dimensions carry these logical names, on a mesh."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=rules.sharding(mesh, names, shape))


def bytes_a_chip(tree: Any) -> int:
    """Bytes that the arrays of a tree of placed shapes take on each chip."""

    def local(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if isinstance(x.sharding, NamedSharding) else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(local(x) for x in jax.tree.leaves(tree))


def _collectives(got: Account) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "axes": list(axes), "count": count, "bytes": size, "seconds": seconds}
        for (kind, axes), (count, size, seconds) in sorted(got.by_axis().items(), key=lambda item: -item[1][2])
    ]
