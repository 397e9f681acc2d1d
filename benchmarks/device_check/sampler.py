"""Microseconds of a draw from logits of all rows, by what filters them, beside one plain pass over the logits."""

import jax
import jax.numpy as jnp

from benchmarks.device_check.sizes import Size, timed_config
from benchmarks.device_check.timing import median_seconds
from rlvr_jax.decoding.sampling import Sampling, draw

SETTINGS = {"plain": (1.0, 1.0, 0), "top_p_0.7": (1.0, 0.7, 0), "greedy": (0.0, 1.0, 0), "top_k_50": (1.0, 1.0, 50)}


def measure(size: Size) -> dict:
    """The part `sampler`; `passes` is each draw's time over that of an argmax, which reads the logits once."""
    rows, vocabulary = size.rows, timed_config(size.models[0]).vocab_size
    logits_BV = jax.random.normal(jax.random.key(0), (rows, vocabulary)) * 3
    keys_B = jax.random.split(jax.random.key(1), rows)
    once = jax.jit(lambda logits_BV: jnp.argmax(logits_BV, axis=-1))
    argmax = median_seconds(lambda: once(logits_BV), size.repeats)
    found: dict = {"logits_MB": logits_BV.size * 4 / 1e6, "argmax_us": argmax * 1e6}
    compiled = jax.jit(draw)
    for name, (temperature, top_p, top_k) in SETTINGS.items():
        each = Sampling(*(jnp.full(rows, x, t) for x, t in ((temperature, "f4"), (top_p, "f4"), (top_k, "i4"))))
        seconds = median_seconds(lambda each=each: compiled(logits_BV, keys_B, each), size.repeats)
        found[name] = {"us": seconds * 1e6, "passes": seconds / argmax}
    return found
