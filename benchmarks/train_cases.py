"""What `benchmarks.train` measures: sequences, objective, and the bars. Needs numpy alone, for the peers' sake."""

import dataclasses

import numpy as np

from benchmarks.cases import GEOMETRIES, SEED

PROMPT, LENGTH, ROWS = 64, 192, 64
CLIP_LOW, CLIP_HIGH, CLIP_DUAL, ALPHA = 0.2, 0.28, 10.0, 0.2
LR, B1, B2, EPS, WEIGHT_DECAY, CLIP_NORM = 1e-6, 0.9, 0.999, 1e-8, 0.1, 1.0

# Seconds a step at the same shape, recorded in another run on the same kind of machine.
RECORDED = {"tunix DAPO step": 6.72, "TRL GRPOTrainer, forward + loss + backward": 3.96}

BAR_TORCH, BAR_TUNIX, BAR_MIX, BAR_MEMORY = 1.0, 0.4, 0.6, 0.6  # at most, of the peer's
BAR_PRODUCTS = 0.65  # at least, of the rate of jax's own products
BAR_PADDING = 0.15  # at most, of the computed tokens of the mix


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Prompts of `PROMPT` tokens and their responses: int32 [rows, LENGTH] right-padded, length of each response."""

    tokens: np.ndarray
    responses: np.ndarray
    advantages: np.ndarray

    @property
    def tokens_in_all(self) -> int:
        return int(self.responses.sum()) + PROMPT * len(self.responses)


def sequences(kind: str) -> Sequences:
    """64 sequences, "full": 64 + 128 tokens each; "mix": log-normal responses of about 0.35 of the longest."""
    rng = np.random.default_rng(SEED)
    longest = LENGTH - PROMPT
    lengths = np.full(ROWS, longest)
    if kind == "mix":
        lengths = np.clip(np.round(rng.lognormal(np.log(0.3 * longest), 0.6, ROWS)), 4, longest).astype(int)
    tokens = rng.integers(1, GEOMETRIES["S"].vocab, (ROWS, LENGTH), dtype=np.int32)
    tokens[np.arange(LENGTH) >= PROMPT + lengths[:, None]] = 0
    return Sequences(tokens, lengths, rng.normal(size=ROWS).astype(np.float32))


def work(made: Sequences) -> float:
    """FLOPs of the matrix products of an update on these sequences: forward and backward, nothing computed twice."""
    products = sum(2 * inputs * outputs * count for _, inputs, outputs, count in GEOMETRIES["S"].products())
    return 3.0 * products * made.tokens_in_all


def product_shapes(rows: int) -> list[tuple[str, tuple[int, int, int], int]]:
    """(name, (m, k, n), how many) of the products [m, k] x [k, n] of an update on `rows` tokens at a time."""
    shapes = []
    for name, i, o, count in GEOMETRIES["S"].products():
        for part, shape in (("forward", (rows, i, o)), ("dx", (rows, o, i)), ("dw", (i, rows, o))):
            shapes.append((f"{name} {part}", shape, count))
    return shapes
