"""Arguments of a chat template in a configuration: `enable_thinking=false` on the command line, a dict in a recipe."""

import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from rlvr_jax.data.text import Tokenizer

logger = logging.getLogger(__name__)

_WORDS = {
    "true": True,
    "false": False,
    "null": None,
    "none": None,
}  # in any capitals: "FALSE" as a text would count as true
# What `apply_chat_template` and those who call it take themselves; tools and documents it hands on.
_RESERVED = {
    *inspect.signature(Tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"},
    *("tokenizer", "messages", "problems", "max_tokens", "overlong"),
}


def parse_template_args(words: Sequence[str]) -> dict[str, Any]:
    """`["enable_thinking=false", "effort=high"]` as a dict; values are JSON where they can be, else texts.

    Raises:
      ValueError: a word without `=`, or two for one key.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key in found:
            raise ValueError(f"{word!r}: {'named twice' if equals else 'expected KEY=VALUE'}")
        try:
            found[key] = _WORDS[text.lower()] if text.lower() in _WORDS else json.loads(text)
        except ValueError:
            found[key] = text
    return found


try:
    from tyro.constructors import PrimitiveConstructorSpec
except ModuleNotFoundError:  # no command line is read without tyro; functions that take a configuration need none
    _FLAG = None
else:
    _FLAG = PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=parse_template_args,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={json.dumps(one, default=str)}" for key, one in value.items()],
    )
TemplateArgs = Annotated[dict[str, Any], _FLAG]


def check_template_args(tokenizer: Tokenizer, arguments: Mapping[str, Any], *, key: str = "template_args") -> Tokenizer:
    """The tokenizer; warns of an argument that its chat template does not mention, and that so changes nothing.

    Raises:
      ValueError: naming the argument: a name that no template argument can have, a value that JSON cannot hold.
    """
    for name, value in arguments.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            raise ValueError(f"{key}: {name!r} is not the name of an argument of a chat template")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{key}: {name} = {value!r:.100}: expected a value that JSON can hold ({error})"
            ) from error
        if not re.search(rf"\b{name}\b", str(tokenizer.chat_template)):
            logger.warning("%s: the chat template does not read %s, which so changes nothing", key, name)
    return tokenizer
