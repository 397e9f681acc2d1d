"""Renders a tokenizer's chat template, which may come from anywhere, in bounded time and memory."""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

# Limits of one rendering. Published templates take milliseconds and write little more than they are given.
SECONDS = 10  # of computing, not of waiting
MEMORY_MB = 512
CHARACTERS = 1 << 24
_WORKER = Path(__file__).with_name("template_worker.py")


def render(template: str, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> str:
    """The text of `messages` under a template, as `apply_chat_template` of transformers gives it.

    Args:
      template: Jinja.
      messages: what the template calls `messages`.
      arguments: its other variables; JSON values.

    Raises:
      ValueError: the template raises, or exceeds a limit, with what it said; arguments that are no JSON.
    """
    try:
        request = json.dumps({"template": template, "messages": messages, "arguments": arguments}).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages and template arguments must be JSON values: {error}") from error
    return _renderer(os.getpid()).render(request)


def prepare() -> None:
    """Starts the process that renders, without waiting for it."""
    _renderer(os.getpid()).start()


class _Renderer:
    """The process that renders: started when it is needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._stop)

    def start(self) -> None:
        with self._lock:
            self._running()

    def render(self, request: bytes) -> str:
        with self._lock:
            for _ in range(2):  # once more, should someone else have ended the process
                try:
                    reply = _exchange(self._running(), request)
                except BaseException:  # Ctrl-C: the reply must not be read as that of the next request
                    self._stop()
                    raise
                if reply.endswith(b"\n"):
                    break
                status = self._stop()
                if status == -signal.SIGPROF:
                    raise ValueError(f"it takes more than {SECONDS} s of computing")
            else:
                raise ValueError(f"the process that renders it ended with status {status}")
        answer = json.loads(reply)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # In a session of its own: what ends the main process (Ctrl-C, a scheduler) reaches this one by the pipe.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            limits = {"seconds": SECONDS, "memory_mb": MEMORY_MB, "characters": CHARACTERS}
            _send(self._process, json.dumps(limits | {"path": [*map(str, sys.path)]}).encode() + b"\n")
        return self._process

    def _stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with process:
            return process.wait()


def _send(process: subprocess.Popen[bytes], line: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended, which the missing reply shows
        requests = cast(IO[bytes], process.stdin)
        requests.write(line)
        requests.flush()


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The reply; without a line break at its end where the process ended."""
    _send(process, request)
    return cast(IO[bytes], process.stdout).readline()


@functools.cache
def _renderer(pid: int) -> _Renderer:
    """Of this process: a forked child has its own."""
    del pid
    return _Renderer()
