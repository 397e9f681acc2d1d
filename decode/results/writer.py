"""Grading and writing beside the device: a thread that takes responses as they come and puts them on disk."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from decode.check.inputs import Inputs
from decode.draw import Drawn
from decode.results.files import Row, RowLog, Timing, TokenParts
from rlvr_jax.data.token_ids import pack_ids
from rlvr_jax.rewards.pool import Graded, GraderPool
from rlvr_jax.runs.program import RunError

MOST_TOGETHER = 256  # responses graded and written in one go, when they have piled up


class Destination(NamedTuple):
    """Where the responses of one setting go.

    `replaces`: what is drawn again comes from rl itself (gamma = 0). `written` is called, in the writing thread, with
    the rows that are newly on disk.
    """

    logs: dict[int, RowLog]
    parts: TokenParts | None
    replaces: bool
    written: Callable[[Sequence[Row]], None]


class _Item(NamedTuple):
    destination: Destination
    drawn: Drawn
    compiled: bool
    at: float


class Writer:
    """A context manager around a thread that grades responses and appends them to their files.

    `put` returns at once, so the caller goes on driving the device. Whatever ends the block, an interrupt included,
    what was put is still graded and written. An error of the thread is raised by the next `put` or at the end.
    """

    def __init__(self, inputs: Inputs, graders: Sequence[str], pool: GraderPool):
        self.inputs, self.graders, self.pool = inputs, graders, pool
        self.items: queue.Queue[_Item | None] = queue.Queue()
        self.error: BaseException | None = None
        self.last_at = time.monotonic()
        self.thread = threading.Thread(target=self._work, name="grading and writing", daemon=True)

    def __enter__(self) -> "Writer":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.items.put(None)
        self.thread.join()
        if error is None:
            self._raise()

    def put(self, destination: Destination, drawn: Drawn, *, compiled: bool) -> None:
        """Takes a response. `compiled`: a program was compiled since those of the chunk before."""
        self._raise()
        self.items.put(_Item(destination, drawn, compiled, time.monotonic()))

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _work(self) -> None:
        ended = False
        while not ended:
            taken = [self.items.get()]
            while len(taken) < MOST_TOGETHER and taken[-1] is not None:
                try:
                    taken.append(self.items.get_nowait())
                except queue.Empty:
                    break
            ended = taken[-1] is None
            try:
                items = [item for item in taken if item is not None]
                if items and self.error is None:
                    self._write(items)
            except BaseException as error:  # whatever it is, the main thread must hear of it
                self.error = error if isinstance(error, OSError) else _as_run_error(error)

    def _write(self, items: list[_Item]) -> None:
        rows = self._graded([item.drawn for item in items], [item.destination.replaces for item in items])
        # What came together was drawn together: each token of it took as long.
        begin, self.last_at = self.last_at, max(item.at for item in items)
        seconds_a_token = (self.last_at - begin) / max(sum(item.drawn.length for item in items), 1)
        compiled = any(item.compiled for item in items)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault((id(item.destination), item.drawn.seed), []).append(i)
        for group in groups.values():
            destination = items[group[0]].destination
            drawn = [items[i].drawn for i in group]
            if destination.parts is not None:
                destination.parts.add([token_row(one) for one in drawn])
            tokens = sum(one.length for one in drawn)
            timing = Timing(
                tokens=tokens,
                seconds=tokens * seconds_a_token,
                compiled=compiled,
                sampled_passes=sum(one.passes[0] for one in drawn),
                other_passes=sum(one.passes[1] for one in drawn),
            )
            written = [rows[i] for i in group]
            destination.logs[drawn[0].seed].append(written, timing)
            destination.written(written)

    def _graded(self, drawn: list[Drawn], replaces: list[bool]) -> list[Row]:
        tokenizer = self.inputs.tokenizer
        ids = [one.tokens.tolist() for one in drawn]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=False)
        # A stop token is no part of an answer, though the published texts show it.
        plain = tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers = [self.inputs.problems[one.place].answer for one in drawn]
        graded = {grader: self.pool.grade(grader, plain, answers) for grader in self.graders}
        return [
            self._row(one, text, {grader: verdicts[i] for grader, verdicts in graded.items()}, replaces[i])
            for i, (one, text) in enumerate(zip(drawn, texts, strict=True))
        ]

    def _row(self, one: Drawn, text: str, verdicts: dict[str, Graded], replaces: bool) -> Row:
        if one.invalid:
            reason = f"the logits after {one.length} tokens were not finite"
            verdicts = {grader: Graded(False, None, reason) for grader in verdicts}
        first = verdicts[self.graders[0]]
        return Row(
            problem=one.problem,
            sample=one.sample,
            text=text,
            correct=first.correct,
            prediction=first.prediction,
            error=first.error,
            length=one.length,
            finished=one.finished,
            others={
                name: (v.correct, v.prediction, v.error) for name, v in verdicts.items() if name != self.graders[0]
            },
            invalid=one.invalid,
            ids=pack_ids(one.tokens),
            **_fired(one, replaces),
        )


def _fired(one: Drawn, replaces: bool) -> dict[str, tuple]:
    """Where the criterion fired in a response, and the token ids there."""
    if one.fired is None or one.sampled_token is None:
        return {}
    (at,) = np.nonzero(one.fired)
    resampled = tuple(one.tokens[at].tolist())
    return {
        "fired": tuple(at.tolist()),
        "original": tuple(one.sampled_token[at].tolist()),
        # Replacement draws from rl itself; an extrapolation draws nothing from the model that did not propose.
        "assistant": resampled if replaces else (None,) * len(at),
        "resampled": resampled,
    }


def token_row(one: Drawn) -> dict[str, Any]:
    """A response as a row of tokens.parquet."""
    row = {"seed": one.seed, "problem": one.problem, "sample": one.sample, "tokens": one.tokens, "logp": one.logp}
    return row if one.fired is None else row | {"delta_logp": one.delta_logp, "fired": one.fired}


def _as_run_error(error: BaseException) -> BaseException:
    return RunError(str(error)) if isinstance(error, RuntimeError) else error
