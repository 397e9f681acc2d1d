"""Whether an input is what it was at an earlier start, wherever it lies now: hashes of its content."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlvr_jax.entries import source_sha256

BLOCKS, BLOCK_BYTES = 1024, 1 << 14  # what is read of a large weight file
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_values(values: Any) -> str:
    """SHA-256 of plain values, such as JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


CODE = "code of "


def of_code(functions: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Fingerprints of the user's own functions, given as (key, "module:name"): of a module's file, not its imports."""
    return {f"{CODE}{key}={name}": source_sha256(name) for key, name in functions}


def of_tokenizer(chat_template: Any, folder: Path | None) -> dict[str, str]:
    """Fingerprints of a tokenizer, by what to call them in a sentence.

    A name on the hub, which is no folder here, has no files to compare. It counts by its chat template alone.
    """
    found = {"chat template": of_values(chat_template)}
    if folder is not None and folder.is_dir():
        files = {name: of_file(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}
        found["tokenizer files"] = of_values(files)
    return found


def of_weights(folder: Path) -> str:
    """Of the names and sizes of a folder's weight files, and of their content.

    Of a file above 16 MiB, that is 1,024 blocks of 16 KiB spread evenly: in a shard of 5 GB one every 5 MB, so at
    least one in every large matrix. A change of a few numbers between two blocks is not seen.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = os.path.getsize(path)
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(file.read())
                continue
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def of_model(folder: Path, name: str) -> dict[str, str]:
    """Fingerprints of a checkpoint folder, by what to call them in a sentence; `name` is the model's."""
    return {f"architecture of {name}": of_file(folder / "config.json"), f"weights of {name}": of_weights(folder)}
