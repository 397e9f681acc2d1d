"""The responses of a mini-batch, packed with their prompts into rows of one length, cut into equal micro-batches."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from rlvr_jax.data.packing import pack, places, scatter
from rlvr_jax.typing import Num


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """N responses in packed rows, whose number is a multiple of that of a micro-batch.

    Attributes:
      tokens: int32 [rows, T]: a prompt and its response side by side, then the next ones, then zeros.
      segments: int32 [rows, T]: 1, 2, 3, ... on the sequences of a row, 0 on padding.
      response_NR: bool [N, R], where a response has a token.
      places: flat places in [rows, T] of those tokens, response after response.
      micro_rows: rows a micro-batch.
    """

    tokens: np.ndarray
    segments: np.ndarray
    response_NR: np.ndarray
    places: np.ndarray
    micro_rows: int

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        tokens_NR: np.ndarray,
        response_NR: np.ndarray,
        *,
        row_length: int,
        micro_rows: int,
        several: bool = True,
    ) -> "PackedRows":
        """Packs N responses behind their prompts (one a response) into rows of `row_length` tokens, `several` a row."""
        response_NR = response_NR > 0
        prompt_N = np.array([len(prompt) for prompt in prompts], np.int64)
        response_N = response_NR.sum(axis=1)
        packing = pack(prompt_N + response_N, row_length, several=several)
        shape = (-(-packing.rows // micro_rows) * micro_rows, row_length)
        at = places(packing, prompt_N, response_N)
        prompt_at = places(packing, np.zeros_like(prompt_N), prompt_N)
        tokens = scatter(tokens_NR[response_NR].astype(np.int32), at, shape)
        tokens.reshape(-1)[prompt_at] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
        segments = scatter(np.repeat(packing.number_N, response_N).astype(np.int32), at, shape)
        segments.reshape(-1)[prompt_at] = np.repeat(packing.number_N, prompt_N)
        return cls(tokens, segments, response_NR, at, micro_rows)

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that are padding."""
        return float((self.segments == 0).mean())

    def spread(self, values_NR: Num[np.ndarray, "N R"]) -> Num[np.ndarray, "rows T"]:
        """Per-token values of the responses at their places in the rows, 0 elsewhere."""
        return scatter(values_NR[self.response_NR], self.places, self.tokens.shape)

    def gather(self, values: Num[np.ndarray, "rows T"]) -> Num[np.ndarray, "N R"]:
        """The inverse of `spread`."""
        made_NR = np.zeros(self.response_NR.shape, values.dtype)
        made_NR[self.response_NR] = values.reshape(-1)[self.places]
        return made_NR

    def micro_batches(self, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Tokens, segments and `arrays` [rows, T], a micro-batch at a time."""
        for begin in range(0, len(self.tokens), self.micro_rows):
            yield tuple(x[begin : begin + self.micro_rows] for x in (self.tokens, self.segments, *arrays))

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self.tokens) // self.micro_rows
