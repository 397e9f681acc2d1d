"""The public graders: lists of text in, verdicts out, on one shared pool of workers."""

import os
import threading
from collections.abc import Sequence

from rlvr_jax.rewards.pool import Graded, GraderPool

_shared: tuple[int, GraderPool] | None = None
_shared_lock = threading.Lock()


def _shared_pool() -> GraderPool:
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():  # a forked child needs workers of its own
            _shared = os.getpid(), GraderPool()
        return _shared[1]


def math_verify_reward(responses: Sequence[str], answers: Sequence[str]) -> list[Graded]:
    r"""Grades the last `\boxed{...}` of every response with math-verify: the paper's rule at test time.

    `correct = verify(parse(f"${answer}$"), parse(f"${boxed}$"))` with math-verify's default settings, where `boxed` is
    the content of the last `\boxed` if a brace follows it at once and is closed. Never hangs and never raises on what
    a response contains: the work is done in guarded processes (`GraderPool`, 5 s and 2 GiB a response), and a
    verdict that was cut short is `correct=False` with its reason in `error`.

    Same as the published verdicts, their faults included: `1,1,1` passes for 1 (a list is read as a set), `50\%` for 50
    and for 0.5, `x=5` for 5, `068` for 68; a response is wrong where its last `\boxed` is malformed even if an
    earlier one is right.
    Different: a text with no `\boxed` at all is never graded (the published rule grades one that happens to begin with
    a brace); content of more than 2,000 characters is wrong, with an error; parsing and comparing share one limit
    of 5 s (published: 5 s each). The rule is that of arXiv 2603.22117's published code.

    Args:
        responses: whole responses.
        answers: reference answers, LaTeX or plain, without dollars.

    Returns:
        A `Graded(correct, prediction, error)` a response; `prediction` is the content of the box, None without one.

    Raises:
        ValueError: lists of unequal length, or something that is no text.
    """
    return _shared_pool().grade("math_verify", responses, answers)


def dapo_answer_reward(responses: Sequence[str], answers: Sequence[str]) -> list[Graded]:
    r"""Grades by DAPO's own rule (arXiv 2503.14476, as published with verl): the last `Answer:` line, compared as text.

    Of the last 300 characters, the last match of `(?i)Answer\s*:\s*([^\n]+)` is the prediction. It and the reference
    answer are normalised (text after the last `=`; units, spaces, `\text{}`, dollars and thousands separators dropped;
    `\frac12` gains its braces) and must be equal as strings. `\boxed{}` alone fails.

    Same as the published verdicts, their faults included (300,000 random texts agree): `**Answer**: 42` and
    `**Answer:** 42` fail, `\dfrac{1}{2}` fails against `\frac{1}{2}`, `068` against `68` and `1/2` against `0.5`; a
    special token such as `<|im_end|>` left at the end of the line fails; a response with no `Answer:` *passes* when the
    reference answer is "[INVALID]".
    Different: the prediction of a response with no `Answer:` is None here, "[INVALID]" there.

    The work on a response is bounded by its last 300 characters, so it is done in this process; only reference
    answers of more than 2,000 characters go to the guarded workers.

    Args, returns and raises: as `math_verify_reward`; `prediction` is the normalised text.
    """
    return _shared_pool().grade("dapo_answer", responses, answers)
