"""One grading process as the pool sees it: its pipes, its deadline, its end (POSIX)."""

import contextlib
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

_WORKER = Path(__file__).with_name("worker.py")
# Of a worker that grades in a sandbox: it keeps the limit of a response itself, and may make a problem again besides.
_APART_GRACE_S = 10.0
# The environment of such a worker: nothing of the run but what finding libraries and reading text takes, and one thread
# for each library, since the threads of a process that forks do not survive in the fork.
_APART_KEEPS = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
_APART_ADDS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# How an answer itself may end a process: by a crash, or at a limit. Other signals come from outside.
_OWN_ENDS = {
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP),
    *(signal.SIGXCPU, signal.SIGXFSZ, signal.SIGALRM),
}


class Worker:
    """One process, its pipes and the job it is on.

    Attributes:
        job: number of the job it is on, None when it has none.
        ready: whether it has started.
        peak_mb: the most resident memory it was seen to take, MiB; 0 where the system does not say.
    """

    def __init__(self, rule, timeout_s, memory_mb, startup_s, *, apart=False, unsafe_evaluation=False):
        environment = os.environ
        if apart:
            environment = _APART_ADDS | {name: os.environ[name] for name in _APART_KEEPS if name in os.environ}
        # A fixed hash seed: sympy's orderings, and so its verdicts, repeat from run to run.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**environment, "PYTHONHASHSEED": "0"},
        )
        self.requests, self.verdicts = cast(io.FileIO, self.process.stdin), cast(io.FileIO, self.process.stdout)
        os.set_blocking(self.requests.fileno(), False)
        os.set_blocking(self.verdicts.fileno(), False)
        self.timeout_s, self.ready, self.job, self.peak_mb = timeout_s, False, None, 0.0
        self.grace_s = _APART_GRACE_S if apart else 0.0
        self.outgoing, self.incoming = b"", bytearray()
        config = {
            "rule": rule,
            "memory_mb": memory_mb,
            "timeout_s": timeout_s,
            "orphan_s": 2 * timeout_s + 10,
            "path": [*map(str, sys.path)],
            "apart": apart,
            "unsafe_evaluation": unsafe_evaluation,
        }
        self._send(config, startup_s)

    def dead(self):
        return self.process.poll() is not None

    def assign(self, job, text, answer):
        self.job = job
        self._send({"text": text, "answer": answer}, self.timeout_s + self.grace_s)

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
                return _failure(f"the grading worker died ({cause})") | {"signal": max(0, -status)}
            self.incoming += chunk
            if chunk.endswith(b"\n"):
                line, self.incoming = bytes(self.incoming), bytearray()
                try:
                    message = json.loads(line)
                except ValueError:
                    return _failure("the grading worker sent something that is no verdict")
                self.peak_mb = max(self.peak_mb, message.get("peak_mb", 0.0))
                return message
        if time.monotonic() < self.deadline:
            return None
        return _failure(f"exceeded the time limit of {self.limit_s:g} s")

    def stop(self):
        """Kills the process group and reaps the worker. One that is already exiting keeps its own exit status."""
        if self.process.returncode is None:
            self.peak_mb = max(self.peak_mb, peak_mb(self.process.pid))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.requests.close()
        self.verdicts.close()


def _failure(error):
    return {"correct": False, "prediction": None, "error": error, "last": True}


def from_outside(message):
    """Whether what a worker says of a grading is that another program killed it, or the machine could not start it."""
    return message.get("outside", False) or message.get("signal", 0) not in {0, *_OWN_ENDS}


def peak_mb(pid):
    """The most resident memory that a running process took, MiB; 0 where the system does not say (Linux does)."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) / 2**10 for line in file if line.startswith("VmHWM:")), 0.0)
    except OSError:
        return 0.0


def dismiss(worker, team):
    """Stops a worker and takes it off its team."""
    worker.stop()
    team.remove(worker)


def wait(workers):
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


def stop_teams(teams, pid):
    """Stops all workers of the process `pid`."""
    # A forked child inherits the pool, but the workers belong to its parent.
    if os.getpid() == pid:
        for worker in [worker for team in teams.values() for worker in team]:
            worker.stop()
        teams.clear()
