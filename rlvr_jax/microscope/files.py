"""The files of a diagnosis: `responses.parquet`, `tokens.parquet` (a row a token) and `vocabulary.parquet`.

The tokens lie in the order of the responses, `length` rows each, so that a few responses are read without the rest.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlvr_jax.microscope.columns import ScoredResponse, TokenColumns
from rlvr_jax.runs.files import atomic_path, valid_text

SCALARS = (
    *("logp_base", "logp_rl", "entropy_base", "entropy_rl", "kl", "kl_reverse", "js", "js_true"),
    *("rank_base", "rank_rl", "gradient_share"),
)
LISTS = ("top_base_ids", "top_base_logp", "top_rl_ids", "top_rl_logp")
_INTEGERS = ("rank_base", "rank_rl", "top_base_ids", "top_rl_ids")
_ROWS = 1 << 16  # of a row group
RESPONSES, TOKENS, VOCABULARY = "responses.parquet", "tokens.parquet", "vocabulary.parquet"

RESPONSE_SCHEMA = pa.schema(
    [
        *(("problem", pa.int32()), ("sample", pa.int32()), ("source", pa.string()), ("prompt", pa.string())),
        *(("text", pa.string()), ("answer", pa.string()), ("correct", pa.bool_()), ("length", pa.int32())),
    ]
)


def _type(name: str) -> pa.DataType:
    scalar = pa.int32() if name in _INTEGERS else pa.float32()
    return pa.list_(scalar) if name in LISTS else scalar


TOKEN_SCHEMA = pa.schema(
    [
        *(("problem", pa.int32()), ("sample", pa.int32()), ("source", pa.string()), ("position", pa.int32())),
        *(("token", pa.int32()), ("text", pa.string())),
        *((name, _type(name)) for name in (*SCALARS, *LISTS)),
    ]
)


class Response(NamedTuple):
    """A row of responses.parquet; `length` in tokens, the others as in `columns.ScoredResponse`."""

    problem: int
    sample: int
    source: str
    prompt: str
    text: str
    answer: str | None
    correct: bool | None
    length: int

    @property
    def key(self) -> tuple[int, int, str]:
        """What a response is known by."""
        return self.problem, self.sample, self.source


class TokenTable(NamedTuple):
    """Tokens of many responses, flat: N numbers a column.

    Attributes:
      responses: one entry a response.
      response: [N] int32, which of `responses` the token belongs to.
      position: [N] int32, from 0 in the response.
      token: [N] int32 ids.
      text: [N] texts, an arrow array.
      values: the scalar columns of `TokenColumns` (not the best tokens) and `delta_logp`, by name, [N] each.
    """

    responses: list[Response]
    response: np.ndarray
    position: np.ndarray
    token: np.ndarray
    text: pa.ChunkedArray
    values: dict[str, np.ndarray]


def write_responses(folder: Path, responses: Sequence[Response]) -> None:
    """Writes responses.parquet."""
    columns = {name: [_valid(getattr(r, name)) for r in responses] for name in RESPONSE_SCHEMA.names}
    with atomic_path(folder / RESPONSES) as temporary:
        pq.write_table(
            pa.table(columns, schema=RESPONSE_SCHEMA), temporary, compression="zstd", write_page_checksum=True
        )


def _valid(value: Any) -> Any:
    return valid_text(value) if isinstance(value, str) else value


def token_table(one: ScoredResponse) -> pa.Table:
    """A response's rows of tokens.parquet."""
    T, columns = len(one.columns.token), one.columns._asdict()
    arrays: dict[str, Any] = {
        "problem": np.full(T, one.problem, np.int32),
        "sample": np.full(T, one.sample, np.int32),
        "source": pa.array([one.source] * T, pa.string()),
        "position": np.arange(T, dtype=np.int32),
        "token": columns["token"],
        "text": pa.array([valid_text(piece) for piece in one.pieces], pa.string()),
        **{name: columns[name] for name in SCALARS},
    }
    for name in LISTS:
        values_TK = columns[name]
        offsets = np.arange(T + 1, dtype=np.int32) * values_TK.shape[1]
        arrays[name] = pa.ListArray.from_arrays(offsets, pa.array(values_TK.reshape(-1), _type(name).value_type))
    return pa.table(arrays, schema=TOKEN_SCHEMA)


def write_tokens(path: Path, tables: Iterable[pa.Table]) -> None:
    """Writes tables of tokens one after the other into one file, holding a row group at a time."""
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, TOKEN_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        waiting, rows = [], 0
        for table in tables:
            waiting.append(table)
            rows += len(table)
            if rows >= _ROWS:
                writer.write_table(pa.concat_tables(waiting), row_group_size=_ROWS)
                waiting, rows = [], 0
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=_ROWS)


def write_scored(folder: Path, responses: Sequence[ScoredResponse], text_of: Callable[[int], str]) -> None:
    """Writes all files of a diagnosis that is small enough to be held. responses.parquet comes last."""
    write_tokens(folder / TOKENS, map(token_table, responses))
    write_vocabulary(folder, text_of)
    write_responses(folder, [row_of(one) for one in responses])


def row_of(one: ScoredResponse) -> Response:
    """A response's row of responses.parquet."""
    return Response(*one[:7], length=len(one.columns.token))


def read_responses(folder: Path) -> list[Response]:
    """The rows of responses.parquet. Raises ValueError for a file that is not there or not one of these."""
    table = _read(folder / RESPONSES, RESPONSE_SCHEMA.names)
    return [Response(**row) for row in table.to_pylist()]


def read_tokens(folder: Path) -> TokenTable:
    """Both files without the best tokens: some 60 bytes a token. Raises ValueError as `read_responses`."""
    responses = read_responses(folder)
    table = _read(folder / TOKENS, ["position", "token", "text", *SCALARS])
    lengths = np.array([r.length for r in responses], int)
    if len(table) != lengths.sum():
        raise ValueError(
            f"{folder / TOKENS}: has {len(table)} tokens and {RESPONSES} lists {lengths.sum()}: expected as many"
        )
    values = {name: table[name].to_numpy() for name in SCALARS}
    response_N = np.repeat(np.arange(len(responses), dtype=np.int32), lengths)
    position_N, token_N = table["position"].to_numpy(), table["token"].to_numpy()
    return TokenTable(responses, response_N, position_N, token_N, table["text"], _with_delta(values))


def flatten(scored: Sequence[ScoredResponse]) -> TokenTable:
    """The same from responses in memory."""
    if not scored:
        raise ValueError("no responses: expected at least one")
    lengths = [len(one.columns.token) for one in scored]
    arrays = {name: np.concatenate([getattr(one.columns, name) for one in scored]) for name in ("token", *SCALARS)}
    return TokenTable(
        [row_of(one) for one in scored],
        np.repeat(np.arange(len(scored), dtype=np.int32), lengths),
        np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        arrays.pop("token"),
        pa.chunked_array([pa.array([piece for one in scored for piece in one.pieces], pa.string())]),
        _with_delta(arrays),
    )


def read_scored(folder: Path, wanted: Sequence[int]) -> list[ScoredResponse]:
    """Some responses, by their place in responses.parquet, whole: only their row groups are read."""
    responses = read_responses(folder)
    ends = np.cumsum([r.length for r in responses])
    found = []
    with pq.ParquetFile(folder / TOKENS, page_checksum_verification=True) as file:
        groups = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
        for place in wanted:
            one, end = responses[place], int(ends[place])
            begin = end - one.length
            first, last = np.searchsorted(groups, [begin, end - 1], side="right") - 1
            if one.length == 0:
                table = TOKEN_SCHEMA.empty_table()
            else:
                table = file.read_row_groups(list(range(first, last + 1))).slice(begin - groups[first], one.length)
            found.append(scored_of(one, table))
    return found


def scored_of(one: Response, table: pa.Table) -> ScoredResponse:
    """A response from its rows of both files."""
    table = table.combine_chunks()
    columns: dict[str, Any] = {name: table[name].to_numpy() for name in ("token", *SCALARS)}
    for name in LISTS:
        flat = table[name].combine_chunks()
        values = (flat.flatten() if len(flat) else pa.array([], _type(name).value_type)).to_numpy(zero_copy_only=False)
        columns[name] = values.reshape(len(table), -1) if len(table) else values.reshape(0, 0)
    return ScoredResponse(*one[:7], pieces=table["text"].to_pylist(), columns=TokenColumns(**columns))


def write_vocabulary(folder: Path, text_of: Callable[[int], str]) -> None:
    """Writes vocabulary.parquet: the text of every token that tokens.parquet has, in responses or best tokens."""
    seen: set[int] = set()
    with pq.ParquetFile(folder / TOKENS) as file:
        for batch in file.iter_batches(_ROWS, columns=["token", "top_base_ids", "top_rl_ids"]):
            for column in batch.columns:
                flat = column.flatten() if isinstance(column, pa.ListArray) else column
                seen.update(flat.unique().to_pylist())
    ids = sorted(seen)
    table = pa.table(
        {"token": pa.array(ids, pa.int32()), "text": pa.array([valid_text(text_of(one)) for one in ids], pa.string())}
    )
    with atomic_path(folder / VOCABULARY) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_vocabulary(folder: Path) -> dict[int, str]:
    """Text by id. Raises ValueError as `read_responses`."""
    table = _read(folder / VOCABULARY, ["token", "text"])
    return dict(zip(table["token"].to_pylist(), table["text"].to_pylist(), strict=True))


def _with_delta(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return values | {"delta_logp": values["logp_rl"] - values["logp_base"]}


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the folder of a finished diagnosis")
    try:
        names = pq.read_schema(path).names
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(f"{path}: has no column {missing[0]}; expected a file of a diagnosis")
        return pq.read_table(path, columns=list(columns), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:  # OSError: a page whose checksum is wrong
        raise ValueError(f"{path}: not a parquet file that can be read: {error}") from error
