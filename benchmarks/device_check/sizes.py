"""What the check runs on a real accelerator, and the same programs made small for any machine."""

import dataclasses
from typing import Any

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.planning.models import PUBLISHED


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of one form of the check.

    Attributes:
      models: names of the models that decode, the largest first; the first one trains too.
      dtype: compute dtype of the timed programs.
      rows, length, live: decoded rows, cache tokens, and cache tokens in use when a timing begins.
      block, chunk: draft tokens of a verified block, and decode steps of one program.
      train_rows, train_length, train_chunk: one micro-batch, and the tokens whose logits exist at one time.
      copy_bytes, product: bytes of the copied array, and side of the square matrix product.
      turns: turns of the timed loops.
      repeats: timings whose median counts.
      numeric: model of the numeric comparison, by field of `QwenConfig`.
      numeric_rows, numeric_length, numeric_new: its training rows, their tokens, and its new tokens per response.
    """

    models: tuple[str, ...]
    dtype: str
    rows: int
    length: int
    live: tuple[int, ...]
    block: int
    chunk: int
    train_rows: int
    train_length: int
    train_chunk: int
    copy_bytes: int
    product: int
    turns: int
    repeats: int
    numeric: dict[str, int]
    numeric_rows: int
    numeric_length: int
    numeric_new: int


SIZES = {
    "gpu": Size(
        models=("Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B"),
        dtype="bfloat16",
        rows=64,
        length=2048,
        live=(512, 1800),
        block=8,
        chunk=32,
        train_rows=4,
        train_length=4096,
        train_chunk=4096,
        copy_bytes=1 << 30,
        product=8192,
        turns=400,
        repeats=7,
        numeric={
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_layers": 4,
            "num_heads": 8,
            "num_kv_heads": 2,
            "head_dim": 64,
        },
        numeric_rows=4,
        numeric_length=1536,
        numeric_new=200,
    ),
    "tiny": Size(
        models=("tiny",),
        dtype="float32",
        rows=4,
        length=64,
        live=(16,),
        block=2,
        chunk=4,
        train_rows=1,
        train_length=64,
        train_chunk=32,
        copy_bytes=1 << 18,
        product=64,
        turns=8,
        repeats=2,
        numeric={
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
        },
        numeric_rows=2,
        numeric_length=64,
        numeric_new=8,
    ),
}


def timed_config(name: str, **more: Any) -> QwenConfig:
    """A published model's shape, or that of the small form."""
    if name == "tiny":
        return QwenConfig(
            "qwen3", 512, 32, 64, 1, 2, 1, 16, rope_theta=1e6, qk_norm=True, tie_word_embeddings=True, **more
        )
    return dataclasses.replace(PUBLISHED[name], **more)


def numeric_config(size: Size, **more: Any) -> QwenConfig:
    """The model of the numeric comparison: small, untied, of Qwen3's form."""
    shape = {"rope_theta": 1e6, "qk_norm": True, "tie_word_embeddings": False, **size.numeric, **more}
    return QwenConfig("qwen3", **shape)
