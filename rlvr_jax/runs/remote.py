"""Files at a URL (gs://, s3://, what else fsspec reads): what a run reads from there is copied to this machine once.

The copies lie under `cache_folder()`, by the URL's own path. They are made whole or not at all, by one process of a
machine while the others wait, and made again when the file at the URL is another one (by its size and time).
"""

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.config import conf
from fsspec.core import url_to_fs

from rlvr_jax.runs.files import atomic_path
from rlvr_jax.runs.lock import flock
from rlvr_jax.runs.paths import at_home

TEXT_FILES = ("*.json", "*.jinja", "*.txt")  # of a model: all but its weights
MODEL_FILES = (*TEXT_FILES, "*.safetensors")
PACKAGES = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # of a scheme: package, our extra
AT_ONCE = 8  # files that are copied at a time
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path begins with a scheme, as gs:// does."""
    return _URL.match(os.fspath(path)) is not None


def cache_folder() -> Path:
    """Where copies of what lies at a URL are kept: RLVR_JAX_CACHE of the environment, or ~/.cache/rlvr_jax."""
    return Path(os.environ.get("RLVR_JAX_CACHE") or "~/.cache/rlvr_jax").expanduser().absolute()


def local(path: str, patterns: Sequence[str] = MODEL_FILES) -> str:
    """The path itself (`~` written out), or for a URL that of its copy on this machine; see `local_copy`."""
    return str(local_copy(path, patterns)) if is_url(path) else at_home(path)


def local_copy(url: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Copies the file at a URL, or of a folder there the files that match one of `patterns`, and gives the copy's path.

    A folder's config.json comes last and goes first, so that half a model never looks like one.

    Raises:
      ValueError: no such kind of URL, or the package that reads it is missing.
      OSError: nothing there (FileNotFoundError), or it cannot be read; named by its URL.
    """
    fs, root = filesystem(url)
    target = cache_folder() / "files" / _place(url, root)
    with naming(url), locked(target):
        if fs.isfile(root):
            fetch(fs, {target.name: fs.info(root)}, target.parent)
            return target
        found = {name: info for name, info in listing(fs, root, _depth(patterns)).items() if _matches(name, patterns)}
        if not found:
            what = f"no file that matches {', '.join(patterns)}" if fs.exists(root) else "no such file or folder"
            raise FileNotFoundError(f"{url}: {what}")
        old = [p for p in target.rglob("*") if p.is_file() and _matches(p.relative_to(target).as_posix(), patterns)]
        late = {name: found.pop(name) for name in ("config.json",) if name in found}
        if any(not is_copy(target / name, info) for name, info in found.items()):
            (target / "config.json").unlink(missing_ok=True)
        fetch(fs, found, target)
        fetch(fs, late, target)
        for path in old:
            if path.relative_to(target).as_posix() not in found.keys() | late.keys():
                path.unlink(missing_ok=True)
    return target


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path in it. Listings are not remembered: other machines write there too.

    Raises:
      ValueError: as `local_copy` says.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in PACKAGES:  # also for those who ask fsspec themselves, as etils.epath does
        conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    try:
        with naming(url):
            return url_to_fs(url)
    except ImportError as error:
        package, extra = PACKAGES.get(scheme, ("", ""))
        needs = f"{scheme}:// needs the package {package}: pip install 'rlvr-jax[{extra}]'" if package else str(error)
        raise ValueError(f"{url}: {needs}") from error


@contextlib.contextmanager
def naming(url: str) -> Iterator[None]:
    """Inside, what a client of a store raises (each has errors of its own) becomes an OSError that names the URL."""
    try:
        yield
    except ImportError:
        raise
    except ValueError as error:
        raise ValueError(str(error) if url in str(error) else f"{url}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and url in str(error):
            raise
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as file:
        flock(file, fcntl.LOCK_EX)
        yield


def listing(fs: fsspec.AbstractFileSystem, root: str, depth: int | None = None) -> dict[str, dict[str, Any]]:
    """The files under a folder of `fs`, `depth` levels deep, by their path in it."""
    found: Any = fs.find(root, maxdepth=depth, detail=True)
    base = root.rstrip("/") + "/"
    return {name.removeprefix(base): info for name, info in found.items() if name.startswith(base) and name != base}


def is_copy(path: Path, info: Mapping[str, Any]) -> bool:
    """Whether a local file is the copy, made by `fetch`, of what `info` describes."""
    when = _modified(info)
    if when is None or not path.is_file():
        return False
    there = path.stat()
    return there.st_size == info["size"] and abs(there.st_mtime - when) < 1e-3


def fetch(fs: fsspec.AbstractFileSystem, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Copies files, given as what `fs` says of them by the name they get, into a folder; each with its own time."""

    def one(name: str) -> None:
        info, path = files[name], folder / name
        if is_copy(path, info):
            return
        with atomic_path(path) as temporary:
            fs.get_file(info["name"], str(temporary))
            if info.get("size") not in (None, size := temporary.stat().st_size):
                raise OSError(f"{info['name']}: {size} of {info['size']} bytes came")
            if (when := _modified(info)) is not None:
                os.utime(temporary, (when, when))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, files))


def _modified(info: Mapping[str, Any]) -> float | None:
    """When a file was written, in seconds, by whatever name the file system has for that."""
    when = next((info[key] for key in ("mtime", "LastModified", "updated", "created") if info.get(key)), None)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    return when.timestamp() if isinstance(when, datetime) else when


def _place(url: str, root: str) -> Path:
    """Of a URL, the path of its copy in a folder of copies: its own, where characters had to be replaced too."""
    parts = [part for part in root.split("/") if part not in ("", ".", "..")]
    named = [re.sub(r"[^\w.=+@-]", "_", part) for part in parts]
    scheme = url.partition("://")[0].lower()
    if named == parts:
        return Path(scheme, *named)
    return Path(f"{scheme}-{hashlib.sha256('/'.join(parts).encode()).hexdigest()[:12]}", *named)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    return any(len(path.parts) == pattern.count("/") + 1 and path.match(pattern) for pattern in patterns)


def _depth(patterns: Sequence[str]) -> int:
    return 1 + max(pattern.count("/") for pattern in patterns)
