"""A trained policy as a Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Any

import jax

from rlvr_jax.data.text import stop_token_ids
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import save_hf
from rlvr_jax.runs.files import atomic_path, read_json

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
    save_hf(
        folder,
        config,
        params,
        tokenizer=tokenizer,
        dtype=config.dtype if dtype == "auto" else dtype,
        generation_config=None if base is None else _generation_config(base, tokenizer),
        overwrite=True,
    )
    for name in TOKENIZER_FILES:
        if jax.process_index() == 0 and tokenizer_folder is not None and (tokenizer_folder / name).is_file():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(tokenizer_folder / name, temporary)


def _generation_config(base: Path, tokenizer: Any) -> dict[str, Any]:
    """That of the base model; where it names no stop token, with those that the policy was sampled with."""
    path = base / "generation_config.json"
    ids = {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "pad_token_id")}
    settings = read_json(path) if path.is_file() else {key: token for key, token in ids.items() if token is not None}
    stops = stop_token_ids(tokenizer, base)
    if settings.get("eos_token_id") is None and stops:
        settings["eos_token_id"] = list(stops)
    return settings
