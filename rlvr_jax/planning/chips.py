"""What is publicly known of each chip. Every estimate of time rests on these figures.

Sources: "How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter on TPUs: FLOP/s, memory bandwidth, link and
data-centre rates), the Cloud TPU documentation (cloud.google.com/tpu/docs/v5p and so on: memory, torus), the memory
limits that the compiler itself states when a program does not fit; for the H100 NVIDIA's data sheets of the H100 SXM
and the DGX H100. TPU clocks are those at which the compiler's `estimated_cycles` of plain matrix products give the
peak FLOP/s.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip and how it is joined to others.

    Attributes:
      name: as the plan's table names it.
      memory: bytes that a program may use.
      flops: peak bfloat16 FLOP/s, dense.
      bandwidth: bytes/s to and from its memory.
      link: bytes/s in one direction over one link (TPU: to a neighbour in the torus; GPU: all of NVLink).
      outside: bytes/s in one direction and chip over the data-centre network (between slices, or nodes).
      wraps: a torus dimension whose size is a multiple of this is a ring; 0: no torus, all of a node reach all.
      node: chips that are joined by links; 0: all of a slice.
      clock: cycles/s of the compiler's estimates; 0 where it gives none.
      hop: seconds that a message takes from chip to chip, however short.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    outside: float
    wraps: int = 0
    node: int = 0
    clock: float = 0.0
    hop: float = 0.0


_GIB = 1 << 30
_TPUS = (
    Chip("v4", int(30.75 * _GIB), 2.75e14, 1.2e12, 4.5e10, 6.25e9, wraps=4, clock=1.05e9, hop=1e-6),
    Chip("v5e", int(15.75 * _GIB), 1.97e14, 8.1e11, 4.5e10, 3.125e9, wraps=16, clock=1.5e9, hop=1e-6),
    Chip("v5p", int(95.74 * _GIB), 4.59e14, 2.8e12, 9.0e10, 6.25e9, wraps=4, clock=1.75e9, hop=1e-6),
    Chip("v6e", int(31.25 * _GIB), 9.20e14, 1.6e12, 9.0e10, 12.5e9, wraps=16, clock=1.75e9, hop=1e-6),
)
H100 = Chip("h100", 85_045_870_592, 9.89e14, 3.35e12, 4.5e11, 5.0e10, node=8)
CHIPS = {chip.name: chip for chip in (*_TPUS, H100)}
