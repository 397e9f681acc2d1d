"""The decode program with full caches: one model, and a pair with verified blocks, beside the bandwidth limit."""

import statistics
import time
from concurrent.futures import Executor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device_check.sizes import Size, timed_config
from benchmarks.device_check.timing import peak_bytes, tree_bytes
from benchmarks.device_check.trace import traced
from rlvr_jax.decoding.sampling import Sampling
from rlvr_jax.decoding.slots import empty_slots
from rlvr_jax.decoding.state import DecodeState, Selection, row_keys
from rlvr_jax.decoding.steps import Rule, advance
from rlvr_jax.generation import language_model
from rlvr_jax.models import qwen

GAMMA, FIRED = 0.1, 0.03  # extrapolation, and the share of tokens at which the pair's criterion fires
NEVER = 1 << 20


class Decode:
    """A decode program of one model or of a pair of its shape: lowered now, compiled by `pool`, measured later."""

    def __init__(self, size: Size, model: str, pool: Executor, *, pair: bool):
        self.name = f"decode_{model.split('/')[-1]}_{'pair' if pair else 'single'}"
        self.size, self.config = size, timed_config(model, dtype=size.dtype)
        self.models = (language_model(self.config),) * (2 if pair else 1)
        self.rule = Rule("delta_logp", "base", None) if pair else None
        self.blocks = (size.block, size.chunk // size.block) if pair else (size.chunk, 1)
        params = jax.eval_shape(self._params)
        state = jax.eval_shape(lambda: empty_slots(self.models, size.rows, size.length))
        stop, leave = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

        def compile_it() -> tuple:
            begin = time.perf_counter()
            lowered = advance.lower(self.models, self.rule, *self.blocks, params, stop, leave, state)
            return lowered.compile(), time.perf_counter() - begin

        self._compiled = pool.submit(compile_it)

    def measure(self, out: Path, bytes_per_s: float | None) -> dict:
        """Tokens/s by live context, nucleus and temperature, and what the profiler saw of the first of them.

        `share_of_bandwidth` is the least bytes of a pass (weights, and the live cache of every row) over its seconds,
        as a share of `bytes_per_s`; None where that is not known. A pair's threshold fires at 3% of the tokens.
        """
        program, compile_s = self._compiled.result()
        params, stop, leave = jax.jit(self._params)(), jnp.full(1, -1, jnp.int32), jnp.int32(self.size.rows + 1)
        text, memory = program.as_text(), program.memory_analysis()
        found: dict = {
            "compile_s": compile_s,
            "weight_bytes": tree_bytes(params[0]),
            "temporary_bytes": memory and memory.temp_size_in_bytes,
            "while_loops": text.count(" while("),
            "conditionals": text.count(" conditional("),
            "cases": [],
        }
        tau, state = -np.inf, self._state(self.size.live[0], 1.0, 1.0)
        if self.rule is not None:
            state, report = program(params, stop, leave, state)
            tau = float(np.quantile(np.asarray(report["delta_logp"]), FIRED))
        cases = [(live, top_p, 1.0) for live in self.size.live for top_p in (1.0, 0.7)]
        for live, top_p, temperature in [*cases, (self.size.live[0], 1.0, 0.0)]:
            state = self._at(state, live, top_p, temperature, tau)
            times = []
            for repeat in range(1 + self.size.repeats):  # the first one warms up
                state = self._at(state, live, top_p, temperature, tau)
                jax.block_until_ready(state)
                begin = time.perf_counter()
                state, report = program(params, stop, leave, state)
                report = jax.device_get(report)
                times += [time.perf_counter() - begin] if repeat else []
            found["cases"].append(
                {"live": live, "top_p": top_p, "temperature": temperature}
                | self._figures(report, statistics.median(times), live, found["weight_bytes"], bytes_per_s)
            )
        state = self._at(state, self.size.live[0], 1.0, 1.0, tau)
        jax.block_until_ready(state)
        found["profile"] = traced(
            lambda: program(params, stop, leave, state)[1], out, self.name, found["cases"][0]["passes"]
        )
        found["peak_bytes"] = peak_bytes()
        return found

    def _figures(self, report: dict, seconds: float, live: int, weights: int, bytes_per_s: float | None) -> dict:
        tokens, drafted = int(report["emitted"].sum()), int(report["steps"].sum())
        verified = int((report["steps"] > 0).sum()) if self.rule is not None else 0
        passes, rows = drafted + verified, self.size.rows
        shape = self.config
        entry = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * jnp.dtype(self.size.dtype).itemsize
        least = passes * (weights + rows * (live + tokens / rows / 2) * entry)
        figures = {
            "seconds": seconds,
            "tokens": tokens,
            "passes": passes,
            "tokens_per_s": tokens / seconds,
            "ms_per_pass": seconds / passes * 1e3,
            "share_of_bandwidth": bytes_per_s and least / seconds / bytes_per_s,
        }
        return figures | ({"fired_share": float(np.mean(report["fired"]))} if self.rule is not None else {})

    def _params(self) -> tuple:
        dtype = jnp.dtype(self.size.dtype)
        base = qwen.init_params(self.config, jax.random.key(0), dtype)

        def near(x: jax.Array) -> jax.Array:
            noise = 0.02 * jnp.std(x.astype(jnp.float32)) * jax.random.normal(jax.random.key(9), x.shape)
            return x + noise.astype(x.dtype)

        prepare = self.models[0].prepare
        return (prepare(base),) if self.rule is None else (prepare(base), prepare(jax.tree.map(near, base)))

    def _state(self, live: int, top_p: float, temperature: float) -> DecodeState:
        """Slots whose caches hold noise; each cache array is made in the place of its zeros, since two may not fit."""
        rows = self.size.rows
        state = empty_slots(self.models, rows, self.size.length)

        def fill(x: jax.Array) -> jax.Array:
            return 0 * x + (0.5 * jax.random.normal(jax.random.key(1), x.shape, jnp.bfloat16)).astype(x.dtype)

        fill = jax.jit(fill, donate_argnums=0)
        state = state._replace(
            caches=jax.tree.map(fill, state.caches),
            last_B=jax.random.randint(jax.random.key(2), (rows,), 0, self.config.vocab_size, jnp.int32),
            limit_B=jnp.full((rows,), NEVER, jnp.int32),
            key_B2=row_keys(np.array([0, 1], np.uint32), np.arange(rows, dtype=np.uint32), np.zeros(rows, np.uint32)),
        )
        return self._at(state, live, top_p, temperature, -np.inf)

    def _at(self, state: DecodeState, live: int, top_p: float, temperature: float, tau: float) -> DecodeState:
        """The state with `live` tokens in every row's cache and other settings."""

        def full(value: float, dtype: type) -> jax.Array:
            return jnp.full((self.size.rows,), value, dtype)

        return state._replace(
            position_B=full(live, jnp.int32),
            sampling=Sampling(full(temperature, jnp.float32), full(top_p, jnp.float32), full(0, jnp.int32)),
            selection=Selection(full(tau, jnp.float32), full(GAMMA, jnp.float32)),
        )


def programs(size: Size, pool: Executor) -> list[Decode]:
    """Every model of the size, alone and as a pair."""
    return [Decode(size, model, pool, pair=pair) for model in size.models for pair in (False, True)]


def pair_over_single(found: dict) -> dict[str, float]:
    """Tokens/s of each pair over those of its model alone, by model and case."""
    ratios = {}
    for name, single in found.items():
        pair = found.get(name.replace("_single", "_pair"), {})
        if name.endswith("_single") and "cases" in single and "cases" in pair:
            for a, b in zip(single["cases"], pair["cases"], strict=True):
                case = f"live {a['live']}, top-p {a['top_p']:g}, temperature {a['temperature']:g}"
                ratios[f"{name.split('_')[1]}, {case}"] = b["tokens_per_s"] / a["tokens_per_s"]
    return ratios
