"""The grading worker: a script that reads one JSON request a line and writes one JSON verdict a line.

`GraderPool` starts it by its path with `python -P`, so neither the package nor jax is imported. Its first line is the
configuration; it answers `{"ready": true}` or `{"fatal": reason}`. The time limit is the pool's, which kills the
worker. (An exception raised inside sympy by a timer would leave half-made entries in sympy's caches, and later verdicts
could then depend on earlier ones.)
"""

import functools
import importlib
import json
import logging
import os
import resource
import runpy
import signal
import sys
from typing import Any

RECYCLE_SHARE = 0.5  # of the memory limit: a worker that once grew this far is replaced after its verdict


class _Failures(logging.Handler):
    """Keeps the last exception that math-verify swallowed: it only logs them."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.last = None

    def emit(self, record):
        if record.exc_info and record.exc_info[1] is not None:
            self.last = record.exc_info[1]


def _reason(error):
    return " ".join(f"{type(error).__name__}: {error}"[:300].split()).rstrip(": ")


def _math_verify():
    import math_verify

    failures = _Failures()
    logger = logging.getLogger("math_verify")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(failures)

    @functools.lru_cache(maxsize=1024)
    def parsed(text):
        # The pool limits the time; math-verify's own limit would interrupt sympy half-way (see above).
        failures.last = None
        return math_verify.parse(f"${text}$", parsing_timeout=0), failures.last

    def grade(prediction, answer):
        gold, gold_failure = parsed(answer)
        target, target_failure = parsed(prediction)
        failures.last = None
        correct = bool(math_verify.verify(gold, target, timeout_seconds=0))
        failure = None if correct else gold_failure or target_failure or failures.last
        if failure is None and not gold:
            return correct, prediction, "no answer can be read from the reference answer"
        return correct, prediction, None if failure is None else _reason(failure)

    grade("\\frac{1}{2}", "0.5")  # compiles the regular expressions and fills the parser's tables now, not on the clock
    return grade


def _dapo_answer():
    rules = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "rules.py"))

    def grade(response, answer):
        return *rules["dapo_verdict"](rules["dapo_prediction"](response), answer), None

    return grade


def _function(rule):
    module, _, name = rule.partition(":")
    function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))

    def grade(response, answer):
        verdict = function(response, answer)
        correct, prediction = verdict if isinstance(verdict, tuple) and len(verdict) == 2 else (verdict, None)
        # numpy's bool and a score of 0 or 1 count as booleans; a graded score does not
        if correct not in (True, False) or not (prediction is None or isinstance(prediction, str)):
            raise TypeError(f"{rule} returned {verdict!r}, expected a bool or (bool, str or None)")
        return bool(correct), prediction, None

    return grade


def _limit_memory(memory_mb):
    """Allows `memory_mb` beyond what the imports already took (address space; not enforced by macOS)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mb is None:
        return
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        used = 0
    limit = used + memory_mb * 2**20
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).warning("no memory limit on this system: %s", error)


def _peak_mb():
    try:
        with open("/proc/self/status") as file:  # Linux: ru_maxrss there starts from the parent's size
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    # Graders may print: the protocol moves to private descriptors and 0, 1, 2 lead nowhere.
    requests = os.fdopen(os.dup(0), "rb")
    verdicts = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)

    def reply(**message):
        verdicts.write(json.dumps(message).encode() + b"\n")
        verdicts.flush()

    config = json.loads(requests.readline())
    rule, orphan_s = config["rule"], config["orphan_s"]
    sys.path[:] = config["path"]
    try:
        builtin = {"math_verify": _math_verify, "dapo_answer": _dapo_answer}.get(rule)
        grade = builtin() if builtin else _function(rule)
    except Exception as error:
        reply(fatal=_reason(error))
        return
    _limit_memory(config["memory_mb"])
    allowed = None if config["memory_mb"] is None else _peak_mb() + RECYCLE_SHARE * config["memory_mb"]
    reply(ready=True)

    for line in requests:
        request = json.loads(line)
        # Should the parent be gone, nobody kills an endless grade; the alarm's default action does.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, orphan_s)
        try:
            correct, prediction, error = grade(request["text"], request["answer"])
        except BaseException as failure:  # a grader's SystemExit too
            correct, prediction, error = False, None, _reason(failure)
        signal.setitimer(signal.ITIMER_REAL, 0)
        last = allowed is not None and _peak_mb() > allowed
        reply(correct=correct, prediction=prediction, error=error, last=last)
        if last:
            return


if __name__ == "__main__":
    main()
