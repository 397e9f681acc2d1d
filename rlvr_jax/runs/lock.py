"""One writer per folder: a lock that says who holds it.

A program that writes to a folder takes the lock before it reads what it resumes from, and before it removes anything.
The lock is `flock` on the file `.lock` of the folder. It ends with its process, however that ends.

Some file systems have no `flock` (Lustre without `-o flock`, NFS with `nolock`). There the lock is the file
`.lock.owner`, which only one process can create. A file whose process is dead is taken over, where that can be known:
the process ran on this machine, since its last start. Otherwise the sentence of the refusal says what to remove.

The variable RLVR_JAX_LOCK of the environment chooses. "auto" is the above. "file" takes the second kind always, beside
`flock` where there is one, for shared folders whose `flock` holds within one machine alone (Lustre with
`-o localflock`). "off" takes no lock.
"""

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import shlex
import socket
import sys
import time
import uuid
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

SWITCH = "RLVR_JAX_LOCK"
MODES = ("auto", "file", "off")
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_LOOK_S = 0.5  # between two looks at a lock that is waited for
_LONGEST_COMMAND = 160  # characters


class FolderInUse(ValueError):
    """Another process writes to the folder; the message says which."""


class FolderLock(contextlib.AbstractContextManager["FolderLock"]):
    """A lock that is held until `close`, the end of its `with` block, or the end of the process."""

    def __init__(self, release: Callable[[], object], there: Callable[[], bool] = lambda: True):
        self._release, self._there = weakref.finalize(self, release), there

    def there(self) -> bool:
        """Whether the lock's file is still the one that was taken: not where the folder was removed or replaced."""
        return self._there()

    def close(self) -> None:
        """Gives the folder free; a second call does nothing."""
        self._release()

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(folder: str | os.PathLike[str], *, wait_s: float = 0.0) -> FolderLock:
    """Takes the lock of a folder, which is made if it does not exist.

    Args:
      folder: a local folder.
      wait_s: seconds to wait for a process that holds it, such as the run before this one that is still ending.

    Raises:
      FolderInUse: another process holds it. The message names host, process, time and command.
      ValueError: an empty name, which would be the current folder; RLVR_JAX_LOCK is none of `MODES`.
      OSError: the folder cannot be written to.
    """
    mode = os.environ.get(SWITCH) or "auto"
    if mode not in MODES:
        raise ValueError(f"{SWITCH}={mode!r} in the environment: expected one of {', '.join(MODES)}")
    if not os.fspath(folder).strip():
        raise ValueError(f"the folder to write to is {os.fspath(folder)!r}: expected a path")
    folder, until = Path(folder), time.monotonic() + wait_s
    folder.mkdir(parents=True, exist_ok=True)
    if mode == "off":
        log.warning("%s is not locked, since %s=off: nothing keeps another run out of it", folder, SWITCH)
        return FolderLock(lambda: None)
    while True:
        try:
            return _take(folder, mode)
        except FolderInUse:
            if time.monotonic() >= until:
                raise
        time.sleep(_LOOK_S)


def flock(file: IO[Any], operation: int) -> None:
    """`fcntl.flock` for the files of a cache on this machine, which need no other kind of lock.

    Raises:
      BlockingIOError: with LOCK_NB, another process holds it.
      OSError: the file system has no such locks. The message names the file and what to do.
    """
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"{file.name}: this file system cannot lock files ({error.strerror}); "
            "set RLVR_JAX_CACHE to a folder on a local disk"
        ) from error


def _take(folder: Path, mode: str) -> FolderLock:
    owner = folder / ".lock.owner"
    held = _flocked(folder / ".lock", needed=mode == "auto")
    if held is None:
        return _owned(owner)
    try:
        if mode == "file":
            owned = _owned(owner)
            return FolderLock(lambda: (owned.close(), held.close()), owned.there)
        _remove_dead(owner)  # of a process that could not use flock, or was told to use both
    except BaseException:
        held.close()
        raise
    return held


def _flocked(path: Path, *, needed: bool) -> FolderLock | None:
    """None where the file system has no flock; where it is not `needed`, trouble of any kind counts as none."""
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (held open as long as the lock)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read()
        file.close()
        raise FolderInUse(_refusal(path, _read(holder))) from error
    except OSError as error:
        file.close()
        if not needed:
            return None
        if error.errno not in _NO_FLOCK:
            raise
        _say_once(f"this file system has no flock ({error.strerror}): folders are locked by a file .lock.owner")
        return None
    file.truncate(0)
    file.write(json.dumps(_myself()))
    file.flush()
    return FolderLock(file.close, functools.partial(_is_file, path, os.fstat(file.fileno())))


def _owned(path: Path) -> FolderLock:
    text = json.dumps(_myself() | {"token": uuid.uuid4().hex})  # no other lock's, not even of this process
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
            return FolderLock(functools.partial(_remove_own, path, text), functools.partial(_says, path, text))
        except FileExistsError:
            _remove_dead(path)


def _is_file(path: Path, known: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), known)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _says(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8", errors="replace") == text
    except (FileNotFoundError, NotADirectoryError):
        return False


def _remove_own(path: Path, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if _says(path, text) and json.loads(text)["pid"] == os.getpid():
            path.unlink()


def _remove_dead(path: Path) -> None:
    """Removes an owner's file whose process is known to be dead. Raises FolderInUse where it is not."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    holder = _read(text)
    if holder is None or not _known_here(holder) or _alive(holder):
        raise FolderInUse(_refusal(path, holder))
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):  # another start removes it too
        os.rename(path, aside)
        if _says(aside, text):
            aside.unlink()
        else:  # that start has removed it and taken the lock since
            os.rename(aside, path)


def _refusal(path: Path, holder: dict[str, Any] | None) -> str:
    who = "another process"
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
    known = holder is not None and _known_here(holder)
    lost = "" if known else f". If it is not running any more, remove {path}"
    return f"{path.parent}: in use by {who}; wait for its end, or use another folder{lost}"


def _known_here(holder: dict[str, Any]) -> bool:
    """Whether this machine can tell if a holder is alive."""
    return holder.get("machine") == _machine()


def _read(text: str) -> dict[str, Any] | None:
    """What a lock's file says of its holder; None where it says nothing whole."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(holder, dict) or not {"pid", "host", "since", "command"} <= holder.keys():
        return None
    return holder if isinstance(holder["pid"], int) and 0 < holder["pid"] < 1 << 31 else None


def _myself() -> dict[str, Any]:
    command = shlex.join(sys.orig_argv)
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": command if len(command) <= _LONGEST_COMMAND else f"{command[:_LONGEST_COMMAND]} ...",
        "machine": _machine(),
        "begun": _begun(os.getpid()),
    }


def _machine() -> str:
    """What has to be the same for process numbers to mean the same: host, its last start, container."""
    boot, container = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        container = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {container}"


def _alive(holder: dict[str, Any]) -> bool:
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return _begun(holder["pid"]) == holder.get("begun")  # else a later process has its number


def _begun(pid: int) -> str:
    """When a process began, in ticks of the system's clock; empty where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@functools.cache
def _say_once(sentence: str) -> None:
    log.warning("%s", sentence)
