"""The files that a source of rows names: one file, several, a folder of shards, a pattern, at a URL or on the hub."""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlvr_jax.data.rows import ENDINGS
from rlvr_jax.runs.paths import at_home
from rlvr_jax.runs.remote import filesystem, is_url, local, naming

Source = str | Path | Sequence[str]

_SHARDS = (".parquet", ".jsonl")  # a .json file among them is more often about the data than data
_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")


def data_files(source: Source) -> list[Path]:
    """The local files of a source, in the order in which their rows are read.

    A source is a file, a folder (its .parquet and .jsonl files, by name), a pattern such as `data/train-*.parquet`
    (what matches, by name), or several of these (one after the other). Each may be a URL (`rlvr_jax.runs.remote`), or
    `hf://datasets/OWNER/NAME[@REVISION]/PATH` for a data set on the Hugging Face hub, whose files are kept in the
    hub's cache. A path that exists is that path, whatever characters it has.

    Raises:
      ValueError: nothing there, or nothing of these kinds; a data set that cannot be obtained from the hub.
      OSError: a URL that cannot be read.
    """
    if isinstance(source, str | Path):
        return _files(str(source))
    if not source:
        raise ValueError("no data file: expected a path, or several")
    return [file for one in source for file in _files(one)]


def names(source: Source) -> str:
    """A source in words."""
    return str(source) if isinstance(source, str | Path) else ", ".join(source)


def _files(source: str) -> list[Path]:
    if source.startswith("hf://"):
        return _from_hub(source)
    if is_url(source):
        return _at_url(source)
    source = at_home(source)
    path = Path(source)
    if path.is_dir():
        return _shards(path, source)
    if path.exists() or not glob.has_magic(source):
        if not path.is_file():
            raise ValueError(f"{source}: no such file (a data set on the hub is hf://datasets/OWNER/NAME/FILE)")
        return [path]
    return _some((Path(name) for name in glob.glob(source)), source)


def _shards(folder: Path, source: str) -> list[Path]:
    return _some((file for file in folder.iterdir() if file.suffix in _SHARDS), source)


def _some(found: Iterable[Path], source: str) -> list[Path]:
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    if not files:
        raise ValueError(f"{source}: no .parquet or .jsonl file there")
    return files


def _at_url(url: str) -> list[Path]:
    if glob.has_magic(url):
        fs, root = filesystem(url)
        with naming(url):
            urls = sorted(fs.unstrip_protocol(str(name)) for name in fs.glob(root))
        return _some((Path(local(one)) for one in urls), url)
    path = Path(local(url, [f"*{ending}" for ending in _SHARDS]))
    return _shards(path, url) if path.is_dir() else [path]


def _from_hub(url: str) -> list[Path]:
    named = _HUB.fullmatch(url)
    if named is None:
        raise ValueError(f"{url}: expected hf://datasets/OWNER/NAME[@REVISION]/FILE, a folder or a pattern")
    import huggingface_hub  # only here: local data must not depend on the hub's settings

    repository, revision, inside = named.group(1), named.group(2), (named.group(3) or "").rstrip("/")
    at = {"repo_type": "dataset", "revision": revision}
    try:
        with naming(url):
            chosen = [inside]
            if glob.has_magic(inside) or Path(inside).suffix not in ENDINGS:
                every = huggingface_hub.list_repo_files(repository, **at)
                chosen = sorted(name for name in every if _wanted(Path(name), inside))
                if not chosen:
                    there = [name for name in every if Path(name).suffix in ENDINGS]
                    raise ValueError(
                        f"{url}: no .parquet or .jsonl file there; it has {', '.join(there[:20]) or 'none'}"
                    )
            return [Path(huggingface_hub.hf_hub_download(repository, name, **at)) for name in chosen]
    except OSError as error:  # what the hub's client raises, by `naming`
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{url}: not obtained from the hub ({reason})") from error


def _wanted(name: Path, inside: str) -> bool:
    """Whether a file of a data set is one of the folder, or matches the pattern, that `inside` is."""
    if glob.has_magic(inside):
        return len(name.parts) == inside.count("/") + 1 and name.match(inside) and not name.name.startswith(".")
    return name.parent == Path(inside) and name.suffix in _SHARDS and not name.name.startswith(".")
