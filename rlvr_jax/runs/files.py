"""Files that are either whole or absent: everything a run leaves behind is replaced atomically."""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as an escape: UTF-8 itself has none
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


def parse_json(data: bytes, path: str | os.PathLike[str], *, line: int | None = None, allow_nan: bool = True) -> Any:
    """A JSON value from UTF-8, with or without a byte order mark, its texts free of lone surrogates.

    Each of those counts as `?`, which is logged once per file.

    Raises:
      ValueError: naming the file (and line): not UTF-8, not JSON, nested too deeply, or without `allow_nan` a NaN or an
        infinity, which JSON has no word for.
    """
    where = f"{path}" if line is None else f"{path} line {line}"
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=None if allow_nan else _refuse_constant)
        if _SURROGATE.search(data) is None:
            return value
        whole = _without_lone_surrogates(value)
        if whole != value:
            _say_replaced(f"{path}", where)
        return whole
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not a UTF-8 text: {error.reason} at byte {error.start}") from error
    except ValueError as error:  # numbers of thousands of digits too
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON that can be read: it is nested too deeply") from error


def read_json(path: str | os.PathLike[str], *, most_bytes: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in a file that may come from anywhere, in bounded time and memory; see `parse_json`.

    Raises:
      ValueError: larger than `most_bytes`, not JSON (NaN and infinities are not), or not an object; naming the file.
    """
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{path}: more than {most_bytes:,} bytes, which no file of this kind has")
    content = parse_json(data, path, allow_nan=False)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [_without_lone_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {valid_text(key): _without_lone_surrogates(one) for key, one in value.items()}
    return value


_said: set[str] = set()


def _say_replaced(path: str, where: str) -> None:
    if path not in _said:
        _said.add(path)
        log.warning("%s: half of a surrogate pair counts as '?', here and in later rows of this file", where)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1) -> None:
    """Writes `value` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value, indent=indent))
