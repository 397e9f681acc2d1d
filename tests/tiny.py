"""A model folder, a tokenizer and problems small enough for tests, in the real formats."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import save_hf
from rlvr_jax.models.qwen import init_params

ALPHABET = "0123456789+-*=abcdefgh?\\{}.:"
WORDS = ("user", "assistant", "boxed", "\n")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def devices(count: int) -> dict[str, str]:
    """The environment of a program on so many simulated CPU devices, compiled as the tests are."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"  # the last one counts
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def tiny_config(model_type: str = "qwen3", **overrides) -> QwenConfig:
    """Hidden size 32, 2 layers, 48 tokens."""
    return QwenConfig(
        **{
            "model_type": model_type,
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "qkv_bias": model_type == "qwen2",
            "qk_norm": model_type == "qwen3",
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
        }
        | overrides
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, Qwen's special tokens and the form of its chat template."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(ALPHABET)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_checkpoint(path: str | Path, *, seed: int = 0, **overrides) -> QwenConfig:
    """Writes a Hugging Face folder with random float32 weights and the tokenizer; gives its config."""
    config = tiny_config(**overrides)
    params = init_params(config, jax.random.key(seed), jnp.float32)
    save_hf(path, config, params, tokenizer=tiny_tokenizer())
    return config


def write_tiny_problems(path: str | Path, count: int, *, answer: str | None = None) -> None:
    """JSONL of one-digit additions modulo 10 (`answer` given: that one for every problem)."""
    rows = [
        {"problem": f"{i % 10}+{i // 10 % 10}", "answer": str((i + i // 10) % 10) if answer is None else answer}
        for i in range(count)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextlib.contextmanager
def compiled_once(folder: str | Path) -> Iterator[None]:
    """Inside, a program that one run compiled is read back by the next run from a cache in `folder`."""
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
