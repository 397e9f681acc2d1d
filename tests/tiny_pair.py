"""A grading rule that random responses of the tiny models pass now and then; imports nothing, so workers start fast."""


def contains_answer(response: str, answer: str) -> tuple[bool, str | None]:
    """Right when the answer occurs anywhere; the prediction is the first character."""
    return answer in response, response[:1] or None
