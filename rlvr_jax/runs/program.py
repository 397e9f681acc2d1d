"""The edge that the command-line programs share: configuration, exit codes, a readable end."""

import argparse
import contextlib
import dataclasses
import logging
import os
import re
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import tyro
from jax._src import compilation_cache as compiled  # nothing public reads an entry
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console
from rich.logging import RichHandler

from rlvr_jax.runs import distributed
from rlvr_jax.runs.lock import FolderInUse
from rlvr_jax.runs.paths import at_home, config_at_home

log = logging.getLogger(__name__)

C = TypeVar("C")
Job = TypeVar("Job")

USAGE_ERROR = 2
RUN_ERROR = 1
_CACHE_DIR = "jax_compilation_cache_dir"
_COMPILED = re.compile(r".+-[0-9a-f]{64}-cache")  # how jax names a compiled program
_MIN_COMPILE_S = 0.1  # what compiles faster is not worth a file
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
# A log file has no width of its own, and tables cut to 80 columns lose their names.
console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


class RunError(RuntimeError):
    """A run that cannot go on; its message is the one sentence that the user gets, exit code 1."""


class Preempted(RunError):
    """The run was asked to end (SIGTERM) and has saved what it needs to go on; exit code 75."""


class Preemption(contextlib.AbstractContextManager):
    """Notes SIGTERM, which schedulers send before they take a machine away, instead of dying of it.

    A second one ends the process as it would have. Where signals cannot be handled (outside the main thread) nothing
    is noted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._installed, self._before = False, None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL  # None: not set from Python
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, self._before)


def parse_config(config_type: type[C], argv: Sequence[str], *, prog: str, description: str) -> C:
    """Configuration from `--config FILE.py` (a Python file that defines `config`) and `--nested.key value` flags.

    Flags win over the file. Keys that do not exist fail, in the file as on the command line. `~/` is the home folder.

    Raises:
      ValueError: a missing file, a file without a `config` of the right type, or one that cannot be executed.
      SystemExit: code 2 for flags that do not parse (tyro prints which), 0 for --help.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, flags = parser.parse_known_args(list(argv))
    description += "\n\n--config FILE.py: a recipe, a Python file that defines `config`; flags override it."
    if known.config is None:
        return parse_flags(config_type, flags, prog=prog, description=description)
    default = read_config(config_type, known.config)
    return config_at_home(tyro.cli(config_type, default=default, args=flags, prog=prog, description=description))


def parse_flags(config_type: type[C], argv: Sequence[str], *, prog: str, description: str | None) -> C:
    """As `parse_config`, for a program without recipes."""
    return config_at_home(tyro.cli(config_type, args=list(argv), prog=prog, description=description))


def read_config(config_type: type[C], path: str | os.PathLike[str]) -> C:
    """The `config` that a recipe file defines. Raises ValueError as `parse_config` says."""
    path = at_home(path)
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:  # whatever a recipe raises is a fault of that file
        raise ValueError(f"--config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, config_type):
        raise ValueError(f"--config {path}: `config` must be a {config_type.__name__}, it is {type(config).__name__}")
    return config


def run_program(prepare: Callable[[Sequence[str]], Job], run: Callable[[Job], None]) -> int:
    """Runs a program: `prepare` checks all input before any long work starts, `run` does the work.

    Returns:
      0; 2 when `prepare` raises ValueError or OSError, or jax has no device of the platform that it was told to use; 75
      when `run` raises Preempted; 1 when it raises another RunError, FolderInUse or OSError, or is interrupted; each
      with one sentence on stderr, which "error:" begins but for 75.
      Any other exception propagates with its traceback. One of several processes ends at once, with 69 where another
      one is the cause (see `rlvr_jax.runs.watch`).
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        code, sentence = _outcome(prepare, run)
    except BaseException as error:
        watch = distributed.cluster().watch
        if watch is not None:  # the interpreter's own end would wait for processes that wait for this one
            if isinstance(error, jax.errors.JaxRuntimeError):
                watch.troubled()
            traceback.print_exception(error)
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else RUN_ERROR
            distributed.leave(code, f"{type(error).__name__}: {error}")
        raise
    return distributed.leave(code, sentence)


def _outcome(prepare: Callable[[Sequence[str]], Job], run: Callable[[Job], None]) -> tuple[int, str]:
    """Exit code, and why the other processes must stop too (empty: they need not, or know)."""
    try:
        job = prepare(sys.argv[1:])
    except (ValueError, OSError) as error:
        return _fail(error, USAGE_ERROR), str(error)
    except (AssertionError, RuntimeError):  # what jax raises where the platform asked for has no device, among others
        if (missing := _missing_platform()) is None:
            raise
        return _fail(missing, USAGE_ERROR), str(missing)
    try:
        run(job)
    except Preempted as error:  # which all agree on
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return PREEMPTED, ""
    except (RunError, FolderInUse, OSError) as error:
        return _fail(error, RUN_ERROR), str(error)
    except KeyboardInterrupt:
        return _fail(RunError("interrupted; the same command resumes from what is saved"), RUN_ERROR), "interrupted"
    return 0, ""


def _platforms() -> str:
    """The platforms that jax was told to use, separated by commas; empty: whatever there is."""
    return jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]: made at run time


def _missing_platform() -> ValueError | None:
    """What is wrong where jax was told to use a platform that has no device here; None where it has one."""
    asked = _platforms()
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        first = asked.split(",")[0]
        accelerator = {"cuda": "cuda12", "gpu": "cuda12", "tpu": "tpu"}.get(first, "cuda12|cuda13|tpu")
        reason = f" ({error})" if str(error) else ""
        return ValueError(
            f"JAX_PLATFORMS={asked}: the installed jax finds no such device here{reason}; "
            f"`make setup ACCELERATOR={accelerator}` installs jax for one, JAX_PLATFORMS=cpu takes the CPU"
        )
    return None


@contextlib.contextmanager
def writing_to(place: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an OSError becomes the RunError of a run in `place`, which names it where the error itself names no file.

    What a full disk raises names none.
    """
    try:
        yield
    except OSError as error:
        said = f"{place}: {error.strerror}" if error.strerror and error.filename is None else error
        raise RunError(f"{said}; the same command resumes from what is saved") from error


@contextlib.contextmanager
def compile_cache(where: str | None, run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, a program that this run or an earlier start of it has compiled is read back instead of compiled.

    Of several processes, jax lets number 0 alone write, and the others read. On CPU their programs are not the same to
    jax, so number 0 alone would be quick, and its collectives would not wait for the others: there, "auto" keeps
    nothing.

    Args:
      where: the folder of the programs; "auto": `compile_cache` in `run_dir`, unless jax has been given a folder
        already (JAX_COMPILATION_CACHE_DIR); None: nothing is kept.
      run_dir: the run's folder.
    """
    given = getattr(jax.config, _CACHE_DIR)
    folder = where
    if where == "auto":
        alone = distributed.cluster().size == 1 or jax.default_backend() != "cpu"
        folder = given or (os.path.abspath(Path(run_dir) / "compile_cache") if alone else None)
    options: dict[str, str | float | None] = {_CACHE_DIR: folder}
    if folder != given:
        options["jax_persistent_cache_min_compile_time_secs"] = _MIN_COMPILE_S
        options["jax_persistent_cache_enable_xla_caches"] = "none"  # it puts the folder's path into every key
    before = {name: getattr(jax.config, name) for name in options}
    if folder is not None and folder != given and distributed.cluster().main:
        _remove_damaged(Path(folder))
    try:
        _update(options)
        yield
    finally:
        _update(before)


def _remove_damaged(folder: Path) -> None:
    """Removes compiled programs that were cut short: jax would fail to read them at every start, and not replace them.

    It costs to read all of them once, some seconds per GB.
    """
    damaged = []
    for path in folder.glob("*-cache"):
        if not _COMPILED.fullmatch(path.name):  # somebody's file in a folder that was given
            continue
        try:
            compiled.decompress_executable(path.read_bytes())
        except Exception as error:  # whatever the compressor raises, which jax chooses
            damaged.append((path, error))
            path.unlink(missing_ok=True)
    if damaged:
        path, error = damaged[0]
        log.warning("%s: %d damaged programs (%s: %s) are compiled again", folder, len(damaged), path.name, error)


def _update(options: dict[str, str | float | None]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax looks at the folder once, at its first compilation


def config_dict(config: object) -> dict:
    """A resolved configuration as plain values, for `config.json` beside the results."""
    return dataclasses.asdict(config)  # type: ignore[arg-type]


def _fail(error: Exception, code: int) -> int:
    console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return code
