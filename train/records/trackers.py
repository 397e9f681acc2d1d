"""Experiment trackers by option: wandb and trackio, optional packages that cannot stop a run once it has begun."""

import contextlib
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from rlvr_jax.runs.files import parse_json, write_json
from rlvr_jax.runs.program import RunError

TRACKERS = ("wandb", "trackio")
STEP = "trainer_steps"

log = logging.getLogger(__name__)


def tracker_module(name: str) -> ModuleType:
    """The package of a tracker. Raises ValueError where it is unknown or not installed."""
    if name not in TRACKERS:
        raise ValueError(f"log.trackers: {name!r}: expected some of {', '.join(TRACKERS)}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"log.trackers: {name} cannot be imported ({error}): pip install {name}, or leave it out"
        ) from error


class Tracker:
    """A run of wandb or trackio; a context manager.

    Its identity is kept in `run_dir/trackers.json`, so that a resumed run goes on in the same place there. A call that
    fails is told once, and training goes on.

    Args:
      name: "wandb" or "trackio".
      run_dir: the run's folder.
      config: the resolved configuration, saved with the run there.
      project: the project there.
      run_name: the run's name there; None: the folder's name.
      resume: whether the run goes on from a checkpoint. If not, it is a new run there too.

    Raises:
      RunError: it did not start (no login, no network ...).
    """

    def __init__(
        self,
        name: str,
        run_dir: Path,
        config: Mapping[str, Any],
        *,
        project: str,
        run_name: str | None = None,
        resume: bool = False,
    ):
        self.name, self._told = name, False
        module = tracker_module(name)
        path = run_dir / "trackers.json"
        known = _known(path)
        before = known.get(name) if resume else None
        begin = _wandb if name == "wandb" else _trackio
        try:
            identity, self._log, self._finish = begin(
                module, run_dir, dict(config), project, run_name or run_dir.resolve().name, before
            )
        except Exception as error:  # whatever a third party's start raises
            raise RunError(f"log.trackers: {name} did not start: {type(error).__name__}: {error}") from error
        write_json(path, known | {name: identity})

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._finish, error is not None)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Sends one record's numbers."""
        self._call(self._log, dict(numbers), step)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # whatever a third party raises: the numbers are in metrics.jsonl all the same
            if not self._told:
                log.warning(
                    "%s failed and may lack records, training goes on (they are in metrics.jsonl): %s: %s",
                    self.name,
                    type(error).__name__,
                    error,
                )
            self._told = True


def _known(path: Path) -> dict[str, str]:
    """The identities in a file, by tracker; none, with a warning, where it is damaged."""
    try:
        known = parse_json(path.read_bytes(), path) if path.exists() else {}
        if not isinstance(known, dict):
            raise ValueError("not a JSON object")
        return known
    except ValueError as error:
        log.warning("%s: damaged (%s); the run gets a new identity there", path, error)
        return {}


def open_trackers(
    stack: contextlib.ExitStack, names: Sequence[str], run_dir: Path, config: Mapping[str, Any], **options: Any
) -> list[Tracker]:
    """The trackers by these names, closed with `stack`. See `Tracker`."""
    return [stack.enter_context(Tracker(name, run_dir, config, **options)) for name in dict.fromkeys(names)]


def _wandb(module: Any, run_dir: Path, config: dict, project: str, run_name: str, before: str | None) -> tuple:
    options = {} if before is None else {"id": before, "resume": "allow"}
    run = module.init(project=project, name=run_name, dir=str(run_dir), config=config, **options)
    # Its own step only grows and drops what is behind it: steps that are made again after a resume, for example.
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)

    def write(numbers: dict[str, float], step: int) -> None:
        run.log(numbers | {STEP: step})

    return run.id, write, lambda failed: run.finish(exit_code=int(failed))


def _trackio(module: Any, run_dir: Path, config: dict, project: str, run_name: str, before: str | None) -> tuple:
    run = module.init(
        project=project, name=before or run_name, config=config, resume="never" if before is None else "allow"
    )

    def write(numbers: dict[str, float], step: int) -> None:
        module.log(numbers, step=step)

    return run.name, write, lambda failed: module.finish()
