"""Rows of parquet and JSON-lines files as dicts. Whatever a stranger's file holds ends in one sentence at most."""

import contextlib
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlvr_jax.runs.files import atomic_path, json_bytes, parse_json

ENDINGS = (".parquet", ".jsonl", ".json")
_BATCH_ROWS = 4096
_LONGEST_LINE = 1 << 26  # bytes: the longest conversations have a few million
_LONGEST_LIST = 1 << 30  # bytes of a .json file, which is read at once
_BOM = b"\xef\xbb\xbf"
_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it first",
    b"PK\x03\x04": "a zip file: unpack it first",
    b"PAR1": "a parquet file: its name must end in .parquet",
    b"\xff\xfe": "a UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "a UTF-16 text: save it as UTF-8",
}
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 80, 80


def brief(value: Any) -> str:
    """`repr` of at most 300 characters, for messages: values of any size and depth are cut short at every level."""
    return _BRIEF.repr(value)[:300]


def read_rows(path: str | Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields `(row number, row)`, counted from 0, with those of the top-level `columns` that the file has.

    Texts hold no lone surrogates (halves of an emoji, as escapes of JSON may leave them): each counts as `?`, which is
    logged once per file. A byte order mark is skipped.

    Args:
        path: a .parquet file, a .jsonl / .json file of one JSON object per line, or a .json file of a list of objects.
        columns: the keys wanted. Files of a million rows are read in pieces, and other columns not at all.

    Raises:
        ValueError: no such file, another kind of file, a file or line that cannot be read, no rows.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: expected a .parquet or .jsonl file")
    if not path.is_file():
        raise ValueError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected a .parquet or .jsonl file"
        )
    count = 0
    for count, row in enumerate((_parquet_rows if path.suffix == ".parquet" else _json_rows)(path, columns), 1):
        yield count - 1, row
    if count == 0:
        raise ValueError(f"{path}: no rows in this file")


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        with _parquet_faults(path):
            file = stack.enter_context(pq.ParquetFile(path))
            schema = file.schema_arrow
        present = [name for name in schema.names if name in columns]
        if twice := sorted({name for name in present if present.count(name) > 1}):
            raise ValueError(f"{path}: has several columns of the name {', '.join(twice)}")
        if not present:
            names = ", ".join(schema.names[:50])
            raise ValueError(f"{path}: has the columns {names}, expected some of {', '.join(columns)}")
        short = {name: schema.field(name).type for name in present if _has_short_floats(schema.field(name).type)}
        with _parquet_faults(path):
            for batch in file.iter_batches(_BATCH_ROWS, columns=present):
                for row in batch.to_pylist():
                    yield row | {name: _as_written(row[name], kind) for name, kind in short.items()}


@contextlib.contextmanager
def _parquet_faults(path: Path) -> Iterator[None]:
    """What a damaged file raises depends on the damage: a page, a text that is not UTF-8, a date out of range."""
    try:
        yield
    except (pa.ArrowException, ValueError, OverflowError, OSError, MemoryError) as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {str(error)[:300]}") from error


def _has_short_floats(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_has_short_floats(field.type) for field in kind)
    return pa.types.is_float32(kind) or pa.types.is_float16(kind)


def _as_written(value: Any, kind: pa.DataType) -> Any:
    """Numbers of short floats by their shortest text: 0.1, not 0.10000000149011612."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return value | {field.name: _as_written(value[field.name], field.type) for field in kind}
    if pa.types.is_float32(kind):
        return float(str(np.float32(value)))
    return float(str(np.float16(value))) if pa.types.is_float16(kind) else value


def _json_rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for where, row in _json_values(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {brief(row)}: expected a JSON object")
        yield {key: row[key] for key in columns if key in row}


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each value stands, and the value: of every line, or of the list that a .json file is."""
    with open(path, "rb") as file:
        begin = file.peek(_BATCH_ROWS)
        for mark, kind in _OTHER_KINDS.items():
            if begin.startswith(mark):
                raise ValueError(f"{path}: {kind}")
        if path.suffix == ".json" and begin.removeprefix(_BOM).lstrip().startswith(b"["):
            data = file.read(_LONGEST_LIST + 1)
            if len(data) > _LONGEST_LIST:
                raise ValueError(f"{path}: a list of more than {_LONGEST_LIST >> 20} MiB: write it as .jsonl")
            yield from ((f"{path} row {number}", value) for number, value in enumerate(parse_json(data, path)))
            return
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                raise ValueError(
                    f"{path} line {number}: longer than {_LONGEST_LINE >> 20} MiB: expected one JSON object per line"
                )
            line = line.removeprefix(_BOM).strip()  # a mark in the middle too, where files were joined
            if line:
                yield f"{path} line {number}", parse_json(line, path, line=number)


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows, whole or not at all, as parquet or JSON lines by the ending of `path`.

    Raises:
        ValueError: no rows, another ending, or values that have no common parquet type or no JSON.
    """
    path = Path(path)
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"{path}: expected a .parquet or .jsonl file")
    try:
        if path.suffix == ".jsonl":
            lines = [json_bytes(row, allow_nan=False) for row in rows]
        else:  # by columns: Arrow would take them from the first row alone
            keys = dict.fromkeys(key for row in rows for key in row)
            table = pa.table({key: [row.get(key) for row in rows] for key in keys})
    except (pa.ArrowException, UnicodeError) as error:
        raise ValueError(f"{path}: the rows do not fit one parquet schema: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the rows cannot be written as JSON: {error}") from error
    with atomic_path(path) as temporary:
        if path.suffix == ".jsonl":
            temporary.write_bytes(b"".join(lines))
        else:
            pq.write_table(table, temporary)
