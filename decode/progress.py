"""How far a decoding run is: a bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlvr_jax.distributed import cluster
from rlvr_jax.program import console

SECONDS_BETWEEN_LINES = 10.0


class DecodeProgress:
    """Progress over all responses of all settings; a context manager.

    Responses found finished on a resume count as done from the start and not towards the speed. Of several processes,
    number 0 alone shows it.
    """

    def __init__(self, total: int, done: int):
        self.console = console if cluster().main else Console(quiet=True)
        self.total, self.done, self.resumed = total, done, done
        self.started = self.line_at = self.begun = time.monotonic()
        self.head = self.accuracy = self.speed = ""
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("responses  {task.fields[speed]}  {task.fields[accuracy]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
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

    def begin(self) -> None:
        """A queue of responses begins: speed is counted from here."""
        self.speed, self.begun = "", time.monotonic()

    def stage(self, name: str) -> None:
        """Another kind of work begins."""
        self.begin()
        self._head(name)

    def setting(self, number: int, count: int, name: str) -> None:
        """Responses of a setting begin to come."""
        self._head(f"setting {number} of {count}: {name}")

    def drawn(self, rows: int, tokens: int) -> None:
        """The device has reported: responses ended and tokens drawn since the queue began."""
        self.speed = f"{tokens / max(time.monotonic() - self.begun, 1e-9):,.0f} tokens/s"
        self._show()

    def response(self) -> None:
        """One more response has ended."""
        self.done += 1
        self._show()

    def graded(self, correct: int, rows: int) -> None:
        """So many of the setting's responses were right so far. May come from another thread."""
        self.accuracy = f"accuracy so far {100 * correct / max(rows, 1):.1f}%"

    def _head(self, text: str) -> None:
        self.head, self.accuracy = text, ""
        if self.bar is not None:
            self.bar.update(self.task, description=text, accuracy="")
        else:
            self.say(text)
            self.line_at = time.monotonic()

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, speed=self.speed, accuracy=self.accuracy)
        elif time.monotonic() - self.line_at >= SECONDS_BETWEEN_LINES:
            self.line_at = time.monotonic()
            said = [f"{self.head}: {self.done}/{self.total} responses", self.speed, self.accuracy, self._left()]
            self.say(", ".join(filter(None, said)))

    def _left(self) -> str:
        new = self.done - self.resumed
        if new < 8:  # too few to guess from
            return ""
        minutes, seconds = divmod(round((time.monotonic() - self.started) / new * (self.total - self.done)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
