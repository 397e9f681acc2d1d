"""One micro-batch of a DAPO update and the optimizer, with each kind of attention that the device offers."""

import time
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device_check.sizes import Size, timed_config
from benchmarks.device_check.timing import median_seconds, peak_bytes, tree_bytes
from benchmarks.device_check.trace import traced
from rlvr_jax.models import qwen
from rlvr_jax.models.qwen import model_apply
from rlvr_jax.planning import ideal
from rlvr_jax.training import TrainState, make_accumulating_step, with_learning_rate
from train.config import AlgorithmConfig, OptimConfig
from train.step.objective import make_loss, scalars
from train.step.programs import make_optimizer

PACKED = 4  # sequences per row, where rows hold several


class Train:
    """A training program: lowered now, compiled by `pool`, measured later.

    Args:
      attention: a kind of `ModelConfig.attention`.
      packed: several sequences per row.
    """

    def __init__(self, size: Size, attention: str, pool: Executor, *, packed: bool):
        self.name = f"train_{attention}" + ("" if packed else "_one_sequence_per_row")
        self.size, self.packed = size, packed
        self.config = timed_config(size.models[0], dtype=size.dtype, remat="full", attention=attention)
        self.optimizer = make_optimizer(OptimConfig())
        loss = make_loss(AlgorithmConfig(), chunk=size.train_chunk, max_response=size.train_length)
        self.step = make_accumulating_step(model_apply(self.config), self.optimizer, loss)
        batch = self._batch()
        params = jax.eval_shape(self._params)
        sums = jax.eval_shape(self.step.begin, params, batch)

        def compile_it() -> tuple:
            begin = time.perf_counter()
            program = self.step.add.lower(params, sums, batch).compile()  # type: ignore[attr-defined]
            return program, time.perf_counter() - begin

        self._compiled = pool.submit(compile_it)

    def measure(self, out: Path, peak_flops: float | None) -> dict:
        """Seconds, MFU, memory and what the profiler saw; MFU is None where the device's rate is not known."""
        program, compile_s = self._compiled.result()
        memory, before = program.memory_analysis(), peak_bytes()
        params, batch = jax.jit(self._params)(), self._batch()
        sums = [self.step.begin(params, batch)]

        def add() -> object:
            sums[0] = program(params, sums[0], batch)
            return sums[0]

        seconds = median_seconds(add, self.size.repeats)
        tokens = self.size.train_rows * self.size.train_length
        model_flops, policy_flops = ideal.training_flops(self.config, self.size.train_rows, self._sequence())
        parts = self.size.train_length // self._sequence()
        found = {
            "compile_s": compile_s,
            "rows": self.size.train_rows,
            "tokens_per_row": self.size.train_length,
            "tokens_per_sequence": self._sequence(),
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": peak_flops and parts * model_flops / seconds / peak_flops,
            "TFLOP_s_with_remat": parts * policy_flops / seconds / 1e12,
            "loss": float(sums[0].total / sums[0].weight),  # type: ignore[attr-defined]
            "planned_bytes": memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            "peak_bytes": peak_bytes(),
            "peak_bytes_before": before,
            "profile": traced(add, out, self.name, 1),
        }
        state = with_learning_rate(TrainState.create(params, self.optimizer), 1e-6)
        found["optimizer"] = self._optimizer(state, sums[0], batch)
        return found

    def _optimizer(self, state: TrainState, sums: object, batch: dict) -> dict:
        """The second of two updates: the first one compiles."""
        moved = tree_bytes(state) * 2 + tree_bytes(sums)
        state, metrics = self.step.finish(state, sums)
        sums = self.step.begin(state.params, batch)
        jax.block_until_ready((state, metrics, sums))
        begin = time.perf_counter()
        jax.block_until_ready(self.step.finish(state, sums))
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "least_GB_s": moved / seconds / 1e9}

    def _params(self) -> Mapping:
        return qwen.init_params(self.config, jax.random.key(0))

    def _sequence(self) -> int:
        return self.size.train_length // (PACKED if self.packed else 1)

    def _batch(self) -> dict:
        rng, shape = np.random.default_rng(0), (self.size.train_rows, self.size.train_length)
        ones = np.ones(shape, np.float32)
        arrays = {
            "tokens_BT": rng.integers(0, self.config.vocab_size, shape, dtype=np.int32),
            "segment_BT": np.broadcast_to(1 + np.arange(shape[1], dtype=np.int32) // self._sequence(), shape),
            "old_logp_BT": -np.float32(np.log(self.config.vocab_size)) * ones,
            "advantages_BT": rng.standard_normal(shape).astype(np.float32),
            "loss_mask_BT": ones,
            "reweight_mask_BT": ones,
            **scalars(AlgorithmConfig(), 1.0),
        }
        return {name: jnp.asarray(x) for name, x in arrays.items()}


def programs(size: Size, pool: Executor) -> list[Train]:
    """What trainers would run: packed rows, and on a GPU one sequence per row through cuDNN as well."""
    made = [Train(size, "auto", pool, packed=True)]
    if jax.default_backend() == "gpu":
        made.append(Train(size, "cudnn", pool, packed=False))
    return made
