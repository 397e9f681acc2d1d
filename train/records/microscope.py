"""The microscope on a training run: every token of some rollouts under the initial policy and under the current one.

Every `log.microscope_every` trainer steps, `run_dir/microscope/step_000120/` gets the files of a diagnosis
(`python -m decode diagnose`): the step's responses as the policy of that moment sees them, before the step's updates.
It is the one that drew them, but for groups that were carried over and with `rollout.one_step_off`.
`python -m decode diagnose page run_dir/microscope` shows how the direction grows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlvr_jax.data.text import decode_ids, token_pieces
from rlvr_jax.generation import language_model
from rlvr_jax.microscope.columns import ScoredResponse
from rlvr_jax.microscope.files import write_scored
from rlvr_jax.microscope.pair import score_pair
from rlvr_jax.models.hf import load_hf
from rlvr_jax.runs.program import RunError
from rlvr_jax.sharding.decode_layout import DECODE_RULES
from train.check.prepare import Job
from train.step.groups import Group

BATCH_TOKENS = 16_384


class Sampled(NamedTuple):
    """A response of a step: its group, its number in it, and the number that the files know it by."""

    group: Group
    row: int
    sample: int

    @property
    def tokens(self) -> np.ndarray:
        """Its token ids."""
        return self.group.tokens[self.row, : self.group.lengths[self.row]]


def sampled(groups: Sequence[Group], count: int) -> list[Sampled]:
    """At most `count` responses, from groups spread evenly: the first of each, then the second, and so on."""
    n = len(groups[0].lengths)
    shown = min(count, len(groups))
    spread = [groups[i * len(groups) // shown] for i in range(shown)]
    places = [(group, row) for row in range(n) for group in spread][:count]
    numbers: dict[int, int] = {}  # a prompt may come twice in a batch, at the edge of an epoch
    found = []
    for group, row in places:
        sample = numbers[group.prompt] = numbers.get(group.prompt, -1) + 1
        found.append(Sampled(group, row, sample))
    return found


def observe(job: Job, groups: Sequence[Group], params: Any, step: int, *, write: bool) -> None:
    """Scores some responses of `groups` and writes the files.

    The initial policy is read from the model's folder, in the compute dtype, and freed on return.

    Args:
      job: the run.
      groups: those of the step, at least one.
      params: the current policy, prepared for decoding.
      step: the number of the trainer step that is about to be made, from 1.
      write: whether this process writes; all of a run score together.

    Raises:
      RunError: the model's folder cannot be read any more.
    """
    responses = sampled(groups, job.config.log.microscope_responses)
    try:
        dtype = jnp.dtype(job.model_config.dtype or "float32")
        initial = load_hf(job.model_folder, dtype=dtype, mesh=job.rollout_mesh, rules=DECODE_RULES)[1]
    except (ValueError, OSError) as error:
        raise RunError(f"model.path: {error}") from error
    with jax.set_mesh(job.rollout_mesh):
        initial = language_model(job.model_config).prepare(initial)
    columns = score_pair(
        *(job.model_config, initial, job.model_config, params),
        [job.train.tokens[one.group.prompt] for one in responses],
        [one.tokens.tolist() for one in responses],
        batch_tokens=BATCH_TOKENS,
        chunk=job.config.model.logprob_chunk,
        mesh=job.rollout_mesh,
    )
    if write:
        scored = []
        for one, found in zip(responses, columns, strict=True):
            pieces = token_pieces(job.tokenizer, one.tokens.tolist())
            problem = job.train.problems[one.group.prompt]
            scored.append(
                ScoredResponse(
                    problem=one.group.prompt,
                    sample=one.sample,
                    source=f"step {step}",
                    prompt=decode_ids(job.tokenizer, job.train.tokens[one.group.prompt]),
                    text="".join(pieces),
                    answer=problem.answer,
                    correct=bool(one.group.correct[one.row]),
                    pieces=pieces,
                    columns=found,
                )
            )
        write_scored(
            job.folder.local / "microscope" / f"step_{step:06d}",
            scored,
            lambda token: decode_ids(job.tokenizer, [token]),
        )
