"""Rows of parquet and JSON-lines files as dicts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlvr_jax.files import atomic_path

_BATCH_ROWS = 4096


def read_rows(path: str | Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields `(row number, row)`, counted from 0, with those of the top-level `columns` that the file has.

    Args:
        path: a .parquet, or a .jsonl / .json file of one JSON object a line.
        columns: the keys wanted. Files of a million rows are read in pieces, and other columns not at all.

    Raises:
        ValueError: no such file, another kind of file, a file or line that cannot be read, no rows.
    """
    path = Path(path)
    readers = {".parquet": _parquet_rows, ".jsonl": _json_rows, ".json": _json_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a .parquet or .jsonl file")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    count = 0
    for count, row in enumerate(readers[path.suffix](path, columns), 1):
        yield count - 1, row
    if count == 0:
        raise ValueError(f"{path}: no rows in this file")


def _parquet_rows(path, columns):
    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in file.schema_arrow.names if name in columns]
            if not present:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: has the columns {names}, expected some of {', '.join(columns)}")
            for batch in file.iter_batches(_BATCH_ROWS, columns=present):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {error}") from error


def _json_rows(path, columns):
    with open(path, encoding="utf-8") as file:
        lines = enumerate(file)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not a UTF-8 text: {error}") from error
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number + 1}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number + 1}: {line.strip()!r:.100}: expected a JSON object")
            yield {key: row[key] for key in columns if key in row}


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows, whole or not at all, as parquet or JSON lines by the ending of `path`.

    Raises:
        ValueError: no rows, another ending, or values that have no common parquet type.
    """
    path = Path(path)
    if not rows:
        raise ValueError(f"{path}: no rows to write")
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"{path}: expected a .parquet or .jsonl file")
    try:
        # Arrow would take the columns from the first row alone.
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = {key: [row.get(key) for row in rows] for key in keys}
        table = pa.table(columns) if path.suffix == ".parquet" else None
    except (pa.ArrowException, UnicodeError) as error:
        raise ValueError(f"{path}: the rows do not fit one parquet schema: {error}") from error
    with atomic_path(path) as temporary:
        if table is not None:
            pq.write_table(table, temporary)
        else:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
