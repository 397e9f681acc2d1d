"""How far a decoding run is: a bar on a terminal, a plain line now and then elsewhere."""

import datetime
import functools
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rlvr_jax.runs.distributed import cluster
from rlvr_jax.runs.pace import Pace, TimeLeft
from rlvr_jax.runs.program import console

SECONDS_BETWEEN_LINES = 10.0


class _CompilationCounter:
    """Counts what XLA compiles, so that decoding speed can be told from compilation."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event.endswith("backend_compile_duration")


@functools.cache
def compilations() -> _CompilationCounter:
    """The one counter of this process."""
    return _CompilationCounter()


class FinishedProblems:
    """Accuracy over the problems of a setting that have all their responses, `each` of them.

    Others do not count: of a problem's responses the short ones end first, and they are more often right.
    """

    def __init__(self, each: int):
        self.each, self.count, self._right = each, 0, 0
        self._verdicts: dict[int, list[bool]] = {}

    def add(self, verdicts: Iterable[tuple[int, bool]]) -> None:
        """(problem, whether it is right) of responses that have ended."""
        for problem, right in verdicts:
            known = self._verdicts.setdefault(problem, [])
            known.append(right)
            if len(known) == self.each:
                self.count += 1
                self._right += sum(self._verdicts.pop(problem))

    @property
    def accuracy(self) -> float:
        """Share of right responses; 0 before a problem has all."""
        return self._right / max(1, self.count * self.each)


class DecodeProgress:
    """Progress over all responses of all settings; a context manager.

    Responses found finished on a resume count as done from the start and not towards the speed. Of several processes,
    number 0 alone shows it.

    The time left is measured in responses, or in `work` where that is known to be a better measure: the tokens of given
    responses. It is not said before `least` responses have ended beside those that a compilation fell between: what
    ends first is short.

    Args:
      total: responses in all.
      done: those that are there already.
      work: tokens to be worked on, if known.
      now: the clock, in seconds.
      compiled: how many programs were compiled so far.
    """

    def __init__(
        self,
        total: int,
        done: int,
        *,
        work: int | None = None,
        now: Callable[[], float] = time.monotonic,
        compiled: Callable[[], int] | None = None,
    ):
        self.console = console if cluster().main else Console(quiet=True)
        self.total, self.done, self.resumed, self.work = total, done, done, work
        self.now, self.compiled = now, compiled or (lambda: compilations().count)
        self.pace, self.tokens = Pace(done if work is None else 0, now), Pace(now=now)
        self.before, self.least, self.seen = done, 0, self.compiled()
        self.line_at = now()
        self.head = self.name = self.accuracy = self.speed = ""
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("responses  {task.fields[speed]}  {task.fields[accuracy]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeLeft(self.left),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=total, completed=done, speed="", accuracy="")

    def __enter__(self) -> "DecodeProgress":
        if self.bar is not None:
            self.bar.start()
        if self.resumed:
            self.say(f"resumed: {self.resumed} of {self.total} responses were there already")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        """A line that stays on the screen."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin(self, slots: int = 1) -> None:
        """A queue of responses begins, `slots` of them at once: speed is counted from here."""
        self.speed, self.before, self.least = "", self.done, slots
        self.pace.restart()
        self.tokens = Pace(now=self.now)

    def stage(self, name: str) -> None:
        """Another kind of work begins."""
        self.begin()
        self._head(name)

    def setting(self, number: int, count: int, name: str) -> None:
        """Responses of a setting begin to come."""
        self._head(f"setting {number} of {count}: {name}", name)

    def drawn(self, rows: int, tokens: int) -> None:
        """The device has reported: responses ended and tokens drawn (or worked on) since the queue began."""
        if self.compiled() > self.seen:
            self.seen = self.compiled()
            self.pace.restart()
            self.tokens.restart()
        self.tokens.mark(tokens)
        self.speed = "" if self.tokens.rate is None else f"{self.tokens.rate:,.0f} tokens/s"
        self.pace.mark(self.before + rows if self.work is None else tokens)
        self._show()

    def response(self) -> None:
        """One more response has ended."""
        self.done += 1
        self._show()

    def graded(self, name: str, finished: "FinishedProblems", problems: int) -> None:
        """More responses of a setting, over so many problems, are graded. May come late, and from another thread."""
        if finished.count and name == self.name:
            self.accuracy = f"accuracy {100 * finished.accuracy:.1f}% over {finished.count} of {problems} problems"

    def left(self) -> datetime.timedelta | None:
        """Time left, None where too little was measured."""
        if self.work is not None:
            return self.pace.left(self.work)
        return self.pace.left(self.total, least=min(self.least, (self.total - self.resumed) // 2))

    def _head(self, text: str, name: str = "") -> None:
        self.head, self.name, self.accuracy = text, name, ""
        if self.bar is not None:
            self.bar.update(self.task, description=text, accuracy="")
        else:
            self.say(text)
            self.line_at = self.now()

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, speed=self.speed, accuracy=self.accuracy)
        elif self.now() - self.line_at >= SECONDS_BETWEEN_LINES:
            self.line_at, left = self.now(), self.left()
            said = [f"{self.head}: {self.done}/{self.total} responses", self.speed, self.accuracy]
            self.say(", ".join(filter(None, [*said, "" if left is None else f"{left} left"])))
