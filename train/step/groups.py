"""Graded groups of responses, and their form in files."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlvr_jax.runs.files import atomic_path

log = logging.getLogger(__name__)
_ROWS = ("lengths", "finished", "correct", "score")  # arrays [n]
_CELLS = ("tokens", "logp")  # arrays [n, longest]
_TEXTS = ("predictions", "errors")


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The n responses to one prompt, graded.

    Attributes:
      prompt: place in the prompt set.
      sampled_at: trainer steps that the sampling policy had behind it.
      generation_batch: number of the generation batch, from 0.
      tokens: int32 [n, longest], 0 beyond a response.
      logp: float32 [n, longest], the sampler's log-probs at its temperature.
      lengths: int32 [n] in tokens, the stop token included.
      finished: bool [n], ended by a stop token.
      correct: bool [n].
      predictions: the answer read from each response, or None.
      errors: why the grading of a response was cut short, or None.
      score: float32 [n], the rewards: the rule's own, or +1 for correct and -1 for wrong (as when none are given).
    """

    prompt: int
    sampled_at: int
    generation_batch: int
    tokens: np.ndarray
    logp: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    correct: np.ndarray
    predictions: tuple[str | None, ...]
    errors: tuple[str | None, ...] = ()
    score: np.ndarray = None  # pyright: ignore[reportAssignmentType] (filled below)

    def __post_init__(self):
        if self.score is None:
            object.__setattr__(self, "score", np.where(self.correct, 1.0, -1.0).astype(np.float32))
        if not self.errors:
            object.__setattr__(self, "errors", (None,) * len(self.correct))

    @property
    def varies(self) -> bool:
        """Whether the scores have a standard deviation above 0, so that the advantages say something.

        Under a rule that says right or wrong that is the accuracy, as published (the overlong punishment is no part of
        it); under a rule with graded rewards two right responses of different reward are enough.
        """
        return bool((self.score != self.score[0]).any())


def to_plain(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Groups as values that JSON can hold and flat arrays (none without groups)."""
    plain = [
        {
            "prompt": group.prompt,
            "sampled_at": group.sampled_at,
            "generation_batch": group.generation_batch,
            **{name: list(getattr(group, name)) for name in _TEXTS},
        }
        for group in groups
    ]
    arrays = {
        name: np.concatenate([getattr(group, name).reshape(-1) for group in groups])
        for name in (*_CELLS, *_ROWS)
        if groups
    }
    return plain, arrays


def from_plain(plain: Sequence[dict[str, Any]], arrays: dict[str, np.ndarray], n: int) -> list[Group]:
    """The groups of `n` responses that `to_plain` was given."""
    groups, row, at = [], 0, 0
    for values in plain:
        # checkpoints made before there were graded rewards have no scores and no errors
        rows = {name: arrays[name][row : row + n] for name in _ROWS if name in arrays}
        longest = int(rows["lengths"].max())
        cells = {name: arrays[name][at : at + n * longest].reshape(n, longest) for name in _CELLS}
        fields: dict[str, Any] = values | rows | cells | {name: tuple(values.get(name, ())) for name in _TEXTS}
        groups.append(Group(**fields))
        row, at = row + n, at + n * longest
    return groups


class Spool:
    """Finished generation batches on disk until a checkpoint holds what became of them: a killed run reads them again.

    Args:
      folder: where the files go; None keeps none.
      n: responses a group.
      run: what identifies the run's configuration and data; a batch of another run is not read.
    """

    def __init__(self, folder: Path | None, n: int, run: str):
        self._folder, self._n, self._run = folder, n, run

    def save(self, number: int, trainer_step: int, groups: Sequence[Group], seconds: dict[str, float]) -> None:
        """Writes generation batch `number`, sampled for `trainer_step`."""
        if self._folder is None:
            return
        plain, arrays = to_plain(groups)
        head = json.dumps({"run": self._run, "trainer_step": trainer_step, "groups": plain, "seconds": seconds})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._path(number)) as temporary, open(temporary, "wb") as file:
                np.savez(file, head=np.frombuffer(head.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
        except OSError as error:  # it saves time, no more
            log.warning("%s: %s; generation batches are not kept any more", self._folder, error)
            self._folder = None

    def load(self, number: int, trainer_step: int) -> tuple[list[Group], dict[str, float]] | None:
        """The groups and seconds of a batch that was sampled for this trainer step; None where there is none.

        Nor is there one where the file is damaged (it has a checksum of each array): that is said.
        """
        if self._folder is None or not self._path(number).is_file():
            return None
        try:
            with np.load(self._path(number)) as file:
                arrays = dict(file)
            head = json.loads(arrays.pop("head").tobytes())
            if (head["run"], head["trainer_step"]) != (self._run, trainer_step):
                return None
            return from_plain(head["groups"], arrays, self._n), head["seconds"]
        except Exception as error:  # zipfile and numpy raise most kinds for damaged files
            log.warning("%s: damaged (%s); the batch is generated again", self._path(number), error)
            return None

    def discard(self, before: int) -> None:
        """Removes the batches with a number below `before`."""
        if self._folder is not None and self._folder.is_dir():
            for path in self._folder.glob(f"batch_{'[0-9]' * 8}.npz"):
                if int(path.stem.removeprefix("batch_")) < before:
                    path.unlink()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"batch_{number:08d}.npz"
