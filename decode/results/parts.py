"""Files that a run is made from again: lines that are appended, and tables of parts. Damage is noticed and made good.

Each has a checksum of its own. What is damaged is moved aside, said once, and counts as not there: it is made again.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rlvr_jax.runs.files import atomic_path, json_bytes

log = logging.getLogger(__name__)

T = TypeVar("T")
DAMAGED = ".damaged"  # what the name of a file that was moved aside ends in


class JsonLines:
    """A file of one JSON object a line, only ever appended to. Each line has the CRC-32 of what else it says."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, take: Callable[[dict[str, Any]], T], *, repair: bool = True) -> list[T]:
        """What `take` makes of every line but a last one that is half written.

        That one is cut off the file too. Other damaged lines are moved to a file beside it, with a warning. So are
        those that `take` refuses with a ValueError, KeyError or TypeError. Without `repair` nothing is changed, since
        another process may be writing the file.

        Raises:
          ValueError: without `repair`, a damaged line.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if repair and len(whole) < len(data):
            os.truncate(self.path, len(whole))
        lines = whole.splitlines(keepends=True)
        taken, damaged = [], {}
        for number, line in enumerate(lines, start=1):
            try:
                taken.append(take(_record(line)))
            except (ValueError, KeyError, TypeError) as error:
                if not repair:
                    raise ValueError(f"{self.path}, line {number}: {error}") from error
                damaged[number] = error
        if damaged:
            self._set_aside(lines, damaged.keys())
            log.warning(
                "%s: %d damaged lines, the first is line %d (%s); moved to %s, and what is missing is made again",
                *(self.path, len(damaged), *next(iter(damaged.items())), self.path.name + DAMAGED),
            )
        return taken

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Adds lines; on return they are on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(b"".join(json_bytes(record | {"crc32": checksum(record)}) for record in records))
            file.flush()
            os.fsync(file.fileno())

    def _set_aside(self, lines: Sequence[bytes], damaged: Collection[int]) -> None:
        with open(self.path.with_name(self.path.name + DAMAGED), "ab") as file:
            file.writelines(lines[number - 1] for number in sorted(damaged))
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(line for i, line in enumerate(lines, start=1) if i not in damaged))


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    known = record.pop("crc32", None)  # older lines have none
    if known is not None and known != checksum(record):
        raise ValueError("not what was written, by its checksum")
    return record


def checksum(record: dict[str, Any]) -> int:
    """CRC-32 of what JSON can hold, keys in their order."""
    return zlib.crc32(json.dumps(record).encode())


def write_part(folder: Path, name: str, table: pa.Table) -> None:
    """Writes a table to NAME.CRC.parquet in a folder, with the CRC-32 of the file's bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    with atomic_path(folder / f"{name}.{zlib.crc32(data):08x}.parquet") as temporary:
        temporary.write_bytes(data)


def part_names(folder: Path) -> dict[str, Path]:
    """The parts of a folder by the names that they were written under, in order."""
    return {path.name.partition(".")[0]: path for path in sorted(folder.glob("*.parquet"))}


def read_part(path: Path) -> pa.Table | None:
    """The table of a part; None, with a warning, where it is damaged: it is then moved aside."""
    data, known = path.read_bytes(), path.name.split(".")[1:-1]
    try:
        if known and known != [f"{zlib.crc32(data):08x}"]:
            raise ValueError("not what was written, by its checksum")
        return pq.read_table(pa.BufferReader(data))
    except (ValueError, OSError, pa.ArrowException) as error:
        set_aside(path, error)
        return None


def set_aside(path: Path, error: Exception) -> None:
    """Moves a damaged file aside and says so."""
    target = path.with_name(path.name + DAMAGED)
    path.replace(target)
    log.warning("%s: damaged (%s); it is moved to %s, and what it held is made again", path, error, target.name)
