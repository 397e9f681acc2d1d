"""The problems that a run trains on and is evaluated on, and their prompts."""

from typing import Any

from rlvr_jax.data.problems import Problem
from rlvr_jax.data.prompts import PromptSet, tokenize_prompts
from rlvr_jax.data.sources import load_problems
from rlvr_jax.data.text import Tokenizer
from train.config import Config
from train.step.evaluate import distinct


def training_problems(config: Config) -> list[Problem]:
    """The rows of data.train that the run trains on."""
    repeats = "by_id" if config.data.deduplicate else "none"
    return load_problems(config.data.train, deduplicate=repeats, **_reading(config))


def validation_problems(config: Config) -> list[Problem] | None:
    """The distinct problems of data.val; None where nothing is evaluated."""
    return None if config.data.val is None else distinct(load_problems(config.data.val, **_reading(config)))


def _reading(config: Config) -> dict[str, Any]:
    return {name: getattr(config.data, name) for name in ("prompt_suffix", "prompt_column", "answer_column")}


def tokenized(config: Config, tokenizer: Tokenizer, problems: list[Problem]) -> PromptSet:
    """The prompts of problems as the run wants them."""
    data = config.data
    return tokenize_prompts(
        tokenizer, problems, max_tokens=data.max_prompt, overlong=data.too_long, **data.template_args
    )
