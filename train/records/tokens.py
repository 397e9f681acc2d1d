"""A response token by token, for the rollout files."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlvr_jax.data.token_ids import pack_ids

DIGITS = 4


class TokenTexts(dict[int, str]):
    """Token id -> its text, special tokens included; each is decoded once. Part of a character reads as "\\ufffd"."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.setdefault(token, text)


def drawn(tokenizer: Any, prompt: Sequence[int], tokens: np.ndarray) -> dict[str, str]:
    """What rollout and evaluation files keep so that a response can be scored again: the prompt, and the ids of both.

    The ids are packed (`rlvr_jax.data.token_ids`), since a text does not say which tokens it was drawn as.
    """
    text = tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"prompt": text, "prompt_ids": pack_ids(prompt), "ids": pack_ids(tokens)}


def token_rows(texts: TokenTexts, arrays: dict[str, np.ndarray], row: int) -> dict[str, list]:
    """The tokens of one response, [text, advantage, weight, log-prob] each, under "tokens".

    The advantage is the re-weighted one that the first update uses, the weight what re-weighting multiplied by (None
    where the advantage is 0: there it changes nothing), the log-prob the trainer's before the update. Numbers are
    rounded to 4 digits after the point; one that is not finite is None.

    Args:
      arrays: see `train.step.trainer.Outcome`.
      row: of the step's rows.
    """
    at_R = arrays["response_NR"][row] > 0
    tokens = arrays["tokens_NR"][row][at_R].tolist()
    numbers = (arrays[name][row][at_R].tolist() for name in ("weighed_NR", "weight_NR", "old_logp_NR"))
    return {"tokens": [[texts[token], *map(_short, values)] for token, *values in zip(tokens, *numbers, strict=True)]}


def _short(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None
