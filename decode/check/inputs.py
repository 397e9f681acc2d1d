"""Reads and checks what a decoding run needs besides the weights, so that bad input ends it within seconds."""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path

from decode.config import DecodeConfig
from rlvr_jax.data.problems import Problem
from rlvr_jax.data.shards import data_files
from rlvr_jax.data.sources import check_source, load_problems
from rlvr_jax.data.tasks import is_tasks
from rlvr_jax.data.template_args import check_template_args
from rlvr_jax.data.text import Tokenizer, encode_text, load_tokenizer, render_chat, stop_token_ids
from rlvr_jax.entries import is_own
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import checkpoint_folder
from rlvr_jax.models.hf_folder import count_weights
from rlvr_jax.runs.fingerprint import of_code, of_file, of_model, of_tokenizer
from rlvr_jax.runs.remote import TEXT_FILES, local

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Checked inputs.

    `folders` and `models` (architectures) are those of the models in use, by role; `prompts` token ids and `texts`
    their rendered chat text, both in the order of `problems`; `fingerprints` tell whether a later run reads the same.
    """

    tokenizer: Tokenizer
    folders: dict[str, Path]
    models: dict[str, QwenConfig]
    problems: list[Problem]
    prompts: list[list[int]]
    texts: list[str]
    stop_tokens: tuple[int, ...]
    fingerprints: dict[str, str]


def read_inputs(config: DecodeConfig) -> Inputs:
    """Reads all but the weights for a resolved configuration.

    Raises:
      ValueError, OSError: one sentence naming the file or key: a missing or empty file, a vocabulary mismatch between
        base and rl, a prompt longer than allowed.
    """
    for grader in config.graders:
        # before a model is downloaded
        check_source(config.problems, rule=grader, unsafe_evaluation=config.unsafe_evaluation)
    used = {setting.model for setting in config.settings}
    folders = {
        role: model_folder(role, path)
        for role, path in (("base", config.base), ("rl", config.rl))
        if path is not None and used & {role, "pair"}
    }
    models = {role: QwenConfig.from_hf(folder) for role, folder in folders.items()}
    tokenizer_folder = _tokenizer_folder(config)
    tokenizer = load_tokenizer(tokenizer_folder)
    models = check_vocabularies(models, folders, tokenizer, tokenizer_folder)
    problems = _read_problems(config)
    check_template_args(tokenizer, config.template_args)
    texts = [render_chat(tokenizer, problem.messages, **config.template_args) for problem in problems]
    prompts = [encode_text(tokenizer, text) for text in texts]
    _check_lengths(config, models, problems, prompts)
    fingerprints = {"problem file": _hash_problems(config.problems, problems)}
    fingerprints |= of_pair(folders, tokenizer, tokenizer_folder)
    named = [("criterion", setting.criterion or "") for setting in config.settings]
    named += [("grader", name) for name in config.graders]
    fingerprints |= of_code((key, name) for key, name in named if is_own(name))
    return Inputs(
        tokenizer=tokenizer,
        folders=folders,
        models=models,
        problems=problems,
        prompts=prompts,
        texts=texts,
        stop_tokens=_stop_tokens(config, tokenizer, folders, models),
        fingerprints=fingerprints,
    )


def _read_problems(config: DecodeConfig) -> list[Problem]:
    """Each problem once: published files repeat a row for every sample wanted, here n and the seeds say that."""
    first: dict[str, Problem] = {}
    for problem in load_problems(
        config.problems,
        prompt_suffix=config.prompt_suffix,
        prompt_column=config.prompt_column,
        answer_column=config.answer_column,
    ):
        first.setdefault(problem.id, problem)
    return list(first.values())[: config.limit]


def model_folder(role: str, path: str) -> Path:
    """The folder of a checkpoint's path or name. Raises ValueError naming the role where it is none."""
    try:
        folder = checkpoint_folder(path)
    except OSError as error:
        raise ValueError(f"{role} = {error}") from error
    count_weights(f"{role} = {folder}", (file.name for file in folder.iterdir()))
    return folder


def _tokenizer_folder(config: DecodeConfig) -> Path:
    if config.tokenizer is None:
        return checkpoint_folder(config.rl or config.base or "")
    folder = Path(local(config.tokenizer, TEXT_FILES))
    if not folder.is_dir():
        raise ValueError(f"tokenizer = {config.tokenizer}: no such folder")
    return folder


def check_vocabularies(
    models: dict[str, QwenConfig], folders: dict[str, Path], tokenizer: Tokenizer, tokenizer_folder: Path
) -> dict[str, QwenConfig]:
    """The models over the rows that both have. Rows of one alone must be padding, beyond every tokenizer.

    Raises:
      ValueError: an id means different tokens, by the maps of all tokenizers that exist, or a token has no row.
    """
    vocabularies = {tokenizer_folder: _id_to_token(tokenizer)}
    for folder in folders.values():
        if not (folder / "tokenizer.json").is_file():
            logger.warning("%s has no tokenizer.json: of its vocabulary only the size can be compared", folder)
        elif folder not in vocabularies:
            vocabularies[folder] = _id_to_token(load_tokenizer(folder))
    for one, other in itertools.combinations(vocabularies, 2):
        _compare(one, vocabularies[one], other, vocabularies[other])
    role, size = min(((role, model.vocab_size) for role, model in models.items()), key=lambda pair: pair[1])
    padded = {name: model.vocab_size for name, model in models.items() if model.vocab_size > size}
    for folder in vocabularies if padded else (tokenizer_folder,):
        if (highest := max(vocabularies[folder], default=0)) >= size:
            raise ValueError(
                f"vocabulary mismatch: the tokenizer in {folder} goes up to id {highest}, "
                f"the {role} model has {size} tokens"
            )
    for name, rows in padded.items():
        logger.warning(
            "the %s model has %d rows of vocabulary and the %s model %d: the last %d of %s, which are beyond every "
            "tokenizer, are left out of its distribution",
            *(name, rows, role, size, rows - size, name),
        )
    return {name: dataclasses.replace(model, vocab_size=size) for name, model in models.items()}


def _compare(one: Path, words: dict[int, str], other: Path, others: dict[int, str]) -> None:
    ids = {token: index for index, token in others.items()}
    for index in sorted(words):
        if index in others and words[index] != others[index]:
            raise ValueError(
                f"vocabulary mismatch: token {index} is {words[index]!r} in {one} and {others[index]!r} in {other}"
            )
        if words[index] in ids and ids[words[index]] != index:
            raise ValueError(
                f"vocabulary mismatch: {words[index]!r} is token {index} in {one} and {ids[words[index]]} in {other}"
            )
    for folder, alone in ((one, words.keys() - others.keys()), (other, others.keys() - words.keys())):
        if alone:
            defined = words if folder == one else others
            logger.warning(
                "%d tokens, from %d %r on, are defined by the tokenizer in %s alone; nothing else differs",
                *(len(alone), min(alone), defined[min(alone)], folder),
            )


def _id_to_token(tokenizer: Tokenizer) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _check_lengths(
    config: DecodeConfig, models: dict[str, QwenConfig], problems: list[Problem], prompts: list[list[int]]
) -> None:
    for problem, prompt in zip(problems, prompts, strict=True):
        where = f"problem {problem.id!r} of {config.problems}: its prompt has {len(prompt)} tokens"
        if config.max_prompt_tokens is not None and len(prompt) > config.max_prompt_tokens:
            raise ValueError(f"{where}, max_prompt_tokens allows {config.max_prompt_tokens}")
        for role, model in models.items():
            if len(prompt) + config.max_new_tokens > model.max_position_embeddings:
                raise ValueError(
                    f"{where}, with max_new_tokens = {config.max_new_tokens} that exceeds the {role} model's "
                    f"{model.max_position_embeddings} positions (max_position_embeddings)"
                )


def _stop_tokens(
    config: DecodeConfig, tokenizer: Tokenizer, folders: dict[str, Path], models: dict[str, QwenConfig]
) -> tuple[int, ...]:
    size = min(model.vocab_size for model in models.values())
    if config.stop_token_ids:
        outside = [token for token in config.stop_token_ids if not 0 <= token < size]
        if outside:
            raise ValueError(f"stop_token_ids: {outside[0]} is outside the vocabulary of {size} tokens")
        return tuple(sorted(set(config.stop_token_ids)))
    found = {token for folder in folders.values() for token in stop_token_ids(tokenizer, folder) if token < size}
    if not found:
        raise ValueError(f"no stop token lies in the vocabulary of {size} tokens; give --stop-token-ids")
    return tuple(sorted(found))


def _hash_problems(source: str, problems: list[Problem]) -> str:
    if not is_tasks(source):
        hashes = [of_file(file) for file in data_files(source)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    return hashlib.sha256(repr([(x.messages, x.answer) for x in problems]).encode(errors="surrogatepass")).hexdigest()


def of_pair(folders: Mapping[str, Path], tokenizer: Tokenizer, tokenizer_folder: Path) -> dict[str, str]:
    """Fingerprints of the models in use, by role, and of the tokenizer; by what to call them in a sentence."""
    found = of_tokenizer(tokenizer.chat_template, tokenizer_folder)
    for role, folder in folders.items():
        found |= of_model(folder, role)
    return found
