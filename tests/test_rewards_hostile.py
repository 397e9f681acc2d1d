"""Thousands of hostile and random responses: no hang, no crash, bounded memory, a reason for every failure."""

import collections
import os
import re
import sys
import time

import pytest

from rlvr_jax.rewards import Graded, GraderPool
from tests.hostile import SLOW_KINDS, Case, cases

MEMORY_MB = 512
REASONS = {
    "time": r"exceeded the time limit of .* s",
    "memory": r"MemoryError",
    "crash": r"the grading worker died \(.*\)",
    "box too long": r"the last \\boxed\{\.\.\.\} does not close within 2000 characters",
    "reference": r"no answer can be read from the reference answer",
    "exception": r"[A-Za-z]+(Error|Exception|Failed|Warning)\b.*",
}


def reason(graded: Graded) -> str | None:
    if graded.error is None:
        return None
    return next((name for name, pattern in REASONS.items() if re.fullmatch(pattern, graded.error)), graded.error)


def grade_all(made: list[Case], timeout_s: float) -> dict[str, collections.Counter]:
    """Grades the cases by both published rules in one pool and checks what holds for every verdict."""
    responses, answers = [case.response for case in made], [case.answer for case in made]
    found = {}
    with GraderPool(workers=2, timeout_s=timeout_s, memory_mb=MEMORY_MB) as pool:
        for rule in ("math_verify", "dapo_answer"):
            start = time.monotonic()
            graded = pool.grade(rule, responses, answers)
            seconds = time.monotonic() - start
            assert len(graded) == len(made)
            reasons = collections.Counter(map(reason, graded))
            assert reasons.keys() <= {None, *REASONS}
            assert all(not verdict.correct for verdict in graded if verdict.error is not None)
            wrong = [
                (case, verdict)
                for case, verdict in zip(made, graded, strict=True)
                if case.expected is not None
                and (verdict.correct, verdict.error) != (case.expected, None)
                and not (rule == "dapo_answer" and "\\text" in case.response)
            ]
            assert not wrong
            # not later than if every failure had taken its whole time and a worker's start, one after the other
            assert seconds < 30 + len(made) / 20 + (timeout_s + 5) * (reasons["time"] + reasons["crash"])
            found[rule] = reasons
            print(f"{rule}: {len(made)} graded in {seconds:.1f} s, {dict(reasons)}, peak {pool.peak_mb:.0f} MiB")
        if sys.platform == "linux":  # the limit is on what a worker takes beyond its imports (about 100 MiB)
            assert 0 < pool.peak_mb < MEMORY_MB + 200
        workers = [worker.process.pid for team in pool._teams.values() for worker in team]
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return found


def test_a_few_hundred_hostile_strings():
    made = [case for case in cases(400, seed=1) if case.kind not in SLOW_KINDS][:250]
    made += [Case("tower", f"\\boxed{{{tower}}}", "42") for tower in ("9^{9^{9^9}}", "7^{7^{7^{7}}}")]
    made += [Case("valid", "\\boxed{6\\cdot 7}\nAnswer: 42", "42", True)]
    assert len({case.kind for case in made}) == 8
    found = grade_all(made, timeout_s=1.0)
    assert found["math_verify"]["time"] >= 2


@pytest.mark.slow
def test_ten_thousand_hostile_strings():
    found = grade_all(list(cases(10_000)), timeout_s=1.0)
    assert found["math_verify"]["time"] > 0


def test_the_cases_follow_the_seed():
    assert list(cases(50, seed=3)) == list(cases(50, seed=3)) != list(cases(50, seed=4))
