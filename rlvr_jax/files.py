"""Files that are either whole or absent: everything a run leaves behind is replaced atomically."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # .NAME.PROCESS.tmp


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it replaces `path`, on an exception it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str], *inside: str) -> None:
    """Removes what killed processes had begun to write in a folder; nobody else may be writing there.

    That is what `atomic_path` names, and the folder that `rlvr_jax.save_hf` fills.

    Args:
      folder: where to look, not below.
      inside: patterns of folders in it where to look too.
    """
    for place in (Path(folder), *(path for pattern in inside for path in Path(folder).glob(pattern))):
        for path in place.glob(".*.tmp") if place.is_dir() else ():
            if not _TEMPORARY.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def valid_text(text: str) -> str:
    """`text` with `?` for every lone surrogate, which no UTF-8 file can hold."""
    return text.encode("utf-8", "replace").decode()


def json_bytes(value: Any, *, indent: int | None = None, allow_nan: bool = True) -> bytes:
    """`value` as JSON in UTF-8 and a line break: how every text of a run is written.

    A lone surrogate, which UTF-8 cannot hold, becomes its escape, so that `json.loads` gives the same text again.

    Raises:
      ValueError: without `allow_nan`, a number that is not finite, which JSON has no word for.
      TypeError: a value of a type that JSON does not have.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan) + "\n"
    return text.encode("utf-8", "backslashreplace")  # whose escapes are those of JSON


def read_json(path: str | os.PathLike[str], *, most_bytes: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in a file that may come from anywhere, in bounded time and memory.

    A byte order mark is passed over. NaN and infinities, which are no JSON, are refused.

    Raises:
      ValueError: larger than `most_bytes`, no JSON, nested too deeply, or not an object; naming the file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise ValueError(f"{path}: more than {most_bytes:,} bytes, which no file of this kind has")
    try:
        content = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from error
    except ValueError as error:  # also UnicodeDecodeError, and numbers of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1) -> None:
    """Writes `value` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value, indent=indent))
