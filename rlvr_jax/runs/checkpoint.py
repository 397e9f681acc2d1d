"""Checkpoints of a whole run: the train state, plain values, and host arrays; each whole, or known to be damaged."""

import contextlib
import errno
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlvr_jax.runs import checksums
from rlvr_jax.runs.checkpoint_s3 import extend_orbax_to_s3
from rlvr_jax.runs.distributed import cluster
from rlvr_jax.runs.paths import at_home
from rlvr_jax.runs.remote import filesystem, is_url, naming

log = logging.getLogger(__name__)
# Orbax reports every stage of every save through absl; a run has its own progress display. Its errors are raised too.
logging.getLogger("absl").setLevel(logging.CRITICAL)

T = TypeVar("T")
# Trouble of a place or of this machine, as stores of objects and tensorstore name it: no file is damaged by it.
_TROUBLE = ("UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED")
_PATTERN = ("[", "]", "*", "?", "\\")  # characters that orbax or tensorstore do not take as they are in a path
_OLD_KEYS, _KEYS = {"host", "empty"}, {"host", "empty", "sums", "crc32"}


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what was saved; the message names its folder and what is wrong there."""


class Restored(NamedTuple):
    """One checkpoint: its step, the state (placed as asked), plain values, and numpy arrays."""

    step: int
    state: Any
    host: dict
    arrays: dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run, a folder a step, written in the background.

    A checkpoint counts only when complete (a folder gets its final name then, and at a URL a file that says so), so a
    run killed while saving resumes from the one before. It holds checksums of its values (`rlvr_jax.runs.checksums`).
    What was saved is what is read back, or `DamagedCheckpoint` is raised, in all processes alike.
    Use as a context manager: leaving it waits for the last save.

    Args:
      directory: where the step folders go, made when missing: a folder, gs://... or s3://...
      keep: number of newest checkpoints kept; None keeps all.
      read_only: for looking at a folder that another process may be writing to. Otherwise unfinished checkpoints of
        killed runs are removed, which only the one writer of the folder may do.

    Raises:
      ValueError: `keep`; a URL of another kind, or one that cannot be written to with what is installed.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = None, read_only: bool = False):
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be None or at least 1 checkpoint, got {keep}")
        _say_errors_once()
        self._manager = ocp.CheckpointManager(
            _place(directory),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=not read_only, cleanup_tmp_directories=not read_only
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise  # else what ended the block is what there is to say

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, *, host: Mapping, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Saves a checkpoint; a second save of the same step does nothing.

        Args:
          step: the trainer step that the checkpoint follows.
          state: pytree of jax arrays. It may be donated as soon as this returns.
          host: plain values that JSON can hold (counters, iterator states, the configuration).
          arrays: host arrays of any shape; empty ones are kept too.

        Raises:
          OSError: this one, or the one before, could not be written; the folder is named. So do `wait` and `close`.
        """
        if self.latest == step:
            return
        arrays = dict(arrays or {})
        # tensorstore cannot write arrays of size 0: their dtype and shape go with the plain values.
        full = {name: x for name, x in arrays.items() if x.size}
        outer = {
            "host": dict(host),
            "empty": {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items() if x.size == 0},
            "sums": {"state": checksums.of_tree(state), "arrays": checksums.of_arrays(full)},
        }
        items = {
            "state": ocp.args.StandardSave(state),
            "host": ocp.args.JsonSave(outer | {"crc32": checksums.of_plain(outer)}),
        }
        if full:
            items["arrays"] = ocp.args.StandardSave(full)
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def host(self, step: int) -> dict:
        """The plain values of a checkpoint alone: what to look at before anything large is read.

        Raises:
          DamagedCheckpoint: they are not what was saved.
        """
        return self._outer(step)["host"]

    def restore(self, like: Any, step: int) -> Restored:
        """Reads the checkpoint of `step`.

        One that an older version wrote has no checksums: it is taken as it is, with a warning.

        Args:
          like: pytree of arrays or of `jax.ShapeDtypeStruct`s with shardings: the structure, dtypes and placement of
            the state. The mesh may differ from the one that saved it.

        Raises:
          ValueError: no such step, or a state of another structure than `like`.
          DamagedCheckpoint: a part cannot be read, or its values are not what was saved.
          OSError: the place cannot be read.
        """
        if step not in self._manager.all_steps():
            raise ValueError(f"no checkpoint of step {step} in {self._manager.directory}; there are {self.steps}")
        outer, folder = self._outer(step), self.folder(step)
        sums = outer.get("sums")
        if sums is None:
            log.warning("%s: an older version wrote it, without checksums; damage would not be noticed", folder)
        else:
            _require_same_forms(folder, {name: one[:2] for name, one in sums["state"].items()}, like)

        def read() -> tuple[Any, dict[str, np.ndarray]]:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            state = ocp.StandardCheckpointHandler().restore(folder / "state", args=ocp.args.StandardRestore(target))
            arrays = {}
            if sums["arrays"] if sums is not None else (folder / "arrays").exists():
                arrays = ocp.StandardCheckpointHandler().restore(folder / "arrays", args=ocp.args.StandardRestore())
            arrays = {name: np.asarray(x) for name, x in arrays.items()}
            if sums is not None and checksums.of_arrays(arrays) != sums["arrays"]:
                raise ValueError("arrays are not what was saved, by their checksums")
            return state, arrays

        state, arrays = self._whole(step, read)
        if sums is not None:
            found = checksums.of_tree(state)  # of all processes together, so after all have read
            if other := [name for name, one in sums["state"].items() if found[name] != one]:
                raise DamagedCheckpoint(f"{folder}: damaged: state{other[0]} is not what was saved, by its checksum")
        arrays |= {name: np.zeros(shape, dtype) for name, (dtype, shape) in outer["empty"].items()}
        return Restored(step, state, outer["host"], arrays)

    def folder(self, step: int) -> epath.Path:
        """Where the checkpoint of a step lies."""
        return epath.Path(self._manager.directory) / str(step)

    def set_aside(self, step: int) -> epath.Path:
        """Renames the folder of a checkpoint to N.damaged, so that it counts as none; all processes call it."""
        folder = self.folder(step)
        target = folder.with_name(f"{step}.damaged")
        if cluster().main:
            number = 1
            while target.exists():
                number += 1
                target = folder.with_name(f"{step}.damaged-{number}")
            folder.rename(target)
        target = epath.Path(cluster().broadcast(os.fspath(target)))
        self._manager.reload()
        return target

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def check(self) -> None:
        """Raises what the save in the background has run into; see `save`."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until the save in progress, if any, is complete."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and ends the background threads."""
        try:
            self.wait()
        finally:
            with self._writing():
                self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, what orbax and tensorstore raise where a place cannot be written to becomes one OSError."""
        try:
            yield
        except Exception as error:
            root = _root(error)
            if not _is_trouble(root):
                raise
            full = os.strerror(errno.ENOSPC)
            why = full if full in str(root) else _brief(root)
            raise OSError(
                f"{self._manager.directory}: a checkpoint could not be written: {why}; those before it are whole"
            ) from error

    def _outer(self, step: int) -> dict:
        """What `save` wrote beside the arrays."""

        def read() -> dict:
            outer = json.loads(_content(self.folder(step) / "host" / "metadata"))
            if not isinstance(outer, dict) or outer.keys() not in (_OLD_KEYS, _KEYS):
                raise ValueError("host/metadata does not have what was saved there")
            if "crc32" in outer and outer.pop("crc32") != checksums.of_plain(outer):
                raise ValueError("host/metadata is not what was saved, by its checksum")
            return outer

        return self._whole(step, read)

    def _whole(self, step: int, read: Callable[[], T]) -> T:
        """What `read` gives; DamagedCheckpoint in all processes where it raises in one. They do not wait in `read`."""
        self.wait()
        value, problem = None, ""
        try:
            value = read()
        except Exception as error:  # tensorstore and orbax raise most kinds for damaged files
            root = _root(error)
            if isinstance(root, MemoryError | jax.errors.JaxRuntimeError):
                raise
            if _is_trouble(root):
                raise OSError(f"{self.folder(step)}: cannot be read: {_brief(root)}") from error
            problem = _brief(root)
        problems = [p.decode() for p in cluster().all_gather("checkpoint", problem.encode())]
        if any(problems):
            raise DamagedCheckpoint(f"{self.folder(step)}: damaged: {next(filter(None, problems))}")
        return value  # pyright: ignore[reportReturnType]


@functools.cache
def _say_errors_once() -> None:
    """Keeps Python from printing what fails beside a failed read or write: orbax drops those tasks and their errors."""
    before = sys.unraisablehook

    def of_others(args: Any) -> None:
        if not inspect.iscoroutine(args.object) and str(args.exc_value) != "Event loop is closed":
            before(args)

    sys.unraisablehook = of_others
    logging.getLogger("asyncio").addFilter(lambda record: "tensorstore" not in record.getMessage())


def _content(path: epath.Path) -> bytes:
    """A file's bytes; FileNotFoundError where there is none, another OSError where it cannot be read, at a URL too."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    with naming(os.fspath(path)) if is_url(path) else contextlib.nullcontext():
        return path.read_bytes()


def _root(error: BaseException) -> BaseException:
    """What an error began with: orbax raises others from those of tensorstore."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _brief(error: BaseException) -> str:
    """The first line of an error, without tensorstore's account of its settings."""
    said = (str(error).splitlines() or [""])[0].partition(" [tensorstore_spec")[0]
    return f"{type(error).__name__}: {said}"[:300]


def _is_trouble(error: BaseException) -> bool:
    """Whether a failed read or write is due to the place or the machine, and not to the files there."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return isinstance(error, ValueError) and str(error).startswith(_TROUBLE)


def _require_same_forms(folder: epath.Path, saved: Mapping[str, list], like: Any) -> None:
    wanted = checksums.forms_of(like)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder}: state{name} was saved as {saved.get(name)}, and {wanted.get(name)} is expected: "
                "another version made this checkpoint"
            )


def any_there(directory: str | os.PathLike[str]) -> bool:
    """Whether there is such a folder of checkpoints, perhaps without a complete one."""
    return _place(directory).is_dir()


def check_place(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError where no checkpoints can be written, as `Checkpoints` does."""
    _place(directory)


def _place(directory: str | os.PathLike[str]) -> epath.Path:
    """The folder as orbax takes it."""
    whole = os.fspath(directory) if is_url(directory) else os.fspath(Path(at_home(directory)).absolute())
    if found := [character for character in _PATTERN if character in whole]:
        raise ValueError(
            f"{whole}: checkpoints there could not be read back, since orbax does not take {found[0]} in a path as it "
            f"is; expected a path without any of {' '.join(_PATTERN)}, or a symbolic link to this one"
        )
    if not is_url(directory):
        return epath.Path(whole)
    url = os.fspath(directory)
    if not url.startswith(("gs://", "s3://")):
        raise ValueError(f"{url}: no checkpoints can be written there, expected a folder, gs://... or s3://...")
    filesystem(url)  # what reads it is installed
    if url.startswith("s3://"):
        extend_orbax_to_s3()
    return epath.Path(url)


def require_same_config(saved: Mapping, current: Mapping, *, may_change: Sequence[str]) -> None:
    """Refuses to go on with a checkpoint of another experiment.

    Args:
      saved, current: resolved configurations as nested plain values.
      may_change: dotted keys (or their parents) that do not change what is trained: "run_dir", "log", "mesh" ...

    Raises:
      ValueError: naming the first key that differs, and both its values.
    """
    before, now = _flat(saved), _flat(current)
    for key in sorted(before.keys() | now.keys()):
        if any(key == free or key.startswith(free + ".") for free in may_change):
            continue
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{key}: the checkpoint was made with {before.get(key)!r}, the configuration says {now.get(key)!r}; "
                "use another run folder, or the value that it was started with"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    return {
        name: value
        for key, child in tree.items()
        for name, value in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
