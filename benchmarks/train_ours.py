"""This library's side of `benchmarks.train`: the update of the training program, on packed rows."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import train_cases as cases
from benchmarks.memory_peak import peak_above, reset_peak
from benchmarks.worker import serve
from rlvr_jax import load_hf
from rlvr_jax.dapo import make_scorer
from rlvr_jax.data.packing import PackedRows
from rlvr_jax.models.qwen import model_apply
from rlvr_jax.training import TrainState, adamw, make_accumulating_step, with_learning_rate
from train.config import AlgorithmConfig, ReweightConfig
from train.step.objective import make_loss, scalars

_RATE_SECONDS = 0.3  # of each product


def start(hello: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    config, params = load_hf(hello["folder"], dtype=jnp.float32)
    config = dataclasses.replace(config, dtype="float32", remat=hello["remat"])
    algorithm = AlgorithmConfig(reweight=ReweightConfig("low_prob", cases.ALPHA))
    apply, chunk = model_apply(config), hello["chunk"]
    optimizer = adamw(
        b1=cases.B1, b2=cases.B2, eps=cases.EPS, weight_decay=cases.WEIGHT_DECAY, clip_norm=cases.CLIP_NORM
    )
    score = make_scorer(apply, chunk=chunk)
    step = make_accumulating_step(
        apply, optimizer, make_loss(algorithm, chunk=chunk, max_response=cases.LENGTH - cases.PROMPT)
    )
    state = with_learning_rate(TrainState.create(params, optimizer), cases.LR)
    prepared: dict[str, tuple[PackedRows, list[np.ndarray]]] = {}
    baseline = reset_peak()

    def prepare(kind: str) -> tuple[PackedRows, list[np.ndarray]]:
        """The sequences packed, with old log-probs from the policy itself."""
        made = cases.sequences(kind)
        longest = cases.LENGTH - cases.PROMPT
        response_NR = np.arange(longest) < made.responses[:, None]
        rows = PackedRows.of(
            list(made.tokens[:, : cases.PROMPT]),
            made.tokens[:, cases.PROMPT :],
            response_NR,
            row_length=cases.LENGTH,
            micro_rows=hello["micro_rows"],
        )
        logp = [score(state.params, *part, np.float32(1)) for part in rows.micro_batches()]
        old_NR = rows.gather(np.concatenate([np.asarray(x[0]) for x in logp]))
        weighted_NR = made.advantages[:, None] * (1 + cases.ALPHA * (1 - np.exp(old_NR)))
        ones_NR = response_NR.astype(np.float32)
        return rows, [rows.spread(x) for x in (old_NR, weighted_NR.astype(np.float32), ones_NR, ones_NR)]

    def update(kind: str) -> dict[str, Any]:
        nonlocal state, baseline
        if kind not in prepared:
            prepared[kind] = prepare(kind)
            baseline = reset_peak()
        rows, spread = prepared[kind]
        names = ("tokens_BT", "segment_BT", "old_logp_BT", "advantages_BT", "loss_mask_BT", "reweight_mask_BT")
        shared = scalars(algorithm, 1.0)
        started, sums = time.perf_counter(), None
        for part in rows.micro_batches(*spread):
            batch = dict(zip(names, part, strict=True)) | shared
            sums = step.begin(state.params, batch) if sums is None else sums
            sums = step.add(state.params, sums, batch)
        state, metrics = step.finish(state, sums)
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        return {
            "seconds": time.perf_counter() - started,
            "loss": loss,
            "grad_norm": norm,
            "peak": peak_above(baseline),
            "computed_tokens": rows.tokens.size,
            "padding_share": rows.padding_share,
            "programs": step.add._cache_size(),  # pyright: ignore[reportFunctionMemberAccess]
        }

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if message["ask"] == "products":
            return {"seconds": products_seconds(hello["micro_rows"] * cases.LENGTH)}
        return update(message["kind"])

    return answer


def products_seconds(rows: int) -> float:
    """Seconds of the products of an update on all full-length sequences, `rows` tokens at a time, one by one."""
    micro_batches = cases.ROWS * cases.LENGTH / rows
    return sum(count * micro_batches * _product(*shape) for _, shape, count in cases.product_shapes(rows))


def _product(m: int, k: int, n: int) -> float:
    """Median seconds of [m, k] x [k, n], stored as jax likes it."""
    a, b = jnp.ones((m, k), jnp.float32), jnp.full((k, n), 1e-3, jnp.float32)
    run = jax.jit(jnp.matmul)
    run(a, b).block_until_ready()
    seconds: list[float] = []
    while sum(seconds) < _RATE_SECONDS:
        started = time.perf_counter()
        run(a, b).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


if __name__ == "__main__":
    serve(start)
