"""The decoding run: check everything, load the models once, decode what is not there yet, assemble, summarise."""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from decode.batches import Plan, Unit, plan
from decode.config import DecodeConfig, MeshConfig, Setting, resolve
from decode.inputs import Inputs, read_inputs
from decode.progress import DecodeProgress
from decode.results import Row, RowLog, Timing, TokenParts, check_resume, lock, published, write_config
from decode.summary import summarise, summary_table, write_summaries
from rlvr_jax.decoding.generate import Generation, LanguageModel, OnChunk
from rlvr_jax.decoding.generate import decode as decode_alone
from rlvr_jax.decoding.selective import SelectiveGeneration, decode_selective
from rlvr_jax.files import write_json
from rlvr_jax.generation import language_model
from rlvr_jax.models.hf import load_hf
from rlvr_jax.program import RunError, parse_config
from rlvr_jax.rewards.pool import RULES, GraderPool
from rlvr_jax.sharding import make_mesh

Models = dict[str, tuple[LanguageModel, Any]]
Responses = Generation | SelectiveGeneration


@dataclasses.dataclass(frozen=True)
class Job:
    """A run whose input has been checked. `lock` keeps other runs out of its folder."""

    config: DecodeConfig
    inputs: Inputs
    mesh: Mesh | None
    lock: contextlib.AbstractContextManager[None]

    @property
    def out(self) -> Path:
        """Folder of the results."""
        return Path(self.config.out)


def prepare(argv: Sequence[str]) -> Job:
    """A job from the command line. Raises ValueError or OSError for anything that can be known before long work."""
    config = parse_config(
        DecodeConfig, argv, prog="python -m decode", description="Batch decoding with one or two models."
    )
    return check(config)


def check(config: DecodeConfig) -> Job:
    """A job from a configuration; see `prepare`."""
    config = resolve(config)
    mesh = _mesh(config.mesh)
    inputs = read_inputs(config)
    if config.grader not in RULES:
        with GraderPool(workers=1) as pool:  # a researcher's own grader is imported now rather than after a batch
            pool.grade(config.grader, [""], [""])
    out = Path(config.out)
    held = lock(out)
    check_resume(out, config, inputs.fingerprints)
    return Job(config, inputs, mesh, held)


def run(job: Job) -> None:
    """Does the job: decodes, grades, writes, summarises. Raises RunError for what ends a run."""
    try:
        with job.lock:
            _run(job)
    except OSError as error:
        raise RunError(f"{error}; the same command goes on where this run stopped") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"out of device memory with batch_rows = {job.config.batch_rows} and max_new_tokens = "
            f"{job.config.max_new_tokens}; give fewer of either, or more devices"
        ) from error


def _run(job: Job) -> None:
    config, out = job.config, job.out
    batches = plan(len(job.inputs.problems), config.n, config.batch_rows)
    runs = [_SettingRun(job, setting, batches) for setting in config.settings]
    models: Models = {}
    if any(run.done < run.total for run in runs):
        models = {role: _load(job, role) for role in job.inputs.folders}
    write_config(out, config, job.inputs.fingerprints)  # after the models: one that cannot be read claims no folder
    summaries = []
    progress = DecodeProgress(sum(run.total for run in runs), sum(run.done for run in runs))
    with progress, GraderPool(config.grader_workers) as pool:
        for number, run in enumerate(runs, start=1):
            progress.setting(number, len(runs), run.setting.name)
            run.decode(models, pool, progress)
            summaries.append(run.finish())
            write_summaries(out, summaries)
    screen = Console(width=None if sys.stdout.isatty() else 140)
    screen.print(summary_table(summaries))
    screen.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)


def _mesh(sizes: MeshConfig) -> Mesh | None:
    if (sizes.data, sizes.fsdp, sizes.tensor) == (1, 1, 1):
        return None
    mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    return None if mesh.size == 1 else mesh


def _load(job: Job, role: str) -> tuple[LanguageModel, Any]:
    """A model and its parameters, laid out for decoding. (A function, so that what was read is freed on return.)"""
    dtype = job.config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    try:
        config, params = load_hf(job.inputs.folders[role], dtype=jnp.dtype(dtype), mesh=job.mesh)
    except (ValueError, OSError) as error:
        raise RunError(f"{role} = {error}") from error
    model = language_model(dataclasses.replace(config, dtype=dtype))
    with contextlib.nullcontext() if job.mesh is None else jax.set_mesh(job.mesh):
        return model, model.prepare(params)


class _SettingRun:
    """One setting: what is there, what is missing, decoding it."""

    def __init__(self, job: Job, setting: Setting, batches: Plan):
        self.job, self.setting, self.plan = job, setting, batches
        self.folder = job.out / setting.name
        self.parts = TokenParts(self.folder)
        self.logs = {seed: RowLog(self.folder / f"seed{seed}.rows.jsonl") for seed in job.config.seeds}
        self.indices = [problem.index for problem in job.inputs.problems]
        self.total = len(self.logs) * len(self.indices) * batches.n
        wanted = {(index, sample) for index in self.indices for sample in range(batches.n)}
        there = [row for log in self.logs.values() for key, row in log.rows.items() if key in wanted]
        self.done, self.correct = len(there), sum(row.correct for row in there)

    def decode(self, models: Models, pool: GraderPool, progress: DecodeProgress) -> None:
        for seed, log in self.logs.items():
            for batch in self.plan.batches:
                kept = self.plan.kept(batch)
                if all((self.indices[place], sample) in log.rows for _, place, sample in kept):
                    continue
                compiled, start = _compilations().count, time.perf_counter()
                generation = self._generate(models, seed, batch, progress.drawn)
                seconds = time.perf_counter() - start
                tokens = int(sum(generation.lengths[row] for row, _, _ in kept))
                if self.job.config.save_tokens:
                    self.parts.add(
                        [_token_row(generation, row, seed, self.indices[place], s) for row, place, s in kept]
                    )
                new = [row for row in self._rows(generation, kept, pool) if (row.problem, row.sample) not in log.rows]
                log.append(new, Timing(tokens, seconds, _compilations().count > compiled))
                self.done, self.correct = self.done + len(new), self.correct + sum(row.correct for row in new)
                progress.rows(len(new), tokens=tokens, seconds=seconds, accuracy=self.correct / self.done)
            self._publish(seed)

    def finish(self) -> dict[str, Any]:
        """Assembles the setting's files and gives its summary."""
        config = self.job.config
        if config.save_tokens:
            self.parts.assemble()
        timings = [timing for log in self.logs.values() for timing in log.timings]
        summary = summarise(self.setting, [log.rows for log in self.logs.values()], self.indices, config.n, timings)
        write_json(self.folder / "summary.json", summary)
        return summary

    def _generate(self, models: Models, seed: int, batch: Sequence[Unit], on_chunk: OnChunk) -> Responses:
        config, inputs, setting = self.job.config, self.job.inputs, self.setting
        units = self.plan.filled(batch)
        prompts = [inputs.prompts[unit.place] for unit in units]
        common: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "n": self.plan.group,
            "temperature": setting.temperature,
            "top_p": setting.top_p,
            "top_k": setting.top_k,
            "seed": seed,
            "problem_ids": [self.indices[unit.place] for unit in units],
            "sample_ids": [[unit.first + j for j in range(self.plan.group)] for unit in units],
            "stop_tokens": inputs.stop_tokens,
            "prompt_length": max(map(len, inputs.prompts)),
            "mesh": self.job.mesh,
            "on_chunk": on_chunk,
        }
        if setting.model != "pair":
            model, params = models[setting.model or ""]
            return decode_alone(model, params, prompts, **common)
        (base, params_base), (rl, params_rl) = models["base"], models["rl"]
        return decode_selective(
            (base, rl),
            (params_base, params_rl),
            prompts,
            criterion=setting.criterion or "",
            tau=setting.tau,
            gamma=setting.gamma,
            sample_from=setting.sample_from,
            top_logprobs=setting.top_logprobs,
            **common,
        )

    def _rows(self, generation: Responses, kept: list[tuple[int, int, int]], pool: GraderPool) -> list[Row]:
        inputs = self.job.inputs
        ids = [generation.tokens[row, : generation.lengths[row]].tolist() for row, _, _ in kept]
        texts = inputs.tokenizer.batch_decode(ids, skip_special_tokens=False)
        answers = [inputs.problems[place].answer for _, place, _ in kept]
        # A stop token is no part of an answer, though the published texts show it.
        plain = inputs.tokenizer.batch_decode(ids, skip_special_tokens=True)
        try:
            graded = pool.grade(self.job.config.grader, plain, answers)
        except RuntimeError as error:
            raise RunError(str(error)) from error
        return [
            Row(
                problem=self.indices[place],
                sample=sample,
                text=text,
                correct=verdict.correct,
                prediction=verdict.prediction,
                error=verdict.error,
                length=int(generation.lengths[row]),
                finished=bool(generation.finished[row]),
                **_fired(generation, row, self.setting),
            )
            for (row, place, sample), text, verdict in zip(kept, texts, graded, strict=True)
        ]

    def _publish(self, seed: int) -> None:
        inputs = self.job.inputs
        prompts = [(p.index, text, p.answer) for p, text in zip(inputs.problems, inputs.texts, strict=True)]
        write_json(self.folder / f"seed{seed}.json", published(prompts, self.logs[seed].rows, self.plan.n), indent=None)


def _fired(generation: Responses, row: int, setting: Setting) -> dict[str, tuple]:
    """Where the criterion fired in a row, and the token ids there."""
    if not isinstance(generation, SelectiveGeneration):
        return {}
    (at,) = np.nonzero(generation.fired[row, : generation.lengths[row]])
    resampled = tuple(generation.tokens[row, at].tolist())
    # Replacement draws from rl itself. An extrapolation draws nothing from the model that did not propose the token.
    drawn_from_other = setting.gamma == 0 and setting.sample_from == "base"
    return {
        "fired": tuple(at.tolist()),
        "original": tuple(generation.sampled_token[row, at].tolist()),
        "assistant": resampled if drawn_from_other else (None,) * len(at),
        "resampled": resampled,
    }


def _token_row(generation: Responses, row: int, seed: int, problem: int, sample: int) -> dict[str, Any]:
    """One row of tokens.parquet."""
    keys = (
        ("tokens", "logp", "delta_logp", "fired") if isinstance(generation, SelectiveGeneration) else ("tokens", "logp")
    )
    arrays = {key: getattr(generation, key)[row, : generation.lengths[row]] for key in keys}
    return {"seed": seed, "problem": problem, "sample": sample, **arrays}


class _CompilationCounter:
    """Counts what XLA compiles, so that a batch's speed can be told from its compilation."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event.endswith("backend_compile_duration")


@functools.cache
def _compilations() -> _CompilationCounter:
    return _CompilationCounter()
