"""Problems of reasoning-gym (PyPI `reasoning-gym`, an optional dependency) by the names of its tasks."""

import dataclasses
import difflib
import hashlib
import json
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import ModuleType
from typing import Any

from rlvr_jax.data.problems import Problem
from rlvr_jax.data.shards import Source

PREFIX = "reasoning_gym:"
SUFFIX = "\nReason step by step, then give the final answer alone between <answer> and </answer>."
_SCRIPT = Path(__file__).with_name("gym_entries.py")
DEFAULTS = {"size": 500, "seed": 0}  # reasoning-gym draws a seed where none is given


def is_tasks(source: Source) -> bool:
    """Whether a source of problems names reasoning-gym tasks."""
    return isinstance(source, str) and source.startswith(PREFIX)


def read_tasks(source: str, *, prompt_suffix: str = "") -> list[Problem]:
    """The problems of `reasoning_gym:TASK[,TASK...][?key=value&...]`, one task after the other.

    `reasoning_gym:leg_counting?size=500&seed=1`; `reasoning_gym:leg_counting,chain_sum?size=200&chain_sum.max_terms=4`.
    A key is a field of the task's configuration: of every task, or after `TASK.` of that one. Its value is read as
    JSON, else as text; `%26` stands for `&`. `size` (500 if not given) is the number of problems of each task, `seed`
    is 0 if not given. Most tasks make problem i from the random numbers of seed + i: two sets share problems unless
    their seeds lie further apart than their sizes. The same source gives the same problems with the same version of
    reasoning-gym.

    A problem's id is `TASK/SEED/INDEX`, its `data_source` is `reasoning_gym/TASK`, and its answer is what the rule
    "reasoning_gym" needs to make the entry again and grade by the task's `score_answer`: JSON of task, configuration,
    index and a digest of the question (beside the task's own example of an answer).

    Args:
        source: as above.
        prompt_suffix: appended to the stripped question; empty: `SUFFIX`, which asks for the answer in tags.

    Raises:
        ValueError: reasoning-gym is not installed (naming the command), an unknown task or key (naming close ones), a
            value that the task refuses, a task that fails to make a problem.
    """
    tasks = check_tasks(source)
    configs = dict(tasks)
    problems = []
    for task, index, question, answer in _entries(source, tasks):
        asked = {
            "task": task,
            "index": index,
            "answer": answer if isinstance(answer, str) else None,
            "config": configs[task],
            "question_sha256": hashlib.sha256(question.encode(errors="surrogatepass")).hexdigest()[:16],
        }
        problems.append(
            Problem(
                index=len(problems),
                id=f"{task}/{configs[task]['seed']}/{index}",
                messages=({"role": "user", "content": question.strip() + (prompt_suffix or SUFFIX)},),
                answer=json.dumps(asked),
                data_source=f"reasoning_gym/{task}",
            )
        )
    return problems


def check_tasks(source: str) -> list[tuple[str, dict[str, Any]]]:
    """The tasks that a source names, each with its configuration.

    Raises:
        ValueError: reasoning-gym is not installed; an unknown task or key; a size or seed that is no number.
    """
    gym = _reasoning_gym(source)
    names, _, query = source.removeprefix(PREFIX).partition("?")
    tasks: dict[str, dict[str, Any]] = {}
    known = gym.factory.DATASETS
    for name in names.split(","):
        if name in tasks:
            raise ValueError(f"{source}: {name} is named twice")
        if name not in known or name == "composite":
            raise ValueError(f"{source}: no task {name!r} in reasoning-gym{_close(name, known)}")
        tasks[name] = dict(DEFAULTS)
    for item in filter(None, query.split("&")):
        key, equals, text = (urllib.parse.unquote(part) for part in item.partition("="))
        if not equals:
            raise ValueError(f"{source}: {item!r}: expected key=value")
        owner, dot, field = key.rpartition(".")
        if dot and owner not in tasks:
            raise ValueError(f"{source}: {key!r}: {owner!r} is none of its tasks")
        for task in [owner] if dot else tasks:
            fields = [x.name for x in dataclasses.fields(known[task][1])]
            if field not in fields:
                raise ValueError(
                    f"{source}: {task} has no key {field!r}{_close(field, fields)}; it has {', '.join(fields)}"
                )
            tasks[task][field] = _value(text)
    for task, config in tasks.items():
        for key in DEFAULTS:
            if isinstance(config[key], bool) or not isinstance(config[key], int) or config[key] < (key == "size"):
                raise ValueError(f"{source}: {task}: {key} = {config[key]!r}: expected a whole number")
    return list(tasks.items())


def _reasoning_gym(source: str) -> ModuleType:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ValueError(f"{source}: reasoning-gym is not installed ({error}): pip install reasoning-gym") from error
    return reasoning_gym


def _entries(source: str, tasks: list[tuple[str, dict[str, Any]]]) -> list[list[Any]]:
    done = subprocess.run(
        [sys.executable, "-P", str(_SCRIPT)],
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if lines and isinstance(lines[-1], dict):
        raise ValueError(f"{source}: {lines[-1]['error']}")
    if done.returncode:
        raise ValueError(f"{source}: its problems cannot be made: {done.stderr.strip()[-300:]}")
    return lines


def _close(name, names) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f", perhaps {' or '.join(close)}" if close else ""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
