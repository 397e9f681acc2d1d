"""Checkpoints of a whole run: the train state, plain values, and host arrays; each whole or absent."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from rlvr_jax.checkpoint_s3 import extend_orbax_to_s3
from rlvr_jax.remote import filesystem, is_url

log = logging.getLogger(__name__)
# Orbax reports every stage of every save at INFO through absl; a run has its own progress display.
logging.getLogger("absl").setLevel(logging.WARNING)


class Restored(NamedTuple):
    """One checkpoint: its step, the state (placed as asked), plain values, and numpy arrays."""

    step: int
    state: Any
    host: dict
    arrays: dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one run, a folder a step, written in the background.

    A checkpoint counts only when complete (a folder gets its final name then, and at a URL a file that says so), so a
    run killed while saving resumes from the one before. Use as a context manager: leaving it waits for the last save.

    Args:
      directory: where the step folders go, made when missing: a folder, gs://... or s3://...
      keep: number of newest checkpoints kept; None keeps all.

    Raises:
      ValueError: `keep`; a URL of another kind, or one that cannot be written to with what is installed.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int | None = None):
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be None or at least 1 checkpoint, got {keep}")
        self._manager = ocp.CheckpointManager(
            _place(directory),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """
        if self.latest == step:
            return
        arrays = dict(arrays or {})
        # tensorstore cannot write arrays of size 0: their dtype and shape go with the plain values.
        empty = {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items() if x.size == 0}
        items = {
            "state": ocp.args.StandardSave(state),
            "host": ocp.args.JsonSave({"host": dict(host), "empty": empty}),
        }
        if full := {name: x for name, x in arrays.items() if x.size}:
            items["arrays"] = ocp.args.StandardSave(full)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def host(self, step: int) -> dict:
        """The plain values of a checkpoint alone: what to look at before anything large is read."""
        return self._host(step)["host"]

    def restore(self, like: Any, step: int) -> Restored:
        """Reads the checkpoint of `step`.

        Args:
          like: pytree of arrays or of `jax.ShapeDtypeStruct`s with shardings: the structure, dtypes and placement of
            the state. The mesh may differ from the one that saved it.

        Raises:
          ValueError: no such step.
        """
        if step not in self._manager.all_steps():
            raise ValueError(f"no checkpoint of step {step} in {self._manager.directory}; there are {self.steps}")
        outer = self._host(step)
        items = {"state": ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))}
        has_arrays = (epath.Path(self._manager.directory) / str(step) / "arrays").exists()
        if has_arrays:
            items["arrays"] = ocp.args.StandardRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        arrays = {name: np.asarray(x) for name, x in restored["arrays"].items()} if has_arrays else {}
        arrays |= {name: np.zeros(shape, dtype) for name, (dtype, shape) in outer["empty"].items()}
        return Restored(step, restored["state"], outer["host"], arrays)

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Blocks until the save in progress, if any, is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and ends the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _host(self, step: int) -> dict:
        return self._manager.restore(step, args=ocp.args.Composite(host=ocp.args.JsonRestore()))["host"]


def any_there(directory: str | os.PathLike[str]) -> bool:
    """Whether there is such a folder of checkpoints, perhaps without a complete one."""
    return _place(directory).is_dir()


def check_place(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError where no checkpoints can be written, as `Checkpoints` does."""
    _place(directory)


def _place(directory: str | os.PathLike[str]) -> epath.Path:
    """The folder as orbax takes it."""
    if not is_url(directory):
        return epath.Path(Path(directory).absolute())
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
