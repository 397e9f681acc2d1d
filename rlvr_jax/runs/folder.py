"""The folder of a run: a local one, or one at a URL that a local one is copied to while the run goes on.

Files of a run are appended to, renamed and replaced, which a store of objects does not do. So the run works in a local
folder, and whole files go to the URL as they change: every minute, wherever the run asks for it (before a checkpoint),
and at its end. What lies at the URL is the run: a start first makes the local folder equal to it, so a run goes on from
there on any machine, and what a lost machine had not sent is made again. Checkpoints do not go this way
(`rlvr_jax.runs.checkpoint` writes them to the URL itself).
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlvr_jax.runs.distributed import cluster
from rlvr_jax.runs.files import parse_json
from rlvr_jax.runs.lock import FolderLock, flock, lock
from rlvr_jax.runs.paths import at_home
from rlvr_jax.runs.remote import AT_ONCE, cache_folder, fetch, filesystem, is_url, listing, locked, naming

log = logging.getLogger(__name__)

EVERY_S = 60.0
BUSY_SHARE = 0.1  # of the time may go into copying: a folder that takes a minute is copied every ten
WAIT_S = 20.0  # for a run that is still ending: a launcher may start the next one before that


class RunFolder(contextlib.AbstractContextManager["RunFolder"]):
    """A run's folder, with one writer. A URL's is copied there by process 0, until the `with` block ends and once more.

    Args:
      place: a local folder, or a URL.
      needed: whether a run that goes on needs a file, given its path in the folder; the others stay at the URL.
      every_s: seconds between copies.

    Raises:
      ValueError: an empty `place`, which would be the current folder; a URL that cannot be read with what is installed.

    Attributes:
      local: the folder that the run works in; for a URL `runs/` of `remote.cache_folder()`.
      checkpoints: where checkpoints go, a local folder or a URL.
    """

    def __init__(self, place: str, *, needed: Callable[[str], bool] = lambda name: True, every_s: float = EVERY_S):
        if not place.strip():
            raise ValueError(f"the folder of the run is {place!r}: expected a path")
        place = at_home(place)
        self.url = place.rstrip("/") if is_url(place) else None
        self.local, self.checkpoints = Path(place), str(Path(place) / "checkpoints")
        self._every_s, self._needed = every_s, needed
        self._there: dict[str, tuple[int, int]] = {}  # what was copied: size and time by path in the folder
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._held: Any = None  # of a URL: shared by the processes of the run on this machine
        self._owned: FolderLock | None = None
        if self.url is not None:
            self.checkpoints = f"{self.url}/checkpoints"
            self._fs, self._root = filesystem(self.url)
            self.local = cache_folder() / "runs" / _name(self.url)

    @contextlib.contextmanager
    def taken(self) -> Iterator["RunFolder"]:
        """`take`, and `release` where the block raises: for what is checked between here and the run."""
        try:
            yield self.take()
        except BaseException:
            self.release()
            raise

    def take(self) -> "RunFolder":
        """Before anything is read: locks the folder; all processes call it.

        A local folder is locked by process 0 (`rlvr_jax.runs.lock`). For a URL the local folder is made what the URL has,
        once per machine, and locked on this machine.

        Raises:
          ValueError: another run writes to the folder.
          OSError: the URL cannot be read, or the folder cannot be written to.
        """
        if self.url is None:
            if self._owned is None and cluster().main:
                self._owned = lock(self.local, wait_s=WAIT_S if cluster().size > 1 else 0.0)
            return self
        if self._held is not None:
            return self
        start = cluster().broadcast(uuid.uuid4().hex)  # tells the processes of this start from those before
        mark = self.local.with_name(f".{self.local.name}.start")
        with locked(self.local), naming(self.url):
            self._held = open(self.local.with_name(f".{self.local.name}.used"), "w")  # noqa: SIM115
            if not mark.is_file() or mark.read_text() != start:
                self._alone()
                shutil.rmtree(self.local, ignore_errors=True)
                self.local.mkdir(parents=True)
                found = {name: info for name, info in listing(self._fs, self._root).items() if self._wanted(name)}
                fetch(self._fs, found, self.local)
                mark.write_text(start)
            flock(self._held, fcntl.LOCK_SH)
        self._there = self._files()
        return self

    def sync(self) -> None:
        """Copies to the URL what has changed; on return it is there. Only process 0 does anything.

        Raises:
          OSError: naming the URL.
        """
        if self.url is None or not cluster().main:
            return
        with self._lock, naming(self.url), tempfile.TemporaryDirectory(dir=self.local.parent, prefix=".") as spare:
            if not self.local.is_dir():  # or all that is at the URL would be removed, as files that the run removed
                raise FileNotFoundError(f"{self.url}: not copied to, since {self.local} is gone")
            # A file that grows is copied as it is now, before the others: what its lines speak of is there then.
            grown, states = {}, self._changed()
            for name in filter(_grows, states):
                with contextlib.suppress(FileNotFoundError):  # removed a moment ago
                    grown[name] = Path(shutil.copyfile(self.local / name, Path(spare, str(len(grown)))))
            states = self._changed() | {name: states[name] for name in grown}
            self._put({name: self.local / name for name in states if not _grows(name)}, states)
            self._put(grown, states)
            for name in self._there.keys() - self._files().keys():
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(f"{self._root}/{name}")
                del self._there[name]

    def __enter__(self) -> "RunFolder":
        if self.url is not None and cluster().main:
            self._thread = threading.Thread(target=self._keep, name="copying results", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.sync()
        except Exception as failed:
            if error is None:
                raise
            log.warning("%s", failed)
        finally:
            self.release()

    def check(self) -> None:
        """For every step of a run: OSError where its local folder was removed, since another run may have begun there.

        What is still written there would lie among that run's results. At a URL, `sync` looks for it.
        """
        if self._owned is not None and not self._owned.there():
            raise OSError(f"{self.local}: was removed or replaced while this run was writing to it, and the run ends")

    def release(self) -> None:
        """Lets other runs have the folder."""
        for held in (self._held, self._owned):
            if held is not None:
                held.close()
        self._held = self._owned = None

    def _keep(self) -> None:
        wait, said = self._every_s, False
        while not self._stop.wait(wait):
            begin = time.monotonic()
            try:
                self.sync()
                said = False
            except Exception as error:  # whatever a client raises: the next copy may succeed
                if not said:
                    log.warning("%s; tried again every %.0f s", error, self._every_s)
                said = True
            wait = max(self._every_s, (time.monotonic() - begin) / BUSY_SHARE)

    def _changed(self) -> dict[str, tuple[int, int]]:
        return {name: state for name, state in self._files().items() if state != self._there.get(name)}

    def _put(self, sources: dict[str, Path], states: dict[str, tuple[int, int]]) -> None:
        """Copies files to their names at the URL."""

        def one(name: str) -> None:
            try:
                self._fs.put_file(str(sources[name]), f"{self._root}/{name}")
            except FileNotFoundError:
                if sources[name].exists():  # else removed a moment ago
                    raise

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, sources))
        self._there |= {name: states[name] for name in sources}

    def _alone(self) -> None:
        """Waits a while for a run of this machine that still holds the folder."""
        until = time.monotonic() + WAIT_S
        while True:
            try:
                flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise ValueError(f"{self.url}: another run of this machine works in {self.local}") from error
            time.sleep(0.5)

    def _wanted(self, name: str) -> bool:
        return not _hidden(name) and not name.startswith("checkpoints/") and self._needed(name)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time by path in the folder, but for hidden files, which are not whole."""
        found = {}
        for folder, folders, names in os.walk(self.local):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                with contextlib.suppress(FileNotFoundError):  # removed a moment ago
                    there = path.stat()
                    found[path.relative_to(self.local).as_posix()] = there.st_size, there.st_mtime_ns
        return found


def own_config(folder: Path, keys: Collection[str]) -> dict[str, Any] | None:
    """The config.json that an earlier start left in a folder; None where there is none.

    Args:
      folder: a local folder.
      keys: of the program's configurations.

    Raises:
      ValueError: a config.json that this program did not write, such as a model's; it would be replaced.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        config = parse_json(path.read_bytes(), path)
    except ValueError as error:
        raise ValueError(f"{error}; use another folder for the results") from error
    foreign = sorted(config.keys() - set(keys)) if isinstance(config, dict) else ["no option"]
    if foreign:
        raise ValueError(
            f"{path}: no configuration of this program (it has {foreign[0]!r}) and would be replaced; "
            "use another folder for the results"
        )
    return config


def _grows(name: str) -> bool:
    return name.endswith(".jsonl") or "tfevents" in name


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _name(url: str) -> str:
    """Of a URL, the name of the folder that stands for it: no other URL's, and not inside another's."""
    return re.sub(r"[^\w.=+@-]+", "_", url) + "-" + hashlib.sha256(url.encode()).hexdigest()[:8]
