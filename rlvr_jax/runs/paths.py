"""Paths as people write them: `~` for the home folder, wherever a path comes from."""

import dataclasses
import os
import re
from typing import Any

_HOME = re.compile(r"~[\w.-]*(/|$)")


def at_home(path: str | os.PathLike[str]) -> str:
    """The path with a leading `~` or `~user` replaced by that home folder, as a shell does it.

    Raises:
      ValueError: no such user.
    """
    text = os.fspath(path)
    if not _HOME.match(text):
        return text
    expanded = os.path.expanduser(text)
    if expanded == text:
        raise ValueError(f"{text}: no home folder of that name; write ./{text} for a folder whose name begins with ~")
    return expanded


def config_at_home(config: Any) -> Any:
    """A configuration in which every text that begins with `~/` is a path with its home folder written out.

    A shell does so with the words of a command line, but neither behind a `=` nor in a recipe.

    Args:
      config: a dataclass, a tuple, or a value; nested ones are looked through.

    Raises:
      ValueError: no such user, for `~user/`.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: config_at_home(getattr(config, field.name)) for field in dataclasses.fields(config)}
        changed = {name: value for name, value in fields.items() if value is not getattr(config, name)}
        return dataclasses.replace(config, **changed) if changed else config
    if isinstance(config, tuple):
        values = tuple(config_at_home(value) for value in config)
        return config if all(a is b for a, b in zip(values, config, strict=True)) else values
    return at_home(config) if isinstance(config, str) else config


def same_place(one: str, other: str) -> bool:
    """Whether two local paths lead to one file or folder; relative ones start here, links are followed."""
    return os.path.realpath(at_home(one)) == os.path.realpath(at_home(other))
