"""The grading worker: a script that reads one JSON request a line and writes one JSON verdict a line.

`GraderPool` starts it by its path with `python -P`, so neither the package nor jax is imported. Its first line is the
configuration; it answers `{"ready": true}` or `{"fatal": reason}`. The time limit is the pool's, which kills the
worker. (An exception raised inside sympy by a timer would leave half-made entries in sympy's caches, and later verdicts
could then depend on earlier ones.)

With "apart" in the configuration the worker itself never grades a response: each is graded in a forked process of its
own that the sandbox confines (`sandbox.py`), and the time limit is kept here. Such a worker is started with an
environment that holds no secret.
"""

import contextlib
import copy
import functools
import gc
import hashlib
import importlib
import inspect
import json
import logging
import math
import os
import random
import resource
import runpy
import signal
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

# What sympy imports only when it meets certain expressions, when the sandbox would not let it. A test looks for more.
_SYMPY_LATE = (
    *("abc", "assumptions.facts", "assumptions.lra_satask", "assumptions.satask", "assumptions.wrapper"),
    *("assumptions.handlers.calculus", "assumptions.handlers.matrices", "assumptions.handlers.ntheory"),
    *("assumptions.handlers.order", "assumptions.handlers.sets", "combinatorics", "combinatorics.coset_table"),
    *("combinatorics.fp_groups", "combinatorics.galois", "combinatorics.homomorphisms", "combinatorics.testutil"),
    *("concrete.delta", "discrete.recurrences", "integrals.heurisch", "integrals.manualintegrate", "integrals.prde"),
    *("integrals.risch", "logic.algorithms.dpll", "logic.algorithms.dpll2", "logic.algorithms.lra_theory"),
    *("logic.algorithms.minisat22_wrapper", "logic.algorithms.pycosat_wrapper", "logic.algorithms.z3_wrapper"),
    *("matrices.expressions.applyfunc", "physics.units", "physics.units.systems", "polys.dispersion"),
    *("polys.distributedmodules", "polys.domains.old_fractionfield", "polys.domains.old_polynomialring"),
    *("polys.domains.quotientring", "polys.matrices._dfm", "polys.numberfields.resolvent_lookup"),
    *("sets.handlers.add", "sets.handlers.functions", "sets.handlers.issubset", "sets.handlers.mul"),
    *("sets.handlers.power", "sets.setexpr", "tensor.array.array_derivatives", "tensor.array.expressions"),
    "tensor.tensor",
)
LARGEST_SCORE = 1e18  # float32, in which the rewards are trained on, cannot hold the square of much more
RECYCLE_SHARE = 0.5  # of the memory limit: a worker that once grew this far is replaced after its verdict


class _Failures(logging.Handler):
    """Keeps the last exception that math-verify swallowed: it only logs them."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.last = None

    def emit(self, record):
        if record.exc_info and record.exc_info[1] is not None:
            self.last = record.exc_info[1]


class Grader(NamedTuple):
    """A rule in the worker.

    Attributes:
        grade: `(text, answer)` to `(correct, prediction, error, score)`.
        prepare: what the worker does with a reference answer before it grades, or before it starts a process that does.
    """

    grade: Callable[[str, str], tuple[bool, str | None, str | None, float | None]]
    prepare: Callable[[str], Any] = lambda answer: None


def _beside(name):
    """A file of this folder as a module, without the package."""
    folder = os.path.dirname(os.path.abspath(__file__))
    return types.SimpleNamespace(**runpy.run_path(os.path.join(folder, f"{name}.py")))


def _reason(error):
    return " ".join(f"{type(error).__name__}: {error}"[:300].split()).rstrip(": ")


def _math_verify():
    import math_verify

    # math-verify gives sympy's parser digits and operators alone; should it ever give it more, that is refused.
    _beside("guard").Guard().start()
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
    return Grader(grade)


def _dapo_answer():
    rules = _beside("rules")

    def grade(response, answer):
        return *rules.dapo_verdict(rules.dapo_prediction(response), answer), None, None

    return Grader(grade)


def _reasoning_gym(evaluating):
    """Scores by the task's own `score_answer`; the entry is made again from its task, configuration and index.

    Args:
        evaluating: why tasks that evaluate the text of an answer are refused, or None if they are not.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"{error} (pip install reasoning-gym)") from error

    guard, evaluate = _beside("guard").Guard(), _beside("rules").EVALUATING_TASKS

    @functools.lru_cache(maxsize=256)
    def made(task, config):
        if evaluating is not None and task in evaluate:
            raise ValueError(f"{task} evaluates the text of an answer: {evaluating}")
        random.seed(0)
        dataset = reasoning_gym.create_dataset(task, **json.loads(config))
        entry = dataset[0]
        with contextlib.suppress(Exception):  # so that what scoring imports late is there
            dataset.score_answer(entry["answer"], entry)
        return dataset

    @functools.lru_cache(maxsize=4096)
    def entry_of(task, config, index, digest):
        dataset = made(task, config)
        random.seed(0)  # some tasks draw from the global random numbers; `gym_entries` sets them too
        entry = dataset[index]
        if hashlib.sha256(entry["question"].encode(errors="surrogatepass")).hexdigest()[: len(digest)] != digest:
            raise ValueError(f"{task} {index} is another question when it is made again")
        return entry

    def prepare(answer):
        try:
            asked = json.loads(answer)
            task, config, index = asked["task"], json.dumps(asked["config"], sort_keys=True), asked["index"]
            digest = asked["question_sha256"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError("the reference answer is not that of a reasoning-gym problem") from error
        return task, made(task, config), entry_of(task, config, index, digest)

    def grade(prediction, answer):
        task, dataset, entry = prepare(answer)
        entry = copy.deepcopy(entry)
        random.seed(0)
        guard.start()
        try:
            score = float(dataset.score_answer(prediction, entry))
        finally:
            guard.stop()
        error = None
        if guard.refused is not None:
            error = f"{task} evaluates the answer, which has more than constants and formulas in it: {guard.refused}"
        if not math.isfinite(score):
            return False, prediction, f"{task} gave the score {score}", None
        return score >= 1, prediction, error, score

    return Grader(grade, prepare)


def _function(rule):
    module, _, name = rule.partition(":")
    function: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    _check_callable(rule, function)

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
        if not abs(value) <= LARGEST_SCORE:  # nor NaN
            return False, prediction, f"{rule} returned the score {value}", None
        return value > 0, prediction, None, value

    return Grader(grade)


def _check_callable(rule, function):
    """Raises TypeError for what cannot be called as `function(response, answer)` and answer with a verdict."""
    called = (function, getattr(type(function), "__call__", None))  # noqa: B004, an object may be called too
    lazy = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    kind = None
    if not callable(function):
        kind = f"of type {type(function).__name__}"
    elif inspect.isclass(function):
        kind = "a class"
    elif any(is_lazy(one) for is_lazy in lazy for one in called):
        kind = "async or a generator, which gives no verdict when it is called"
    if kind is not None:
        raise TypeError(f"{rule} is {kind}: expected a function of (response, answer)")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind("", "")
    except TypeError as error:
        raise TypeError(f"{rule} takes {signature}, expected (response, answer): {error}") from error


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
    sys.path[:] = config["path"]
    try:
        sandbox, evaluating = _sandbox(config)
        grader = _grader(config["rule"], evaluating)
    except Exception as error:
        reply(fatal=_reason(error))
        return
    if sandbox is not None and "sympy" in sys.modules:
        for name in _SYMPY_LATE:
            with contextlib.suppress(ImportError):  # another version may have it elsewhere
                importlib.import_module(f"sympy.{name}")
    _limit_memory(config["memory_mb"])
    allowed = None if config["memory_mb"] is None else _peak_mb() + RECYCLE_SHARE * config["memory_mb"]
    gc.freeze()  # a forked process then leaves more of the memory that it shares as it is
    reply(ready=True)

    for line in requests:
        request = json.loads(line)
        # Should the parent be gone, nobody kills an endless grade; the alarm's default action does.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, config["orphan_s"])
        if sandbox is None:
            verdict = _verdict(grader.grade, request)
        else:
            verdict = _verdict_apart(sandbox, grader, request, config["timeout_s"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak_mb = _peak_mb()
        last = allowed is not None and peak_mb > allowed
        reply(**{"peak_mb": peak_mb} | verdict | {"last": last})
        if last:
            return


def _sandbox(config):
    """The sandbox to grade in, or None; and why text of answers must not be evaluated here, or None."""
    if not config["apart"]:
        return None, None
    sandbox = _beside("sandbox")
    failing = sandbox.failing()
    if failing is None:
        return sandbox, None
    if config["rule"] != "reasoning_gym":
        raise RuntimeError(f"no sandbox here: {failing}")
    return None, None if config["unsafe_evaluation"] else f"refused, since there is no sandbox here: {failing}"


def _grader(rule, evaluating):
    if ":" in rule:
        return _function(rule)
    if rule == "reasoning_gym":
        return _reasoning_gym(evaluating)
    return {"math_verify": _math_verify, "dapo_answer": _dapo_answer}[rule]()


def _verdict(grade, request):
    try:
        correct, prediction, error, score = grade(request["text"], request["answer"])
    except BaseException as failure:  # a grader's SystemExit too
        correct, prediction, error, score = False, None, _reason(failure), None
    return {"correct": correct, "prediction": prediction, "error": error, "score": score}


def _verdict_without_imports(grade, request):
    late = []
    sys.addaudithook(lambda event, arguments: late.append(arguments[0]) if event == "import" else None)
    verdict = _verdict(grade, request)
    if late and not verdict["correct"]:  # a scorer may take the failed import for a wrong answer
        verdict["error"] = f"the grading imports {late[0]}, which the sandbox allows only before it: {verdict['error']}"
    return verdict


def _verdict_apart(sandbox, grader, request, timeout_s):
    """The verdict of a process of its own; all that it says is read as data, and must be a verdict."""
    try:
        grader.prepare(request["answer"])
    except Exception as failure:
        return _no_verdict(_reason(failure))
    try:
        outcome = sandbox.apart(lambda: _verdict_without_imports(grader.grade, request), timeout_s)
    except OSError as failure:
        return _no_verdict(f"no process can be started to grade in: {failure}") | {"outside": True}
    if outcome.failure is not None:
        return _no_verdict(outcome.failure) | {"signal": outcome.signal, "peak_mb": outcome.peak_mb}
    match outcome.value:
        case {
            "correct": bool(),
            "prediction": str() | None,
            "error": str() | None,
            "score": float() | None as score,
            **more,
        } if not more and (score is None or abs(score) <= LARGEST_SCORE):
            return outcome.value | {"peak_mb": outcome.peak_mb}
    return _no_verdict("the grading process sent something that is no verdict")


def _no_verdict(error):
    return {"correct": False, "prediction": None, "error": error, "score": None}


if __name__ == "__main__":
    main()
