"""Where a run is kept, and whether there is one to go on with."""

import hashlib
from collections.abc import Sequence

from rlvr_jax.checkpoint import Checkpoints, any_there, check_place, require_same_config
from rlvr_jax.distributed import cluster
from rlvr_jax.run_folder import RunFolder

GOES_ON_FROM = ("metrics.jsonl", "trackers.json", "generated", "compile_cache")


def run_folder(run_dir: str) -> RunFolder:
    """The folder of a training run; of one at a URL, a run that goes on needs the files of `GOES_ON_FROM` alone."""
    folder = RunFolder(run_dir, needed=lambda name: name.split("/")[0] in GOES_ON_FROM)
    check_place(folder.checkpoints)
    return folder


def resumable(
    folder: RunFolder, record: dict, may_change: Sequence[str], *, defaults: dict | None = None
) -> int | None:
    """Step of the newest checkpoint of a run; ValueError if it was made with another configuration.

    An option that is younger than the checkpoint had the value that it has in `defaults`.
    """
    if not cluster().broadcast(any_there(folder.checkpoints)):
        return None
    with Checkpoints(folder.checkpoints) as checkpoints:
        step = cluster().broadcast(checkpoints.latest)
        if step is not None:
            saved = _filled(checkpoints.host(step)["config"], defaults or {})
            require_same_config(saved, record, may_change=may_change)
        return step


def fingerprint(*parts: bytes) -> str:
    """SHA-256 of the data that a run trains on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _filled(saved: dict, defaults: dict) -> dict:
    return defaults | {
        key: _filled(value, defaults.get(key) or {}) if isinstance(value, dict) else value
        for key, value in saved.items()
    }
