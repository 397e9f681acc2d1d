"""How far a decoding run is: a bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlvr_jax.program import console

SECONDS_BETWEEN_LINES = 10.0


class DecodeProgress:
    """Progress over all rows of all settings; a context manager.

    Rows found finished on a resume count as done from the start and not towards the speed.
    """

    def __init__(self, total: int, done: int):
        self.total, self.done, self.resumed = total, done, done
        self.started = self.line_at = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows  {task.fields[speed]}  {task.fields[accuracy]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
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
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def setting(self, number: int, count: int, name: str) -> None:
        """A new setting begins."""
        self.accuracy, self.batch_at = "", time.monotonic()
        self.head = f"setting {number} of {count}: {name}"
        if self.bar is not None:
            self.bar.update(self.task, description=self.head, speed="", accuracy="")
        else:
            self.say(self.head)
            self.line_at = time.monotonic()

    def rows(self, new: int, *, tokens: int, seconds: float, accuracy: float) -> None:
        """A batch is done: rows that are new, its tokens and seconds, the setting's accuracy so far."""
        self.done += new
        self.accuracy = f"accuracy so far {100 * accuracy:.1f}%"
        self._show(self.done, tokens, seconds)
        self.batch_at = time.monotonic()

    def drawn(self, rows: int, tokens: int) -> None:
        """Inside a batch: rows that are finished, among them padding, and tokens drawn."""
        self._show(min(self.done + rows, self.total - 1), tokens, time.monotonic() - self.batch_at)

    def _show(self, done: int, tokens: int, seconds: float) -> None:
        speed = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, speed=speed, accuracy=self.accuracy)
        elif time.monotonic() - self.line_at >= SECONDS_BETWEEN_LINES or done == self.total:
            self.line_at = time.monotonic()
            said = [f"{self.head}: {done}/{self.total} rows", speed, self.accuracy, f"{self._left(done)} left"]
            self.say(", ".join(filter(None, said)))

    def _left(self, done: int) -> str:
        seconds = (time.monotonic() - self.started) / max(done - self.resumed, 1) * (self.total - done)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
