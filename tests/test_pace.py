"""Time left and accuracy so far, with a clock that is set by hand."""

import io

import pytest
from rich.console import Console

from decode.results import progress as progress_module
from decode.results.progress import DecodeProgress, FinishedProblems
from rlvr_jax.runs.pace import Pace


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def seconds(left) -> float | None:
    return None if left is None else left.total_seconds()


def test_compilation_does_not_count(clock):
    """An hour of it before the first mark leaves no trace in what is said later."""
    pace = Pace(now=clock)
    clock.now += 3600
    pace.mark(4)
    assert pace.left(100) is None
    clock.now += 10
    pace.mark(24)  # 2 a second
    assert (seconds(pace.left(100)), pace.rate) == (38, 2)
    clock.now += 8  # it runs on between marks
    assert seconds(pace.left(100)) == 30
    assert seconds(pace.left(24)) == 0
    assert pace.left(100, least=20) is None
    pace.restart()  # another program is compiled
    clock.now += 500
    pace.mark(40)
    assert seconds(pace.left(100)) == 30
    clock.now += 30
    pace.mark(100)
    assert seconds(pace.left(120)) == 10  # (20 + 60) in 40 s


def test_work_that_was_there_already_is_no_pace(clock):
    pace = Pace(done=50, now=clock)
    for done in (51, 52):
        clock.now += 10
        pace.mark(done)
    assert seconds(pace.left(100)) == 480


@pytest.fixture
def screen(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    monkeypatch.setattr(progress_module, "console", console)
    return console.file


def test_a_sweep_says_the_time_left_by_what_has_ended_since_compilation(clock, screen):
    """80 of 1000 responses at once, ten seconds a chunk, the first one 120 s. The first few that end say nothing."""
    count = [0]
    progress = DecodeProgress(1000, 0, now=clock, compiled=lambda: count[0])
    progress.begin(slots=80)
    progress.setting(1, 2, "kl")
    count[0] += 3
    clock.now += 120
    for ended in (2, 10, 40, 100):
        progress.drawn(ended, 100 * ended)
        for _ in range(ended - progress.done):
            progress.response()
        clock.now += 10
    lines = screen.getvalue().splitlines()
    assert lines[0] == "setting 1 of 2: kl"
    assert not any("left" in line for line in lines[:4])
    assert lines[-1].startswith("setting 1 of 2: kl: 40/1000 responses, ")
    assert lines[-1].endswith("327 tokens/s, 0:04:36 left")  # 9,800 tokens and 98 responses in 30 s, 900 to come
    count[0] += 1  # the next queue compiles again
    progress.begin(slots=80)
    clock.now += 600
    progress.drawn(1, 10)
    progress.response()
    assert seconds(progress.left()) == round(899 * 30 / 98)


def test_a_diagnosis_goes_by_tokens(clock, screen):
    progress = DecodeProgress(10, 0, work=1000, now=clock, compiled=lambda: 0)
    progress.stage("scoring with both models")
    clock.now += 60
    progress.drawn(0, 300)  # the longest first
    progress.response()
    clock.now += 10
    progress.drawn(0, 500)
    progress.response()
    assert seconds(progress.left()) == 25


def test_the_accuracy_is_of_the_setting_that_is_named_and_of_whole_problems(clock, screen):
    progress = DecodeProgress(40, 0, now=clock, compiled=lambda: 0)
    progress.setting(1, 2, "kl")
    finished = FinishedProblems(each=2)
    finished.add([(0, True), (1, True), (2, True)])  # the short ones of each
    progress.graded("kl", finished, 10)
    assert progress.accuracy == ""
    finished.add([(0, False), (2, False), (3, True)])
    progress.graded("kl", finished, 10)
    assert progress.accuracy == "accuracy 50.0% over 2 of 10 problems"
    progress.setting(2, 2, "rl")
    assert progress.accuracy == ""
    progress.graded("kl", finished, 10)  # graded late
    assert progress.accuracy == ""
    whole = FinishedProblems(each=1)
    whole.add([(5, True), (6, True), (7, False), (8, True)])
    progress.graded("rl", whole, 10)
    assert progress.accuracy == "accuracy 75.0% over 4 of 10 problems"
    clock.now += 11
    progress.drawn(0, 5)
    assert "accuracy 75.0% over 4 of 10 problems" in screen.getvalue().splitlines()[-1]
