"""What a decoding run leaves behind, and how it is found again after a kill.

Each setting has a folder with, for every seed, `seedN.rows.jsonl`: one line a finished response, appended as responses
come and never rewritten. From it `seedN.json` is assembled in the published format: a JSON list with one object a
problem, `prompt, gt, generated_texts, accs, lengths, resample_rates, resample_infos`.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from decode.check.inputs import Inputs
from decode.config import DecodeConfig
from decode.results.parts import JsonLines, part_names, read_part, set_aside, write_part
from rlvr_jax.runs.files import atomic_path, parse_json, write_json
from rlvr_jax.runs.fingerprint import CODE
from rlvr_jax.runs.folder import own_config
from rlvr_jax.runs.paths import at_home, same_place

# A later run in the same folder may differ in these; a setting may join or leave, but not change under its name.
FREE_TO_CHANGE = (
    *("out", "setting", "settings", "grid", "match_rate", "controls", "seeds", "limit"),
    *("print_table", "slots", "memory", "block", "mesh", "compile_cache", "distributed"),
    *("grader_workers", "grader_sandbox", "unsafe_evaluation", "changed_code"),
)
# Of inputs whose path may differ: the fingerprints that then must not.
CONTENT_OF = {
    "base": ("architecture of base", "weights of base"),
    "rl": ("architecture of rl", "weights of rl"),
    "tokenizer": ("chat template", "tokenizer files"),
    "problems": ("problem file",),
    "responses": ("responses",),  # of a diagnosis
}
RESULT_FILES = ("*/seed*.rows.jsonl", "tokens.parquet", "parts/*.parquet")  # of a run or a diagnosis, in its folder
# Keys that the results of older versions lack, with the value that they stand for.
YOUNGER = {"template_args": {}, "prompt_column": "", "answer_column": ""}
MARKS = ("role", "control_of")  # say what a setting is there for; no response depends on them


@dataclasses.dataclass(frozen=True)
class Row:
    """One response. `error` says why it could not be graded, else it is None.

    `correct`, `prediction` and `error` are those of the first grader, `others` has the same three of each other one by
    name. `invalid`: the logits became not finite, so the response ended there and counts as wrong.
    `fired` holds the positions where the criterion fired, in tokens from the response's start; `original`, `assistant`
    and `resampled` the token ids there: the proposed one, the other model's own draw, and the emitted one.
    `ids` are the token ids of the whole response (`rlvr_jax.data.token_ids`); rows of older runs have none.
    """

    problem: int
    sample: int
    text: str
    correct: bool
    prediction: str | None
    error: str | None
    length: int
    finished: bool
    fired: tuple[int, ...] = ()
    original: tuple[int, ...] = ()
    assistant: tuple[int | None, ...] = ()
    resampled: tuple[int, ...] = ()
    others: dict[str, tuple[bool, str | None, str | None]] = dataclasses.field(default_factory=dict)
    invalid: bool = False
    ids: str = ""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Responses that were written together: their tokens, the seconds since those before, compilation or not.

    `sampled_passes` and `other_passes` are forward passes of the two models while these responses were in their slots.
    """

    tokens: int
    seconds: float
    compiled: bool
    sampled_passes: int = 0
    other_passes: int = 0


class RowLog:
    """The append-only rows of one setting and seed. Opening it reads what is there; `repair` as in `JsonLines.read`."""

    def __init__(self, path: Path, *, repair: bool = True):
        self.path, self.file = path, JsonLines(path)
        self.rows: dict[tuple[int, int], Row] = {}
        self.timings: list[Timing] = []
        self.file.read(self._take, repair=repair)

    def append(self, rows: Sequence[Row], timing: Timing | None = None) -> None:
        """Adds the rows that are not there yet; on return they are on disk."""
        new = [row for row in rows if (row.problem, row.sample) not in self.rows]
        records = [vars(row) for row in new]
        if timing is not None:
            records.append({"timing": vars(timing)})
            self.timings.append(timing)
        self.file.append(records)
        self.rows.update({(row.problem, row.sample): row for row in new})

    def _take(self, record: dict[str, Any]) -> None:
        if "timing" in record:
            self.timings.append(Timing(**record["timing"]))
            return
        fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in record.items()}
        fields["others"] = {name: tuple(verdict) for name, verdict in fields.get("others", {}).items()}
        row = Row(**fields)
        self.rows.setdefault((row.problem, row.sample), row)


def published(prompts: Sequence[tuple[int, str, str]], rows: dict[tuple[int, int], Row], n: int) -> list[dict]:
    """The published list for one seed. `prompts` holds (problem index, prompt text, answer), `rows` n samples of each.

    `lengths` are tokens, the stop token included; `resample_infos` maps a position where the criterion fired to the
    token ids `original` (proposed), `assistant` (the other model's own draw, null where none was made) and `resampled`.
    """
    out = []
    for problem, prompt, answer in prompts:
        samples = [rows[problem, sample] for sample in range(n)]
        out.append(
            {
                "prompt": prompt,
                "gt": answer,
                "generated_texts": [row.text for row in samples],
                "accs": [row.correct for row in samples],
                "lengths": [row.length for row in samples],
                "resample_rates": [len(row.fired) / max(row.length, 1) for row in samples],
                "resample_infos": [_resample_info(row) for row in samples],
            }
        )
    return out


def _resample_info(row: Row) -> dict[str, dict[str, int | None]]:
    drawn = zip(row.fired, row.original, row.assistant, row.resampled, strict=True)
    return {str(at): {"original": o, "assistant": a, "resampled": r} for at, o, a, r in drawn}


# ---- per-token data ------------------------------------------------------------------------------------------------


class TokenParts:
    """`tokens.parquet` of one setting: one row a response with its token ids and per-token arrays.

    Every batch is a part file, written before its rows are logged; `assemble` merges parts and any earlier table. All
    have checksums.
    """

    def __init__(self, folder: Path):
        self.table_path = folder / "tokens.parquet"
        self.parts = folder / "tokens.parts"

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes one batch. Keys: seed, problem, sample, tokens, logp and, for a pair, delta_logp and fired."""
        number = max(map(int, part_names(self.parts)), default=-1) + 1
        write_part(self.parts, f"{number:06d}", _token_table(rows))

    def whole(self) -> set[tuple[int, int, int]]:
        """Seed, problem and sample of all responses in files that are there and whole.

        Damaged files are moved aside, with a warning.
        """
        found = set()
        for table in map(read_part, part_names(self.parts).values()):
            found |= set() if table is None else _keys(table)
        if self.table_path.exists():
            try:
                with pq.ParquetFile(self.table_path, page_checksum_verification=True) as file:
                    for batch in file.iter_batches():  # all columns: only what is read is checked
                        found |= _keys(batch)
            except (ValueError, OSError, pa.ArrowException) as error:
                set_aside(self.table_path, error)
        return found

    def assemble(self) -> None:
        """Rewrites the table with the parts merged in, sorted by seed, problem and sample, and removes the parts."""
        parts = list(part_names(self.parts).values())
        sources = ([self.table_path] if self.table_path.exists() else []) + parts
        if parts:
            table = pa.concat_tables([pq.read_table(path) for path in sources])
            keys = np.stack([table[key].to_numpy() for key in ("seed", "problem", "sample")], axis=1)
            _, first = np.unique(keys, axis=0, return_index=True)  # a batch decoded twice is the same twice
            with atomic_path(self.table_path) as temporary:
                pq.write_table(table.take(first), temporary, write_page_checksum=True)
        for path in parts:
            path.unlink()
        with contextlib.suppress(OSError):
            self.parts.rmdir()


def _keys(table: pa.Table | pa.RecordBatch) -> set[tuple[int, int, int]]:
    columns = (table[key].to_pylist() for key in ("seed", "problem", "sample"))
    return set(zip(*columns, strict=True))


def _token_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    types = {"tokens": pa.int32(), "logp": pa.float32(), "delta_logp": pa.float32(), "fired": pa.bool_()}
    columns = {key: pa.array([row[key] for row in rows], pa.int32()) for key in ("seed", "problem", "sample")}
    for key, type_ in types.items():
        if key in rows[0]:
            columns[key] = pa.array([row[key] for row in rows], pa.list_(type_))
    return pa.table(columns)


# ---- the folder of a run -------------------------------------------------------------------------------------------


def check_resume(folder: Path, config: DecodeConfig, inputs: dict[str, str]) -> None:
    """Compares a resolved configuration and its inputs with those an earlier run left in `folder`.

    Raises:
      ValueError: naming the key or the input that differs; a config.json there that no decoding run wrote.
    """
    now = with_whole_paths(config)
    require_same_decode(folder, now, FREE_TO_CHANGE, inputs)
    for setting in now["settings"]:
        earlier = read_record(folder / setting["name"] / "setting.json")
        for key in sorted(earlier.keys() & setting.keys() - set(MARKS)):
            _same(folder / setting["name"], f"setting {setting['name']!r}, {key}", earlier[key], setting[key])


def write_config(folder: Path, config: DecodeConfig, inputs: Inputs) -> None:
    """Saves the resolved configuration, the inputs' fingerprints, the problems and each setting beside the results."""
    write_json(folder / "config.json", with_whole_paths(config))
    write_json(folder / "inputs.json", read_record(folder / "inputs.json") | inputs.fingerprints)
    problems = [{"index": p.index, "id": p.id, "answer": p.answer} for p in inputs.problems]
    write_json(folder / "problems.json", problems, indent=None)
    for setting in with_whole_paths(config)["settings"]:
        write_json(folder / setting["name"] / "setting.json", setting)


def require_same_decode(folder: Path, now: Mapping[str, Any], free: Collection[str], inputs: Mapping[str, str]) -> None:
    """Compares a start with what an earlier one left in `folder`; for diagnoses too.

    An input may have moved, where its content is known from then and now, and is the same.

    Args:
      folder: of the results.
      now: the configuration, as `with_whole_paths` gives it.
      free: keys that may differ.
      inputs: fingerprints by what to call them in a sentence.

    Raises:
      ValueError: naming the key or the input that differs; a config.json that another program wrote.
    """
    before = own_config(folder, now.keys() | {"grader"})  # which older versions called it
    if before is None:
        if found := sorted(path for pattern in RESULT_FILES for path in folder.glob(pattern)):
            raise ValueError(
                f"out = {folder}: it holds results ({found[0].relative_to(folder)}), and no config.json says of which "
                "run; give another --out"
            )
        before = {}
    else:
        before = YOUNGER | before
    content = read_record(folder / "inputs.json")
    moved = {key for key, names in CONTENT_OF.items() if all(name in content and name in inputs for name in names)}
    for key in sorted(before.keys() & now.keys() - set(free) - moved):
        if not (key in CONTENT_OF and _one_place(before[key], now[key])):
            _same(folder, key, before[key], now[key])
    for name, value in content.items():
        if name.startswith(CODE) and now.get("changed_code"):
            continue
        if name in inputs and value != inputs[name]:
            raise ValueError(
                f"out = {folder}: it holds results of other content of the {name}, which has changed since; "
                "give another --out or remove the folder"
            )


def _one_place(before: Any, now: Any) -> bool:
    return isinstance(before, str) and isinstance(now, str) and same_place(before, now)


def _same(folder: Path, key: str, before: Any, now: Any) -> None:
    if before != now:
        raise ValueError(
            f"out = {folder}: it holds a run with {key} = {before!r}, now {key} = {now!r}; "
            "give another --out or remove the folder"
        )


def with_whole_paths(config: Any) -> dict[str, Any]:
    """A configuration, of a diagnosis too, as JSON gives it back, the paths of its inputs absolute."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    for key in CONTENT_OF.keys() & values.keys():
        given = values[key]
        values[key] = [_whole(path) for path in given] if isinstance(given, list) else _whole(given)
    return values


def _whole(path: str | None) -> str | None:
    """A path, absolute where something is there: else it is a URL or a name on the hub."""
    here = at_home(path) if path else ""
    return os.path.abspath(here) if here and os.path.exists(here) else path


def read_record(path: Path) -> Any:
    """What a JSON file holds, an empty object where there is no file. Raises ValueError naming the file."""
    return parse_json(path.read_bytes(), path) if path.exists() else {}
