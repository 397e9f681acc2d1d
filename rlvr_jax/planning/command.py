"""`--plan TOPOLOGY` of a program: its options, the compiler's process, the table and the JSON.

A module with a plan has a `compile_all(request) -> Iterator[(name, compile)]` that runs in the compiler's process
(`answer`), and asks for it from outside (`ask`), where no compiler and no device is touched.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.planning import process
from rlvr_jax.planning.models import PUBLISHED
from rlvr_jax.planning.programs import ProgramAccount
from rlvr_jax.planning.table import NOTE, table, warnings
from rlvr_jax.planning.topology import Topology
from rlvr_jax.runs.program import RunError, console

FLAG = "--plan"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says of the plan itself.

    Attributes:
      topology: what to compile for. only: the programs that are wanted.
      json, text: where the plan goes, and a folder for the compiled programs.
      rest: the other arguments. argv: all.
    """

    topology: Topology
    only: tuple[str, ...]
    json: Path | None
    text: Path | None
    rest: tuple[str, ...]
    argv: tuple[str, ...]

    @classmethod
    def read(cls, argv: Sequence[str], programs: Sequence[str]) -> "Options":
        """From a command line; `programs` are those there are. Raises ValueError for what is wrong with it."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument(FLAG, required=True)
        parser.add_argument("--plan-json", type=Path)
        parser.add_argument("--plan-text", type=Path)
        parser.add_argument("--plan-only", default=",".join(programs))
        known, rest = parser.parse_known_args(list(argv))
        only = tuple(known.plan_only.split(","))
        if unknown := set(only) - set(programs):
            raise ValueError(f"--plan-only {known.plan_only}: {sorted(unknown)[0]!r} is none of {', '.join(programs)}")
        return cls(Topology.parse(known.plan), only, known.plan_json, known.plan_text, tuple(rest), tuple(argv))

    def require_compiler(self) -> None:
        """Raises NoCompiler, a ValueError, where it is not here."""
        self.topology.settings()
        self.topology.interpreter()


def architecture(what: str, path: str, **choices: Any) -> QwenConfig:
    """The model of a folder with config.json, or of a published name; `choices` replace its fields.

    Raises:
      ValueError: it is neither; `what` names the option.
    """
    if (Path(path) / "config.json").is_file():
        return QwenConfig.from_hf(path, **choices)
    if path in PUBLISHED:
        return dataclasses.replace(PUBLISHED[path], **choices)
    raise ValueError(f"{what}={path}: expected a folder with a config.json, or one of {', '.join(sorted(PUBLISHED))}")


def ask(
    module: str, options: Options, title: str, advise: Callable[[ProgramAccount], str], config: dict[str, Any]
) -> None:
    """Has `module` compile in another process; prints the table, writes the JSON.

    Args:
      module: whose `__main__` calls `answer`.
      options, title: of the plan.
      advise: a sentence on what to change for a program that does not fit.
      config: the run's configuration, for the JSON.

    Raises:
      RunError: with the compiler's words.
    """
    programs: list[ProgramAccount] = []
    try:
        for message in process.inside(options.topology, module, options.argv):
            if "compiling" in message:
                console.print(f"{options.topology.text}: compiling {message['compiling']} ...", highlight=False)
            else:
                programs.append(ProgramAccount.of(message["program"]))
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error
    advice = [f"{program.name} does not fit: {advise(program)}" for program in programs if not program.fits]
    out = Console(width=None if sys.stdout.isatty() else 140)
    out.print(table(programs, title), NOTE, sep="\n", highlight=False)
    for line in (*warnings(programs), *advice):
        out.print(line, highlight=False, markup=False)
    if options.json is not None:
        plain = {
            "title": title,
            "topology": options.topology.text,
            "chips": options.topology.size,
            "note": NOTE,
            "advice": advice,
            "programs": [program.plain() for program in programs],
            "config": config,
        }
        options.json.write_text(json.dumps(plain, indent=1) + "\n")


def answer(programs: Callable[[], Iterable[tuple[str, Callable[[], ProgramAccount]]]]) -> None:
    """In the compiler's process: compiles and says so, one by one."""
    try:
        for name, compiled in programs():
            process.say(compiling=name)
            process.say(program=compiled().plain())
    except ValueError as fault:
        process.say(error=str(fault))
