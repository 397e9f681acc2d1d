"""`GraderPool`: worker processes that grade text under a time and a memory limit (POSIX)."""

import collections
import contextlib
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from rlvr_jax.rewards import rules

RULES = ("math_verify", "dapo_answer")
REMEMBERED = 1 << 17  # verdicts kept
OVERRUNS_REMEMBERED = 2  # a pair that failed this often is not tried again: once may be the machine's fault
START_ATTEMPTS = 3
IN_PROCESS_ANSWER = 2000  # characters; DAPO's regular expressions are quadratic in the worst case, 10 ms at this length

_WORKER = Path(__file__).with_name("worker.py")


class Graded(NamedTuple):
    """One verdict.

    Attributes:
        correct: the response's answer equals the reference answer.
        prediction: the answer read from the response (math_verify: the content of the last `\\boxed`; dapo_answer: the
            normalised text after `Answer:`); None where there is none.
        error: why there is no proper comparison (time limit, memory, crash, an exception in the parser), else None.
            A wrong or missing answer is not an error. `correct` is False wherever the grading was cut short.
    """

    correct: bool
    prediction: str | None
    error: str | None


_NOT_GRADED = Graded(False, None, "not graded")


class GraderPool:
    """Worker processes for grading; a context manager.

    Workers are started at the first need, reused across calls, and stopped by `close`, at the end of `with`, or at
    exit. A worker that exceeds the time limit, dies, or grows past half its memory is killed with its process group
    and replaced; only the response it was grading gets an error. They import neither this package nor jax, and a
    verdict does not depend on what was graded before it. Calls from several threads take turns.

    Args:
        workers: number of processes for each rule in use.
        timeout_s: seconds (wall clock) for one response.
        memory_mb: MiB a worker may take beyond its imports; None for no limit. Not enforced by macOS.
        startup_s: seconds a worker may take to start (importing sympy takes one to a few).
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float | int = 5.0,
        memory_mb: int | None = 2048,
        startup_s: float | int = 120.0,
    ):
        if workers < 1:
            raise ValueError(f"workers = {workers}: expected at least 1")
        for name, value in (("timeout_s", timeout_s), ("memory_mb", memory_mb), ("startup_s", startup_s)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} = {value}: expected a positive number")
        self.workers, self.timeout_s, self.memory_mb, self.startup_s = workers, timeout_s, memory_mb, startup_s
        self._teams: dict[str, list[_Worker]] = collections.defaultdict(list)
        self._memo: dict[tuple[str, str | None, str], Graded] = {}
        self._overruns: collections.Counter[tuple[str, str | None, str]] = collections.Counter()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _stop_teams, self._teams, self._pid)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        """Stops the workers. The pool can still be used: the next call that needs workers starts new ones."""
        with self._lock:
            _stop_teams(self._teams, self._pid)

    def grade(self, rule: str, responses: Sequence[str], answers: Sequence[str]) -> list[Graded]:
        """Grades `responses[i]` against `answers[i]`.

        Args:
            rule: "math_verify", "dapo_answer" (see the functions of those names + `_reward`), or a researcher's own
                grader as "module:function", called in a worker as `function(response, answer)` under the same guards.
                It returns a bool or `(bool, prediction)`. Its module is looked up on this process's `sys.path`.
            responses: whole responses, without special tokens.
            answers: reference answers.

        The verdicts of the two named rules are remembered per (prediction, answer).

        Raises:
            ValueError: an unknown rule, one that cannot be imported, lists of unequal length, something not a text.
            RuntimeError: workers do not start.
        """
        if rule not in RULES and not all(rule.partition(":")):
            raise ValueError(f"rule = {rule!r}: expected one of {', '.join(RULES)} or 'module:function'")
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
            if rule == "math_verify":
                return self._math_verify(list(pairs))
            if rule == "dapo_answer":
                return self._dapo_answer(list(pairs))
            return self._run(rule, list(pairs))

    def _math_verify(self, pairs):
        verdicts: list[Graded] = []
        wanted = collections.defaultdict(list)
        for i, (response, answer) in enumerate(pairs):
            prediction, error = rules.last_boxed(response)
            known = self._memo.get(("math_verify", prediction, answer))
            if prediction and known is None:
                wanted[prediction, answer].append(i)
            verdicts.append(known or Graded(False, prediction, error))
        for (prediction, answer), graded in zip(wanted, self._run("math_verify", list(wanted)), strict=True):
            graded = graded._replace(prediction=prediction)
            self._remember(("math_verify", prediction, answer), graded)
            for i in wanted[prediction, answer]:
                verdicts[i] = graded
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
        failed_starts = 0
        try:
            while left:
                for worker in [worker for worker in team if worker.ready and worker.job is None and worker.dead()]:
                    _dismiss(worker, team)
                free = sum(worker.job is None for worker in team)
                while len(team) < self.workers and free < len(todo):
                    team.append(_Worker(rule, self.timeout_s, self.memory_mb, self.startup_s))
                    free += 1
                for worker in team:
                    if todo and worker.ready and worker.job is None:
                        job = todo.popleft()
                        worker.assign(job, *jobs[job])
                for worker, message in _wait([worker for worker in team if not worker.ready or worker.job is not None]):
                    if worker.job is not None:
                        verdicts[worker.job] = Graded(*map(message.get, ("correct", "prediction", "error")))
                        worker.job, left = None, left - 1
                    elif "fatal" in message:
                        raise ValueError(f"rule = {rule!r}: the grader cannot be imported: {message['fatal']}")
                    elif message.get("ready"):
                        worker.ready, failed_starts = True, 0
                    else:
                        failed_starts += 1
                        if failed_starts >= START_ATTEMPTS:
                            raise RuntimeError(f"grading workers do not start: {message['error']}")
                    if message.get("last"):
                        _dismiss(worker, team)
        except BaseException:
            # An interrupted call must not leave a verdict in a pipe for the next one to read.
            for worker in [worker for worker in team if not worker.ready or worker.job is not None]:
                _dismiss(worker, team)
            raise
        return verdicts


class _Worker:
    """One process, its pipes and the job it is on. `job` is None when it has none."""

    def __init__(self, rule, timeout_s, memory_mb, startup_s):
        # A fixed hash seed: sympy's orderings, and so its verdicts, repeat from run to run.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        self.requests, self.verdicts = cast(io.FileIO, self.process.stdin), cast(io.FileIO, self.process.stdout)
        os.set_blocking(self.requests.fileno(), False)
        os.set_blocking(self.verdicts.fileno(), False)
        self.timeout_s, self.ready, self.job = timeout_s, False, None
        self.outgoing, self.incoming = b"", bytearray()
        config = {"rule": rule, "memory_mb": memory_mb, "orphan_s": 2 * timeout_s + 10, "path": [*map(str, sys.path)]}
        self._send(config, startup_s)

    def dead(self):
        return self.process.poll() is not None

    def assign(self, job, text, answer):
        self.job = job
        self._send({"text": text, "answer": answer}, self.timeout_s)

    def _send(self, message, limit_s):
        self.outgoing = memoryview(json.dumps(message).encode() + b"\n")
        self.limit_s, self.deadline = limit_s, time.monotonic() + limit_s
        self.write()

    def write(self):
        """Sends what the pipe takes now. A closed pipe shows up in `read`."""
        try:
            while self.outgoing:
                sent = self.requests.write(self.outgoing)
                if sent is None:
                    return
                self.outgoing = self.outgoing[sent:]
        except BrokenPipeError:
            self.outgoing = b""

    def read(self):
        """The worker's next message, or the reason why none will come, or None when there is nothing yet."""
        while (chunk := self.verdicts.read(1 << 16)) is not None:
            if not chunk:
                self.stop()
                status = self.process.returncode
                cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                return _failure(f"the grading worker died ({cause})")
            self.incoming += chunk
            if chunk.endswith(b"\n"):
                line, self.incoming = bytes(self.incoming), bytearray()
                try:
                    return json.loads(line)
                except ValueError:
                    return _failure("the grading worker sent something that is no verdict")
        if time.monotonic() < self.deadline:
            return None
        return _failure(f"exceeded the time limit of {self.limit_s:g} s")

    def stop(self):
        """Kills the process group and reaps the worker. One that is already exiting keeps its own exit status."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.requests.close()
        self.verdicts.close()


def _failure(error):
    return {"correct": False, "prediction": None, "error": error, "last": True}


def _dismiss(worker, team):
    worker.stop()
    team.remove(worker)


def _wait(workers):
    """Blocks until some workers have something to say or run out of time; yields `(worker, message)`."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.verdicts, selectors.EVENT_READ, worker)
            if worker.outgoing:
                selector.register(worker.requests, selectors.EVENT_WRITE, worker)
        first = min(worker.deadline for worker in workers)
        for key, events in selector.select(max(0.0, first - time.monotonic())):
            if events & selectors.EVENT_WRITE:
                key.data.write()
    return [(worker, message) for worker in workers if (message := worker.read()) is not None]


def _stop_teams(teams, pid):
    # A forked child inherits the pool, but the workers belong to its parent.
    if os.getpid() == pid:
        for worker in [worker for team in teams.values() for worker in team]:
            worker.stop()
        teams.clear()
