"""Compiling in a process of its own: the compilers' settings are for a whole process, and some need another Python."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlvr_jax.planning.topology import Topology

_MARK = "planning: "  # begins the lines that are meant, among what the compilers print
_ROOT = Path(__file__).parents[2]


def say(**message: Any) -> None:
    """In the inner process: tells the outer one something, as a line of JSON."""
    print(_MARK + json.dumps(message), flush=True)


def inside(topology: Topology, module: str, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Runs `python -m module arguments` where it can compile for a topology; yields what it `say`s.

    Raises:
      NoCompiler: at once, where there is none.
      ValueError: with the inner process's sentence where it said `error=...`.
      RuntimeError: with its last lines where it ended in another way.
    """
    environment = os.environ | topology.settings()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as errors:  # TPU compilers print pages about machines that are not there
        command = [topology.interpreter(), "-m", module, *arguments]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if not line.startswith(_MARK):
                        continue
                    message = json.loads(line.removeprefix(_MARK))
                    if "error" in message:
                        raise ValueError(message["error"])
                    yield message
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"the compiler's process ended with {process.returncode}: {errors.read()[-2000:]}")
