"""From "v5p:4x4x4" to a mesh of devices that need not be there, and the compiler that knows them.

The compilers: libtpu for TPUs (`make tpu-compiler`), an interpreter with `jax[cuda13]` for NVIDIA GPUs
(`make cuda-compiler`, 4.5 GB). Both run on any machine. Their settings are for a whole process and must be there before
jax starts, so everything that compiles for a topology runs in a process of its own (`planning.process`).
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from rlvr_jax.planning.chips import CHIPS, H100, Chip

CUDA_PYTHON = "RLVR_JAX_CUDA_PYTHON"  # environment: the interpreter that has jax[cuda13]
# What the compiler has to know of the card: an H100 SXM.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 85045870592
}
"""


class NoCompiler(ValueError):
    """The compiler for a topology is not on this machine; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Accelerators that a program is compiled for.

    Attributes:
      text: as given: `[SLICES*]KIND:AxBxC`, such as "v5p:4x4x4", "v6e:8x8", "2*v5e:16x16", or "cuda:1x8x8" (slices x
        nodes x H100s of a node).
      kind: "v4", "v5e", "v5p", "v6e" or "cuda".
      dims: the torus of a slice; for CUDA the three numbers.
      slices: how many.
    """

    text: str
    kind: str
    dims: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Raises ValueError for what is no topology."""
        found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text)
        kinds = [*(name for name in CHIPS if name != H100.name), "cuda"]
        if found is None or found[2] not in kinds:
            raise ValueError(f"topology {text!r}: expected KIND:AxB or KIND:AxBxC with KIND one of {', '.join(kinds)}")
        kind, dims = found[2], tuple(int(size) for size in found[3].split("x"))
        wanted = 2 if kind in ("v5e", "v6e") else 3
        if len(dims) != wanted or min(dims) < 1 or (kind == "cuda" and found[1]):
            raise ValueError(
                f"topology {text!r}: expected {wanted} sizes for {kind}" + ", slices first" * (kind == "cuda")
            )
        return cls(text, kind, dims, int(found[1] or 1))

    @property
    def chip(self) -> Chip:
        """What its devices are."""
        return H100 if self.kind == "cuda" else CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.slices * math.prod(self.dims)

    @property
    def islands(self) -> int:
        """Parts that only the data-centre network joins: slices of TPUs."""
        return 1 if self.kind == "cuda" else self.slices

    def devices(self) -> list[Any]:
        """Descriptions of the devices; call it in a process that has `settings` and the compiler."""
        shape = "x".join(map(str, self.dims))
        if self.kind == "cuda":
            return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=_H100).devices
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.size == 1:
            options = {"chips_per_host_bounds": (1, 1, 1)}
        return topologies.get_topology_desc(topology_name=f"{self.kind}:{shape}", platform="tpu", **options).devices

    def mesh(self, sizes: dict[str, int]) -> Mesh:
        """A mesh of `devices()` with these axes; at most one size may be -1 and takes what the others leave.

        Slices are split over the first axis that they divide, so that the others stay inside a slice.

        Raises:
          ValueError: sizes that do not multiply to the number of devices.
        """
        sizes = fill(sizes, self.size, self.text)
        grid = tuple(sizes.values())
        if self.islands > 1:
            outer = next((i for i, size in enumerate(grid) if size % self.islands == 0), None)
            if outer is None:
                raise ValueError(f"mesh {sizes}: no axis divides into the {self.islands} slices of {self.text}")
            across = tuple(self.islands if i == outer else 1 for i in range(len(grid)))
            within = tuple(size // by for size, by in zip(grid, across, strict=True))
            placed = mesh_utils.create_hybrid_device_mesh(
                within, across, self.devices(), allow_split_physical_axes=True
            )
        elif self.kind == "cuda":
            placed = np.array(self.devices()).reshape(grid)
        else:
            placed = mesh_utils.create_device_mesh(grid, self.devices(), allow_split_physical_axes=True)
        return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def settings(self) -> dict[str, str]:
        """Environment of a process that compiles for it. Raises NoCompiler."""
        common = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
        if self.kind == "cuda":
            return common
        library = compiler_library()
        if library is None:
            raise NoCompiler(f"{self.text}: the TPU compiler is not here; `make tpu-compiler` fetches it (0.2 GB)")
        return common | {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LIBRARY_PATH": str(library),
        }

    def interpreter(self) -> str:
        """The Python that compiles for it. Raises NoCompiler."""
        if self.kind != "cuda":
            return sys.executable
        python = cuda_python()
        if python is None:
            raise NoCompiler(
                f"{self.text}: the CUDA compiler is not here; `make cuda-compiler` fetches it (4.5 GB), or "
                f"{CUDA_PYTHON} names an interpreter that has jax[cuda13]"
            )
        return str(python)


def fill(sizes: dict[str, int], devices: int, what: str) -> dict[str, int]:
    """The sizes of a mesh's axes with the one that is -1 filled in. Raises ValueError where they do not fit."""
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    bad = [f"{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        raise ValueError(f"mesh sizes must be positive, at most one of them -1; got {sizes}")
    if devices % known or (not free and known != devices):
        raise ValueError(f"mesh {sizes} needs {'a multiple of ' * bool(free)}{known} devices, {what} has {devices}")
    return {name: devices // known if size == -1 else size for name, size in sizes.items()}


def compiler_library() -> Path | None:
    """libtpu.so: that of $TPU_LIBRARY_PATH, of `make tpu-compiler` or of an installed libtpu; None if there is none."""
    spec = importlib.util.find_spec("libtpu")
    candidates = [
        Path(os.environ.get("TPU_LIBRARY_PATH", "/")),
        Path(sys.prefix) / "tpu-compiler" / "libtpu" / "libtpu.so",
        Path(spec.origin).parent / "libtpu.so" if spec and spec.origin else Path("/"),
    ]
    return next((path for path in candidates if path.is_file()), None)


def cuda_python() -> Path | None:
    """An interpreter with jax[cuda13]: that of $RLVR_JAX_CUDA_PYTHON, of `make cuda-compiler`, or this one."""
    given = os.environ.get(CUDA_PYTHON)
    made = Path(sys.prefix) / "cuda-compiler" / "bin" / "python"
    candidates = [Path(given)] if given else [made]
    if not given and importlib.util.find_spec("jax_cuda13_plugin"):
        candidates.append(Path(sys.executable))
    return next((path for path in candidates if path.is_file()), None)
