"""Conversations for supervised training."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr_jax.data.rows import brief, read_rows, write_rows
from rlvr_jax.data.shards import Source, data_files
from rlvr_jax.data.text import ROLES, Tokenizer, check_messages, encode_text, render_chat

Conversation = tuple[dict[str, str], ...]


def read_conversations(path: Source) -> list[Conversation]:
    """Reads conversations that end with an assistant turn from .parquet or .jsonl files (`rlvr_jax.data.shards`).

    A row has `messages` (chat messages), or `prompt` (chat messages, or a text for a user turn) and `response`
    (a text).

    Raises:
        ValueError: a missing, empty or unreadable file; a row without these keys or whose last turn is not the
            assistant's, naming file, row and key.
    """
    return [
        _conversation(row, f"{file} row {number}", ROLES)
        for file in data_files(path)
        for number, row in read_rows(file, ("messages", "prompt", "response"))
    ]


def write_conversations(path: str | Path, conversations: Iterable[Sequence[Mapping[str, str]]]) -> None:
    """Writes rows of `messages`, whole or not at all, as parquet or JSON lines by the ending of `path`."""
    rows = [{"messages": [dict(message) for message in conversation]} for conversation in conversations]
    for number, row in enumerate(rows):
        _conversation(row, f"row {number} for {path}")
    write_rows(path, rows)


def _conversation(row: Mapping[str, Any], where: str, roles: Sequence[str] | None = None) -> Conversation:
    key = next((key for key in ("messages", "prompt") if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{where}: no 'messages', and no 'prompt' with 'response'")
    messages = row[key]
    if key == "prompt":
        response = row.get("response")
        if not isinstance(response, str):
            raise ValueError(f"{where}: 'response' = {brief(response)}: expected a text, since there are no 'messages'")
        prompt = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        check_messages(prompt, f"{where}: 'prompt'")
        if prompt[-1]["role"] == "assistant":
            raise ValueError(f"{where}: 'prompt' ends with the assistant's turn, and 'response' is another one")
        messages = [*prompt, {"role": "assistant", "content": response}]
    check_messages(messages, f"{where}: {key!r}", roles=roles)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"{where}: {key!r} has the roles {roles}: expected turns that end with the assistant's")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    max_tokens: int | None = None,
    **template_arguments: Any,
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of a conversation whose last turn is the assistant's.

    The mask is 1 on that turn's tokens up to and with its end-of-turn token, 0 before; what the template writes after
    the end-of-turn token (a line break in Qwen's) is left out, since no response goes on there. The prompt's tokens are
    exactly those of `encode_chat(tokenizer, messages[:-1])`, so training sees what generation will see.

    Args:
        tokenizer: with a chat template that writes the last turn after its generation prompt.
        messages: at least two; the last by the assistant.
        max_tokens: longer conversations are cut on the right (which may leave nothing to learn from).
        template_arguments: passed to the chat template.

    Returns:
        `(tokens, loss_mask)`, equally long.

    Raises:
        ValueError: messages that do not end with the assistant's turn; a template that rewrites the prompt or ends the
            turn with no special token.
    """
    messages = _conversation({"messages": messages}, "the conversation")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}: expected at least 1")
    prompt = render_chat(tokenizer, messages[:-1], **template_arguments)
    whole = render_chat(tokenizer, messages, add_generation_prompt=False, **template_arguments)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{tokenizer.name_or_path}: the chat template does not write the last turn after its generation prompt "
            f"{prompt[-50:]!r}"
        )
    prompt_tokens, turn = encode_text(tokenizer, prompt), encode_text(tokenizer, whole[len(prompt) :])
    # Those of tokenizer.json too: tokenizer_config.json need not name the token that ends a turn.
    ends = {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}
    last = max((i for i, token in enumerate(turn) if token in ends), default=None)
    if last is None:
        raise ValueError(f"{tokenizer.name_or_path}: the chat template ends the assistant's turn with no special token")
    turn = turn[: last + 1]
    tokens = prompt_tokens + turn
    mask = [0] * len(prompt_tokens) + [1] * len(turn)
    return tokens[:max_tokens], mask[:max_tokens]
