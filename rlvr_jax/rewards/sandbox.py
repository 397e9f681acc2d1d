"""Calls a function in a forked process that can compute and say one thing, and do nothing else (Linux).

The process keeps the memory of its parent, /dev/null as its three standard descriptors, and one pipe. A seccomp filter
allows the few system calls that computing and writing to open descriptors take. All others fail with EPERM: it can
open, list, make or remove no file, make no socket, start no program, process or thread, signal or trace no process,
and raise no limit. The filter needs no privilege and no namespace, so it is the same for root, for an ordinary user
and in a container. A list of what is allowed leaves nothing for namespaces or Landlock to take away.

Only the standard library is imported: the grading worker loads this file by its path. Run as a script, it prints why
the sandbox does not hold here, or nothing.
"""

import contextlib
import ctypes
import errno
import functools
import json
import os
import platform
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LARGEST = 1 << 22  # bytes that a process may say
PROBE_S = 10.0
PIPE = 3  # the descriptor that it says it on
_RLIMITS = {"CORE": 0, "FSIZE": 0, "NPROC": 0}

# Audit architectures of linux/audit.h, and system calls by architecture: (x86-64, arm64), -1 where there is none.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_ALLOWED = {
    # memory
    **{"brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226)},
    **{"madvise": (28, 233), "futex": (202, 98), "rseq": (334, 293), "set_robust_list": (273, 99)},
    # its own signals and its end
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132)},
    **{"alarm": (37, -1), "setitimer": (38, 103), "exit": (60, 93), "exit_group": (231, 94)},
    # time, chance and what it is
    **{"clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101)},
    **{"gettimeofday": (96, 169), "time": (201, -1), "restart_syscall": (219, 128), "sched_yield": (24, 124)},
    **{"getrandom": (318, 278), "getpid": (39, 172), "gettid": (186, 178), "getrusage": (98, 165)},
    # what is open: /dev/null and the pipe
    "write": (1, 64),
}
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: a word of the call's description, jump if equal, the verdict
_KILL, _FAIL, _ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000


class Outcome(NamedTuple):
    """How a process ended.

    Attributes:
        value: what it said, read as JSON; None where it said nothing that can be read.
        failure: why there is no value, else None.
        signal: the number of the signal that ended it before its time was over, else 0.
        peak_mb: the most resident memory it took, MiB.
    """

    value: Any
    failure: str | None
    signal: int
    peak_mb: float


def apart(function: Callable[[], Any], timeout_s: float) -> Outcome:
    """Calls `function` in a confined process of its own; what it returns comes back as JSON, never as code.

    The caller must have a single thread. `function` finds all that it needs in memory: modules that are not imported
    yet cannot be.

    Args:
        function: returns something that JSON can hold, in at most `LARGEST` bytes.
        timeout_s: seconds (wall clock) until it is killed.

    Raises:
        OSError: the machine has no process or no memory left for it.
    """
    reading, writing = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    if child == 0:
        _be_the_child(function, writing, timeout_s)
    os.close(writing)
    try:
        said, failure = _listen(reading, timeout_s)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # one that is exiting keeps its own status
        _, status, usage = os.wait4(child, 0)
    value, ended = None, os.WTERMSIG(status) if failure is None and os.WIFSIGNALED(status) else 0
    if ended == signal.SIGXCPU:
        failure = _late(timeout_s)
    elif failure is None:
        try:
            value = json.loads(said)
        except (ValueError, RecursionError, MemoryError):
            cause = signal.Signals(ended).name if ended else f"exit status {os.waitstatus_to_exitcode(status)}"
            failure = f"the grading process died ({cause})"
    return Outcome(value, failure, ended, usage.ru_maxrss / 2**10)


def _late(timeout_s: float) -> str:
    return f"exceeded the time limit of {timeout_s:g} s"


def _listen(reading: int, timeout_s: float) -> tuple[bytes, str | None]:
    """All that comes before the pipe is closed, or the reason why it was not waited for."""
    said, deadline = bytearray(), time.monotonic() + timeout_s
    while len(said) <= LARGEST:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return b"", _late(timeout_s)
        if not (chunk := os.read(reading, 1 << 16)):
            return bytes(said), None
        said += chunk
    return b"", f"the verdict has more than {LARGEST} bytes"


def _be_the_child(function, writing, timeout_s):
    """Never returns."""
    status = 1
    try:
        _confine(writing, timeout_s)
        said = json.dumps(function()).encode()
        while said:
            said = said[os.write(PIPE, said) :]
        status = 0
    except BaseException:  # whatever it was, no code of the parent may run here
        status = 1
    finally:
        os._exit(status)


def _confine(writing: int, timeout_s: float) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.dup2(writing, PIPE)
    os.closerange(PIPE + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.environ.clear()
    for name, limit in {**_RLIMITS, "CPU": int(timeout_s) + 2}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    program = _filter()
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(header))


@functools.cache
def _filter() -> bytes:
    """The seccomp filter as classic BPF instructions of 8 bytes: operation, jump if true, jump if false, operand."""
    column, architecture = _ARCHITECTURES[platform.machine()]
    numbers = [found[column] for found in _ALLOWED.values() if found[column] >= 0]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    # Each jump passes the tests after it and the refusal.
    program += [(_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _FAIL), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc().prctl(ctypes.c_int(option), *words):
        raise OSError(ctypes.get_errno(), "prctl")


def failing() -> str | None:
    """Why the sandbox does not hold here, or None: a process in it tries what it must not be able to do.

    The caller must have a single thread; `unavailable` asks from any process.
    """
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return f"it needs Linux on x86-64 or arm64, this is {sys.platform} on {platform.machine()}"
    _filter()  # made once, before the forks
    _libc()
    outcome = apart(lambda: [name for name, attempt in _ATTEMPTS.items() if _succeeds(attempt)], PROBE_S)
    if outcome.failure is not None:
        return f"a process cannot be confined by seccomp: {outcome.failure}"
    if outcome.value != []:
        return f"a confined process could {', '.join(outcome.value)}"
    return None


def _succeeds(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def _raise_errno(returned: int) -> None:
    if returned == -1:
        raise OSError(ctypes.get_errno(), "")


def _grow_limit():
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    except ValueError as error:  # how Python reports EPERM here
        raise OSError(errno.EPERM, "") from error


_ATTEMPTS: dict[str, Callable[[], Any]] = {
    "read a file": lambda: os.open(__file__, os.O_RDONLY),
    "write a file": lambda: os.open("/dev/null", os.O_WRONLY),
    "list a folder": lambda: os.listdir("/"),
    "make a folder": lambda: os.mkdir("/tmp"),
    "remove a file": lambda: os.unlink("/"),
    "open a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "open a local socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "run a program": lambda: os.execv("/bin/true", ["true"]),
    "start a process": lambda: os.fork() or os._exit(0),
    "signal its parent": lambda: os.kill(os.getppid(), 0),
    "trace its parent": lambda: _raise_errno(_libc().ptrace(16, os.getppid(), 0, 0)),
    "change a limit": _grow_limit,
}


@functools.cache
def unavailable() -> str | None:
    """`failing`, asked in a process of its own; None where the sandbox holds."""
    if sys.platform != "linux":
        return failing()
    command = [sys.executable, "-I", "-S", __file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * PROBE_S)
    except (OSError, subprocess.SubprocessError) as error:
        return f"its self-test does not run: {error}"
    if done.returncode:
        return f"its self-test does not run: {done.stderr.strip()[-200:]}"
    return done.stdout.strip() or None


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(failing() or "")
