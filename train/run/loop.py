"""The training loop: collect, train, log, evaluate, checkpoint, export."""

import contextlib
import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from rlvr_jax.evaluation import bracketed
from rlvr_jax.generation import language_model
from rlvr_jax.models.hf import load_hf
from rlvr_jax.rewards.pool import rule_version
from rlvr_jax.runs.checkpoint import Checkpoints
from rlvr_jax.runs.distributed import cluster
from rlvr_jax.runs.files import remove_leftovers
from rlvr_jax.runs.program import Preempted, Preemption, RunError, compile_cache, config_dict, console, writing_to
from train.check.prepare import Job, grading
from train.records.display import Display
from train.records.metrics import MetricLog, plain, write_jsonl
from train.records.microscope import observe
from train.records.tokens import TokenTexts, drawn, token_rows
from train.records.trackers import Tracker, open_trackers
from train.run.export import export
from train.run.resume import restore
from train.run.same_run import CONTENT, fingerprint, write_record
from train.step.ahead import Ahead, own_copy
from train.step.bad_batch import STOP_AFTER, Skips, save_bad_batch
from train.step.evaluate import evaluate
from train.step.groups import Group, from_plain, to_plain
from train.step.metrics import PhaseClock, memory_metrics, phase_metrics
from train.step.rollout import Collected, Collector, Decoder
from train.step.together import SharedPool, SharedSpool, require_same_groups
from train.step.trainer import Outcome, Trainer

SHOWN = {
    "accuracy": ("accuracy", ".3f"),
    "kept": ("groups_kept_share", ".0%"),
    "groups": ("groups_trained", ".0f"),
    "entropy": ("entropy", ".3f"),
    "length": ("response_length", ".1f"),
    "gap": ("rollout_gap_mean_abs", ".1e"),
    "tokens/s": ("rollout_tokens_per_s", ",.0f"),
    "s": ("seconds", ".1f"),
}


def run(job: Job) -> None:
    """Runs a checked job to its end; raises RunError where it cannot go on."""
    with writing_to(job.config.run_dir), contextlib.ExitStack() as stack:
        stack.enter_context(job.folder)
        stack.enter_context(compile_cache(job.config.compile_cache, job.folder.local))
        stack.enter_context(jax.set_mesh(job.mesh))
        _Run(job, stack).run()


class _Run:
    """A run in progress. Everything that must be closed is on `stack`."""

    def __init__(self, job: Job, stack: contextlib.ExitStack):
        config = job.config
        self.job, self.config, self.folder = job, config, job.folder.local
        self.cluster = cluster()
        self.cluster.phase("load", 0)
        self.decoder = Decoder(
            model=language_model(job.model_config),
            tokenizer=job.tokenizer,
            stop_tokens=job.stop_tokens,
            max_response=config.rollout.max_response,
            chunk=config.rollout.chunk,
            mesh=job.rollout_mesh,
        )
        trackers = self._begin_files(stack) if self.cluster.main else []
        reward = config.reward
        self.pool = stack.enter_context(SharedPool(self.cluster, reward.workers, **grading(config)))
        wanted = ("seed", "data", "rollout", "reward", "model", "algorithm", "optim", *CONTENT)
        made_for: dict[str, Any] = {name: job.record[name] for name in wanted} | {
            "rule": rule_version(config.reward.rule)
        }
        for name, paths in {"model": ("path",), "data": ("train", "val")}.items():  # the content counts, not the place
            made_for[name] = {key: value for key, value in made_for[name].items() if key not in paths}
        self.spool = SharedSpool(
            self.cluster,
            self.folder / "generated" if config.checkpoint.generated else None,
            config.rollout.n,
            fingerprint(json.dumps(made_for, sort_keys=True).encode()),
        )
        self.collector = Collector(config, self.decoder, job.train, self.pool, self.spool)
        self.trainer = Trainer(
            config,
            job.model_config,
            self._load(jnp.float32),
            job.train,
            self.collector.prompt_length,
            self._load(job.model_config.dtype) if config.algorithm.needs_reference else None,
        )
        self.checkpoints = stack.enter_context(Checkpoints(job.folder.checkpoints, keep=config.checkpoint.keep))
        self.trainer_steps, self.skips = 0, Skips()
        self.preemption = stack.enter_context(Preemption())
        if self.cluster.watch is not None:
            self.cluster.watch.asked = lambda: self.preemption.asked
        self.ahead = stack.enter_context(Ahead(job.mesh)) if config.rollout.one_step_off else None
        self.counted = self.collector.counters
        resumed_from = None if job.resume_from is None else self._restore(job.resume_from)
        self.metrics = None
        if self.cluster.main:
            self.metrics = MetricLog(
                self.folder, after_step=resumed_from, tensorboard=config.log.tensorboard, trackers=trackers
            )
            stack.callback(self.metrics.close)
        self.evaluated = self.cluster.broadcast(self.metrics and self.metrics.last_step("eval"))
        seen = console if self.cluster.main else Console(quiet=True)
        self.display = stack.enter_context(
            Display(seen, total=config.steps, done=self.trainer_steps, shown=SHOWN, share=self._share())
        )
        self.clock, self.token_texts = PhaseClock(), TokenTexts(job.tokenizer)
        self.exported_step = None

    def _begin_files(self, stack: contextlib.ExitStack) -> list[Tracker]:
        """The folder as a run finds it, and the trackers."""
        config, resume = config_dict(self.config), self.job.resume_from is not None
        remove_leftovers(self.folder, "generated", "rollouts", "eval", "microscope/*", "hf", "hf_step_*")
        write_record(self.folder, self.config, self.job.record)
        self.job.folder.sync()  # a place that cannot be written to is found now
        log = self.config.log
        name = log.name or (self.job.folder.url or "").rpartition("/")[2] or None
        return open_trackers(
            stack, log.trackers, self.folder, config, resume=resume, project=log.project, run_name=name
        )

    def run(self) -> None:
        """Trainer steps until the steps or the data are used up; then the export."""
        for name, prompts in (("data.train", self.job.train), ("data.val", self.job.val)):
            if prompts is not None:
                self.display.line(f"{name}: {prompts.summary(self.config.data.max_prompt)}")
        if self.trainer_steps:
            self.display.line(f"resumed {self.config.run_dir} after trainer step {self.trainer_steps}")
        steps = math.inf if self.config.steps is None else self.config.steps
        self.position, self.covered = self.collector.snapshot(), 0
        try:
            self._after_step(last=False)  # at the beginning, or where the run was ended before it
            while self.trainer_steps < steps and self._step(last=self.trainer_steps + 1 >= steps):
                self._after_step(last=self.trainer_steps >= steps or self._used_up())
            self._after_step(last=True)
        except Preempted as asked:
            raise Preempted(self._preempted()) from asked
        self.checkpoints.wait()
        self.spool.discard(self.collector.generation_batches)
        self._export(self.folder / "hf")
        self.display.line(
            f"done: {self.trainer_steps} trainer steps, {self.trainer.optimizer_steps} optimizer steps, "
            f"{self.collector.generation_batches} generation batches; model in {self.job.folder.url or self.folder}/hf"
        )

    def _step(self, *, last: bool) -> bool:
        """One trainer step and its records; False where the data are used up."""
        traced = self.cluster.main and self.trainer_steps + 1 == self.config.log.profile_step
        with jax.profiler.trace(self.folder / "profile") if traced else contextlib.nullcontext():
            return self._trained(last)

    def _trained(self, last: bool) -> bool:
        self._interruptible("prepare")
        outside = self.clock.take()
        collected = self._collected(last)
        require_same_groups(self.cluster, collected.groups, self.trainer_steps)
        if not collected.groups:
            return False
        self._phase("prepare")
        collecting = self.clock.take()
        outside["microscope"] = self._looked(collected.groups)
        outcome = self.trainer.train(collected.groups, self.trainer_steps, self._phase)
        self._phase("log")
        training = self.clock.take()
        self.trainer_steps += 1
        self.skips, stop = self.skips.after(outcome.skipped)
        seconds = {"seconds_train": sum(training.values())} | phase_metrics(outside, collecting, training)
        skipped = {"skipped_in_a_row": self.skips.in_a_row, "skipped_total": self.skips.total}
        self._log("train", collected.metrics | outcome.metrics | skipped | seconds | memory_metrics())
        if self.cluster.main:
            self._dump(collected.groups, outcome)
        if stop is not None and self.cluster.main:  # which tells the others
            self._stop_not_finite(collected.groups, outcome, stop)
        if self.ahead is None:
            self.position = self.collector.snapshot()
        return True

    def _looked(self, groups: list[Group]) -> float:
        """The microscope's look at the step's responses, where it is due; the seconds that it took."""
        every, step = self.config.log.microscope_every, self.trainer_steps + 1
        if every and step % every == 0:
            self._phase("microscope")
            observe(self.job, groups, self._rollout_params(), step, write=self.cluster.main)
        taken = self.clock.take().get("microscope", 0.0)
        self._phase("prepare")
        return taken

    def _collected(self, last: bool) -> Collected:
        """The groups of this step; with one_step_off those of the next one are begun."""
        if self.ahead is None:
            collected = self.collector.collect(self._rollout_params(), self.trainer_steps, self._interruptible)
            self.counted = self.collector.counters
            return collected
        self._phase("rollout (waited for)")
        collected = self.ahead.take()
        if collected is None:
            collected = self.collector.collect(self._rollout_params(), self.trainer_steps, self._interruptible)
        self.counted = self.collector.counters  # now, before the thread goes on
        if not last and collected.groups and not self.collector.done:
            params = own_copy(self._rollout_params(), self.trainer.state.params)
            self.ahead.begin(partial(self.collector.collect, params, self.trainer_steps))
        return collected

    def _used_up(self) -> bool:
        """Whether there is nothing left to train on, as far as is known: a collection that goes on may give nothing."""
        return (self.ahead is None or not self.ahead.begun) and self.collector.done

    def _interruptible(self, name: str) -> None:
        """A phase in which a run that is asked to end may do so at once, since the policy is that of the last step."""
        self._phase(name)
        watch = self.cluster.watch
        if self.preemption.asked if watch is None else watch.stop_here():
            raise Preempted(name)

    def _preempted(self) -> str:
        """Saves what is not saved yet; what to tell the user."""
        if self.trainer_steps and self.checkpoints.latest != self.trainer_steps:
            self._save()
        self.checkpoints.wait()
        after = f"after trainer step {self.trainer_steps}, saved" if self.trainer_steps else "before the first step"
        return f"stopped on request (SIGTERM) {after}; the same command resumes"

    def _phase(self, name: str) -> None:
        self.job.folder.check()  # before anything is written there
        self.clock.phase(name)
        self.display.phase(name)
        self.cluster.phase(name, self.trainer_steps)

    def _share(self) -> float:
        """Share of the run that is done: of its steps or of its epochs, whichever ends it first."""
        steps = 0.0 if self.config.steps is None else self.trainer_steps / self.config.steps
        return min(1.0, max(steps, self.counted["epoch"] / self.config.epochs))

    def _after_step(self, *, last: bool) -> None:
        """Evaluation, checkpoint and export, where they are due and not made yet."""
        config, step = self.config, self.trainer_steps
        self.checkpoints.check()
        every = config.eval.every
        if (last or step == 0 or (every and step % every == 0)) and self.evaluated != step:
            self._evaluate()
        every = config.checkpoint.every
        if (last or (every and step and step % every == 0)) and self.checkpoints.latest != step:
            self._save()
        every = config.checkpoint.export_every
        if every and step and step % every == 0 and self.exported_step != step:
            self._export(self.folder / f"hf_step_{step}")
            self.exported_step = step

    def _rollout_params(self) -> Any:
        """The policy's weights as decoding wants them: compute dtype, one dict a layer, laid out for it."""
        with jax.set_mesh(self.job.rollout_mesh):
            return self.decoder.model.prepare(self.trainer.state.params)

    def _evaluate(self) -> None:
        if self.job.val is None:
            return
        metrics, rows = evaluate(
            self.config, self.decoder, self._rollout_params(), self.job.val, self.pool, self._interruptible
        )
        self._phase("log")
        self.evaluated = self.trainer_steps
        if self.metrics is not None:
            write_jsonl(self.folder / "eval" / f"step_{self.trainer_steps:06d}.jsonl", rows)
        self._log("eval", metrics)

    def _log(self, kind: str, metrics: dict[str, Any]) -> None:
        counters = {
            "trainer_steps": self.trainer_steps,
            "optimizer_steps": self.trainer.optimizer_steps,
            **self.counted,
        }
        record = {"kind": kind} | counters | metrics
        if self.metrics is not None:
            self.metrics.write(record)
        if kind == "train":
            self.display.step(record, self._share())
        else:
            avg = f"avg@{self.config.eval.n}"
            numbers = [f"{name} {x:.3f}" for name, x in metrics.items() if name.startswith("pass@")]
            interval = bracketed(metrics[f"{avg}_low"], metrics[f"{avg}_high"], ".3f")
            line = "  ".join([f"{avg} {metrics[avg]:.3f} {interval}", *numbers])
            self.display.line(f"eval after step {self.trainer_steps}  {line}")

    def _stop_not_finite(self, groups: list[Group], outcome: Outcome, mini_batch: int) -> None:
        rows = [
            {
                "problem": self.job.train.problems[group.prompt].id,
                "prompt_tokens": self.job.train.tokens[group.prompt],
                "group": g,
                "sample": i,
                "generation_batch": group.generation_batch,
                "response": self.decoder.text(group.tokens[i, : group.lengths[i]]),
            }
            for g, group in enumerate(groups)
            for i in range(self.config.rollout.n)
        ]
        arrays = {name: x for name, x in outcome.arrays.items() if name != "weight_NR"}  # NaN there is no fault
        path = save_bad_batch(self.folder, self.trainer_steps, arrays, mini_batch, rows)
        raise RunError(
            f"trainer step {self.trainer_steps}: the loss or its gradient was not finite in {STOP_AFTER} mini-batches "
            f"in a row, the last one number {mini_batch + 1} of the step; their rows are in {path} (who they are in "
            f"{path.with_suffix('.json').name}); the newest checkpoint is of step {self.checkpoints.latest}"
        )

    def _dump(self, groups: list[Group], outcome: Outcome) -> None:
        log, n = self.config.log, self.config.rollout.n
        rows = []
        for g, group in enumerate(groups[: log.rollouts]):
            problem = self.job.train.problems[group.prompt]
            prompt = self.job.train.tokens[group.prompt]
            for i in range(n):
                tokens = group.tokens[i, : group.lengths[i]]
                rows.append(
                    {
                        "problem": problem.id,
                        **drawn(self.job.tokenizer, prompt, tokens),
                        "response": self.decoder.text(tokens),
                        "answer": problem.answer,
                        "prediction": group.predictions[i],
                        "correct": bool(group.correct[i]),
                        "error": group.errors[i],
                        "score": float(outcome.score_N[g * n + i]),
                        "length": int(group.lengths[i]),
                        "finished": bool(group.finished[i]),
                        "advantage": float(outcome.advantage_N[g * n + i]),
                        "mean_logp": float(outcome.mean_logp_N[g * n + i]),
                        "group": g,
                        "sampled_at": group.sampled_at,
                    }
                    | (token_rows(self.token_texts, outcome.arrays, g * n + i) if log.tokens else {})
                )
        if rows:
            write_jsonl(self.folder / "rollouts" / f"step_{self.trainer_steps:06d}.jsonl", rows)

    def _save(self) -> None:
        self._phase("save")
        ahead = None if self.ahead is None else self.ahead.wait()
        position = self.position if self.ahead is None else self.collector.snapshot()
        collector, arrays = position.state()
        host = {
            "config": self.job.record,
            "trainer_steps": self.trainer_steps,
            "collector": collector,
            "skips": dataclasses.asdict(self.skips),
            "counted": self.counted,
        }
        if ahead is not None:
            groups, more = to_plain(ahead.groups)
            host["ahead"] = {"groups": groups, "metrics": {name: plain(x) for name, x in ahead.metrics.items()}}
            arrays = arrays | {f"ahead_{name}": x for name, x in more.items()}
        self.job.folder.sync()  # before the checkpoint that counts on it
        self.checkpoints.save(self.trainer_steps, self.trainer.state, host=host, arrays=arrays)
        self.spool.discard(self.covered)  # by the checkpoint before: this one is being written
        self.covered = position.drawn

    def _restore(self, step: int) -> int:
        """Takes up the run from the checkpoint of `step`, or an older one; the step of what was restored."""
        restored = restore(self.checkpoints, self.trainer.state, step, fallback=self.config.checkpoint.fallback)
        self.trainer.state = restored.state
        self.trainer_steps = restored.host["trainer_steps"]
        self.skips = Skips(**restored.host.get("skips", {}))  # older checkpoints have none
        self.collector.set_state(restored.host["collector"], restored.arrays)
        self.counted = restored.host.get("counted", self.collector.counters)
        if self.ahead is not None and (saved := restored.host.get("ahead")) is not None:
            begins = "ahead_"
            arrays = {name.removeprefix(begins): x for name, x in restored.arrays.items() if name.startswith(begins)}
            self.ahead.put(Collected(from_plain(saved["groups"], arrays, self.config.rollout.n), saved["metrics"]))
        return restored.step

    def _export(self, folder: Path) -> None:
        self._phase("export")
        job, dtype = self.job, self.config.checkpoint.export_dtype
        params = self.trainer.state.params
        source = job.model_folder
        export(folder, job.model_config, params, job.tokenizer, base=source, tokenizer_folder=source, dtype=dtype)

    def _load(self, dtype: Any) -> Any:
        try:
            return load_hf(self.job.model_folder, dtype=dtype, mesh=self.job.mesh)[1]
        except (ValueError, OSError) as error:
            raise RunError(f"model.path: {error}") from error
