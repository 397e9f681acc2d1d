"""`python -m train --config configs/x.py --dry-run`: what the run would be and take, with no device and no weights.

Prints the resolved recipe, the three counters, the tokens and the bytes a device, and checks the data and the model's
files. The exit code is 0, or 2 with every check that failed.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlvr_jax.runs.program import config_dict
from train.check import budget
from train.check.examine import Found, examine
from train.check.prepare import configuration
from train.config import Config

FLAG = "--dry-run"
_GIB = 1 << 30


def dry_run(argv: Sequence[str]) -> None:
    """Checks and prints; the arguments are those of the program, with --dry-run among them.

    Raises:
      ValueError: with a line for each check that failed, once everything is printed.
    """
    found = examine(configuration([argument for argument in argv if argument != FLAG]))
    report(found, Console(width=None if sys.stdout.isatty() else 120))
    failed = [f"{check.name}: {check.says}" for check in found.checks if check.ok is False]
    if failed:
        raise ValueError("\n".join([f"{len(failed)} of {len(found.checks)} checks failed", *failed]))


def report(found: Found, console: Console) -> None:
    """Prints what was found, as tables."""
    config = found.config
    default = _flat(config_dict(Config()))
    recipe = Table("key", "value", title="Recipe (bold: not the default)", title_justify="left")
    for key, value in _flat(config_dict(config)).items():
        recipe.add_row(key, escape(str(value)), style="bold" if value != default.get(key) else None)
    console.print(recipe)
    if any(check.name == "values" and not check.ok for check in found.checks):
        console.print("counters, tokens, memory: not counted, since values are wrong")
    else:
        _print_counters(found, console)
        _print_memory(found, console)
    checks = Table("check", "", "", title="Checks", title_justify="left")
    for check in found.checks:
        word = {True: "ok", False: "[red]FAILED[/red]", None: "not made"}[check.ok]
        checks.add_row(check.name, word, escape(check.says))
    console.print(checks)
    console.print("Not checked: the content of the weights, a checkpoint to go on from, the number of devices.")


def _print_counters(found: Found, console: Console) -> None:
    config, algorithm = found.config, found.config.algorithm
    updates = algorithm.train_batch // algorithm.mini_batch
    table = Table("counter", "in all", title="Counters", title_justify="left")
    if found.problems is None:
        table.add_row("generation batches, trainer steps", "unknown: needs data.train")
    else:
        for name, bounds in budget.counters(config, found.problems)._asdict().items():
            table.add_row(name.replace("_", " "), str(bounds))
    table.add_row("optimizer steps in a full trainer step", f"{updates:,}")
    console.print(table)
    if found.problems is not None:
        ends = "" if config.steps is None else f", at most {config.steps:,} trainer steps"
        console.print(f"{found.problems:,} training problems, {config.epochs} epochs{ends}")
    if algorithm.dynamic_sampling:
        console.print("with dynamic sampling the counters depend on how many groups vary: fewest and most")
    table = Table("tokens, at most", "", title="Tokens", title_justify="left")
    for name, count in budget.tokens(config, found.prompt_length).items():
        table.add_row(name, f"{count:,}")
    console.print(table)


def _print_memory(found: Found, console: Console) -> None:
    if found.model is None or found.mesh is None:
        console.print("memory: not counted, needs the model's config.json and a mesh")
        return
    config = found.config
    together = min(config.eval.prompts_at_once or found.eval_problems, found.eval_problems)
    parts = budget.memory(
        config, found.model, found.dtype, found.mesh, found.prompt_length, eval_rows=together * config.eval.n
    )
    title = f"Memory a device, {found.mesh.size} devices, {found.dtype}"
    table = Table("phase", "what", "GiB", title=title, title_justify="left")
    for part in parts:
        table.add_row(part.phase, part.name, f"{part.size / _GIB:.3f}")
    for phase, size in budget.totals(parts).items():
        table.add_row(phase, "in all", f"{size / _GIB:.3f}", style="bold")
    console.print(table)
    console.print(f"Not counted: {budget.NOT_COUNTED}.")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: value
        for key, child in tree.items()
        for name, value in (
            _flat(child, f"{prefix}{key}.") if isinstance(child, Mapping) else {prefix + key: child}
        ).items()
    }
