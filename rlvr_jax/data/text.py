"""Tokenizers and chat prompts: the host side of text."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Only tokenizers are used, so the advice to install torch would mislead; transformers reads this when it is imported.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import PreTrainedTokenizerFast as Tokenizer

from rlvr_jax.data import template
from rlvr_jax.data.rows import brief
from rlvr_jax.runs.files import read_json, valid_text
from rlvr_jax.runs.remote import TEXT_FILES, local

logger = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_BYTES = 1 << 28  # of a file; the largest vocabularies take a tenth
_LONGEST_CHARACTER = 4  # bytes of UTF-8, so tokens


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from tokenizer.json, tokenizer_config.json and chat_template.jinja (if the template is there).

    The class named in tokenizer_config.json is not used: transformers 5 gives any qwen2 folder its own Qwen2 class,
    whatever tokenizer.json says, so a folder with another vocabulary or pre-tokenizer would be read wrongly.

    Args:
        path: a folder, a URL of one (`rlvr_jax.runs.remote`), or a name on the Hugging Face hub.

    Raises:
        ValueError: no tokenizer there, or one that cannot be read; naming the folder or the file.
    """
    path = local(str(path), TEXT_FILES)
    folder = Path(path)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json in this folder")
    if not folder.is_dir() and (folder.is_absolute() or str(path).startswith((".", "~")) or len(folder.parts) > 2):
        raise ValueError(f"{folder}: no such folder, expected one with tokenizer.json, or a hub name")
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.suffix in (".json", ".jinja", ".txt") and file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{file}: more than {_MOST_BYTES:,} bytes, which no file of a tokenizer has")
    try:
        tokenizer = Tokenizer.from_pretrained(str(path))
        decode_ids(tokenizer, encode_text(tokenizer, "1"))  # some settings are first read here
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises Exception itself, and panics that are none
        raise ValueError(f"{path}: no tokenizer can be loaded: {type(error).__name__}: {error!s:.500}") from error
    if isinstance(tokenizer.chat_template, str):  # a byte order mark would become a part of every prompt
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    if tokenizer.chat_template:
        template.prepare()  # its start takes as long as the rest of a program's
    return tokenizer


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    **template_arguments: Any,
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template, ready for the assistant to go on.

    Special tokens spelled out in a message become special tokens, as in the published pipelines.

    Args:
        tokenizer: with a chat template.
        messages: `{"role": ..., "content": ...}`, at least one.
        add_generation_prompt: end with the template's opening of an assistant turn.
        template_arguments: passed to the template, such as `enable_thinking=False` of Qwen3.

    Raises:
        ValueError: no template, a message without role or content, a template that refuses the messages.
    """
    text = render_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt, **template_arguments)
    return encode_text(tokenizer, text)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    **template_arguments: Any,
) -> str:
    """The text that `encode_chat` encodes: as `apply_chat_template` of transformers, in bounded time and memory."""
    if not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path}: no chat template in chat_template.jinja or tokenizer_config.json")
    check_messages(messages, "messages")
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    arguments = tokenizer.special_tokens_map | {"add_generation_prompt": add_generation_prompt} | template_arguments
    try:
        return template.render(tokenizer.get_chat_template(), given, arguments)
    except ValueError as error:
        roles = ", ".join(message["role"] for message in messages)
        where = tokenizer.name_or_path or "the tokenizer"
        raise ValueError(f"{where}: the chat template refuses messages with the roles {roles}: {error}") from error


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text as it stands: no beginning-of-text token is added; a lone surrogate counts as `?`."""
    return tokenizer.encode(valid_text(text), add_special_tokens=False)


def decode_ids(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of token ids as they stand: special tokens spelled out, no space removed."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text of each token; joined, the text of all. Special tokens are spelled out.

    A token that ends inside a character has no text; the one that completes the character has all of it. Bytes that
    are no text come out as U+FFFD.
    """
    pieces = [""] * len(tokens)
    # A token's text may depend on the one before it (word boundaries), so short runs are read with and without it.
    context = begin = 0
    for end in range(1, len(tokens) + 1):
        before, text = decode_ids(tokenizer, tokens[context:begin]), decode_ids(tokenizer, tokens[context:end])
        if text.endswith("\ufffd") and end - begin < _LONGEST_CHARACTER and end < len(tokens):
            continue
        pieces[end - 1] = text[len(before) :]
        context, begin = begin, end
    return pieces


def check_messages(messages: Any, where: str, *, roles: Sequence[str] | None = None) -> None:
    """Raises ValueError, opening with `where`, unless these are chat messages: a list of {role, content} texts.

    With `roles` these are the only ones: a template writes any role as it stands, so a wrong one goes unnoticed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) == 0:
        raise ValueError(f"{where} = {brief(messages)}: expected a list of at least one {{role, content}} message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}[{i}] = {brief(message)}: expected {{role, content}}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{where}[{i}][{key!r}] = {brief(message.get(key))}: expected a text")
        if roles is not None and message["role"] not in roles:
            raise ValueError(f"{where}[{i}]['role'] = {brief(message['role'])}: expected one of {', '.join(roles)}")


def stop_token_ids(tokenizer: Tokenizer, generation_config: str | Path | None) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's end-of-text token, then those of generation_config.json.

    Both count, as in the published rollouts: a chat template may close turns with a token (`<|im_end|>`) that a base
    model's generation_config.json does not list (`<|endoftext|>`), and the other way round. In a folder whose
    generation_config.json is missing or names none, those of config.json count, as in transformers and vLLM.

    Args:
        tokenizer: its `eos_token`, if any.
        generation_config: generation_config.json, or the folder of a model, or None.

    Returns:
        Distinct ids; empty (and a warning is logged) where nothing names one, so that no response would ever end early.

    Raises:
        ValueError: no such file or folder, or an `eos_token_id` that is neither an id nor a list of ids.
    """
    end = tokenizer.eos_token_id
    found = [end] if isinstance(end, int) else []
    if generation_config is not None:
        path = Path(generation_config)
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder, expected generation_config.json or its folder")
        files = [path / "generation_config.json", path / "config.json"] if path.is_dir() else [path]
        found += next((ids for file in files if file.exists() and (ids := _end_ids(file))), [])
    if not found:
        logger.warning("%s: no stop token is named by eos_token or the model's files", tokenizer.name_or_path)
    return tuple(dict.fromkeys(found))


def _end_ids(path: Path) -> list[int]:
    value = read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise ValueError(f"{path}: eos_token_id = {value!r:.200}: expected a token id or a list of them")
    return ids
