"""`python -m train.sft --model FOLDER --data x.jsonl ...`: supervised training on conversations.

Starts from a checkpoint (`--model`), or from random weights for a config.json (`--init-config`, with `--tokenizer`):
that is how a base model is born. The loss is the mean over the last assistant turn's tokens of a batch.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from rlvr_jax.data.prompts import prompt_batches
from rlvr_jax.data.shards import data_files
from rlvr_jax.data.template_args import TemplateArgs, check_template_args
from rlvr_jax.data.text import Tokenizer, load_tokenizer
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import load_hf
from rlvr_jax.models.qwen import init_params, model_apply, param_axes
from rlvr_jax.runs.bounds import Count, Every, MaybePath, PathText, Seed, Source, Steps, Tokens, require
from rlvr_jax.runs.checkpoint import Checkpoints
from rlvr_jax.runs.distributed import DistributedConfig, cluster, identity, initialize, to_host
from rlvr_jax.runs.files import remove_leftovers
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.program import (
    Preempted,
    Preemption,
    RunError,
    compile_cache,
    config_dict,
    console,
    parse_config,
    run_program,
    writing_to,
)
from rlvr_jax.runs.remote import TEXT_FILES, local
from rlvr_jax.sharding.rules import ShardingRules, batch_shards
from rlvr_jax.training import (
    TrainState,
    adamw,
    make_accumulating_step,
    warmup_constant,
    warmup_cosine,
    with_learning_rate,
)
from train.check.prepare import mesh_for, model_folder, read_model_config
from train.config import (
    CheckpointConfig,
    ClipNorm,
    Decay,
    Epsilon,
    LearningRate,
    MeshConfig,
    WeightDecay,
)
from train.records.display import Display
from train.records.metrics import MetricLog
from train.run.export import export
from train.run.resume import restore, resumable, run_folder
from train.run.same_run import model_inputs, record_of, write_record
from train.step.sft_rows import Conversation, Rows, encode
from train.step.sft_step import make_loss, update

SHOWN = {
    "loss": ("loss", ".4f"),
    "lr": ("lr", ".2e"),
    "grad": ("grad_norm", ".3g"),
    "tokens/s": ("tokens_per_s", ",.0f"),
}


@dataclasses.dataclass(frozen=True)
class SFTOptim:
    lr: LearningRate = 1e-5
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Every = 10
    """Steps of linear warm-up, from lr / warmup to lr."""
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Epsilon = 1e-8
    weight_decay: WeightDecay = 0.1
    clip_norm: ClipNorm = 1.0


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    model: MaybePath = ""
    """Hugging Face folder to start from."""
    init_config: MaybePath = ""
    """Instead of it: a config.json (or its folder) to start from random weights."""
    tokenizer: MaybePath = ""
    """Folder of the tokenizer; empty: the model's."""
    data: Source = ""
    """Conversations: parquet or JSONL with `messages`, or `prompt` and `response`. Also a folder of such files, a
    pattern, several of them, or "hf://datasets/OWNER/NAME/PATH" on the Hugging Face hub."""
    template_args: TemplateArgs = dataclasses.field(default_factory=dict)
    """Arguments of the chat template, such as enable_thinking=false; in a recipe a dict."""
    run_dir: PathText = "runs/sft"
    """Where everything goes. A run continues from its newest checkpoint there."""
    compile_cache: PathText | None = "auto"
    """Folder that keeps compiled programs; auto: compile_cache in run_dir; None: none (see `train.config`)."""
    steps: Steps | None = None
    """Optimizer steps; None: as many as the epochs give."""
    epochs: Steps = 1
    batch: Count = 64
    """Conversations an optimizer step."""
    micro_batches: Count = 1
    """Parts of a batch that pass through the model one after the other, were every conversation the longest. Shorter
    ones are packed together into rows, so that a part has as many tokens and there are fewer parts."""
    max_tokens: Tokens = 2048
    """Longer conversations are cut on the right."""
    seed: Seed = 0
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    logprob_chunk: Tokens = 1024
    optim: SFTOptim = SFTOptim()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=lambda: CheckpointConfig(every=0))
    log_every: Steps = 1
    """Steps between records."""
    tensorboard: bool = True
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


MAY_CHANGE = (
    *("run_dir", "compile_cache", "mesh", "checkpoint", "log_every", "tensorboard", "remat", "logprob_chunk"),
    "micro_batches",
    *("model", "init_config", "tokenizer", "data"),  # their content is compared (`train.run.same_run`)
)


@dataclasses.dataclass(frozen=True)
class SFTJob:
    """A checked run: the configuration and what was read on the way."""

    config: SFTConfig
    model_folder: Path | None
    model_config: QwenConfig
    tokenizer: Tokenizer
    conversations: list[Conversation]
    mesh: Mesh
    steps: int
    record: dict
    """What a checkpoint is compared with: the configuration and fingerprints of what it reads."""
    resume_from: int | None
    folder: RunFolder
    """Where everything goes."""


def prepare(argv: Sequence[str]) -> SFTJob:
    """Reads the configuration and every input but the weights. Raises ValueError naming what is wrong."""
    config = parse_config(SFTConfig, argv, prog="python -m train.sft", description=__doc__ or "")
    check_values(config)
    initialize(config.distributed)
    return check(config)


def check_values(config: SFTConfig) -> None:
    """Raises ValueError for values that no file has to be opened to refuse."""
    require(config)
    if bool(config.model) == bool(config.init_config):
        raise ValueError(f"model={config.model!r} and init_config={config.init_config!r}: expected one of the two")
    if config.init_config and not config.tokenizer:
        raise ValueError("tokenizer='': expected a folder, since init_config has none")
    if config.batch % config.micro_batches:
        raise ValueError(f"micro_batches={config.micro_batches} does not divide batch={config.batch}")


def check(config: SFTConfig) -> SFTJob:
    """As `prepare`, from a configuration; together with the other processes, where there are some."""
    check_values(config)
    cluster().phase("prepare")
    run_place = run_folder(config.run_dir)
    data_files(config.data)  # before a model is downloaded
    folder = model_folder(config.model) if config.model else None
    tokenizer = load_tokenizer(config.tokenizer or str(folder))
    check_template_args(tokenizer, config.template_args)
    conversations = encode(tokenizer, config.data, config.max_tokens, **config.template_args)
    model_config = read_model_config(
        folder or Path(local(config.init_config)),
        tokenizer,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        max_position_embeddings=None,
        longest=max(len(one.tokens) for one in conversations),
        what="the longest conversation",
    )
    mesh = mesh_for(config.mesh, config.batch // config.micro_batches, "batch / micro_batches")
    inputs = model_inputs(
        "model",
        folder,
        tokenizer,
        Path(local(config.tokenizer, TEXT_FILES)) if config.tokenizer else folder,
        init_config=Path(local(config.init_config)) if config.init_config else None,
    )
    shapes = np.array([(one.context, len(one.tokens)) for one in conversations])
    record = record_of(config, inputs, [shapes.tobytes(), *(one.tokens.tobytes() for one in conversations)])
    cluster().require_same("the configuration, the data or the code", *identity(record, "train"))
    # At a constant rate, more steps are the same run, longer.
    longer = ("steps", "epochs") if config.optim.schedule == "constant" else ()
    with run_place.taken():
        resume_from = resumable(
            run_place,
            record,
            (*MAY_CHANGE, *longer),
            defaults=config_dict(SFTConfig()),
            fallback=config.checkpoint.fallback,
        )
    return SFTJob(
        config=config,
        model_folder=folder,
        model_config=model_config,
        tokenizer=tokenizer,
        conversations=conversations,
        mesh=mesh,
        steps=config.steps or math.ceil(config.epochs * len(conversations) / config.batch),
        record=record,
        resume_from=resume_from,
        folder=run_place,
    )


def initial_params(job: SFTJob) -> Any:
    """The folder's weights, or random ones, float32, on the mesh."""
    if job.model_folder is not None:
        try:
            return load_hf(job.model_folder, dtype=jnp.float32, mesh=job.mesh)[1]
        except (ValueError, OSError) as error:
            raise RunError(f"model: {error}") from error
    init, key = partial(init_params, job.model_config, dtype=jnp.float32), jax.random.key(job.config.seed)
    rules, axes = ShardingRules(), param_axes(job.model_config)
    shardings = jax.tree.map(lambda x, names: rules.sharding(job.mesh, names, x.shape), jax.eval_shape(init, key), axes)
    return jax.jit(init, out_shardings=shardings)(key)


def run(job: SFTJob) -> None:
    """Runs a checked job to its end; raises RunError where it cannot go on."""
    config, optim, folder = job.config, job.config.optim, job.folder.local
    main, watch = cluster().main, cluster().watch
    cluster().phase("load", 0)
    with writing_to(config.run_dir), contextlib.ExitStack() as stack:
        stack.enter_context(job.folder)
        if main:
            remove_leftovers(folder, "hf")
            write_record(folder, config, job.record)
        job.folder.sync()  # a place that cannot be written to is found now
        stack.enter_context(compile_cache(config.compile_cache, folder))
        stack.enter_context(jax.set_mesh(job.mesh))
        optimizer = adamw(
            b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, clip_norm=optim.clip_norm
        )
        state = TrainState.create(initial_params(job), optimizer)
        step = make_accumulating_step(
            model_apply(job.model_config),
            optimizer,
            make_loss(config.logprob_chunk),
            shardings=jax.tree.map(lambda x: x.sharding, state),
        )
        batches = prompt_batches(job.conversations, config.batch, config.seed)
        packer = Rows(
            job.conversations,
            config.batch,
            most_rows=config.batch // config.micro_batches,
            shards=batch_shards(job.mesh),
        )
        checkpoints = stack.enter_context(Checkpoints(job.folder.checkpoints, keep=config.checkpoint.keep))
        done, resumed_from = 0, None
        if job.resume_from is not None:
            restored = restore(checkpoints, state, job.resume_from, fallback=config.checkpoint.fallback)
            state, done = restored.state, restored.step
            resumed_from = done
            batches.set_state(restored.host["data"])
        metrics = None
        if main:
            metrics = MetricLog(folder, after_step=resumed_from, tensorboard=config.tensorboard)
            stack.callback(metrics.close)
        preemption = stack.enter_context(Preemption())
        if watch is not None:
            watch.asked = lambda: preemption.asked
        seen = console if main else Console(quiet=True)
        display = stack.enter_context(Display(seen, total=job.steps, done=done, shown=SHOWN))
        if done:
            display.line(f"resumed {config.run_dir} after step {done}")
        display.phase("update")

        def require_finite(step: int) -> None:
            if skipped := step - int(state.step):
                raise RunError(f"step {step}: the loss or its gradient was not finite in {skipped} of the steps so far")

        def save(step: int) -> None:
            require_finite(step)
            job.folder.sync()  # before the checkpoint that counts on it
            checkpoints.save(step, state, host={"config": job.record, "data": batches.get_state()})

        start, tokens, computed = time.monotonic(), 0, 0
        for number in range(done, job.steps):
            cluster().phase("update", number)
            job.folder.check()
            checkpoints.check()
            if preemption.asked if watch is None else watch.stop_here():
                if number and checkpoints.latest != number:
                    save(number)
                checkpoints.wait()
                after = f"after step {number}, saved" if number else "before the first step"
                raise Preempted(f"stopped on request (SIGTERM) {after}; the same command resumes")
            rows = packer.of(next(batches))
            if optim.schedule == "cosine":
                lr = warmup_cosine(number, peak=optim.lr, warmup=optim.warmup, total=job.steps)
            else:
                lr = warmup_constant(number + 1, peak=optim.lr, warmup=optim.warmup)
            state, made = update(step, with_learning_rate(state, lr), rows, job.mesh)
            tokens, computed = tokens + int((rows.segments > 0).sum()), computed + rows.segments.size
            last = number + 1 == job.steps
            if last or (number + 1) % config.log_every == 0:
                require_finite(number + 1)
                made = {name: float(x) for name, x in to_host(made).items()}
                seconds = time.monotonic() - start
                numbers = {
                    "trainer_steps": number + 1,
                    "optimizer_steps": int(state.step),
                    "epoch": batches.epoch,
                    "loss": made["loss"],
                    "lr": lr,
                    "grad_norm": made["grad_norm"],
                    "loss_tokens": made["weight"],
                    "padding_share": 1 - tokens / computed,
                    "tokens_per_s": tokens / max(seconds, 1e-9),
                }
                if metrics is not None:
                    metrics.write({"kind": "train"} | numbers)
                display.step(numbers)
                start, tokens, computed = time.monotonic(), 0, 0
            every = config.checkpoint.every
            if last or (every and (number + 1) % every == 0):
                save(number + 1)
        checkpoints.wait()
        job.folder.check()
        out, dtype = folder / "hf", config.checkpoint.export_dtype
        source = Path(local(config.tokenizer, TEXT_FILES)) if config.tokenizer else job.model_folder
        export(
            out,
            job.model_config,
            state.params,
            job.tokenizer,
            base=job.model_folder,
            tokenizer_folder=source,
            dtype=dtype,
        )
        display.line(f"done: {job.steps} steps; model in {job.folder.url or folder}/hf")


if __name__ == "__main__":
    from train import sft  # under its own name: recipes make train.sft's SFTConfig, not that of __main__

    sys.exit(run_program(sft.prepare, sft.run))
