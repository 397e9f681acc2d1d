"""Grading rules of a researcher's own, as `module:function`; imported by the grading workers, so nothing heavy here."""

import os
import signal


def contains(response: str, answer: str) -> tuple[bool, str | None]:
    """Right when the answer occurs anywhere: random responses pass now and then."""
    return answer in response, response[:1] or None


def never(response: str, answer: str) -> bool:
    """Always wrong."""
    return False


def marks(response: str, answer: str) -> tuple[float, str | None]:
    """A graded reward: the share of digits, less a little."""
    share = sum(letter.isdigit() for letter in response) / max(1, len(response))
    return share - 0.25, response[:1] or None


def killed(response: str, answer: str) -> bool:
    """Ends its process as another program would."""
    os.kill(os.getpid(), signal.SIGKILL)
    return True


def alone(response: str) -> bool:
    """A rule that takes no answer."""
    return True


def failing(response: str, answer: str) -> float:
    """No reward: an error for every response."""
    return float("nan")
