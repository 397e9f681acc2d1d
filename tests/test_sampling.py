"""Sampling: exact supports against a float64 sort, distributions by chi-square, independence of companions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.decoding.sampling import (
    Sampling,
    broadcast_sampling,
    draw,
    filtered_logprobs,
    log_normaliser,
    sample,
    token_logprob,
)
from tests.decoding_tools import chi_square, compilations

DRAWS = 20_000
jit_sample = jax.jit(sample)
jit_filtered = jax.jit(filtered_logprobs)


def reference_filter(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """One row, float64, by sorting: the probabilities after temperature, top-k and top-p."""
    if temperature == 0:
        p = np.zeros(len(logits))
        p[np.argmax(logits)] = 1
        return p
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    if 0 < top_k < len(p):
        p = np.where(scaled >= np.sort(scaled)[-top_k], p, 0)
    p /= p.sum()
    if top_p < 1:
        order = np.sort(p)[::-1]
        cut = order[np.searchsorted(np.cumsum(order), top_p)]
        p = np.where(p >= cut, p, 0)
    return p / p.sum()


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


SETTINGS = [
    (1.0, 1.0, 0),
    (0.7, 1.0, 0),
    (1.0, 0.7, 0),
    (1.0, 0.05, 0),
    (1.5, 0.95, 0),
    (1.0, 1.0, 4),
    (0.6, 0.95, 20),
    (2.0, 0.5, 7),
    (0.0, 0.5, 3),
]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), SETTINGS)
@pytest.mark.parametrize("vocabulary", [5, 200, 384])
def test_filtered_logprobs_match_a_float64_sort(vocabulary, temperature, top_p, top_k):
    logits = np.random.default_rng(vocabulary).normal(size=(6, vocabulary)).astype(np.float32) * 3
    expected = np.stack([reference_filter(row, temperature, top_p, top_k) for row in logits])
    arguments = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    actual = np.asarray(jit_filtered(logits, **arguments))
    np.testing.assert_array_equal(np.isfinite(actual), expected > 0)
    np.testing.assert_allclose(np.exp(actual), expected, atol=2e-6)


def test_without_jit():
    logits = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32) * 3
    arguments = {"temperature": 0.9, "top_p": 0.8, "top_k": np.array([0, 5, 50])}
    with jax.disable_jit():
        filtered, token_B = filtered_logprobs(logits, **arguments), sample(logits, keys(3), **arguments)
    np.testing.assert_allclose(filtered, jit_filtered(logits, **arguments), atol=1e-5)
    np.testing.assert_array_equal(token_B, jit_sample(logits, keys(3), **arguments))


def test_hand_computed_cuts():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    with np.errstate(divide="ignore"):
        top_p = np.exp(jit_filtered(logits, temperature=1.0, top_p=0.65))
        top_k = np.exp(jit_filtered(logits, temperature=1.0, top_k=3))
        both = np.exp(jit_filtered(logits, temperature=1.0, top_p=0.5, top_k=2))
    np.testing.assert_allclose(top_p, [0, 4 / 7, 0, 3 / 7], atol=1e-6)
    np.testing.assert_allclose(top_k, [0, 4 / 9, 2 / 9, 3 / 9], atol=1e-6)
    # 0.4 / 0.7 is already more than half of the two best.
    np.testing.assert_allclose(both, [0, 1, 0, 0], atol=1e-6)


def test_ties_at_the_cut_are_kept_and_order_does_not_matter():
    logits = jnp.array([0.0, 2.0, 0.0, -0.0, -1.0, 0.0])
    for arguments in ({"top_k": 2}, {"top_p": 0.7}):
        kept = np.isfinite(jit_filtered(logits, temperature=1.0, **arguments))
        np.testing.assert_array_equal(kept, [True, True, True, True, False, True])
        order = np.array([4, 3, 5, 1, 0, 2])
        kept_permuted = np.isfinite(jit_filtered(logits[order], temperature=1.0, **arguments))
        np.testing.assert_array_equal(kept_permuted, kept[order])


def test_extreme_logits_keep_exact_supports():
    logits = jnp.array([[0.0, -300.0, -500.0, -jnp.inf, -400.0], [1e30, -1e30, 0.0, 5.0, -5.0]])
    finite = np.isfinite(jit_filtered(logits, temperature=1.0, top_k=2))
    np.testing.assert_array_equal(finite, [[True, True, False, False, False], [True, False, False, True, False]])
    finite = np.isfinite(jit_filtered(logits, temperature=1.0, top_p=0.999))
    np.testing.assert_array_equal(finite.sum(axis=1), [1, 1])


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), SETTINGS)
def test_draws_follow_the_filtered_distribution(temperature, top_p, top_k):
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32) * 1.5
    p = reference_filter(logits, temperature, top_p, top_k)
    rows = jnp.broadcast_to(logits, (DRAWS, 300))
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    tokens = np.asarray(jit_sample(rows, keys(DRAWS), **settings))
    assert tokens.dtype == np.int32
    assert abs(chi_square(tokens, p)) < 4


def test_chi_square_notices_a_wrong_distribution():
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32) * 1.5
    rows = jnp.broadcast_to(logits, (DRAWS, 300))
    tokens = jit_sample(rows, keys(DRAWS), temperature=1.1, top_p=1.0, top_k=0)
    assert chi_square(np.asarray(tokens), reference_filter(logits, 1.0, 1.0, 0)) > 4


def test_small_probabilities_are_drawn_at_their_rate():
    """A vocabulary of 2,000 with one likely token: the tail's share, and its spread over both levels of the draw."""
    p = np.full(2000, 0.02 / 1999)
    p[700] = 0.98
    rows = jnp.broadcast_to(jnp.log(p).astype(jnp.float32), (DRAWS, 2000))
    tokens = np.asarray(jit_sample(rows, keys(DRAWS, 3), temperature=1.0))
    tail = tokens[tokens != 700]
    assert abs(len(tail) - 0.02 * DRAWS) < 4 * np.sqrt(0.02 * DRAWS)
    halves = np.array([(tail < 1000).sum(), (tail >= 1000).sum()])
    assert abs(halves[0] - halves.sum() * 999 / 1999) < 4 * np.sqrt(halves.sum()) / 2


def test_per_row_settings_and_companions():
    """Mixed settings in one call give what each row gives alone; raw and typed keys agree."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(len(SETTINGS), 150)).astype(np.float32) * 3
    temperature, top_p, top_k = (np.array(column) for column in zip(*SETTINGS, strict=True))
    row_keys = keys(len(SETTINGS), 9)
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    together = np.asarray(jit_sample(logits, row_keys, **settings))
    alone = [
        int(jit_sample(logits[i : i + 1], row_keys[i : i + 1], temperature=t, top_p=p, top_k=k)[0])
        for i, (t, p, k) in enumerate(SETTINGS)
    ]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, jit_sample(logits, jax.random.key_data(row_keys), **settings))
    order = rng.permutation(len(SETTINGS))
    permuted = {name: value[order] for name, value in settings.items()}
    np.testing.assert_array_equal(together[order], jit_sample(logits[order], row_keys[order], **permuted))


def test_temperature_zero_takes_the_first_maximum():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [-5.0, -7.0, -6.0, -5.0]])
    np.testing.assert_array_equal(jit_sample(logits, keys(2), temperature=0.0, top_p=0.1, top_k=1), [1, 0])


def test_nothing_is_compiled_again_for_other_settings():
    logits, row_keys = np.zeros((2, 40), np.float32), keys(2)
    arguments = [dict(zip(("temperature", "top_p", "top_k"), setting, strict=True)) for setting in SETTINGS]
    jit_sample(logits, row_keys, **arguments[0])
    with compilations() as compiled:
        for settings in arguments:
            jit_sample(logits + settings["top_k"], row_keys, **settings)
    assert not compiled
    with compilations() as compiled:
        jit_sample(logits[:, :30], row_keys, **arguments[0])
    assert compiled, "the count itself must work"


def test_normaliser_turns_logits_into_log_probabilities():
    logits = np.random.default_rng(2).normal(size=(3, 333)).astype(np.float32) * 4 + 50
    sampling = broadcast_sampling((3,), np.array([0.0, 1.0, 0.5]), 0.4, 0)
    assert isinstance(sampling, Sampling)
    token_B, log_z_B = draw(logits, keys(3), sampling)
    for row, effective in enumerate([1.0, 1.0, 0.5]):
        scaled = logits[row].astype(np.float64) / effective
        expected = scaled[int(token_B[row])] - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()
        actual = token_logprob(logits, token_B, sampling.temperature, log_z_B)[row]
        np.testing.assert_allclose(actual, expected, atol=3e-5)
    np.testing.assert_allclose(log_normaliser(logits)[1], log_z_B[1], atol=1e-6)


def test_a_row_of_nan_ends():
    """Broken logits give some token; a loop that waits for an acceptance would hang here."""
    logits = jnp.full((1, 200), jnp.nan)
    assert 0 <= int(jit_sample(logits, keys(1), temperature=1.0, top_p=0.5)[0]) < 200
