"""From prompts to graded groups: generation batches, dynamic sampling, and the surplus that waits for the next step."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlvr_jax.data.prompts import PromptSet, prompt_batches
from rlvr_jax.decoding.generate import Generation, decode
from rlvr_jax.decoding.state import LanguageModel
from rlvr_jax.program import RunError
from rlvr_jax.rewards.pool import GraderPool
from train.config import Config

ROW_FIELDS = ("lengths", "finished", "correct", "score")  # arrays [n] of a group


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The n responses to one prompt, graded.

    Attributes:
      prompt: place in the prompt set.
      sampled_at: trainer steps that the sampling policy had behind it.
      generation_batch: number of the generation batch, from 0.
      tokens: int32 [n, longest], 0 beyond a response.
      logp: float32 [n, longest], the sampler's log-probs at its temperature.
      lengths: int32 [n] in tokens, the stop token included.
      finished: bool [n], ended by a stop token.
      correct: bool [n].
      predictions: the answer read from each response, or None.
      errors: why the grading of a response was cut short, or None.
      score: float32 [n], the rewards: the rule's own, or +1 for correct and -1 for wrong (as when none are given).
    """

    prompt: int
    sampled_at: int
    generation_batch: int
    tokens: np.ndarray
    logp: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    correct: np.ndarray
    predictions: tuple[str | None, ...]
    errors: tuple[str | None, ...] = ()
    score: np.ndarray = None  # pyright: ignore[reportAssignmentType] (filled below)

    def __post_init__(self):
        if self.score is None:
            object.__setattr__(self, "score", np.where(self.correct, 1.0, -1.0).astype(np.float32))
        if not self.errors:
            object.__setattr__(self, "errors", (None,) * len(self.correct))

    @property
    def varies(self) -> bool:
        """Whether the scores have a standard deviation above 0, so that the advantages say something.

        Under a rule that says right or wrong that is the accuracy, as published (the overlong punishment is no part of
        it); under a rule with graded rewards two right responses of different reward are enough.
        """
        return bool((self.score != self.score[0]).any())


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
        **sampling: Any,
    ) -> list[Generation]:
        """One `Generation` a prompt, decoded in equally shaped parts of `at_once` prompts (the last one filled up).

        `on_tokens` is told now and then how many tokens were drawn and how many responses are done.
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
            n = len(result.lengths) // size
            wanted = min(size, len(prompts) - begin)
            done += [Generation(*(x[i * n : (i + 1) * n] for x in result)) for i in range(wanted)]
            tokens, before = tokens + int(result.lengths.sum()), before + len(result.lengths)
        return done

    def text(self, tokens: np.ndarray) -> str:
        """The response as text, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def rows_done(on_phase: Callable[[str], None], phase: str, rows: int) -> Callable[[int, int], None]:
    """For `on_tokens`: says of a phase how many of its rows are done, and how fast."""
    start = time.monotonic()

    def tell(tokens: int, done: int) -> None:
        speed = tokens / max(time.monotonic() - start, 1e-9)
        on_phase(f"{phase} {min(done, rows)}/{rows} responses, {speed:,.0f} tokens/s")

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

    def __init__(self, config: Config, decoder: Decoder, prompts: PromptSet, pool: GraderPool):
        self._config, self._decoder, self._prompts, self._pool = config, decoder, prompts, pool
        self._batches = prompt_batches(prompts.problems, config.rollout.generation_batch, config.seed)
        self._carried: collections.deque[Group] = collections.deque()
        self.prompt_length = max(len(tokens) for tokens in prompts.tokens)

    @property
    def generation_batches(self) -> int:
        """Generation batches since the run began."""
        return self._batches.drawn

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
        batches, seconds, errors = 0, collections.Counter(), 0
        while len(kept) < algorithm.train_batch and not self.exhausted:
            if batches == algorithm.max_generation_batches:
                if algorithm.when_short == "pad" and kept:
                    break
                raise RunError(_short_of_groups(trainer_step, batches, made, kept, algorithm.train_batch))
            groups, took, failed = self._generation_batch(params, trainer_step, on_phase)
            batches, errors = batches + 1, errors + failed
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
            metrics |= _rollout_metrics(made, seconds, errors)
        return Collected(groups, metrics)

    def _generation_batch(
        self, params: Any, trainer_step: int, on_phase: Callable[[str], None]
    ) -> tuple[list[Group], dict[str, float], int]:
        rollout, reward = self._config.rollout, self._config.reward
        number = self._batches.drawn
        chosen = [int(i) for i in next(self._batches)]
        on_phase("rollout")
        start = time.monotonic()
        generations = self._decoder(
            params,
            [self._prompts.tokens[i] for i in chosen],
            range(len(chosen)),  # a prompt may come twice in a batch, at the edge of an epoch
            prompt_length=self.prompt_length,
            at_once=rollout.prompts_at_once,
            on_tokens=rows_done(on_phase, "rollout", len(chosen) * rollout.n),
            n=rollout.n,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=rollout_seed(self._config.seed, number),
        )
        generated = time.monotonic()
        on_phase(f"grade {len(chosen) * rollout.n} responses")
        responses = [
            self._decoder.text(tokens[:length])
            for generation in generations
            for tokens, length in zip(generation.tokens, generation.lengths, strict=True)
        ]
        answers = [self._prompts.problems[i].answer for i in chosen for _ in range(rollout.n)]
        graded = self._pool.grade(reward.rule, responses, answers)
        groups = []
        for g, (prompt, generation) in enumerate(zip(chosen, generations, strict=True)):
            verdicts = graded[g * rollout.n : (g + 1) * rollout.n]
            longest = int(generation.lengths.max())
            groups.append(
                Group(
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
            )
        took = {"rollout": generated - start, "grade": time.monotonic() - generated}
        return groups, took, sum(verdict.error is not None for verdict in graded)

    def get_state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Position in the data and the carried groups, as plain values and arrays."""
        plain = [
            {
                "prompt": group.prompt,
                "sampled_at": group.sampled_at,
                "generation_batch": group.generation_batch,
                "predictions": list(group.predictions),
                "errors": list(group.errors),
            }
            for group in self._carried
        ]
        arrays = {
            name: np.concatenate([getattr(group, name).reshape(-1) for group in self._carried])
            for name in ("tokens", "logp", *ROW_FIELDS)
            if self._carried
        }
        return {"data": self._batches.get_state(), "carried": plain}, arrays

    def set_state(self, plain: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Goes on exactly where `get_state` was called."""
        self._batches.set_state(plain["data"])
        self._carried.clear()
        row = at = 0
        n = self._config.rollout.n
        for group in plain["carried"]:
            # checkpoints made before there were graded rewards have no scores and no errors
            rows = {name: arrays[name][row : row + n] for name in ROW_FIELDS if name in arrays}
            longest = int(rows["lengths"].max())
            cells = {name: arrays[name][at : at + n * longest].reshape(n, longest) for name in ("tokens", "logp")}
            texts = {name: tuple(group.get(name, ())) for name in ("predictions", "errors")}
            fields: dict[str, Any] = group | rows | cells | texts
            self._carried.append(Group(**fields))
            row, at = row + n, at + n * longest


def _rollout_metrics(made: list[Group], seconds: collections.Counter, errors: int) -> dict[str, float]:
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
        "grading_errors": errors,
        "rollout_tokens": int(lengths.sum()),
        "rollout_tokens_per_s": float(lengths.sum() / max(seconds["rollout"], 1e-9)),
        "seconds_rollout": seconds["rollout"],
        "seconds_grade": seconds["grade"],
    }


def _short_of_groups(step: int, batches: int, made: list[Group], kept: list[Group], wanted: int) -> str:
    accuracy = np.mean([group.correct.mean() for group in made])
    return (
        f"trainer step {step}: {batches} generation batches (algorithm.max_generation_batches) gave {len(kept)} groups "
        f"whose scores vary, {wanted} are needed (algorithm.train_batch); mean accuracy {accuracy:.3f}: the "
        "problems are too hard or too easy for the model, or the grading rule does not read its answers "
        "(algorithm.when_short=pad would train on what there is)"
    )
