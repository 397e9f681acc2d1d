"""A trained policy as a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import save_hf


def export(folder: Path, config: QwenConfig, params: Any, tokenizer: Any, *, base: Path | None, dtype: str) -> None:
    """Writes weights, tokenizer and the generation settings of the `base` folder, replacing an earlier export.

    `dtype` "auto" stores the compute dtype, in which the policy was sampled.
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
