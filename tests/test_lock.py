"""One writer per folder, with flock and without it; what a refusal says; locks of dead processes."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlvr_jax.runs import lock as locks
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.lock import FolderInUse, lock

# Another process that takes a folder's lock, says so, and holds it until its input ends. It needs no jax.
HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
locks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locks)
print("ready", flush=True)
sys.stdin.readline()
try:
    held = locks.lock(sys.argv[2])
    print("held", flush=True)
    sys.stdin.read()
except ValueError as error:
    print("refused", error, flush=True)
"""


def holder(folder, **environment):
    command = [sys.executable, "-c", HOLDER, locks.__file__, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | environment, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def told(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owner(folder, **changes):
    path = Path(folder) / ".lock.owner"
    path.write_text(json.dumps(locks._myself() | changes))
    return path


@pytest.mark.parametrize("mode", ["auto", "file"])
def test_a_second_process_is_told_who_holds_it_and_a_dead_one_holds_nothing(tmp_path, mode, monkeypatch):
    monkeypatch.setenv("RLVR_JAX_LOCK", mode)
    first = holder(tmp_path)
    assert told(first) == "held\n"
    with pytest.raises(FolderInUse) as refused:
        lock(tmp_path)
    for part in (str(tmp_path), f"process {first.pid} on {socket.gethostname()} since 20", Path(sys.executable).name):
        assert part in str(refused.value)
    first.kill()
    first.wait()
    with lock(tmp_path), pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
        lock(tmp_path)
    lock(tmp_path).close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_a_file_is_the_lock_and_it_is_said(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks._say_once.cache_clear()
    with lock(tmp_path / "new"):
        assert (tmp_path / "new" / ".lock.owner").is_file()
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
            lock(tmp_path / "new")
    assert not (tmp_path / "new" / ".lock.owner").exists()
    held = lock(tmp_path / "new")
    assert [record.message for record in caplog.records] == [
        f"this file system has no flock ({os.strerror(code)}): folders are locked by a file .lock.owner"
    ]
    del held  # whoever forgets a lock does not keep it
    lock(tmp_path / "new").close()


def test_another_error_of_flock_is_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken disk"):
        lock(tmp_path)


def test_an_owner_s_file_is_removed_where_its_process_is_known_to_be_dead(tmp_path, no_flock):
    owner(tmp_path, pid=dead_process())
    with lock(tmp_path):
        assert json.loads((tmp_path / ".lock.owner").read_text())["pid"] == os.getpid()
    owner(tmp_path, begun="1")  # our number, but of an earlier process that had it
    lock(tmp_path).close()
    path = owner(tmp_path, pid=dead_process(), machine="another boot", host="far")
    with pytest.raises(FolderInUse, match=rf"on far since .* If it is not running any more, remove {path}"):
        lock(tmp_path)
    whole = locks._myself()
    damaged = [whole | {"pid": pid} for pid in ("7", None, 0, -1, 1 << 80)]
    for text in (b"", b'{"pid":', b"\xff\xfe", b"[" * 100_000, *(json.dumps(one).encode() for one in damaged)):
        path.write_bytes(text)
        with pytest.raises(FolderInUse, match=f"in use by another process; .* remove {path}"):
            lock(tmp_path)


def test_an_owner_s_file_counts_where_there_is_flock_too(tmp_path):
    path = owner(tmp_path)
    with pytest.raises(FolderInUse, match="wait for its end"):
        lock(tmp_path)
    owner(tmp_path, pid=dead_process())
    with lock(tmp_path):
        assert not path.exists()


def test_a_start_that_is_told_to_use_the_file_minds_the_flock_of_one_that_was_not(tmp_path, monkeypatch):
    with lock(tmp_path), monkeypatch.context() as patch:
        patch.setenv("RLVR_JAX_LOCK", "file")
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
            lock(tmp_path)
        assert not (tmp_path / ".lock.owner").exists()
    (tmp_path / ".lock").write_bytes(b"\xff")
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderInUse, match="in use by another process; "):
            lock(tmp_path)

    def fail(*_):
        raise OSError(errno.EINVAL, "strange")

    monkeypatch.setattr(fcntl, "flock", fail)
    monkeypatch.setenv("RLVR_JAX_LOCK", "file")
    with lock(tmp_path):
        assert (tmp_path / ".lock.owner").is_file()


@pytest.mark.parametrize("mode", ["auto", "file"])
def test_a_run_whose_folder_is_removed_ends_since_another_may_begin_in_it(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("RLVR_JAX_LOCK", mode)
    place = tmp_path / "run"
    with RunFolder(str(place)).take() as first:
        first.check()
        shutil.rmtree(place)
        with pytest.raises(OSError, match=f"{place}: was removed or replaced"):
            first.check()
        with RunFolder(str(place)).take() as second:
            second.check()
            with pytest.raises(OSError, match=f"{place}: was removed or replaced"):
                first.check()


def test_a_flock_that_another_machine_holds_may_be_that_of_a_lost_one(tmp_path, monkeypatch):
    with lock(tmp_path):
        with pytest.raises(FolderInUse) as refused:
            lock(tmp_path)
        assert "remove" not in str(refused.value)
        monkeypatch.setattr(locks, "_machine", lambda: "another")
        with pytest.raises(FolderInUse, match=rf"not running any more, remove {tmp_path}/\.lock$"):
            lock(tmp_path)


def test_one_of_many_takes_over_a_dead_lock(tmp_path):
    owner(tmp_path, pid=dead_process())
    starts = [holder(tmp_path, RLVR_JAX_LOCK="file") for _ in range(8)]
    for process in starts:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.stdout.readline().split()[0] for process in starts]
    assert sorted(said) == ["held"] + ["refused"] * 7
    for process in starts:
        process.stdin.close()
        assert process.wait() == 0
    assert not list(tmp_path.glob(".lock.owner*"))


def test_a_lock_that_was_taken_over_a_moment_ago_is_put_back(tmp_path, no_flock, monkeypatch):
    owner(tmp_path, pid=dead_process())
    rename, taken = os.rename, []

    def late(source, target):
        if not taken:
            taken.append(owner(tmp_path, command="the other start"))
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(FolderInUse, match="the other start"):
        lock(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".lock.owner"]


def test_a_start_waits_for_a_run_that_is_still_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_LOOK_S", 0.02)
    held = lock(tmp_path)
    begin = time.monotonic()
    threading.Timer(0.1, held.close).start()
    lock(tmp_path, wait_s=20.0).close()
    assert 0.1 <= time.monotonic() - begin < 10


def test_the_environment_chooses_the_kind_of_lock(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RLVR_JAX_LOCK", "off")
    with lock(tmp_path), lock(tmp_path):
        assert "not locked, since RLVR_JAX_LOCK=off" in caplog.text
    monkeypatch.setenv("RLVR_JAX_LOCK", "no")
    with pytest.raises(ValueError, match="RLVR_JAX_LOCK='no' in the environment: expected one of auto, file, off"):
        lock(tmp_path)


def test_a_cache_where_no_file_can_be_locked_names_it_and_the_way_out(tmp_path, no_flock):
    with (
        open(tmp_path / "x", "w") as file,
        pytest.raises(OSError, match=rf"{tmp_path}/x: .* \(No locks.*RLVR_JAX_CACHE"),
    ):
        locks.flock(file, fcntl.LOCK_EX)
