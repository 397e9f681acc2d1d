"""Several processes that watch one another: none waits for ever for one that died or hangs, and all stop together.

Every process says about once a second, through the key-value store of jax's coordination service, that it lives, and
in which phase of which step. Who finds a process silent for too long, or behind all others for too long, says so in one
sentence, tells the others and ends its own process at once: the main thread may sit in a collective that never returns.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PEER_LOST = 69  # EX_UNAVAILABLE of sysexits.h: another process of the run died, hangs or gave up
_BEAT, _END, _LEFT = "rlvr/beat/", "rlvr/end", "rlvr/left/"
_SUSPECT_S = 10.0  # silence that is enough once a communication has failed
_LINGER_S = 5.0


class Watched(NamedTuple):
    """What one process says of itself.

    Attributes:
      beat: how often it has said something.
      step: trainer steps it has behind it, None before the first is begun.
      phase: what it does.
      progress: phases named so far; the process behind all others is the one with the fewest.
      idle_s: seconds since the newest of them.
      asked: it was asked to end.
      held: where it will wait until all know where to stop; None while nobody was asked.
      done: it has come to its end.
      trouble: a communication with another process has failed.
    """

    beat: int
    step: int | None
    phase: str
    progress: int
    idle_s: float
    asked: bool
    held: int | None
    done: bool
    trouble: bool

    @property
    def where(self) -> str:
        """The phase and the step in words."""
        return f"in phase '{self.phase}'" + ("" if self.step is None else f" after trainer step {self.step}")


class Watch:
    """Watches the other processes from three threads, and tells them of this one.

    Args:
      client: jax's client of the coordination service, which runs in process 0.
      index: of this process.
      hosts: the host's name of each process.
      address: host:port of the coordination service.
      timeout_s: silence after which a process counts as dead.
      hang_s: time in one phase after which the process that is behind all others counts as hung.
    """

    def __init__(self, client: Any, index: int, hosts: list[str], address: str, *, timeout_s: float, hang_s: float):
        self._client, self._index, self._hosts, self._address = client, index, hosts, address
        self._timeout_s, self._hang_s = timeout_s, hang_s
        self._interval = min(1.0, timeout_s / 5)
        self._lock, self._ending = threading.Lock(), threading.Lock()
        self._closed, self._decided = threading.Event(), threading.Event()
        self._mine = Watched(0, None, "start", 0, 0.0, False, None, False, False)
        self._point, self._target, self._lost = 0, None, None
        self._since = self._answered = time.monotonic()
        self._heard = dict.fromkeys(range(len(hosts)), (self._mine, self._since))
        self.asked: Callable[[], bool] = lambda: False
        self._abort = None
        if index:
            self._catch_abort()
        for work in (self._beat, self._listen, self._judge):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def name(self, process: int) -> str:
        """A process in words."""
        return f"process {process} of {len(self._hosts)} (host {self._hosts[process]})"

    def phase(self, name: str, step: int | None) -> None:
        """This process goes on: it begins `name`, or is further in it, with `step` trainer steps behind it."""
        with self._lock:
            self._since = time.monotonic()
            self._mine = self._mine._replace(phase=name, step=step, progress=self._mine.progress + 1)

    def stop_here(self) -> bool:
        """Whether all processes stop at this point, since one was asked to. All call it equally often.

        Nothing is exchanged before one is asked. Then each says which point it has passed, and the one after the
        furthest is where all stop; nobody passes a point while that is being found out.
        """
        with self._lock:
            self._point += 1
            point, held = self._point, self._mine.held
        if held is None:
            return False
        while not self._decided.wait(self._interval):
            pass
        return point == self._target

    def finished(self) -> None:
        """This process has nothing left to do: waits until that is so of all."""
        self.phase("end", self._mine.step)
        with self._lock:
            self._mine = self._mine._replace(done=True)
        while not all(said.done for said, _ in self._heard.values()):
            time.sleep(self._interval / 4)
        with contextlib.suppress(Exception):  # another one may have said it
            self._client.key_value_set(_END, json.dumps(None))
        self._closed.set()
        if self._abort is not None:
            self._libc().signal(signal.SIGABRT, None)

    def failed(self, sentence: str, code: int) -> None:
        """Ends this process, which has said `sentence`, and tells the others why."""
        self._end(f"{self.name(self._index)} ended {self._mine.where}: {sentence}", code, say=False)

    def troubled(self) -> None:
        """A computation failed, perhaps since another process is gone: returns if within a while none turns out to be.

        Whoever finds a dead process ends this one.
        """
        with self._lock:
            self._mine = self._mine._replace(trouble=True)
        time.sleep(min(self._timeout_s, _SUSPECT_S) + 3 * self._interval)

    def _beat(self) -> None:
        """Says that this process lives, and reads what the others say."""
        while not self._closed.is_set():
            with self._lock:
                said = self._mine = self._mine._replace(
                    beat=self._mine.beat + 1,
                    idle_s=time.monotonic() - self._since,
                    asked=self._mine.asked or self.asked(),
                )
            try:
                self._client.key_value_set(f"{_BEAT}{self._index}", json.dumps(said), allow_overwrite=True)
                found = self._client.key_value_dir_get(_BEAT)
            except Exception:  # whatever the client raises: `_judge` sees how long it has got no answer
                time.sleep(self._interval / 4)
                continue
            self._answered = time.monotonic()
            self._read({int(key.rpartition("/")[2]): Watched(*json.loads(value)) for key, value in found})
            self._closed.wait(self._interval)

    def _read(self, said: dict[int, Watched]) -> None:
        now = time.monotonic()
        for process, watched in said.items():
            if self._heard[process][0].beat != watched.beat:
                self._heard[process] = watched, now
        if any(one.asked or one.held is not None for one in said.values()):
            with self._lock:
                if self._mine.held is None:
                    self._mine = self._mine._replace(held=self._point)
        held = [one.held for one in said.values() if one.held is not None]
        if len(held) == len(self._hosts) and self._target is None:
            self._target = max(held) + 1
            self._decided.set()

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - before > self._timeout_s / 2:  # this process itself stood still, so nobody else is to blame yet
                self._answered = now
                self._heard = {process: (said, now) for process, (said, _) in self._heard.items()}
            before = now
            others = {i: said for i, (said, _) in self._heard.items() if not said.done and i != self._index}
            if now - self._answered > self._timeout_s:  # nothing can be known of any other then
                self._blame(0, f"has not answered for {now - self._answered:.0f} s")
            elif now - self._answered < 2 * self._interval and others:
                silent, process = max((now - self._heard[i][1], i) for i in others)
                suspicious = any(said.trouble for said in (self._mine, *others.values()))
                if silent > (min(self._timeout_s, _SUSPECT_S) if suspicious else self._timeout_s):
                    self._blame(process, f"has not answered for {silent:.0f} s")
            self._judge_progress({i: said for i, (said, _) in self._heard.items() if not said.done})

    def _judge_progress(self, said: dict[int, Watched]) -> None:
        least = min((one.progress for one in said.values()), default=0)
        behind = [i for i, one in said.items() if one.progress == least]
        idle = min((said[i].idle_s for i in behind), default=0.0)
        if idle > self._hang_s:
            others = "" if len(behind) == 1 else f" (nor have {', '.join(map(str, behind[1:]))}: any may be the cause)"
            self._blame(behind[0], f"has made no progress for {idle:.0f} s{others}")

    def _blame(self, process: int, fault: str) -> None:
        said = self._heard[process][0].where if process in self._heard else "before it said where it was"
        self._lost = process
        self._end(
            f"{self.name(process)} {fault}; it was last {said}; all processes stop, and the same command on all of "
            "them resumes from what is saved",
            PEER_LOST,
        )

    def _listen(self) -> None:
        """Waits for the word of another process that all must end; the open call also fails at once with process 0."""
        while not self._closed.is_set():
            try:
                said = json.loads(self._client.blocking_key_value_get(_END, 10_000))
            except Exception as error:
                if self._closed.is_set() or "DEADLINE_EXCEEDED" in str(error):
                    continue
                if self._index:
                    self._blame(0, "is gone")
                self._closed.wait(self._interval)  # process 0 itself: it will hear of the end yet
                continue
            if said is not None and not self._closed.is_set():
                self._end(said, PEER_LOST, tell=False)
            return

    def _end(self, sentence: str, code: int, *, say: bool = True, tell: bool = True) -> None:
        """Ends this process. The first thread that comes here does it."""
        self._ending.acquire()  # never released
        if say:
            os.write(2, f"error: {sentence} (this is process {self._index}{_main_thread()})\n".encode())
        if self._lost != 0 or not self._index:  # through process 0 all is told
            telling = threading.Thread(target=self._tell, args=(sentence if tell else None,), daemon=True)
            telling.start()
            telling.join(min(_LINGER_S, self._timeout_s))
        os._exit(code)

    def _tell(self, sentence: str | None) -> None:
        with contextlib.suppress(Exception):  # told already, or nobody is there to be told
            if sentence is not None:
                self._client.key_value_set(_END, json.dumps(sentence))
        with contextlib.suppress(Exception):
            if self._index:
                self._client.key_value_set(f"{_LEFT}{self._index}", "left")
            others = {f"{_LEFT}{i}" for i in range(1, len(self._hosts)) if i != self._lost}
            while not self._index and not others <= {key for key, _ in self._client.key_value_dir_get(_LEFT)}:
                time.sleep(0.05)  # with process 0 goes what the others hear through

    def _catch_abort(self) -> None:
        """When process 0 goes, jax aborts the others within a moment; the sentence and the exit code shall be ours."""

        def caught(_: int) -> None:
            with contextlib.suppress(OSError), socket.create_connection(self._place(), timeout=1):
                self._libc().signal(signal.SIGABRT, None)  # it is there: another cause, and none of ours
                return
            self._blame(0, "is gone")

        self._abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(caught)
        self._libc().signal(signal.SIGABRT, self._abort)

    def _place(self) -> tuple[str, int]:
        host, _, port = self._address.rpartition(":")
        return host.strip("[]"), int(port)

    def _libc(self) -> Any:
        return ctypes.CDLL(None)


def _main_thread() -> str:
    """Where the main thread is in code that is not a library's, for whoever looks for what hangs."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and "/python3" in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f", at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
