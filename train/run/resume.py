"""Where a run is kept, and what it resumes from."""

import logging
from collections.abc import Sequence
from typing import Any

from rlvr_jax.runs.checkpoint import Checkpoints, DamagedCheckpoint, Restored, any_there, check_place
from rlvr_jax.runs.distributed import cluster
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.program import RunError
from train.run.same_run import require_free, require_same_run

log = logging.getLogger(__name__)
GOES_ON_FROM = ("config.json", "inputs.json", "metrics.jsonl", "trackers.json", "generated", "compile_cache")


def run_folder(run_dir: str) -> RunFolder:
    """The folder of a training run; of one at a URL, a run that goes on needs the files of `GOES_ON_FROM` alone."""
    folder = RunFolder(run_dir, needed=lambda name: name.split("/")[0] in GOES_ON_FROM)
    check_place(folder.checkpoints)
    return folder


def resumable(
    folder: RunFolder,
    record: dict,
    may_change: Sequence[str],
    *,
    defaults: dict | None = None,
    fallback: bool = False,
) -> int | None:
    """Step of the newest checkpoint of a run, as far as its plain values say; None where there is none, and it begins.

    An option that is younger than the checkpoint had the value that it has in `defaults`.

    Raises:
      ValueError: the folder holds another run (`train.run.same_run`); the checkpoint is damaged and `fallback` does not
        allow an older one.
    """
    defaults = defaults or {}
    if cluster().broadcast(any_there(folder.checkpoints)):
        with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
            steps = cluster().broadcast(checkpoints.steps)
            for step in reversed(steps):
                try:
                    saved = checkpoints.host(step)["config"]
                except DamagedCheckpoint as error:
                    _passed_over(error, step, steps, fallback)
                    continue
                require_same_run(saved, record, may_change, defaults=defaults)
                return step
    if cluster().main:
        require_free(folder.local, record, may_change, defaults=defaults)
    return None


def restore(checkpoints: Checkpoints, like: Any, step: int, *, fallback: bool) -> Restored:
    """The checkpoint of `step`; where it is damaged and `fallback` allows it, the newest whole one before it.

    Damaged ones that are newer than what is restored are renamed to N.damaged: their steps will be made again.

    Raises:
      RunError: it cannot be restored, or none can.
    """
    steps = cluster().broadcast(checkpoints.steps)
    for older in [one for one in reversed(steps) if one <= step]:
        try:
            restored = checkpoints.restore(like, older)
        except ValueError as error:
            if not isinstance(error, DamagedCheckpoint):
                raise RunError(str(error)) from error
            try:
                _passed_over(error, older, steps, fallback)
            except ValueError as refused:
                raise RunError(str(refused)) from error
            continue
        for newer in [one for one in steps if one > older]:
            log.warning("damaged checkpoint of step %d: kept as %s", newer, checkpoints.set_aside(newer))
        return restored
    raise RunError(f"no checkpoint up to step {step}; there are {steps}")


def _passed_over(error: DamagedCheckpoint, step: int, steps: Sequence[int], fallback: bool) -> None:
    """Warns of a damaged checkpoint; ValueError, which says how to go on, unless an older one may stand in for it."""
    older = [one for one in steps if one < step]
    if not older:
        raise ValueError(
            f"{error}; no older checkpoint exists: give another run folder, or remove the checkpoints to begin again"
        ) from error
    if not fallback:
        raise ValueError(
            f"{error}; --checkpoint.fallback resumes from the newest whole one before it (there are those of steps "
            f"{', '.join(map(str, older))})"
        ) from error
    log.warning("%s; the one of step %d is tried (checkpoint.fallback)", error, older[-1])
