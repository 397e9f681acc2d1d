"""One trainer step: graded groups in, a better policy out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlvr_jax.data.packing import PackedRows
from rlvr_jax.data.prompts import PromptSet
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.objectives.tokens import Tokens
from rlvr_jax.rewards.overlong import overlong_penalty
from rlvr_jax.runs.distributed import place, to_host
from rlvr_jax.sharding.rules import ShardingRules
from rlvr_jax.training import TrainState, warmup_constant, with_learning_rate
from train.config import Config
from train.step.metrics import at_ratio_one, gap_metrics, importance_metrics, token_metrics
from train.step.objective import advantages, scalars
from train.step.programs import make_optimizer, make_programs, row_length
from train.step.rollout import Group


class Responses(NamedTuple):
    """The responses of one trainer step, group after group: N = train_batch * n rows, the last ones empty where groups
    are missing.

    Attributes:
      prompts: the prompt of each response that is there.
      tokens_NR: int32 [N, R], 0 beyond a response.
      response_NR: int32 [N, R], 1 on response tokens, the stop token included.
      logp_NR: the sampler's log-probs.
      group_N: number of the row's group, -1 for empty rows.
      score_N: shaped reward: +1 or -1 plus the overlong punishment; 0 for empty rows.
      penalty_N: that punishment, at most 0.
    """

    prompts: list[list[int]]
    tokens_NR: np.ndarray
    response_NR: np.ndarray
    logp_NR: np.ndarray
    group_N: np.ndarray
    score_N: np.ndarray
    penalty_N: np.ndarray


class Outcome(NamedTuple):
    """What a trainer step leaves behind.

    Attributes:
      metrics: its numbers.
      score_N, advantage_N, mean_logp_N: of each response, for the rollout dump.
      skipped: bool, of each mini-batch in order: its update was not finite and not made.
      arrays: what the updates were made of, N rows each: tokens_NR, response_NR, old_logp_NR, rollout_logp_NR,
        weight_NR and weighed_NR (the advantage times it, at ratio 1), loss_mask_NR, and mini_batch_N, the number of
        each row's mini-batch (-1: in none).
    """

    metrics: dict[str, float]
    score_N: np.ndarray
    advantage_N: np.ndarray
    mean_logp_N: np.ndarray
    skipped: np.ndarray
    arrays: dict[str, np.ndarray]


class Trainer:
    """The train state and the compiled programs of a run. All shapes are fixed when it is made.

    Args:
      config: the run's configuration.
      model_config: the policy's architecture; its dtype is the compute dtype.
      params: float32 master weights, on the ambient mesh.
      prompts: the prompt set that groups refer to.
      prompt_length: columns for a prompt.
      reference: parameters of the base model, for the masks and the penalty that compare with it; None otherwise.
    """

    def __init__(
        self,
        config: Config,
        model_config: QwenConfig,
        params: Any,
        prompts: PromptSet,
        prompt_length: int,
        reference: Any | None,
    ):
        self._config, self._prompts = config, prompts
        self._reference = reference
        algorithm = config.algorithm
        if reference is None and algorithm.needs_reference:
            raise ValueError("reference=None: the configuration's masks or its KL penalty compare with the base model")
        optimizer = make_optimizer(config.optim)
        self.state = TrainState.create(params, optimizer)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self._score, self._step = make_programs(config, model_config, optimizer, shardings)
        self._mesh = jax.tree.leaves(self.state.params)[0].sharding.mesh
        self._key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)  # no row of a decode has this problem id
        self._mini_rows = algorithm.mini_batch * config.rollout.n
        self._row_length = row_length(config, prompt_length)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps made since the run began, skipped ones not counted."""
        return int(self.state.step)

    def train(self, groups: Sequence[Group], trainer_step: int, on_phase: Callable[[str], None]) -> Outcome:
        """Scores `groups` with the current policy, then updates it mini-batch by mini-batch.

        Args:
          groups: at most train_batch of them; missing ones become rows of weight zero.
          trainer_step: its number, from 0.
        """
        config = self._config
        rows = self._responses(groups)
        packed = self._packed(rows)
        on_phase("score")
        old_logp_NR, entropy_NR = self._scores(self.state.params, packed, rows.response_NR.shape)
        ref_logp_NR = None
        if self._reference is not None:
            ref_logp_NR, _ = self._scores(self._reference, packed, rows.response_NR.shape)
        step_key = jax.random.fold_in(self._key, trainer_step)
        given = Tokens(rows.response_NR, old_logp_NR, entropy_NR, ref_logp_NR, rows.logp_NR, group_B=rows.group_N)
        placed = Tokens(*(None if x is None else self._put(x)[0] for x in given))._replace(key=step_key)
        alpha = np.float32(config.algorithm.reweight.alpha)
        advantage_N, made = advantages(config.algorithm, *self._put(rows.score_N), placed, alpha)
        advantage_N, tokens = to_host((advantage_N, made._replace(key=None)))
        each_NR, loss_mask_NR, reweight_mask_NR = tokens.advantages_BT, tokens.loss_mask_BT, tokens.reweight_mask_BT
        on_phase("update")
        lr = warmup_constant(trainer_step, peak=config.optim.lr, warmup=config.optim.warmup)
        self.state = with_learning_rate(self.state, lr)
        arrays = tokens.arrays()
        made = []
        for number, part in enumerate(packed):
            made.append(self._update(number, part, arrays))
            if number:  # one update waits while one is made: so the phase is true
                jax.block_until_ready(made[number - 1])
                on_phase(f"update {number}/{len(packed)} mini-batches")
        made = to_host(made)
        on_phase("measure")
        metrics = _over_mini_batches(made)

        real_NR = rows.response_NR > 0
        real_N = rows.group_N >= 0
        fresh_NR = (
            real_NR & np.isin(rows.group_N, [g for g, x in enumerate(groups) if x.sampled_at == trainer_step])[:, None]
        )
        tokens_N = rows.response_NR.sum(axis=1)
        weighed_NR = at_ratio_one(config.algorithm, each_NR, old_logp_NR, rows.response_NR, reweight_mask_NR)
        of_tokens, weight_NR = token_metrics(
            config.algorithm, advantage_N, weighed_NR, old_logp_NR, rows.response_NR, loss_mask_NR
        )
        metrics |= of_tokens
        metrics |= {
            "lr": lr,
            "score": float(rows.score_N[real_N].mean()),
            "overlong_penalty": float(rows.penalty_N[real_N].mean()),
            "entropy": float(entropy_NR[real_NR].mean()),
            "old_logp": float(old_logp_NR[real_NR].mean()),
            "loss_token_share": float((loss_mask_NR > 0).sum() / real_NR.sum()),
            "trained_accuracy": float(np.mean([group.correct.mean() for group in groups])),
            "padding_share": float(np.average([x.padding_share for x in packed], weights=[len(x) for x in packed])),
        }
        for name, mask_NR in {"rollout_gap": real_NR, "rollout_gap_fresh": fresh_NR}.items():
            metrics |= {f"{name}_{key}": x for key, x in gap_metrics(rows.logp_NR, old_logp_NR, mask_NR).items()}
        if tokens.importance_BT is not None:
            metrics |= importance_metrics(tokens.importance_BT, real_NR, config.algorithm.importance_cap)
        if ref_logp_NR is not None:
            metrics["delta_logp"] = float((old_logp_NR - ref_logp_NR)[real_NR].mean())
        return Outcome(
            metrics,
            rows.score_N,
            advantage_N,
            old_logp_NR.sum(axis=1) / np.maximum(tokens_N, 1),
            np.array([bool(one["skipped"]) for one in made]),
            {
                "tokens_NR": rows.tokens_NR,
                "response_NR": rows.response_NR,
                "old_logp_NR": old_logp_NR,
                "rollout_logp_NR": rows.logp_NR,
                "weight_NR": weight_NR,
                "weighed_NR": weighed_NR,
                "loss_mask_NR": loss_mask_NR,
                "mini_batch_N": np.where(rows.group_N >= 0, np.arange(len(rows.group_N)) // self._mini_rows, -1),
            },
        )

    def _update(self, number: int, rows: PackedRows, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The optimizer step of mini-batch `number`; its metrics."""
        shared = scalars(self._config.algorithm, self._config.rollout.temperature)
        begin = number * self._mini_rows
        spread = [rows.spread(x_NR[begin : begin + len(rows.response_NR)]) for x_NR in arrays.values()]
        names = ("tokens_BT", "segment_BT", *arrays)
        batches = (dict(zip(names, self._put(*part), strict=True)) | shared for part in rows.micro_batches(*spread))
        if self._config.algorithm.micro_batches == 1:  # packed, a mini-batch has no more rows than unpacked
            (batch,) = batches
            self.state, metrics = self._step.whole(self.state, batch)
            return metrics
        sums = None
        for batch in batches:
            sums = self._step.begin(self.state.params, batch) if sums is None else sums
            sums = self._step.add(self.state.params, sums, batch)
        self.state, metrics = self._step.finish(self.state, sums)
        return metrics

    def _responses(self, groups: Sequence[Group]) -> Responses:
        rollout, reward = self._config.rollout, self._config.reward
        R, n = rollout.max_response, rollout.n
        N = self._config.algorithm.train_batch * n
        rows = Responses(
            prompts=[self._prompts.tokens[group.prompt] for group in groups for _ in range(n)],
            tokens_NR=np.zeros((N, R), np.int32),
            response_NR=np.zeros((N, R), np.int32),
            logp_NR=np.zeros((N, R), np.float32),
            group_N=np.full(N, -1, np.int32),
            score_N=np.zeros(N, np.float32),
            penalty_N=np.zeros(N, np.float32),
        )
        for g, group in enumerate(groups):
            at, longest = slice(g * n, (g + 1) * n), group.tokens.shape[1]
            rows.tokens_NR[at, :longest] = group.tokens
            rows.response_NR[at] = np.arange(R) < group.lengths[:, None]
            rows.logp_NR[at, :longest] = group.logp
            rows.group_N[at] = g
            rows.score_N[at] = group.score
        if reward.overlong_buffer:  # of all rows at once: empty rows have length 0, hence no punishment
            rows.penalty_N[:] = overlong_penalty(
                rows.response_NR.sum(axis=1),
                max_response=R,
                buffer=reward.overlong_buffer,
                factor=reward.overlong_factor,
            )
            rows.score_N[:] += rows.penalty_N
        return rows

    def _packed(self, rows: Responses) -> list[PackedRows]:
        """Every mini-batch that has responses."""
        made = []
        for begin in range(0, len(rows.prompts), self._mini_rows):
            part = slice(begin, min(begin + self._mini_rows, len(rows.prompts)))
            made.append(
                PackedRows.of(
                    rows.prompts[part],
                    rows.tokens_NR[part],
                    rows.response_NR[part],
                    row_length=self._row_length,
                    micro_rows=self._mini_rows // self._config.algorithm.micro_batches,
                    several=self._config.algorithm.packing,
                )
            )
        return made

    def _scores(self, params: Any, packed: Sequence[PackedRows], shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """Log-probs and entropies [N, R] under `params`, 0 beyond the responses."""
        temperature = np.float32(self._config.rollout.temperature)
        scored = [
            [self._score(params, *self._put(*part), temperature) for part in rows.micro_batches()] for rows in packed
        ]
        made = np.zeros((2, *shape), np.float32)
        for i, (rows, parts) in enumerate(zip(packed, scored, strict=True)):
            begin = i * self._mini_rows
            for out_NR, values in zip(made, zip(*to_host(parts), strict=True), strict=True):
                out_NR[begin : begin + len(rows.response_NR)] = rows.gather(np.concatenate(values))
        return tuple(made)

    def _put(self, *arrays: np.ndarray) -> list[jax.Array]:
        rules = ShardingRules()
        return [place(x, rules.sharding(self._mesh, ("batch", "time")[: x.ndim], x.shape)) for x in arrays]


def _over_mini_batches(made: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the optimizer steps of a trainer step; of those alone that were not skipped, where there are any."""
    done = [metrics for metrics in made if not metrics["skipped"]] or made
    merged = {name: float(np.mean([metrics[name] for metrics in done])) for name in made[0]}
    merged.pop("weight")
    return merged | {
        "grad_norm_max": float(np.max([metrics["grad_norm"] for metrics in done])),
        "skipped": float(np.sum([metrics["skipped"] for metrics in made])),
        "mini_batches": float(len(made)),
        "loss_weight": float(np.sum([metrics["weight"] for metrics in made])),
    }
