"""What a name in a configuration stands for: an entry of a table, or an object of the user's own as "module:name".

Criteria, re-weightings, token masks, losses and aggregations are tables of one kind. Wherever their name is taken, the
library's functions also take the object itself, and "module:name" takes an attribute of a module that can be imported.
"""

import functools
import hashlib
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

OWN = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"


def entry(what: str, table: Mapping[str, T], given: Any, *, of: Callable[[Any], T] = lambda function: function) -> T:
    """The entry of a table that a name stands for; "module:name" is imported, and what is no text is taken as it is.

    Args:
      what: what the name is called in an error.
      table: at least one entry.
      given: a name, an entry, or a function.
      of: makes an entry of a function; the entries of a table of functions are functions.

    Raises:
      ValueError: naming `what`, the name and what was expected.
    """
    found = given
    if is_own(given):
        found = imported(what, given)
    elif isinstance(given, str):
        if given not in table:
            raise ValueError(f"{what}={given!r}: expected one of {', '.join(table)}, or module:name of your own")
        return table[given]
    kind = type(next(iter(table.values())))
    if isinstance(found, kind):
        return found
    if not callable(found):
        raise ValueError(f"{what}={given!r}: expected a {kind.__name__} or a function, got a {type(found).__name__}")
    return of(found)


def is_own(name: Any) -> bool:
    """Whether a name is that of an object of the user's own, "module:name"."""
    return isinstance(name, str) and re.fullmatch(OWN, name) is not None


def source_sha256(name: str) -> str:
    """SHA-256 of the file of the module in "module:name"; empty where it has none. The module is not imported."""
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):  # a parent that is no package; whoever calls the function says so
        spec = None
    if spec is None or not spec.has_location or spec.origin is None:
        return ""
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


@functools.cache
def imported(what: str, name: str) -> Any:
    """The object that "module:name" names. Raises ValueError naming `what` where it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what}={name!r}: cannot be imported: {error}") from error
