"""`GraderPool`: worker processes that grade text under a time and a memory limit (POSIX)."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Annotated

from rlvr_jax.entries import is_own, source_sha256
from rlvr_jax.rewards import rules
from rlvr_jax.rewards.process import Worker, dismiss, from_outside, stop_teams, wait
from rlvr_jax.runs.bounds import Text

log = logging.getLogger(__name__)

RULES = ("math_verify", "dapo_answer", "reasoning_gym")
RULE = Text.entry_of(RULES)
RuleName = Annotated[str, RULE]
REMEMBERED = 1 << 17  # verdicts kept
OVERRUNS_REMEMBERED = 2  # a pair that failed this often is not tried again: once may be the machine's fault
START_ATTEMPTS = 3
GRADE_ATTEMPTS = 3  # of a response whose grading was killed from outside
IN_PROCESS_ANSWER = 2000  # characters; DAPO's regular expressions are quadratic in the worst case, 10 ms at this length


@dataclasses.dataclass(frozen=True)
class Graded:
    """One verdict.

    Attributes:
        correct: the response's answer equals the reference answer.
        prediction: the answer read from the response (math_verify: the content of the last `\\boxed`; dapo_answer: the
            normalised text after `Answer:`; reasoning_gym: see `rules.final_answer`); None where there is none.
        error: why there is no proper comparison (time limit, memory, crash, an exception in the parser), else None.
            A wrong or missing answer is not an error. `correct` is False wherever the grading was cut short.
        score: the reward of a rule that gives a graded one, else None: then it is +1 or -1 by `correct` (`reward`).
    """

    correct: bool
    prediction: str | None
    error: str | None
    score: float | None = None

    @property
    def reward(self) -> float:
        """The score; where the rule gives none, +1 if correct and -1 if not (DAPO, arXiv 2503.14476)."""
        return self.score if self.score is not None else 1.0 if self.correct else -1.0


def rule_version(rule: str) -> str:
    """What verdicts of a rule depend on: the versions of the libraries, or the file of a rule of one's own."""
    if is_own(rule) and (digest := source_sha256(rule)):
        return digest
    found = []
    for name in ("rlvr_jax", "math-verify", "reasoning-gym"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def all_failed(errors: Sequence[str | None]) -> str | None:
    """A sentence on gradings of which every one failed, with their most frequent errors; None where one did not."""
    if not errors or None in errors:
        return None
    common = collections.Counter(errors).most_common(3)
    listed = "; ".join(f"{error} ({count} times)" for error, count in common)
    return f"all {len(errors)} gradings failed: {listed}"


# Rule, prediction (as a digest where it may be long), reference answer.
_Key = tuple[str, str | bytes | None, str]
_NOT_GRADED = Graded(False, None, "not graded")


def _digest(prediction: str | None) -> bytes:
    """Stands for a prediction in what is remembered, which would take gigabytes with thousands of characters each."""
    return hashlib.sha256((prediction or "").encode(errors="surrogatepass")).digest()


class GraderPool:
    """Worker processes for grading; a context manager.

    Workers are started at the first need, reused across calls, and stopped by `close`, at the end of `with`, or at
    exit. A worker that exceeds the time limit, dies, or grows past half its memory is killed with its process group
    and replaced; only the response it was grading gets an error. One that another program killed (such as the kernel
    when memory ran out) is replaced and the response is graded again, three times at most. Workers import neither this
    package nor jax, and a verdict does not depend on what was graded before it. Calls from several threads take turns.

    Under the rule "reasoning_gym", whose scorers may evaluate the text of an answer, and under every rule with
    `sandbox`, each response is graded in a process of its own that can compute and return a verdict and nothing else
    (see `docs/rewards.md`). Where the platform has no such sandbox, "reasoning_gym" refuses the tasks that evaluate
    text, unless `unsafe_evaluation`.

    Args:
        workers: number of processes for each rule in use.
        timeout_s: seconds (wall clock) for one response.
        memory_mb: MiB a worker may take beyond its imports; None for no limit. Not enforced by macOS.
        startup_s: seconds a worker may take to start (importing sympy takes one to a few).
        sandbox: grade each response in a sandbox, whatever the rule; workers then start with a bare environment.
        unsafe_evaluation: where there is no sandbox, let tasks of reasoning-gym evaluate answers all the same: text
            written by the model may then run as code with the rights of this process.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float | int = 5.0,
        memory_mb: int | None = 2048,
        startup_s: float | int = 120.0,
        *,
        sandbox: bool = False,
        unsafe_evaluation: bool = False,
    ):
        if workers < 1:
            raise ValueError(f"workers = {workers}: expected at least 1")
        for name, value in (("timeout_s", timeout_s), ("memory_mb", memory_mb), ("startup_s", startup_s)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: expected a positive number")
        self.workers, self.timeout_s, self.memory_mb, self.startup_s = workers, timeout_s, memory_mb, startup_s
        self.sandbox, self.unsafe_evaluation = sandbox, unsafe_evaluation
        self._teams: dict[str, list[Worker]] = collections.defaultdict(list)
        self._memo: dict[_Key, Graded] = {}
        self._overruns: collections.Counter[_Key] = collections.Counter()
        self._peak_mb = 0.0
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, stop_teams, self._teams, self._pid)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Stops the workers. The pool can still be used: the next call that needs workers starts new ones."""
        with self._lock:
            self._peak_mb = self.peak_mb
            stop_teams(self._teams, self._pid)

    @property
    def peak_mb(self) -> float:
        """The most resident memory that any worker was seen to take so far, MiB; 0 where the system does not say."""
        return max([self._peak_mb, *(worker.peak_mb for team in self._teams.values() for worker in team)])

    def grade(self, rule: str, responses: Sequence[str], answers: Sequence[str]) -> list[Graded]:
        """Grades `responses[i]` against `answers[i]`.

        Args:
            rule: "math_verify", "dapo_answer" (see the functions of those names + `_reward`), "reasoning_gym" (the
                task's own `score_answer`, see `rlvr_jax.data.tasks`), or a researcher's own grader as
                "module:function", called in a worker as `function(response, answer)` under the same guards. Its module
                is looked up on this process's `sys.path`. It returns a bool (or 0, 1, or numpy's), a float, or a pair
                of one of these and the prediction (a str or None). A bool is a verdict. A float is a reward: it
                becomes `score`, and `correct` is score > 0. One not finite or above 1e18 is an error, and the response
                counts as wrong.
            responses: whole responses, without special tokens.
            answers: reference answers.

        Under "reasoning_gym" the score is the task's, 0 to 1 (0 where grading was cut short), and `correct` means full
        marks, 1. The verdicts of the named rules are remembered per (prediction, answer).

        Raises:
            ValueError: an unknown rule, one that cannot be imported or called with (response, answer), lists of
                unequal length, something not a text; with `sandbox` a platform that has none.
            RuntimeError: workers do not start.
        """
        if not RULE.allows(rule):
            raise ValueError(f"rule={rule!r}: expected {RULE.expected}")
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses but {len(answers)} answers: expected one answer a response")
        for name, texts in (("responses", responses), ("answers", answers)):
            for i, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"{name}[{i}] = {text!r}: expected a str")
        if os.getpid() != self._pid:
            raise RuntimeError("this GraderPool was made before a fork; make another in the child process")
        pairs = zip(responses, answers, strict=True)
        with self._lock:
            graded = self._graded(rule, list(pairs))
        if failures := all_failed([verdict.error for verdict in graded]):
            log.warning("%s by %s", failures, rule)
        return graded

    def _graded(self, rule, pairs):
        if rule == "math_verify":
            return self._extracted(rule, rules.last_boxed, pairs)
        if rule == "reasoning_gym":
            graded = self._extracted(rule, rules.final_answer, pairs)
            return [x if x.score is not None else dataclasses.replace(x, score=0.0) for x in graded]
        if rule == "dapo_answer":
            return self._dapo_answer(pairs)
        return self._run(rule, pairs)

    def _extracted(self, rule, extract, pairs):
        """Rules that compare what `extract` finds in the response: each (prediction, answer) is graded once."""
        verdicts: list[Graded] = []
        wanted = collections.defaultdict(list)
        for i, (response, answer) in enumerate(pairs):
            prediction, error = extract(response)
            known = self._memo.get((rule, _digest(prediction), answer))
            if prediction and known is None:
                wanted[prediction, answer].append(i)
            verdicts.append(
                Graded(False, prediction, error) if known is None else dataclasses.replace(known, prediction=prediction)
            )
        for (prediction, answer), graded in zip(wanted, self._run(rule, list(wanted)), strict=True):
            self._remember((rule, _digest(prediction), answer), dataclasses.replace(graded, prediction=None))
            for i in wanted[prediction, answer]:
                verdicts[i] = dataclasses.replace(graded, prediction=prediction)
        return verdicts

    def _dapo_answer(self, pairs):
        verdicts = [_NOT_GRADED] * len(pairs)
        guarded = []
        for i, (response, answer) in enumerate(pairs):
            if len(answer) > IN_PROCESS_ANSWER:
                guarded.append(i)
                continue
            prediction = rules.dapo_prediction(response)
            key = ("dapo_answer", prediction, answer)
            if key not in self._memo:
                self._remember(key, Graded(*rules.dapo_verdict(prediction, answer), None))
            verdicts[i] = self._memo[key]
        jobs = [(pairs[i][0][-rules.DAPO_TAIL :], pairs[i][1]) for i in guarded]
        for i, graded in zip(guarded, self._run("dapo_answer", jobs), strict=True):
            verdicts[i] = graded
        return verdicts

    def _remember(self, key, graded):
        if graded.error is not None:
            if len(self._overruns) > REMEMBERED:
                self._overruns.clear()
            self._overruns[key] += 1
            if self._overruns[key] < OVERRUNS_REMEMBERED:
                return
        self._memo[key] = graded
        while len(self._memo) > REMEMBERED:
            del self._memo[next(iter(self._memo))]

    def _run(self, rule, jobs):
        """Grades `(text, answer)` jobs on the rule's workers; every job gets a verdict."""
        verdicts = [_NOT_GRADED] * len(jobs)
        todo = collections.deque(range(len(jobs)))
        left = len(jobs)
        team = self._teams[rule]
        failed_starts, killed = 0, collections.Counter()
        try:
            while left:
                for worker in [worker for worker in team if worker.ready and worker.job is None and worker.dead()]:
                    self._dismiss(worker, team)
                free = sum(worker.job is None for worker in team)
                while len(team) < self.workers and free < len(todo):
                    team.append(self._new_worker(rule))
                    free += 1
                for worker in team:
                    if todo and worker.ready and worker.job is None:
                        job = todo.popleft()
                        worker.assign(job, *jobs[job])
                for worker, message in wait([worker for worker in team if not worker.ready or worker.job is not None]):
                    if worker.job is not None and from_outside(message) and killed[worker.job] < GRADE_ATTEMPTS - 1:
                        killed[worker.job] += 1
                        todo.appendleft(worker.job)
                        worker.job = None
                    elif worker.job is not None:
                        verdicts[worker.job] = Graded(*map(message.get, ("correct", "prediction", "error", "score")))
                        worker.job, left = None, left - 1
                    elif "fatal" in message:
                        raise ValueError(f"rule={rule!r} cannot be used: {message['fatal']}")
                    elif message.get("ready"):
                        worker.ready, failed_starts = True, 0
                    else:
                        failed_starts += 1
                        if failed_starts >= START_ATTEMPTS:
                            raise RuntimeError(f"grading workers do not start: {message['error']}")
                    if message.get("last"):
                        self._dismiss(worker, team)
        except BaseException:
            # An interrupted call must not leave a verdict in a pipe for the next one to read.
            for worker in [worker for worker in team if not worker.ready or worker.job is not None]:
                self._dismiss(worker, team)
            raise
        return verdicts

    def _new_worker(self, rule):
        return Worker(
            rule,
            self.timeout_s,
            self.memory_mb,
            self.startup_s,
            apart=self.sandbox or rule == "reasoning_gym",
            unsafe_evaluation=self.unsafe_evaluation,
        )

    def _dismiss(self, worker, team):
        dismiss(worker, team)
        self._peak_mb = max(self._peak_mb, worker.peak_mb)
