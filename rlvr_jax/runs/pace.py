"""How long a run still takes: the pace of its work, without compilation."""

import datetime
import time
from collections.abc import Callable

from rich.progress import ProgressColumn, Task
from rich.text import Text


class Pace:
    """Work per second so far, from which the time left follows.

    Intervals between two marks count, but for the first one and those after `restart`: programs are compiled and loaded
    in them, which is not the pace of what is still to do.

    Args:
      done: work that is done already. Its unit is the caller's (steps, responses, tokens, a share of the run).
      now: the clock, in seconds.
    """

    def __init__(self, done: int | float = 0, now: Callable[[], float] = time.monotonic):
        self._now, self._at, self._done, self._counts = now, now(), done, False
        self._seconds = self._work = 0.0

    def restart(self) -> None:
        """Leaves out the interval up to the next mark: something is compiled, or other work is done."""
        self._counts = False

    def mark(self, done: int | float) -> None:
        """So much work is done in all."""
        at = self._now()
        if self._counts:
            self._seconds += at - self._at
            self._work += done - self._done
        self._at, self._done, self._counts = at, done, True

    @property
    def rate(self) -> float | None:
        """Work per second; None before any was measured."""
        return self._work / self._seconds if self._work > 0 and self._seconds > 0 else None

    def left(self, total: int | float, *, least: int | float = 0) -> datetime.timedelta | None:
        """Time until `total` is done, to the second; None before more work than `least` has been measured."""
        if self.rate is None or self._work <= least:
            return None
        ahead = (total - self._done) / self.rate
        return datetime.timedelta(seconds=max(0, round(ahead - (self._now() - self._at))))


class TimeLeft(ProgressColumn):
    """A column with a time left. Rich's own estimate forgets after 30 seconds, and a step may take longer."""

    def __init__(self, left: Callable[[], datetime.timedelta | None]):
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        left = self._left()
        return Text("-:--:--" if left is None else str(left), style="progress.remaining")
