"""The grading worker: a script that reads one JSON request a line and writes one JSON verdict a line.

`GraderPool` starts it by its path with `python -P`, so neither the package nor jax is imported. Its first line is the
configuration; it answers `{"ready": true}` or `{"fatal": reason}`. The time limit is the pool's, which kills the
worker. (An exception raised inside sympy by a timer would leave half-made entries in sympy's caches, and later verdicts
could then depend on earlier ones.)
"""

import copy
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import random
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
            return correct, prediction, "no answer can be read from the reference answer", None
        return correct, prediction, None if failure is None else _reason(failure), None

    grade("\\frac{1}{2}", "0.5")  # compiles the regular expressions and fills the parser's tables now, not on the clock
    return grade


def _dapo_answer():
    rules = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "rules.py"))

    def grade(response, answer):
        return *rules["dapo_verdict"](rules["dapo_prediction"](response), answer), None, None

    return grade


def _reasoning_gym():
    """Scores by the task's own `score_answer`; the entry is made again from its task, configuration and index."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"{error} (pip install reasoning-gym)") from error

    @functools.lru_cache(maxsize=256)
    def made(task, config):
        random.seed(0)
        return reasoning_gym.create_dataset(task, **json.loads(config))

    @functools.lru_cache(maxsize=4096)
    def entry_of(task, config, index, digest):
        dataset = made(task, config)
        random.seed(0)  # some tasks draw from the global random numbers; `gym_entries` sets them too
        entry = dataset[index]
        if hashlib.sha256(entry["question"].encode(errors="surrogatepass")).hexdigest()[: len(digest)] != digest:
            raise ValueError(f"{task} {index} is another question when it is made again")
        return entry

    def grade(prediction, answer):
        try:
            asked = json.loads(answer)
            task, config, index = asked["task"], json.dumps(asked["config"], sort_keys=True), asked["index"]
            digest = asked["question_sha256"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("the reference answer is not that of a reasoning-gym problem") from error
        entry = copy.deepcopy(entry_of(task, config, index, digest))
        score = float(made(task, config).score_answer(prediction, entry))
        if not math.isfinite(score):
            return False, prediction, f"{task} gave the score {score}", None
        return score >= 1, prediction, None, score

    return grade


def _function(rule):
    module, _, name = rule.partition(":")
    function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))

    def grade(response, answer):
        verdict: Any = function(response, answer)
        value: Any
        value, prediction = verdict if isinstance(verdict, tuple) and len(verdict) == 2 else (verdict, None)
        value = value.item() if hasattr(value, "item") else value  # numpy's and other scalars
        known = isinstance(value, float) or (isinstance(value, int) and value in (0, 1))
        if not known or not (prediction is None or isinstance(prediction, str)):
            raise TypeError(f"{rule} returned {verdict!r}, expected a bool, a float or a pair of it and a str or None")
        if not isinstance(value, float):
            return bool(value), prediction, None, None
        if not math.isfinite(value):
            return False, prediction, f"{rule} returned the score {value}", None
        return value > 0, prediction, None, value

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
    # A scheduler may ask every process of a job to end: the main one decides, and a verdict in progress stays true.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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
        builtin = {"math_verify": _math_verify, "dapo_answer": _dapo_answer, "reasoning_gym": _reasoning_gym}.get(rule)
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
            correct, prediction, error, score = grade(request["text"], request["answer"])
        except BaseException as failure:  # a grader's SystemExit too
            correct, prediction, error, score = False, None, _reason(failure), None
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak_mb = _peak_mb()
        last = allowed is not None and peak_mb > allowed
        reply(correct=correct, prediction=prediction, error=error, score=score, last=last, peak_mb=peak_mb)
        if last:
            return


if __name__ == "__main__":
    main()
