"""From prompts to graded groups: generation batches, dynamic sampling, and the surplus that waits for the next step."""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from rlvr_jax.data.prompts import PromptSet, prompt_batches
from rlvr_jax.decoding.generate import Generation, decode
from rlvr_jax.decoding.state import LanguageModel
from rlvr_jax.rewards.pool import Graded, GraderPool, all_failed
from rlvr_jax.runs.pace import Pace
from rlvr_jax.runs.program import RunError
from train.config import AlgorithmConfig, Config
from train.step.groups import Group, Spool, from_plain, to_plain

log = logging.getLogger(__name__)


class Collected(NamedTuple):
    """The groups of one trainer step (fewer than train_batch only where `when_short` or the data end), numbers."""

    groups: list[Group]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What decoding needs besides parameters, prompts and sampling settings."""

    model: LanguageModel
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    max_response: int
    chunk: int
    mesh: jax.sharding.Mesh | None

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        problem_ids: Sequence[int],
        *,
        prompt_length: int,
        at_once: int | None,
        on_tokens: Callable[[int, int], None] = lambda tokens, rows: None,
        on_part: Callable[[list[Generation]], None] = lambda part: None,
        **sampling: Any,
    ) -> list[Generation]:
        """One `Generation` a prompt, decoded in equally shaped parts of `at_once` prompts (the last one filled up).

        `on_tokens` is told now and then how many tokens were drawn and how many responses are done, `on_part` is given
        the results of every part.

        Raises:
          RunError: no response has a token, since the logits are not finite: the weights hold NaN or infinities.
        """
        size = min(at_once or len(prompts), len(prompts))
        done, tokens, before = [], 0, 0
        for begin in range(0, len(prompts), size):
            part = list(range(begin, min(begin + size, len(prompts))))
            part += part[-1:] * (size - len(part))
            result = decode(
                self.model,
                params,
                [prompts[i] for i in part],
                problem_ids=[problem_ids[i] for i in part],
                max_new_tokens=self.max_response,
                stop_tokens=self.stop_tokens,
                prompt_length=prompt_length,
                chunk=self.chunk,
                mesh=self.mesh,
                on_chunk=lambda rows, drawn, rows_before=before, before=tokens: on_tokens(
                    before + drawn, rows_before + rows
                ),
                **sampling,
            )
            _check_finite(result)
            n = len(result.lengths) // size
            wanted = min(size, len(prompts) - begin)
            made = [Generation(*(x[i * n : (i + 1) * n] for x in result)) for i in range(wanted)]
            on_part(made)
            done += made
            tokens, before = tokens + int(result.lengths.sum()), before + len(result.lengths)
        return done

    def text(self, tokens: np.ndarray) -> str:
        """The response as text, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _check_finite(result: Generation) -> None:
    if result.invalid.all() and not result.lengths.any():
        raise RunError("no response has a token, since the logits are not finite: look for NaN or infinite weights")
    if result.invalid.any():
        log.warning(
            "%d of %d responses ended where the next token's logits were not finite; they count as cut",
            *(result.invalid.sum(), len(result.invalid)),
        )


def rows_done(on_phase: Callable[[str], None], phase: str, rows: int) -> Callable[[int, int], None]:
    """For `on_tokens`: says of a phase how many of its rows are done, and how fast since it was told first."""
    pace = Pace()

    def tell(tokens: int, done: int) -> None:
        pace.mark(tokens)
        speed = "" if pace.rate is None else f", {pace.rate:,.0f} tokens/s"
        on_phase(f"{phase} {min(done, rows)}/{rows} responses{speed}")

    return tell


def rollout_seed(seed: int, generation_batch: int) -> int:
    """The seed of a generation batch: another one for every batch, and none that `eval_seed` gives."""
    return (2 * seed << 32) + generation_batch


def eval_seed(seed: int) -> int:
    """The seed of every evaluation."""
    return 2 * seed + 1 << 32


class Collector:
    """Collects the groups of each trainer step; its state goes into the checkpoint.

    Groups beyond a step's need wait for the next one, first in first out (or are discarded, as published). They were
    sampled by an older policy: like all others they get old log-probs from the current trainer policy, so the ratio
    measures what this step changes, not how old they are; the gap metric and `carried_share` show their age.
    """

    def __init__(
        self, config: Config, decoder: Decoder, prompts: PromptSet, pool: GraderPool, spool: Spool | None = None
    ):
        self._config, self._decoder, self._prompts, self._pool = config, decoder, prompts, pool
        self._spool = spool or Spool(None, config.rollout.n, "")
        self._batches = prompt_batches(prompts.problems, config.rollout.generation_batch, config.seed)
        self._carried: collections.deque[Group] = collections.deque()
        self.prompt_length = max(len(tokens) for tokens in prompts.tokens)

    @property
    def generation_batches(self) -> int:
        """Generation batches since the run began."""
        return self._batches.drawn

    @property
    def counters(self) -> dict[str, float]:
        """What a record says of the place in the data."""
        return {"generation_batches": self.generation_batches, "epoch": self.epoch}

    @property
    def epoch(self) -> float:
        """Passes over the training problems since the run began."""
        return self._batches.epoch

    @property
    def exhausted(self) -> bool:
        """Whether the epochs are over; carried groups may be left."""
        return self._batches.epoch >= self._config.epochs

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train on."""
        return self.exhausted and not self._carried

    def collect(self, params: Any, trainer_step: int, on_phase: Callable[[str], None]) -> Collected:
        """Groups for one trainer step; an empty list when the data are used up.

        Raises:
          RunError: max_generation_batches did not give a full batch (and `when_short` is "error").
        """
        algorithm = self._config.algorithm
        kept, self._carried = list(self._carried), collections.deque()
        carried = min(len(kept), algorithm.train_batch)
        made: list[Group] = []
        batches, seconds = 0, collections.Counter()
        while len(kept) < algorithm.train_batch and not self.exhausted:
            if batches == algorithm.max_generation_batches:
                if algorithm.when_short == "pad" and kept:
                    break
                raise RunError(_short_of_groups(trainer_step, batches, made, len(kept), algorithm))
            groups, took = self._generation_batch(params, trainer_step, on_phase)
            batches += 1
            seconds.update(took)
            made += groups
            kept += [group for group in groups if group.varies or not algorithm.dynamic_sampling]
        groups, rest = kept[: algorithm.train_batch], kept[algorithm.train_batch :]
        if algorithm.surplus == "carry":
            self._carried.extend(rest)
        metrics = {
            "generation_batches_this_step": batches,
            "groups_trained": len(groups),
            "groups_carried_over": len(self._carried),
            "groups_discarded": 0 if algorithm.surplus == "carry" else len(rest),
            "carried_share": carried / max(1, len(groups)),
            "prompts_truncated": self._prompts.truncated,
            "prompts_dropped": self._prompts.dropped,
        }
        if made:
            metrics |= _rollout_metrics(made, seconds)
        return Collected(groups, metrics)

    def _generation_batch(
        self, params: Any, trainer_step: int, on_phase: Callable[[str], None]
    ) -> tuple[list[Group], dict[str, float]]:
        """The groups of the next generation batch, and the seconds of its phases."""
        number = self._batches.drawn
        chosen = [int(i) for i in next(self._batches)]
        if (kept := self._spool.load(number, trainer_step)) is not None:
            return kept
        rollout = self._config.rollout
        on_phase("rollout")
        start = time.monotonic()
        grader = ThreadPoolExecutor(1)  # one part is graded while the next is decoded
        graded: list[Future[list[Graded]]] = []
        waiting = iter(chosen)

        def grade(part: list[Generation]) -> None:
            graded.append(grader.submit(self._grade, [next(waiting) for _ in part], part))

        try:
            generations = self._decoder(
                params,
                [self._prompts.tokens[i] for i in chosen],
                range(len(chosen)),  # a prompt may come twice in a batch, at the edge of an epoch
                prompt_length=self.prompt_length,
                at_once=rollout.prompts_at_once,
                on_tokens=rows_done(on_phase, "rollout", len(chosen) * rollout.n),
                on_part=grade,
                n=rollout.n,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                seed=rollout_seed(self._config.seed, number),
            )
            generated = time.monotonic()
            on_phase(f"grade {len(chosen) * rollout.n} responses")
            verdicts = iter([verdict for part in graded for verdict in part.result()])
        finally:
            grader.shutdown(wait=False, cancel_futures=True)  # who ends the run does not wait for verdicts
        groups = [
            _group(prompt, trainer_step, number, generation, [next(verdicts) for _ in range(rollout.n)])
            for prompt, generation in zip(chosen, generations, strict=True)
        ]
        seconds = {"rollout": generated - start, "grade": time.monotonic() - generated}
        self._spool.save(number, trainer_step, groups, seconds)
        return groups, seconds

    def _grade(self, prompts: Sequence[int], generations: Sequence[Generation]) -> list[Graded]:
        responses = [
            self._decoder.text(tokens[:length])
            for generation in generations
            for tokens, length in zip(generation.tokens, generation.lengths, strict=True)
        ]
        answers = [self._prompts.problems[i].answer for i in prompts for _ in range(self._config.rollout.n)]
        return self._pool.grade(self._config.reward.rule, responses, answers)

    def snapshot(self) -> "Position":
        """Where the collector is now."""
        return Position(self._batches.get_state(), self._batches.drawn, tuple(self._carried))

    def set_state(self, plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Goes on exactly where the state was taken."""
        self._batches.set_state(plain["data"])
        self._carried = collections.deque(from_plain(plain["carried"], arrays, self._config.rollout.n))


class Position(NamedTuple):
    """A collector's state between two trainer steps: place in the data, batches drawn, groups that wait."""

    data: dict[str, Any]
    drawn: int
    carried: tuple[Group, ...]

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """As plain values and arrays, for a checkpoint."""
        plain, arrays = to_plain(self.carried)
        return {"data": self.data, "carried": plain}, arrays


def _group(prompt: int, trainer_step: int, number: int, generation: Generation, verdicts: Sequence[Graded]) -> Group:
    longest = int(generation.lengths.max())
    return Group(
        prompt=prompt,
        sampled_at=trainer_step,
        generation_batch=number,
        tokens=generation.tokens[:, :longest].copy(),
        logp=generation.logp[:, :longest].copy(),
        lengths=generation.lengths.copy(),
        finished=generation.finished.copy(),
        correct=np.array([verdict.correct for verdict in verdicts]),
        predictions=tuple(verdict.prediction for verdict in verdicts),
        errors=tuple(verdict.error for verdict in verdicts),
        score=np.array([verdict.reward for verdict in verdicts], np.float32),
    )


def _rollout_metrics(made: list[Group], seconds: collections.Counter) -> dict[str, float]:
    correct = np.concatenate([group.correct for group in made])
    lengths = np.concatenate([group.lengths for group in made])
    finished = np.concatenate([group.finished for group in made])
    return {
        "accuracy": float(correct.mean()),
        "groups_generated": len(made),
        "groups_kept_share": float(np.mean([group.varies for group in made])),
        "groups_all_correct_share": float(np.mean([group.correct.all() for group in made])),
        "groups_all_wrong_share": float(np.mean([not group.correct.any() for group in made])),
        "response_length": float(lengths.mean()),
        "response_length_max": int(lengths.max()),
        "response_cut_share": float(1 - finished.mean()),
        "grading_errors": sum(error is not None for group in made for error in group.errors),
        "rollout_tokens": int(lengths.sum()),
        "rollout_tokens_per_s": float(lengths.sum() / max(seconds["rollout"], 1e-9)),
        "seconds_rollout": seconds["rollout"],
        "seconds_grade": seconds["grade"],
    }


def _short_of_groups(step: int, batches: int, made: list[Group], kept: int, algorithm: AlgorithmConfig) -> str:
    accuracy = np.mean([group.correct.mean() for group in made])
    errors = [error for group in made for error in group.errors]
    failed = [error for error in errors if error is not None]
    said = (
        f"trainer step {step}: {batches} generation batches (algorithm.max_generation_batches) gave {kept} groups "
        f"whose scores vary, {algorithm.train_batch} are needed (algorithm.train_batch); "
    )
    if failures := all_failed(errors):
        return f"{said}{failures}; the reward rule, not the model, is what to look at"
    said += (
        f"mean accuracy {accuracy:.3f}: the problems are too hard or too easy for the model, or the grading rule does "
        "not read its answers"
    )
    if failed:
        said += f"; {len(failed)} of {len(errors)} gradings failed, such as: {failed[0]}"
    return said if algorithm.when_short == "pad" else f"{said} (algorithm.when_short=pad would train on what there is)"
