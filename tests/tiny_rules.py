"""Grading rules of a researcher's own, as `module:function`; imported by the grading workers, so nothing heavy here."""


def contains(response: str, answer: str) -> tuple[bool, str | None]:
    """Right when the answer occurs anywhere: random responses pass now and then."""
    return answer in response, response[:1] or None


def never(response: str, answer: str) -> bool:
    """Always wrong."""
    return False
