"""Everything about a run that can be checked before the long work starts: one clear sentence, exit code 2."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlvr_jax.data.problems import Problem
from rlvr_jax.data.prompts import PromptSet
from rlvr_jax.data.shards import names
from rlvr_jax.data.sources import check_source
from rlvr_jax.data.template_args import check_template_args
from rlvr_jax.data.text import Tokenizer, load_tokenizer, stop_token_ids
from rlvr_jax.models.config import QwenConfig, platform_dtype
from rlvr_jax.models.hf import checkpoint_folder
from rlvr_jax.models.hf_folder import count_weights
from rlvr_jax.objectives.reweight import reweighting_of
from rlvr_jax.rewards.pool import GraderPool
from rlvr_jax.runs.bounds import Fault, faults
from rlvr_jax.runs.distributed import cluster, identity, initialize
from rlvr_jax.runs.fingerprint import of_code, of_values
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.program import config_dict, parse_config
from rlvr_jax.sharding.decode_layout import decode_mesh
from rlvr_jax.sharding.rules import MESH_AXES, batch_shards, make_mesh
from train.check.problems import tokenized, training_problems, validation_problems
from train.config import MAY_CHANGE, AlgorithmConfig, Config, MeshConfig
from train.records.trackers import tracker_module
from train.run.resume import resumable, run_folder
from train.run.same_run import model_inputs, record_of
from train.step.objective import check_functions, own_functions

log = logging.getLogger(__name__)

MICRO_ROWS = "algorithm.mini_batch * rollout.n / algorithm.micro_batches"


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked run: the configuration and what was read on the way."""

    config: Config
    model_folder: Path
    model_config: QwenConfig
    tokenizer: Tokenizer
    stop_tokens: tuple[int, ...]
    train: PromptSet
    val: PromptSet | None
    mesh: Mesh
    rollout_mesh: Mesh
    """The same devices as decoding wants them."""
    record: dict
    """What a checkpoint is compared with: the configuration and fingerprints of what it reads."""
    resume_from: int | None
    folder: RunFolder
    """Where everything goes."""


def prepare(argv: Sequence[str]) -> Job:
    """Reads the configuration and every input but the weights. Raises ValueError naming what is wrong."""
    config = configuration(argv)
    check_values(config)
    initialize(config.distributed)
    return check(config)


def configuration(argv: Sequence[str]) -> Config:
    """The configuration of a command line, not checked yet."""
    description = (
        "Trains a Qwen model with DAPO.\n\n--dry-run: check the files, print what the run would be and take.\n\n"
        "--plan v5p:4x4x4: compile its programs for that topology and print what they would take there."
    )
    return parse_config(Config, argv, prog="python -m train", description=description)


def check(config: Config) -> Job:
    """As `prepare`, from a configuration; together with the other processes, where there are some."""
    check_values(config)
    cluster().phase("prepare")
    place = run_folder(config.run_dir)
    for name in config.log.trackers:
        tracker_module(name)
    for source in filter(None, (config.data.train, config.data.val)):
        check_source(  # before a model is downloaded
            source, rule=config.reward.rule, unsafe_evaluation=config.reward.unsafe_evaluation
        )
    folder = model_folder(config.model.path)
    tokenizer = load_tokenizer(folder)
    check_template_args(tokenizer, config.data.template_args, key="data.template_args")
    train = tokenized(config, tokenizer, training_problems(config))
    problems = validation_problems(config)
    val = None if problems is None else tokenized(config, tokenizer, problems)
    known = {_text(problem) for problem in train.problems}
    if val is not None and (shared := sum(_text(problem) in known for problem in val.problems)):
        log.warning("%d of %d validation problems are training problems too", shared, len(val))
    longest = max(len(tokens) for prompts in (train, val) if prompts for tokens in prompts.tokens)
    model_config = read_model_config(
        folder,
        tokenizer,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        attention=config.model.attention,
        max_position_embeddings=config.model.max_position_embeddings,
        longest=longest + config.rollout.max_response,
        what=f"the longest prompt ({longest} tokens) + rollout.max_response={config.rollout.max_response}",
    )
    row_length, needed = config.algorithm.row_length, max(map(len, train.tokens)) + config.rollout.max_response
    if row_length is not None and row_length < needed:
        raise ValueError(
            f"algorithm.row_length={row_length}: expected at least {needed} tokens, the longest training prompt + "
            "rollout.max_response"
        )
    mesh = mesh_for(config.mesh, micro_rows(config), MICRO_ROWS)
    if config.rollout.one_step_off and mesh.size > 1:  # two programs with collectives at once may wait for each other
        raise ValueError(f"rollout.one_step_off on a mesh of {mesh.size} devices: expected one device")
    try_rule(config, train.problems)
    stop_tokens = stop_token_ids(tokenizer, folder)
    record = record_of(
        config,
        {
            "training problems of data.train": of_values([problem.messages for problem in train.problems]),
            "answers of data.train": of_values([problem.answer for problem in train.problems]),
            "stop tokens": of_values(stop_tokens),
            **model_inputs("model.path", folder, tokenizer, folder),
            **of_code(own_functions(config)),
        },
        [json.dumps([train.tokens, [p.answer for p in train.problems]]).encode()],
    )
    cluster().require_same("the configuration, the training problems or the code", *identity(record, "train"))
    with place.taken():
        resume_from = resumable(
            place, record, MAY_CHANGE, defaults=config_dict(Config()), fallback=config.checkpoint.fallback
        )
    return Job(
        config=config,
        model_folder=folder,
        model_config=model_config,
        tokenizer=tokenizer,
        stop_tokens=stop_tokens,
        train=train,
        val=val,
        mesh=mesh,
        rollout_mesh=decode_mesh(mesh, [model_config.num_kv_heads], config.rollout.tensor),
        record=record,
        resume_from=resume_from,
        folder=place,
    )


def check_values(config: Config) -> None:
    """Raises ValueError for values that no file has to be opened to refuse, at the first of `value_faults`."""
    for fault in value_faults(config):
        raise ValueError(fault.sentence)


def value_faults(config: Config) -> Iterator[Fault]:
    """What is wrong with the values: those out of their bounds, then those that do not go together."""
    wrong = set()
    for fault in faults(config):
        wrong.add(fault.key)
        yield fault
    yield from _together(config, lambda *keys: wrong.isdisjoint(keys))


def _together(config: Config, known: Callable[..., bool]) -> Iterator[Fault]:
    """What does not go together, among the keys that are `known` to be in their bounds."""
    algorithm, rollout = config.algorithm, config.rollout
    if config.model.attention == "cudnn" and algorithm.packing:
        yield Fault(
            "model.attention", "model.attention=cudnn takes one response a row: expected --algorithm.no-packing with it"
        )
    sizes = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in MESH_AXES}
    if list(sizes.values()).count(-1) > 1:
        given = ", ".join(f"{key}={size}" for key, size in sizes.items())
        yield Fault("mesh.fsdp", f"mesh: expected at most one size of -1; got {given}")
    if known("rollout.n") and algorithm.dynamic_sampling and rollout.n < 2:
        yield Fault(
            "rollout.n",
            f"rollout.n={rollout.n} with algorithm.dynamic_sampling: a group of one never varies, expected at least 2",
        )
    if (
        known("rollout.generation_batch", "algorithm.max_generation_batches", "algorithm.train_batch")
        and algorithm.when_short == "error"
        and rollout.generation_batch * algorithm.max_generation_batches < algorithm.train_batch
    ):
        yield Fault(
            "rollout.generation_batch",
            f"rollout.generation_batch={rollout.generation_batch} x algorithm.max_generation_batches="
            f"{algorithm.max_generation_batches}: never the {algorithm.train_batch} groups of algorithm.train_batch",
        )
    if known("algorithm.mini_batch", "algorithm.train_batch") and algorithm.train_batch % algorithm.mini_batch:
        yield Fault(
            "algorithm.mini_batch",
            f"algorithm.mini_batch={algorithm.mini_batch} does not divide algorithm.train_batch="
            f"{algorithm.train_batch}",
        )
    if (
        known("algorithm.micro_batches", "algorithm.mini_batch", "rollout.n")
        and algorithm.mini_batch * rollout.n % algorithm.micro_batches
    ):
        yield Fault(
            "algorithm.micro_batches",
            f"algorithm.micro_batches={algorithm.micro_batches} does not divide the "
            f"{algorithm.mini_batch * rollout.n} rows of a mini-batch (algorithm.mini_batch * rollout.n)",
        )
    if algorithm.clip_low == 1 and algorithm.loss != "cispo":
        yield Fault(
            "algorithm.clip_low",
            f"algorithm.clip_low={algorithm.clip_low}: expected below 1 (1 is no bound, for loss cispo alone)",
        )
    choices = ("loss", "aggregation", "importance", "reweight.kind", "reweight.mask.kind", "loss_mask.kind")
    if known("algorithm.reweight.alpha", *(f"algorithm.{key}" for key in choices)):
        yield from _of_functions(algorithm)
    if known("reward.overlong_buffer", "rollout.max_response") and config.reward.overlong_buffer > rollout.max_response:
        yield Fault(
            "reward.overlong_buffer",
            f"reward.overlong_buffer={config.reward.overlong_buffer}: expected 0 to rollout.max_response="
            f"{rollout.max_response} tokens",
        )


def _of_functions(algorithm: AlgorithmConfig) -> Iterator[Fault]:
    """What is wrong with the user's own functions, and with an alpha that the re-weighting does not take."""
    try:
        check_functions(algorithm)
    except ValueError as error:
        yield Fault("algorithm", str(error))
        return
    key, alpha, wanted = "algorithm.reweight.alpha", algorithm.reweight.alpha, reweighting_of(algorithm.reweight.kind)
    if wanted.alpha is not None and not wanted.alpha[1](np.asarray(alpha)):
        yield Fault(key, f"{key}={alpha}: expected {wanted.alpha[0]}")


def model_folder(path: str) -> Path:
    """The local folder of a model, with its weights in it."""
    folder = checkpoint_folder(path)
    count_weights(path, (file.name for file in folder.iterdir()))
    return folder


def read_model_config(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    compute_dtype: str,
    remat: str,
    attention: str = "auto",
    max_position_embeddings: int | None,
    longest: int,
    what: str,
) -> QwenConfig:
    """The architecture of a folder (or config.json) with the run's choices; `what` of `longest` tokens must fit."""
    overrides: dict[str, Any] = {"remat": remat, "attention": attention, "dtype": resolved_dtype(compute_dtype)}
    if max_position_embeddings is not None:
        overrides["max_position_embeddings"] = max_position_embeddings
    config = QwenConfig.from_hf(folder, **overrides)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"{what} is {longest} tokens: expected at most max_position_embeddings={config.max_position_embeddings} "
            "(model.max_position_embeddings raises it)"
        )
    if (highest := max(tokenizer.get_vocab().values(), default=-1)) >= config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer goes up to token {highest}, the model's vocab_size is {config.vocab_size}"
        )
    return config


def resolved_dtype(compute_dtype: str) -> str:
    """ "auto" is bfloat16 on accelerators and float32 on CPU, whose bfloat16 is slow."""
    if compute_dtype != "auto":
        return compute_dtype
    return platform_dtype()


def mesh_for(sizes: MeshConfig, rows: int, what: str) -> Mesh:
    """The mesh; ValueError when its data and fsdp axes do not divide the `rows` that pass through the model at once."""
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sequence=sizes.sequence)
    check_shards(batch_shards(mesh), rows, what)
    return mesh


def check_shards(shards: int, rows: int, what: str) -> None:
    """ValueError when the rows do not divide over the shards of the batch."""
    if rows % shards:
        raise ValueError(f"{what} = {rows} rows do not divide over the {shards} shards of mesh.data * mesh.fsdp")


def grading(config: Config) -> dict[str, Any]:
    """What `GraderPool` is told besides the number of its workers."""
    return {name: getattr(config.reward, name) for name in ("timeout_s", "memory_mb", "sandbox", "unsafe_evaluation")}


def try_rule(config: Config, problems: Sequence[Problem]) -> None:
    """A rule of one's own must at least be there; a reasoning-gym task must be able to make its problems again."""
    rule, tries = config.reward.rule, [("", "")]
    if rule == "reasoning_gym":
        entries = {problem.data_source: problem.answer for problem in problems}.values()
        tries = [(f"<answer>{json.loads(entry)['answer'] or 0}</answer>", entry) for entry in entries]
    if rule in ("math_verify", "dapo_answer"):
        return
    with GraderPool(1, **grading(config)) as pool:
        graded = pool.grade(rule, *map(list, zip(*tries, strict=True)))
    failed = [verdict.error for verdict in graded if verdict.error] if rule == "reasoning_gym" else []
    if failed:
        raise ValueError(f"data.train={names(config.data.train)}: its problems cannot be graded: {failed[0]}")


def _text(problem: Problem) -> tuple[str, ...]:
    return tuple(message["content"] for message in problem.messages)


def micro_rows(config: Config) -> int:
    """Rows that pass through the model at once."""
    return config.algorithm.mini_batch * config.rollout.n // config.algorithm.micro_batches
