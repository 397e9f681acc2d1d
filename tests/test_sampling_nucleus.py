"""The nucleus to the last bit: exact ties at its boundary, top_p of 0, and one rule for drawing and for filtering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.decoding import sampling
from rlvr_jax.decoding.sampling import filtered_logprobs, sample

DRAWS = 400
jit_sample = jax.jit(sample)
jit_filtered = jax.jit(filtered_logprobs)


def drawn(logits, **settings) -> np.ndarray:
    """bool [V]: the tokens that `sample` gave in many draws from one row."""
    rows = jnp.broadcast_to(logits, (DRAWS, len(logits)))
    tokens = jit_sample(rows, jax.random.split(jax.random.key(1), DRAWS), temperature=1.0, **settings)
    return np.bincount(tokens, minlength=len(logits)) > 0


def kept(logits, **settings) -> np.ndarray:
    return np.isfinite(jit_filtered(logits, temperature=1.0, **settings))


def exact_tie(vocabulary: int, best: int) -> tuple[np.ndarray, np.float32]:
    """Logits with `best` equal tokens above equal others, and the top_p that the best hold to the last bit."""
    places = np.random.default_rng(vocabulary).permutation(vocabulary)[:best]
    for level in np.linspace(-2, -1, 500, dtype=np.float32):
        logits = np.full(vocabulary, level)
        logits[places] = 0
        mass = jnp.exp(logits)
        total = np.float32(np.asarray(mass, np.float64).sum())
        top_p = np.float32(best / total)
        above = np.nextafter(top_p, np.float32(1)) * total
        if sampling._exact_sum(mass) == total and top_p * total == best < above:
            return logits, top_p
    raise AssertionError("no exact tie found")


@pytest.mark.parametrize(("vocabulary", "best"), [(5, 1), (5, 3), (130, 40), (130, 127), (700, 150), (700, 3)])
def test_an_exact_tie_on_the_boundary(vocabulary, best):
    """The best tokens hold exactly top_p, so the next ones are out. One bit more of top_p lets them in."""
    logits, tie = exact_tie(vocabulary, best)
    for top_p, expected in ((tie, logits == 0), (np.nextafter(tie, np.float32(1)), logits > -3)):
        np.testing.assert_array_equal(kept(logits, top_p=top_p), expected)
        tokens = drawn(logits, top_p=top_p)
        assert not (tokens & ~expected).any()
        assert tokens[logits < 0].any() == expected[logits < 0].any()


@pytest.mark.parametrize("vocabulary", [5, 130, 700])
def test_draws_and_filter_agree_at_every_boundary(vocabulary):
    """Few levels of logits, top_p at the float32 of each level's share and its two neighbours."""
    logits = np.random.default_rng(vocabulary).choice(np.linspace(-1, 0, 4, dtype=np.float32), vocabulary)
    mass = np.exp(logits.astype(np.float64))
    levels = np.unique(logits)[::-1]
    supports = []
    for share in np.float32([mass[logits >= level].sum() / mass.sum() for level in levels[:-1]]):
        for top_p in (np.nextafter(share, np.float32(0)), share, np.nextafter(share, np.float32(1))):
            expected = kept(logits, top_p=top_p)
            supports.append(expected.sum())
            assert set(np.unique(logits[drawn(logits, top_p=top_p)])) == set(np.unique(logits[expected]))
    assert len(set(supports)) > 1


def test_sums_do_not_depend_on_their_order():
    """Ordinary float32 sums of these numbers do; the sums that decide the nucleus do not, and are right."""
    rng = np.random.default_rng(0)
    mass = np.exp(rng.normal(size=20_000) * 4).astype(np.float32)
    mass /= mass.max()
    orders = [rng.permutation(len(mass)) for _ in range(8)]
    exact = {float(sampling._exact_sum(jnp.asarray(mass[order]))) for order in orders}
    assert len(exact) == 1
    np.testing.assert_allclose(exact.pop(), mass.astype(np.float64).sum(), rtol=1e-6)
    assert len({float(np.cumsum(mass[order], dtype=np.float32)[-1]) for order in orders}) > 1


@pytest.mark.parametrize("top_p", [0.0, 1e-45, 1e-38, 1e-9])
def test_the_most_probable_token_stays_at_any_top_p(top_p):
    """`sample` used to look for a token for ever; equals of the best one are as good."""
    logits = np.array([0.5, 2.0, -1.0, 2.0, 0.0], np.float32)
    np.testing.assert_array_equal(kept(logits, top_p=top_p), [False, True, False, True, False])
    np.testing.assert_array_equal(drawn(logits, top_p=top_p), [False, True, False, True, False])
    both = {"top_p": top_p, "top_k": 3}
    np.testing.assert_array_equal(drawn(logits, **both), kept(logits, **both))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_every_draw_ends(bad, top_p):
    """Traced settings out of range and rows that are not finite give some token of the vocabulary."""
    logits = jnp.array([[0.0, 1.0, 2.0], [0.0, bad, 1.0], [bad, bad, bad]])
    row_keys = jax.random.split(jax.random.key(0), 3)
    for arguments in ({}, {"top_p": np.nan}, {"top_p": -1.0}, {"temperature": -1.0}, {"temperature": np.nan}):
        tokens = jit_sample(logits, row_keys, **{"temperature": 1.0, "top_p": top_p, **arguments})
        assert ((tokens >= 0) & (tokens < 3)).all()


SETTINGS = {
    "temperature": [-0.1, np.float32(-1), np.nan, np.inf, 1e39, np.ones(3), np.ones((2, 1))],
    "top_p": [-0.1, 1.1, np.float32(2), np.nan, np.ones((1,))],
    "top_k": [-1, np.int64(-5), 1.5, np.nan, 2**31, np.ones((2, 2), int)],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_out_of_range_are_named(name):
    logits, row_keys = np.zeros((2, 5), np.float32), jax.random.split(jax.random.key(0), 2)
    for value in SETTINGS[name]:
        arguments = {"temperature": 1.0, name: value}
        for call in (lambda a: sample(logits, row_keys, **a), lambda a: filtered_logprobs(logits, **a)):
            with pytest.raises(ValueError, match=rf"^{name}.*expected") as raised:
                call(arguments)
            assert "\n" not in str(raised.value)


def test_shapes_of_keys_and_logits_are_named():
    logits, typed = np.zeros((2, 5), np.float32), jax.random.split(jax.random.key(0), 2)
    raw = np.asarray(jax.random.key_data(typed))
    for wrong in (typed[:1], typed[0], raw[0], raw[:1], raw.astype(np.int32), np.zeros((2, 3), np.uint32)):
        with pytest.raises(ValueError, match=r"keys_B .*expected one key a row"):
            sample(logits, wrong, temperature=1.0)
    with pytest.raises(ValueError, match=r"logits_BV has shape \(2, 0\): expected \[B, V\]"):
        sample(logits[:, :0], typed, temperature=1.0)
