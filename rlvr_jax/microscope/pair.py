"""Every token of given responses under two models: `score_pair`, teacher-forced and in chunks of the vocabulary's size.

1M tokens never need 1M x V numbers: of `chunk` tokens at a time the logits are there, of each token some twenty numbers
remain.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlvr_jax.direction import entropy, js_divergence, kl_divergence
from rlvr_jax.microscope.columns import TokenColumns
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.scoring import score_texts

Params = Any


def score_pair(
    config_base: QwenConfig,
    params_base: Params,
    config_rl: QwenConfig,
    params_rl: Params,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    written_by: str | Sequence[str] = "rl",
    top: int = 5,
    cache_dtype: str | None = None,
    batch_tokens: int = 16_384,
    chunk: int = 512,
    mesh: Mesh | None = None,
) -> list[TokenColumns]:
    """What both models give every token of each response, in the order of `responses`.

    Args:
      config_base, params_base, config_rl, params_rl: the two models, over the same tokenizer. Where one has more
        rows of padding, both are cut to the fewer rows. They compute in the
        config's `compute_dtype`.
      prompts: token ids before each response, at least one.
      responses: token ids that are scored.
      written_by: "base" or "rl", or one of them a response: whose probabilities `gradient_share` takes.
      top: how many of each model's most probable tokens are kept.
      cache_dtype: what keys and values are read back from, as in `generation.language_model`.
      batch_tokens: tokens, padding included, in a batch: both models' caches for so many are held.
      chunk: tokens whose logits (and several arrays of their size) are held at a time.
      mesh: splits the rows over its data and fsdp axes; the parameters stay where they are.

    Raises:
      ValueError: naming the argument, its value and what was expected.
    """
    found: list[Any] = [None] * len(responses)
    for row, columns in iterate_pair(
        *(config_base, params_base, config_rl, params_rl, prompts, responses),
        written_by=written_by,
        top=top,
        cache_dtype=cache_dtype,
        batch_tokens=batch_tokens,
        chunk=chunk,
        mesh=mesh,
    ):
        found[row] = columns
    return found


def iterate_pair(
    config_base: QwenConfig,
    params_base: Params,
    config_rl: QwenConfig,
    params_rl: Params,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    written_by: str | Sequence[str] = "rl",
    top: int = 5,
    **options: Any,
) -> Iterator[tuple[int, TokenColumns]]:
    """(number of the response, its columns) as batches end, longest text first; arguments as in `score_pair`."""
    writers = [written_by] * len(responses) if isinstance(written_by, str) else list(written_by)
    if len(writers) != len(responses):
        raise ValueError(f"written_by has {len(writers)} entries and there are {len(responses)} responses")
    for writer in writers:
        if writer not in ("base", "rl"):
            raise ValueError(f"written_by has {writer!r}: expected 'base' or 'rl'")
    size = min(config_base.vocab_size, config_rl.vocab_size)
    if not 1 <= top <= size:
        raise ValueError(f"top={top}: expected 1 to {size}, the vocabulary")
    rule = PairRule(top, options.pop("chunk", 512))
    models = (config_base, params_base, config_rl, params_rl)
    for row, measured in score_texts(*models, prompts, responses, rule, **options):
        yield (
            row,
            TokenColumns(
                token=np.asarray(responses[row], np.int32),
                gradient_share=gradient_share(measured[f"logp_{writers[row]}"]),
                **measured,
            ),
        )


@dataclasses.dataclass(frozen=True)
class PairRule:
    """Measures the columns of `TokenColumns` that come from the models; a `scoring.Rule`."""

    top: int
    chunk: int

    def measure(self, logp_base_NV: jax.Array, logp_rl_NV: jax.Array, token_N: jax.Array) -> dict[str, jax.Array]:
        """[N], and the best tokens [N, top]."""
        kl_N, reverse_N = kl_divergence(logp_rl_NV, logp_base_NV), kl_divergence(logp_base_NV, logp_rl_NV)
        out = {
            "kl": kl_N,
            "kl_reverse": reverse_N,
            "js": (kl_N + reverse_N) / 2,
            "js_true": js_divergence(logp_rl_NV, logp_base_NV),
        }
        for model, logp_NV in (("base", logp_base_NV), ("rl", logp_rl_NV)):
            logp_N1 = jnp.take_along_axis(logp_NV, token_N[:, None], axis=-1)
            best_NK, ids_NK = jax.lax.top_k(logp_NV, self.top)
            out |= {
                f"logp_{model}": logp_N1[:, 0],
                f"entropy_{model}": entropy(logp_NV),
                f"rank_{model}": 1 + jnp.sum(logp_NV > logp_N1, axis=-1, dtype=jnp.int32),
                f"top_{model}_ids": ids_NK,
                f"top_{model}_logp": best_NK,
            }
        return out


def gradient_share(logp_T: np.ndarray) -> np.ndarray:
    """[T] (1 - p) over its sum in the response, float32; zeros where every p is 1."""
    mass_T = -np.expm1(np.minimum(logp_T.astype(np.float64), 0.0))
    total = mass_T.sum()
    return (mass_T / total if total > 0 else np.zeros_like(mass_T)).astype(np.float32)
