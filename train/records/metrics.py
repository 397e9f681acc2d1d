"""Where a run's numbers go: one JSON object a line, TensorBoard, and trackers."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from rlvr_jax.runs.files import atomic_path, json_bytes
from train.records.trackers import Tracker

log = logging.getLogger(__name__)


class MetricLog:
    """`metrics.jsonl` and TensorBoard events of a run.

    Every record names its trainer step under "trainer_steps" and its kind under "kind" ("train" or "eval").

    Args:
      run_dir: the run's folder; events go to `run_dir/tensorboard`.
      after_step: None for a new run (older files are replaced); on resume, the checkpointed trainer step: lines of
        later steps are dropped, since those steps will be made again, and TensorBoard is told to forget them.
      tensorboard: write events as well.
      trackers: open ones that get every record too; whoever opened them closes them.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        after_step: int | None = None,
        tensorboard: bool = True,
        trackers: Sequence[Tracker] = (),
    ):
        self._trackers = trackers
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last: dict[str, int] = {}
        self._keep_lines(-1 if after_step is None else after_step)
        self._file: BinaryIO = open(self.path, "ab")  # noqa: SIM115 (open for the whole run)
        self._events = EventFileWriter(str(Path(run_dir) / "tensorboard")) if tensorboard else None
        if self._events is not None and after_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=after_step + 1, session_log=start))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; numbers that are not finite are written as null (JSON has no word for them)."""
        clean = {name: plain(value) for name, value in record.items()}
        self._last[record["kind"]] = record["trainer_steps"]
        self._file.write(json_bytes(clean, allow_nan=False))
        self._file.flush()
        numbers = {
            f"{record['kind']}/{name}": value
            for name, value in clean.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        step = int(record["trainer_steps"])
        for tracker in self._trackers:
            tracker.write(numbers, step)
        if self._events is None:
            return
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()

    def last_step(self, kind: str) -> int | None:
        """Trainer step of the newest record of a kind, those of earlier processes included."""
        return self._last.get(kind)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _keep_lines(self, last_step: int) -> None:
        if not self.path.exists():
            if last_step >= 0:
                log.warning("%s: is gone, and with it the records of the steps up to %d", self.path, last_step)
            return
        kept, damaged = [], []
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                kind, step = record["kind"], int(record["trainer_steps"])
            except (ValueError, KeyError, TypeError):
                damaged.append(number)
                continue
            if step <= last_step:
                kept.append(line.rstrip(b"\n") + b"\n")  # a full disk may have cut the line break alone
                self._last[kind] = step
        if damaged and damaged != [len(lines)]:  # the last line: cut short by a kill, which is nothing to tell
            log.warning("%s: line %d is damaged and left out, %d in all", self.path, damaged[0], len(damaged))
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))


def plain(value: Any) -> Any:
    """A number, string, bool or list as JSON has it; None for a number that is not finite."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as JSON, one per line, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.writelines(map(json_bytes, rows))
