"""What several processes of a run do together: each grades its share, and all go on from the same groups."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvr_jax.rewards.pool import Graded, GraderPool
from rlvr_jax.runs.distributed import Cluster
from rlvr_jax.runs.program import RunError
from train.step.groups import Group, Spool, to_plain


class SharedPool(GraderPool):
    """A pool of each process; every one grades a part of the responses and gets the verdicts on all."""

    def __init__(self, cluster: Cluster, *options: Any, **more: Any):
        super().__init__(*options, **more)
        self._cluster = cluster

    def grade(self, rule: str, responses: Sequence[str], answers: Sequence[str]) -> list[Graded]:
        """See `GraderPool.grade`; all processes call it with the same arguments."""
        index, size = self._cluster.index, self._cluster.size
        begin, end = (len(responses) * i // size for i in (index, index + 1))
        mine = super().grade(rule, responses[begin:end], answers[begin:end])
        plain = json.dumps([dataclasses.astuple(verdict) for verdict in mine]).encode()
        parts = self._cluster.all_gather("verdicts", plain)
        return [Graded(*verdict) for part in parts for verdict in json.loads(part)]


class SharedSpool(Spool):
    """Written by process 0; a batch counts as there where all processes can read it, and read the same."""

    def __init__(self, cluster: Cluster, folder: Path | None, n: int, run: str):
        super().__init__(folder, n, run)
        self._cluster = cluster

    def save(self, number: int, trainer_step: int, groups: Sequence[Group], seconds: dict[str, float]) -> None:
        """See `Spool.save`."""
        if self._cluster.main:
            super().save(number, trainer_step, groups, seconds)

    def load(self, number: int, trainer_step: int) -> tuple[list[Group], dict[str, float]] | None:
        """See `Spool.load`."""
        found = super().load(number, trainer_step)
        seen = "nothing" if found is None else _digest(found[0])
        return found if set(self._cluster.all_gather("spool", seen.encode())) == {seen.encode()} else None

    def discard(self, before: int) -> None:
        """See `Spool.discard`."""
        if self._cluster.main:
            super().discard(before)


def require_same_groups(cluster: Cluster, groups: Sequence[Group], trainer_step: int) -> None:
    """Raises RunError where the processes would not train on the same groups."""
    if cluster.size == 1:
        return
    try:
        cluster.require_same(f"the groups of trainer step {trainer_step}", _digest(groups).encode())
    except ValueError as error:
        raise RunError(str(error)) from error


def _digest(groups: Sequence[Group]) -> str:
    plain, arrays = to_plain(groups)
    digest = hashlib.sha256(json.dumps(plain).encode())
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
