"""Pairs of models over one tokenizer whose embeddings differ in padding rows.

Qwen2.5 has 151,936 or 152,064 rows by size and one tokenizer of 151,665 tokens; tools that train pad again. The rows
beyond the tokenizer stand for nothing. Both models are cut to the rows that they have in common, so a distribution is
the model's own, given that the token is one of those.
"""

import dataclasses
import logging

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.qwen import Params

logger = logging.getLogger(__name__)


def cut_vocabulary(config: QwenConfig, params: Params, size: int) -> tuple[QwenConfig, Params]:
    """The model over its first `size` tokens: rows of the embedding, columns of the unembedding.

    Raises:
      ValueError: the model has fewer.
    """
    if not 1 <= size <= config.vocab_size:
        raise ValueError(f"size={size}: expected 1 to {config.vocab_size}, the rows of the model's vocabulary")
    if size == config.vocab_size:
        return config, params
    cut = {"embed": params["embed"][:size]}
    if "unembed" in params:
        cut["unembed"] = params["unembed"][:, :size]
    return dataclasses.replace(config, vocab_size=size), {**params, **cut}


def common_vocabulary(
    config_base: QwenConfig, params_base: Params, config_rl: QwenConfig, params_rl: Params
) -> tuple[QwenConfig, Params, QwenConfig, Params]:
    """Both models over the smaller of their vocabularies; said in the log where they differ.

    That the ids mean the same in both, and that no token lies beyond, is the caller's to know: `decode` compares the
    tokenizers.
    """
    sizes = config_base.vocab_size, config_rl.vocab_size
    if len(set(sizes)) > 1:
        logger.warning("vocabularies of %d (base) and %d (rl) rows: both models are cut to %d", *sizes, min(sizes))
    return (
        *cut_vocabulary(config_base, params_base, min(sizes)),
        *cut_vocabulary(config_rl, params_rl, min(sizes)),
    )
