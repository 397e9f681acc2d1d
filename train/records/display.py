"""What whoever watches a run sees: one line a step, and on a terminal a live line with the phase and the time left."""

import datetime
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rlvr_jax.runs.pace import Pace, TimeLeft

SECONDS_BETWEEN_LINES = 60.0


class Display:
    """Progress of a run: one plain line a step.

    On a terminal a live line stands below them: step, time passed and left, phase and how far it is. Elsewhere a plain
    line says the phase where nothing else was said for a minute.

    Args:
      console: where to show it.
      total: number of steps in all, or None when unknown.
      done: steps made before this process began.
      shown: label -> (metric, format), the numbers worth a glance.
      share: of the whole run that was done before this process began; None: done / total.
    """

    def __init__(
        self,
        console: Console,
        *,
        total: int | None,
        done: int,
        shown: Mapping[str, tuple[str, str]],
        share: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._console, self._shown, self._total, self._now = console, shown, total, now
        self._pace = Pace((self._share_of(done) or 0.0) if share is None else share, now)
        self._said = now()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(self.left),
            TextColumn("[bold]{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total, completed=done)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str) -> None:
        """What the run is doing now, the phase first, then how far it is: "rollout 3/8 rows", "grade", "save"."""
        self._bar.update(self._task, description=name.replace("[", r"\["))
        if not self._console.is_terminal and self._now() - self._said >= SECONDS_BETWEEN_LINES:
            self.line(f"  {name}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._said = self._now()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, record: Mapping[str, Any], share: float | None = None) -> None:
        """A step is done; `share` of the whole run is behind it, by default its steps' share."""
        numbers = "  ".join(
            f"{label} {value:{form}}"
            for label, (name, form) in self._shown.items()
            if isinstance(value := record.get(name), int | float)
        )
        step = record["trainer_steps"]
        self._bar.update(self._task, completed=step)
        share = self._share_of(step) if share is None else share
        if share is not None:
            self._pace.mark(share)
        left = self.left()
        of = "" if self._total is None else f"/{self._total}"
        self.line(f"step {step}{of}  {numbers}" + ("" if left is None else f"  left {left}"))

    def left(self) -> datetime.timedelta | None:
        """Time left at the pace of the steps since the first one of this process, which holds the compilation."""
        return self._pace.left(1.0)

    def _share_of(self, step: int) -> float | None:
        return None if self._total is None else step / max(1, self._total)
