"""The checks of a dry run: everything about a run that can be found out without a device and without its weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import AbstractMesh

from rlvr_jax.data.problems import Problem
from rlvr_jax.data.prompts import PromptSet
from rlvr_jax.data.shards import Source
from rlvr_jax.data.sources import check_source
from rlvr_jax.data.template_args import check_template_args
from rlvr_jax.data.text import Tokenizer, load_tokenizer, stop_token_ids
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf_folder import count_weights
from rlvr_jax.runs.remote import TEXT_FILES, filesystem, is_url, listing, local_copy, naming
from rlvr_jax.sharding.rules import MESH_AXES, batch_shards
from train.check.prepare import (
    MICRO_ROWS,
    check_shards,
    micro_rows,
    read_model_config,
    try_rule,
    value_faults,
)
from train.check.problems import tokenized, training_problems, validation_problems
from train.config import Config
from train.run.resume import run_folder

T = TypeVar("T")


class Check(NamedTuple):
    """One check: `ok` is None where it could not be made because another one failed."""

    name: str
    ok: bool | None
    says: str


class Found(NamedTuple):
    """What there is to a run; None for what could not be found out."""

    config: Config
    checks: list[Check]
    dtype: str
    mesh: AbstractMesh | None
    model: QwenConfig | None
    problems: int | None
    prompt_length: int
    eval_problems: int


def examine(config: Config) -> Found:
    """Everything that can be found out without a device; nothing is written, and no weights are read or fetched."""
    faults = list(value_faults(config))
    checks = _Checks(wrong=[fault.key for fault in faults])
    checks.made += [Check("values", False, fault.sentence) for fault in faults] or [
        Check("values", True, "as they should be")
    ]
    dtype = _dtype(config.model.compute_dtype)
    checks.attempt("run_dir", lambda: run_folder(config.run_dir), lambda folder: folder.url or str(folder.local))
    options: dict[str, Any] = {"remat": config.model.remat, "dtype": dtype}
    if config.model.max_position_embeddings is not None:
        options["max_position_embeddings"] = config.model.max_position_embeddings
    mesh = checks.attempt("mesh", lambda: _mesh(config, check_rows=not faults), lambda x: _mesh_says(x, config))
    folder, model, tokenizer = _examine_model(checks, config.model.path, options)
    arguments = config.data.template_args
    if arguments and tokenizer is not None:
        check_arguments = partial(check_template_args, tokenizer, arguments, key="data.template_args")
        tokenizer = checks.attempt("data.template_args", check_arguments, lambda _: ", ".join(arguments))
    train = _examine_data(checks, config, tokenizer, "data.train", training_problems)
    val = _Rows(0, 0)
    if config.data.val is not None:
        val = _examine_data(checks, config, tokenizer, "data.val", validation_problems)
    longest = max(train.longest or 0, val.longest or 0)
    if folder is None or model is None or tokenizer is None or train.longest is None or val.longest is None:
        checks.skip("context", "the architecture and the prompts")
    else:
        checks.attempt(
            "context", lambda: _context(config, folder, tokenizer, longest, options), lambda x: f"{x:,} tokens fit"
        )
    checks.attempt("reward.rule", lambda: _rule(config, train.problems), str, keys="reward.")
    return Found(
        config=config,
        checks=checks.made,
        dtype=dtype,
        mesh=mesh,
        model=model,
        problems=train.count,
        prompt_length=train.longest or config.data.max_prompt,
        eval_problems=val.count or 0,
    )


class _Checks:
    """The checks made so far; `wrong` are the keys of values that are not as they should be."""

    def __init__(self, wrong: Sequence[str]) -> None:
        self.made: list[Check] = []
        self._wrong = wrong

    def attempt(self, name: str, do: Callable[[], T], says: Callable[[T], str], *, keys: str = "") -> T | None:
        """The result of `do`; None where it raises ValueError or OSError, which is how a check fails.

        It is not tried where a value is wrong whose key begins with `keys`, or else with `name`.
        """
        if wrong := next((key for key in self._wrong if key.startswith(keys or name)), None):
            self.skip(name, f"a right {wrong}")
            return None
        try:
            result = do()
        except (ValueError, OSError) as error:
            self.made.append(Check(name, False, str(error)))
            return None
        self.made.append(Check(name, True, says(result)))
        return result

    def skip(self, name: str, needs: str) -> None:
        """A check that cannot be made."""
        self.made.append(Check(name, None, f"needs {needs}"))


class _Rows(NamedTuple):
    """How many problems there are, and the tokens of the longest prompt; None for what is not known."""

    count: int | None
    longest: int | None
    problems: Sequence[Problem] = ()


def _examine_model(
    checks: _Checks, path: str, options: Mapping[str, Any]
) -> tuple[Path | None, QwenConfig | None, Tokenizer | None]:
    folder = checks.attempt("model.path", lambda: _config_folder(path), str)
    if folder is None:
        for name in ("architecture", "weights", "tokenizer"):
            checks.skip(name, "model.path")
        return None, None, None
    model = checks.attempt("architecture", lambda: QwenConfig.from_hf(folder, **options), _model_says)
    checks.attempt("weights", lambda: _weights(path), lambda files: f"{files} .safetensors files, not read")
    tokenizer = checks.attempt("tokenizer", lambda: _tokenizer(path, folder), lambda x: f"{len(x):,} tokens")
    return folder, model, tokenizer


def _examine_data(
    checks: _Checks,
    config: Config,
    tokenizer: Tokenizer | None,
    name: str,
    read: Callable[[Config], list[Problem] | None],
) -> _Rows:
    path = config.data.train if name == "data.train" else config.data.val or ""
    problems = checks.attempt(name, lambda: _problems(config, path, read), lambda x: f"{len(x):,} problems")
    if problems is None or tokenizer is None:
        checks.skip(f"{name}, prompts", name if problems is None else "the tokenizer")
        return _Rows(None if problems is None else len(problems), None, problems or ())
    prompts = checks.attempt(f"{name}, prompts", lambda: tokenized(config, tokenizer, problems), _prompts_say)
    if prompts is None:
        return _Rows(None, None)
    return _Rows(len(prompts), max(map(len, prompts.tokens)), problems)


def _dtype(compute_dtype: str) -> str:
    """As `prepare.resolved_dtype`, but "auto" is decided by the platform asked for: looking would take a device."""
    if compute_dtype != "auto":
        return compute_dtype
    return "float32" if (getattr(jax.config, "jax_platforms", None) or "").startswith("cpu") else "bfloat16"


def _mesh(config: Config, *, check_rows: bool) -> AbstractMesh:
    """The mesh by its sizes; a size of -1 counts as 1, since there may be no device to ask."""
    given = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    mesh = AbstractMesh(tuple(max(size, 1) for size in given.values()), MESH_AXES)
    if check_rows:
        check_shards(batch_shards(mesh), micro_rows(config), MICRO_ROWS)
    return mesh


def _mesh_says(mesh: AbstractMesh, config: Config) -> str:
    free = [axis for axis in MESH_AXES if getattr(config.mesh, axis) == -1]
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{sizes}: {mesh.size} devices" + (f"; mesh.{free[0]}=-1 counted as 1: give a number" if free else "")


def _model_says(model: QwenConfig) -> str:
    return f"{model.model_type}, {model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size:,}"


def _prompts_say(prompts: PromptSet) -> str:
    longest = max(map(len, prompts.tokens))
    return f"up to {longest:,} tokens; {prompts.truncated} cut on the left, {prompts.dropped} dropped"


def _config_folder(path: str) -> Path:
    """The folder that holds config.json: the model's own, a copy of what is at a URL, or that of the hub's cache."""
    if is_url(path):
        return local_copy(path, TEXT_FILES)
    if path and Path(path).is_dir():
        return Path(path)
    import huggingface_hub  # only here: a local model must not depend on the hub's settings

    try:
        return Path(huggingface_hub.hf_hub_download(path, "config.json")).parent
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no such folder, and not obtained from the hub ({reason})") from error


def _weights(path: str) -> int:
    """How many files hold the weights; ValueError where there is none. Nothing is fetched."""
    if is_url(path):
        fs, root = filesystem(path)
        with naming(path):
            files = list(listing(fs, root, depth=1))
    elif Path(path).is_dir():
        files = [file.name for file in Path(path).iterdir()]
    else:
        import huggingface_hub

        files = huggingface_hub.list_repo_files(path)
    return count_weights(path, files)


def _tokenizer(path: str, folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder if is_url(path) or Path(path).is_dir() else path)
    stop_token_ids(tokenizer, folder)
    return tokenizer


def _problems(config: Config, path: Source, read: Callable[[Config], list[Problem] | None]) -> list[Problem]:
    check_source(path, rule=config.reward.rule, unsafe_evaluation=config.reward.unsafe_evaluation)
    return read(config) or []


def _context(config: Config, folder: Path, tokenizer: Tokenizer, longest: int, options: Mapping[str, Any]) -> int:
    total = longest + config.rollout.max_response
    read_model_config(
        folder,
        tokenizer,
        compute_dtype=options["dtype"],
        remat=options["remat"],
        max_position_embeddings=options.get("max_position_embeddings"),
        longest=total,
        what=f"the longest prompt ({longest} tokens) + rollout.max_response={config.rollout.max_response}",
    )
    return total


def _rule(config: Config, problems: Sequence[Problem]) -> str:
    if config.reward.rule != "reasoning_gym" or problems:
        try_rule(config, problems)
    return config.reward.rule
