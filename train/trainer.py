"""One trainer step: graded groups in, a better policy out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlvr_jax.data.prompts import PromptSet
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.rewards.overlong import overlong_penalty
from rlvr_jax.sharding import ShardingRules
from rlvr_jax.training import TrainState, adamw, make_train_step, warmup_constant, with_learning_rate
from train.config import Config
from train.dapo import Rows, advantages, gap_metrics, make_loss, make_scorer, model_apply, scalars
from train.rollout import Group
from train.step_metrics import at_ratio_one, token_metrics


class Outcome(NamedTuple):
    """What a trainer step leaves behind.

    Attributes:
      metrics: its numbers.
      score_N, advantage_N, mean_logp_N: of each response, for the rollout dump.
      skipped: bool, of each mini-batch in order: its update was not finite and not made.
      arrays: what the updates were made of, N rows each: tokens_NT, mask_NT, response_NR, old_logp_NR, rollout_logp_NR,
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
      reference: parameters of the base model, for the masks that compare with it; None otherwise.
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
        self._config, self._prompts, self._prompt_length = config, prompts, prompt_length
        self._reference = reference
        optim, algorithm, chunk = config.optim, config.algorithm, config.model.logprob_chunk
        optimizer = adamw(
            b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay, clip_norm=optim.clip_norm
        )
        self.state = TrainState.create(params, optimizer)
        apply = model_apply(model_config)
        self._score = make_scorer(apply, chunk=chunk)
        self._step = make_train_step(
            apply,
            optimizer,
            make_loss(algorithm, chunk=chunk),
            micro_batches=algorithm.micro_batches,
            shardings=jax.tree.map(lambda x: x.sharding, self.state),
        )
        self._mesh = jax.tree.leaves(self.state.params)[0].sharding.mesh
        self._key = jax.random.fold_in(jax.random.key(config.seed), 2**32 - 1)  # no row of a decode has this problem id
        self._mini_rows = algorithm.mini_batch * config.rollout.n

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
        rows, rollout_logp_NR, penalty_N = self._rows(groups)
        on_phase("score")
        old_logp_NR, entropy_NR = self._scores(self.state.params, rows)
        ref_logp_NR = None if self._reference is None else self._scores(self._reference, rows)[0]
        advantage_N, each_NR, loss_mask_NR, reweight_mask_NR = jax.device_get(
            advantages(
                config.algorithm,
                *self._put(rows.score_N, rows.group_N, rows.response_NR, old_logp_NR, entropy_NR),
                None if ref_logp_NR is None else self._put(ref_logp_NR)[0],
                np.float32(config.algorithm.reweight.alpha),
                jax.random.fold_in(self._key, trainer_step),
            )
        )
        on_phase("update")
        lr = warmup_constant(trainer_step, peak=config.optim.lr, warmup=config.optim.warmup)
        self.state = with_learning_rate(self.state, lr)
        names = ("tokens_BT", "mask_BT", "old_logp_BR", "advantages_BR", "loss_mask_BR", "reweight_mask_BR")
        arrays = (rows.tokens_NT, rows.mask_NT, old_logp_NR, each_NR, loss_mask_NR, reweight_mask_NR)
        shared = scalars(config.algorithm, config.rollout.temperature)
        made, mini_batch_N = [], np.full(len(rows.group_N), -1, np.int32)
        begins = range(0, len(groups) * config.rollout.n, self._mini_rows)  # later ones would be padding alone
        for number, begin in enumerate(begins):
            part = self._put(*(x[begin : begin + self._mini_rows] for x in arrays))
            self.state, metrics = self._step(self.state, dict(zip(names, part, strict=True)) | shared)
            made.append(metrics)
            mini_batch_N[begin : begin + self._mini_rows] = number
            if number:  # one update waits while one is made: so the phase is true
                jax.block_until_ready(made[number - 1])
                on_phase(f"update {number}/{len(begins)} mini-batches")
        made = jax.device_get(made)
        on_phase("measure")
        metrics = _over_mini_batches(made)
        computed_N = mini_batch_N >= 0

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
            "overlong_penalty": float(penalty_N[real_N].mean()),
            "entropy": float(entropy_NR[real_NR].mean()),
            "old_logp": float(old_logp_NR[real_NR].mean()),
            "loss_token_share": float((loss_mask_NR > 0).sum() / real_NR.sum()),
            "trained_accuracy": float(np.mean([group.correct.mean() for group in groups])),
            "padding_row_share": float(1 - real_N.mean()),
            "padding_share": float(1 - rows.mask_NT[computed_N].mean()),
        }
        for name, mask_NR in {"rollout_gap": real_NR, "rollout_gap_fresh": fresh_NR}.items():
            metrics |= {f"{name}_{key}": x for key, x in gap_metrics(rollout_logp_NR, old_logp_NR, mask_NR).items()}
        if ref_logp_NR is not None:
            metrics["delta_logp"] = float((old_logp_NR - ref_logp_NR)[real_NR].mean())
        return Outcome(
            metrics,
            rows.score_N,
            advantage_N,
            old_logp_NR.sum(axis=1) / np.maximum(tokens_N, 1),
            np.array([bool(one["skipped"]) for one in made]),
            {
                "tokens_NT": rows.tokens_NT,
                "mask_NT": rows.mask_NT,
                "response_NR": rows.response_NR,
                "old_logp_NR": old_logp_NR,
                "rollout_logp_NR": rollout_logp_NR,
                "weight_NR": weight_NR,
                "weighed_NR": weighed_NR,
                "loss_mask_NR": loss_mask_NR,
                "mini_batch_N": mini_batch_N,
            },
        )

    def _rows(self, groups: Sequence[Group]) -> tuple[Rows, np.ndarray, np.ndarray]:
        """The step's arrays, padded to train_batch groups; the sampler's log-probs [N, R]; the punishments [N]."""
        rollout, reward = self._config.rollout, self._config.reward
        P, R, n = self._prompt_length, rollout.max_response, rollout.n
        N = self._config.algorithm.train_batch * n
        rows = Rows(
            tokens_NT=np.zeros((N, P + R), np.int32),
            mask_NT=np.zeros((N, P + R), np.int32),
            response_NR=np.zeros((N, R), np.int32),
            group_N=np.full(N, -1, np.int32),
            score_N=np.zeros(N, np.float32),
        )
        logp_NR, penalty_N = np.zeros((N, R), np.float32), np.zeros(N, np.float32)
        for g, group in enumerate(groups):
            prompt = self._prompts.tokens[group.prompt]
            at, longest = slice(g * n, (g + 1) * n), group.tokens.shape[1]
            rows.tokens_NT[at, P - len(prompt) : P] = prompt
            rows.tokens_NT[at, P : P + longest] = group.tokens
            rows.response_NR[at] = np.arange(R) < group.lengths[:, None]
            rows.mask_NT[at, P - len(prompt) : P] = 1
            rows.mask_NT[at, P:] = rows.response_NR[at]
            rows.group_N[at] = g
            logp_NR[at, :longest] = group.logp
            rows.score_N[at] = np.where(group.correct, 1.0, -1.0)
        if reward.overlong_buffer:  # of all rows at once: padding rows have length 0, hence no punishment
            penalty_N[:] = overlong_penalty(
                rows.response_NR.sum(axis=1),
                max_response=R,
                buffer=reward.overlong_buffer,
                factor=reward.overlong_factor,
            )
            rows.score_N[:] += penalty_N
        return rows, logp_NR, penalty_N

    def _scores(self, params: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs and entropies [N, R] under `params`, in parts as large as a micro-batch of the update."""
        size = self._mini_rows // self._config.algorithm.micro_batches
        temperature = np.float32(self._config.rollout.temperature)
        arrays = (rows.tokens_NT, rows.mask_NT, rows.response_NR)
        parts = [
            self._score(params, *self._put(*(x[begin : begin + size] for x in arrays)), temperature)
            for begin in range(0, len(rows.group_N), size)
        ]
        logp, entropy = zip(*jax.device_get(parts), strict=True)
        return np.concatenate(logp), np.concatenate(entropy)

    def _put(self, *arrays: np.ndarray) -> list[jax.Array]:
        rules = ShardingRules()
        return [jax.device_put(x, rules.sharding(self._mesh, ("batch", "time")[: x.ndim], x.shape)) for x in arrays]


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
