"""Columns of given responses under two models, against float64 numpy over whole distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax import scoring
from rlvr_jax.generation import language_model
from rlvr_jax.microscope.pair import PairRule, gradient_share, iterate_pair, score_pair
from rlvr_jax.models.qwen import init_params
from rlvr_jax.sharding.rules import make_mesh
from tests.decoding_tools import full_logprobs, tiny_qwen
from tests.tiny import tiny_config

PIECE, TOP = 32, 3
WRITERS = ["rl", "base", "rl", "base", "rl"]
LENGTHS = [(3, 5), (1, 1), (20, 0), (9, 20), (7, 2 * PIECE + 9)]


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """So that short texts take several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "PIECE", PIECE)
        yield


@pytest.fixture(scope="module")
def pair():
    return (*tiny_qwen(seed=0), *tiny_qwen(seed=1))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(3)
    return tuple([rng.integers(64, size=n).tolist() for n in lengths] for lengths in zip(*LENGTHS, strict=True))


@pytest.fixture(scope="module")
def scored(pair, texts):
    return score_pair(*pair, *texts, written_by=WRITERS, top=TOP, chunk=64)


def expected_columns(base_TV, rl_TV, tokens, writer):
    """Every column in float64, one loop a token."""
    out = {}
    at = np.arange(len(tokens))
    logp = {"base": base_TV, "rl": rl_TV}
    mixture = np.log((np.exp(base_TV) + np.exp(rl_TV)) / 2)
    kl = lambda p, q: (np.exp(p) * (p - q)).sum(-1)  # noqa: E731
    out["kl"], out["kl_reverse"] = kl(rl_TV, base_TV), kl(base_TV, rl_TV)
    out["js"] = (out["kl"] + out["kl_reverse"]) / 2
    out["js_true"] = (kl(rl_TV, mixture) + kl(base_TV, mixture)) / 2
    for model, logp_TV in logp.items():
        drawn = logp_TV[at, tokens]
        out[f"logp_{model}"] = drawn
        out[f"entropy_{model}"] = -(np.exp(logp_TV) * logp_TV).sum(-1)
        out[f"rank_{model}"] = 1 + (logp_TV > drawn[:, None]).sum(-1)
        out[f"top_{model}_ids"] = np.argsort(-logp_TV, axis=-1)[:, :TOP]
        out[f"top_{model}_logp"] = -np.sort(-logp_TV, axis=-1)[:, :TOP]
    mass = 1 - np.exp(logp[writer][at, tokens])
    out["gradient_share"] = mass / mass.sum()
    return out


def test_columns_are_those_of_float64(pair, texts, scored):
    whole = [full_logprobs(c, p, [x + y for x, y in zip(*texts, strict=True)]) for c, p in (pair[:2], pair[2:])]
    for row, (prompt, response) in enumerate(zip(*texts, strict=True)):
        got = scored[row]
        assert got.token.tolist() == response
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        expected = expected_columns(whole[0][row, at], whole[1][row, at], np.array(response, int), WRITERS[row])
        for name, value in expected.items():
            column = getattr(got, name)
            assert column.shape == value.shape, name
            assert column.dtype == (np.int32 if "rank" in name or "ids" in name else np.float32)
            if column.dtype == np.int32:
                np.testing.assert_array_equal(column, value, err_msg=name)
            else:
                np.testing.assert_allclose(column, value, atol=2e-4, err_msg=name)
        np.testing.assert_allclose(got.delta_logp, expected["logp_rl"] - expected["logp_base"], atol=2e-4)


def test_batches_change_nothing(pair, texts, scored):
    rows = []
    for row, one in iterate_pair(*pair, *texts, top=TOP, written_by=WRITERS, batch_tokens=1):
        rows.append(row)
        assert_same(one, scored[row])
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert rows[0] == 4  # the longest text comes first


def test_a_mesh_changes_nothing(pair, texts, scored):
    parts = [part[:1] for part in texts]
    assert_same(score_pair(*pair, *parts, top=TOP, mesh=make_mesh(2, 2, 2))[0], scored[0])


def assert_same(got, expected):
    for name in got._fields:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=1e-4, err_msg=name)


def test_ranks_of_equal_probabilities():
    """The rank is one more than the number of strictly more probable tokens."""
    logp_NV = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    measured = PairRule(2, 8).measure(logp_NV, logp_NV, jnp.array([3, 2]))
    assert measured["rank_base"].tolist() == measured["rank_rl"].tolist() == [2, 1]
    np.testing.assert_allclose(measured["kl"], 0, atol=1e-7)


def test_gradient_shares():
    shares = gradient_share(np.log(np.array([0.9, 0.5, 0.4], np.float32)))
    np.testing.assert_allclose(shares, [0.1 / 1.2, 0.5 / 1.2, 0.6 / 1.2], atol=1e-6)
    assert gradient_share(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


def test_no_array_of_all_positions_and_the_vocabulary():
    config = tiny_config(vocab_size=57, dtype="float32")  # a number that is no other dimension
    model = language_model(config)
    params = model.prepare(init_params(config, jax.random.key(0)))
    score = jax.make_jaxpr(scoring.score, static_argnums=(0, 1))
    jaxpr = str(score((model, model), PairRule(5, 32), (params, params), jnp.zeros((4, 96), jnp.int32)))
    assert "f32[32,57]" in jaxpr  # 4 rows x 8 positions: what is measured at a time
    for tokens in (PIECE, 96, 97):
        assert f"f32[4,{tokens},57]" not in jaxpr
        assert f"f32[{4 * tokens},57]" not in jaxpr


def test_bad_arguments_are_named(pair):
    for options, message in [
        ({"written_by": "both"}, "written_by has 'both'"),
        ({"written_by": ["rl", "rl"]}, "written_by has 2 entries and there are 1 responses"),
        ({"top": 0}, "top=0: expected 1 to 64"),
        ({"chunk": 0}, "chunk=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_pair(*pair, [[1]], [[2]], **options)
