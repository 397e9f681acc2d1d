"""A trained policy as a Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from rlvr_jax.files import atomic_path
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import save_hf

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def export(
    folder: Path,
    config: QwenConfig,
    params: Any,
    tokenizer: Any,
    *,
    base: Path | None,
    tokenizer_folder: Path | None,
    dtype: str,
) -> None:
    """Writes weights, tokenizer and the generation settings of the `base` folder, replacing an earlier export.

    Tokenizer files are those of `tokenizer_folder`, byte for byte, where it is one: training changes none of them, and
    what transformers 5 writes for the same tokenizer older versions cannot read. `dtype` "auto" stores the compute
    dtype, in which the policy was sampled.
    """
    settings = None if base is None else base / "generation_config.json"
    save_hf(
        folder,
        config,
        params,
        tokenizer=tokenizer,
        dtype=config.dtype if dtype == "auto" else dtype,
        generation_config=json.loads(settings.read_text(encoding="utf-8")) if settings and settings.is_file() else None,
        overwrite=True,
    )
    for name in TOKENIZER_FILES:
        if jax.process_index() == 0 and tokenizer_folder is not None and (tokenizer_folder / name).is_file():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(tokenizer_folder / name, temporary)
