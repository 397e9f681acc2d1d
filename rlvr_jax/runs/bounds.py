"""Bounds of configuration values: declared in the type of each field, checked by one function for every program.

    n: Annotated[int, Range(1, 64)] = 16
    steps: Steps | None = None

A number without a `Range`, a text without a `Text` or a tuple without a `Several` is a mistake of the programmer, and
the check raises TypeError. Booleans, `Literal` and nested configurations need nothing, since their type says it all.
What depends on several fields is checked by the program that has them.
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from rlvr_jax.entries import OWN


@dataclasses.dataclass(frozen=True)
class Range:
    """A finite number between two others.

    Attributes:
      least, most: the two.
      ends: which of them are allowed, as in mathematics; "(]" excludes `least`.
      also: values outside that have a meaning.
      why: the reason, or the meaning of `also`, for the message.
    """

    least: int | float
    most: int | float
    ends: Literal["[]", "(]", "[)", "()"] = "[]"
    also: tuple[int | float, ...] = ()
    why: str = ""

    def allows(self, value: int | float) -> bool:
        """Whether a number lies in the range; NaN and infinities never do."""
        inside = self.least < value < self.most
        edges = (self.least if self.ends[0] == "[" else None, self.most if self.ends[1] == "]" else None)
        return inside or value in edges or value in self.also

    @property
    def expected(self) -> str:
        """The range in words."""
        least, most = (f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in (self.least, self.most))
        words = {
            "[]": f"{least} to {most}",
            "(]": f"above {least}, at most {most}",
            "[)": f"at least {least}, below {most}",
            "()": f"above {least} and below {most}",
        }[self.ends]
        return " or ".join([words, *map(str, self.also)]) + (f" ({self.why})" if self.why else "")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
      expected: what it should be, for the message.
      pattern: regular expression of the whole; by default at least one letter that is no space.
      empty: the empty text has a meaning, which the description of the field gives.
    """

    expected: str
    pattern: str = r"(?s).*\S.*"
    empty: bool = False

    def allows(self, value: str) -> bool:
        """Whether it is such a text. No text may contain the character 0, which no path can hold."""
        if not value:
            return self.empty
        return "\0" not in value and re.fullmatch(self.pattern, value) is not None

    @classmethod
    def one_of(cls, names: Iterable[str]) -> "Text":
        """One of some names."""
        return cls(f"one of {', '.join(names)}", "|".join(map(re.escape, names)))

    @classmethod
    def entry_of(cls, table: Iterable[str]) -> "Text":
        """The name of an entry of a table, or "module:name" of the user's own (`rlvr_jax.entries`)."""
        names = tuple(table)
        return cls(f"one of {', '.join(names)}, or module:name of your own", "|".join((*map(re.escape, names), OWN)))


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple of different values, whose own type says what each may be.

    Attributes:
      least: how many there must be. With 0 the empty tuple has a meaning, which the description of the field gives.
      repeats: a value may be there twice, and means the same as once.
    """

    least: int = 1
    repeats: bool = False

    def allows(self, value: tuple) -> bool:
        """Whether they are enough, and all different."""
        different = self.repeats or all(one not in value[:i] for i, one in enumerate(value))
        return len(value) >= self.least and different

    @property
    def expected(self) -> str:
        """What is wanted in words."""
        return ("one or more" if self.least else "several") + ("" if self.repeats else ", all different")


Mark = Range | Text | Several

# Upper ends are far above what anybody needs, and below what only a slip of the finger gives.
Tokens = Annotated[int, Range(1, 1 << 24)]
Count = Annotated[int, Range(1, 1_000_000)]
Steps = Annotated[int, Range(1, 1_000_000_000)]
Every = Annotated[int, Range(0, 1_000_000_000)]  # steps between two events; 0: never
Seed = Annotated[int, Range(0, (1 << 31) - 1)]
Axis = Annotated[int, Range(1, 1 << 20, also=(-1,), why="-1: the devices that the other axes leave")]
Workers = Annotated[int, Range(1, 1024, why="processes on this machine")]
Seconds = Annotated[float, Range(0.0, 86_400.0, "(]", why="a day")]
Gigabytes = Annotated[float, Range(0.0, 4096.0, "(]", why="GiB per device")]
Share = Annotated[float, Range(0.0, 1.0)]
InnerShare = Annotated[float, Range(0.0, 1.0, "()")]
TopP = Annotated[float, Range(0.0, 1.0, "(]")]
TopK = Annotated[int, Range(0, 1 << 20, why="0: off")]
# Below 0.001 the logits leave float32's precision and then its range; 0 says what is meant.
Temperature = Annotated[float, Range(0.001, 100.0, also=(0,), why="0: greedy")]
PathText = Annotated[str, Text("a path")]
MaybePath = Annotated[str, Text("a path, or nothing", empty=True)]
Source = PathText | Annotated[tuple[PathText, ...], Several()]
Words = Annotated[str, Text("a text", r"(?s).*", empty=True)]
Name = Annotated[str, Text("a name")]


class Fault(NamedTuple):
    """What is wrong with a value.

    Attributes:
      key: its name as in the flag, with underscores.
      sentence: the key, the value and what was expected.
    """

    key: str
    sentence: str


def require(config: Any) -> None:
    """Raises ValueError with the sentence of the first of the `faults`."""
    for fault in faults(config):
        raise ValueError(fault.sentence)


def faults(config: Any) -> Iterator[Fault]:
    """The values of a configuration that its fields do not allow, nested ones included.

    Raises:
      TypeError: a field declares no bounds.
    """
    yield from _of_fields("", config)


def _of_fields(prefix: str, config: Any) -> Iterator[Fault]:
    for name, kind in _hints(type(config)).items():
        yield from _of_value(prefix + name, getattr(config, name), kind)


@functools.cache
def _hints(config_type: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_type, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def _of_value(key: str, value: Any, declared: Any) -> Iterator[Fault]:
    arms = [parts(arm) for arm in union_arms(declared)]
    fitting = next((arm for arm in arms if _is(value, arm[0])), None)
    if fitting is None:
        expected = " or ".join(_in_words(kind) for kind, _ in arms)
        yield Fault(key, f"{key}={value!r:.100}: expected {expected}")
        return
    kind, marks = fitting
    if dataclasses.is_dataclass(kind):
        unnamed = any(getattr(mark, "name", None) == "" for mark in marks)  # `tyro.conf.arg(name="")`: no prefix
        yield from _of_fields("" if unnamed else f"{key}.", value)
    elif (mark := mark_of(kind, marks)) is not None:
        if not mark.allows(value):
            yield Fault(key, f"{key}={value!r:.100}: expected {mark.expected}")
        elif isinstance(mark, Several):
            yield from _of_elements(key, value, typing.get_args(kind)[0])


def _of_elements(key: str, values: tuple, declared: Any) -> Iterator[Fault]:
    kind, _ = parts(declared)
    for i, value in enumerate(values):
        found = _of_value(f"{key}.{i}", value, declared)
        if dataclasses.is_dataclass(kind):  # whose values have flags of their own
            yield from found
        else:
            yield from (Fault(key, f"{key} has {fault.sentence.partition('=')[2]}") for fault in found)


def union_arms(declared: Any) -> tuple[Any, ...]:
    """The types of `A | B`; a type alone is its only one."""
    is_union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    return typing.get_args(declared) if is_union else (declared,)


def parts(declared: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type, and what `Annotated` says beside it."""
    if typing.get_origin(declared) is Annotated:
        kind, *marks = typing.get_args(declared)
        return kind, tuple(marks)
    return declared, ()


def mark_of(kind: Any, marks: tuple[Any, ...]) -> Mark | None:
    """The bounds of a type; None for one that needs none. Raises TypeError where they are missing."""
    plain = typing.get_origin(kind) or kind
    wanted = {int: Range, float: Range, str: Text, tuple: Several}.get(plain)
    if wanted is None:
        return None
    found = [mark for mark in marks if isinstance(mark, wanted)]
    if len(found) != 1:
        raise TypeError(f"{kind}: expected one {wanted.__name__} in its annotation, got {marks}")
    return found[0]


def _is(value: Any, kind: Any) -> bool:
    plain = typing.get_origin(kind) or kind
    if plain is Literal:
        return any(type(value) is type(one) and value == one for one in typing.get_args(kind))
    if plain is int or plain is float:
        return isinstance(value, int if plain is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, plain)


def _in_words(kind: Any) -> str:
    plain = typing.get_origin(kind) or kind
    if plain is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    words = {int: "an integer", float: "a number", str: "a text", bool: "True or False", types.NoneType: "None"}
    return words.get(plain, f"a {plain.__name__}")
