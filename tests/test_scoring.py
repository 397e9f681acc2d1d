"""Criterion values of given responses, against whole logits; thresholds for a wanted share, against `fires`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax import scoring
from rlvr_jax.criteria import MEASURED, criterion_value, fires, threshold_for_share
from rlvr_jax.generation import language_model
from rlvr_jax.models.qwen import init_params
from rlvr_jax.scoring import criterion_values
from rlvr_jax.sharding.rules import make_mesh
from tests.decoding_tools import full_logprobs, tiny_qwen
from tests.tiny import tiny_config

PIECE = 32


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
    """Prompts and responses of very different lengths, one response empty, one longer than a piece."""
    rng = np.random.default_rng(3)
    lengths = [(3, 5), (1, 1), (20, 0), (9, 20), (7, 2 * PIECE + 9), (50, 30), (4, 27)]
    draw = lambda n: rng.integers(64, size=n).tolist()  # noqa: E731
    return [draw(p) for p, _ in lengths], [draw(r) for _, r in lengths]


def whole(pair, prompts, responses):
    """(log-probabilities of base and rl before every response token, the tokens): all of it at once."""
    config_base, params_base, config_rl, params_rl = pair
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    logp = [full_logprobs(c, p, texts) for c, p in ((config_base, params_base), (config_rl, params_rl))]
    rows = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        at = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        rows.append((logp[0][i, at].astype(np.float32), logp[1][i, at].astype(np.float32), np.asarray(response, int)))
    return rows


@pytest.fixture(scope="module")
def every(pair, texts):
    """All criteria's values of the texts."""
    return criterion_values(*pair, *texts, MEASURED, chunk=64)


def test_values_are_those_of_whole_logits(pair, texts, every):
    for row, (base, rl, tokens) in enumerate(whole(pair, *texts)):
        for name in MEASURED:
            assert every[name][row].shape == tokens.shape
            if tokens.size:
                np.testing.assert_allclose(every[name][row], criterion_value(name, base, rl, tokens), atol=2e-4)


def test_the_published_rule_is_passed_on(pair, texts):
    names, top_logprobs, sample_from = ["delta_logp", "kl"], 5, "rl"
    texts = [part[:2] for part in texts]
    got = criterion_values(*pair, *texts, names, top_logprobs=top_logprobs, sample_from=sample_from)
    for row, (base, rl, tokens) in enumerate(whole(pair, *texts)):
        for name in names:
            assert got[name][row].shape == tokens.shape
            if tokens.size:
                expected = criterion_value(name, base, rl, tokens, top_logprobs=top_logprobs, sample_from=sample_from)
                np.testing.assert_allclose(got[name][row], expected, atol=2e-4)


@pytest.mark.parametrize("options", [{"batch_tokens": 1}, {"chunk": 1, "batch_tokens": 100_000}])
def test_batches_and_chunks_change_nothing(pair, texts, every, options):
    got = criterion_values(*pair, *texts, ["delta_logp", "kl"], **options)
    for name in got:
        for expected, row in zip(every[name], got[name], strict=True):
            np.testing.assert_allclose(row, expected, atol=1e-4)


def test_a_mesh_changes_nothing(pair, texts, every):
    got = criterion_values(*pair, *(part[:3] for part in texts), ["kl"], mesh=make_mesh(2, 2, 2))["kl"]
    for expected, row in zip(every["kl"], got, strict=False):
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_the_compute_dtype_is_that_of_decoding(pair):
    """On CPU parameters stored in bfloat16 compute in float32, as in `generate_selective`."""
    stored = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), params) for params in pair[1::2]]
    widened = [jax.tree.map(lambda x: x.astype(jnp.float32), params) for params in stored]
    got, expected = (
        criterion_values(pair[0], base, pair[2], rl, [[1, 2, 3]], [[4, 5, 6, 7]], ["delta_logp"])["delta_logp"][0]
        for base, rl in (stored, widened)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_no_array_of_all_positions_and_the_vocabulary():
    """The program has no [B, T, V] array, nor [B, piece, V]."""
    config = tiny_config(vocab_size=57, dtype="float32")  # a number that is no other dimension
    model, rule = language_model(config), scoring.ScoreRule(("kl", "delta_logp"), None, "base", 32)
    params = model.prepare(init_params(config, jax.random.key(0)))
    tokens_BT = jnp.zeros((4, 96), jnp.int32)
    score = jax.make_jaxpr(scoring.score, static_argnums=(0, 1))
    jaxpr = str(score((model, model), rule, (params, params), tokens_BT))
    assert "f32[32,57]" in jaxpr  # 4 rows x 8 positions: what is measured at a time
    for tokens in (PIECE, 96, 97):
        assert f"f32[4,{tokens},57]" not in jaxpr
        assert f"f32[{4 * tokens},57]" not in jaxpr


def test_the_threshold_selects_the_share(pair, texts, every):
    base, rl, tokens = (np.concatenate(parts) for parts in zip(*whole(pair, *texts), strict=True))
    for name in MEASURED:
        values = np.concatenate(every[name])
        for share in (0.02, 0.1, 0.5):
            found = threshold_for_share(name, values, share)
            assert found.share_selected == pytest.approx(share, abs=1 / len(values))
            selected = np.asarray(fires(name, base, rl, tokens, found.tau))
            assert selected.mean() == pytest.approx(found.share_selected, abs=1.5 / len(values))


def test_ties_are_reported():
    values = [0.0] * 60 + [0.5] * 30 + [1.0] * 9 + [np.inf]
    above = threshold_for_share("kl", values, 0.3)
    assert above == (0.25, 0.4, 0.3)  # 0.5 and more: 40%; 1 and more would be 10%
    assert threshold_for_share("kl", values, 0.2) == (0.75, 0.1, 0.09)
    below = threshold_for_share("delta_logp", values, 0.1)
    assert below == (0.25, 0.6, 0.6)  # the zeros are all or none, and none is not on offer
    assert threshold_for_share("kl", values, 0.001) == (np.inf, 0.01, 0.01)
    assert threshold_for_share("kl", [0.0, 0.0], 0.9) == (0.0, 1.0, 1.0)
    assert threshold_for_share("random", [], 0.07) == (0.07, 0.07, 0.0)
    neighbours = np.array([1.0, np.nextafter(np.float32(1.0), np.float32(2.0))], np.float32)
    assert threshold_for_share("delta_logp", neighbours, 0.5) == (1.0, 0.5, 0.5)
    assert threshold_for_share("kl", neighbours, 0.5) == (float(neighbours[1]), 0.5, 0.5)


def test_bad_arguments_are_named(pair):
    for call, message in [
        (lambda: criterion_values(*pair, [[1]], [[2]], ["random"]), "criteria has 'random'"),
        (lambda: criterion_values(*pair, [[1]], [], ["kl"]), "1 prompts and 0 responses"),
        (lambda: criterion_values(*pair, [[]], [[1]], ["kl"]), r"prompts\[0\] is empty"),
        (lambda: criterion_values(*pair, [[1]], [[64]], ["kl"]), r"responses\[0\] has ids outside 0 to 63"),
        (lambda: criterion_values(*pair, [[1]], [[2]], ["kl"], chunk=0), "chunk=0"),
        (lambda: criterion_values(*pair, [np.array([1.5])], [[2]], ["kl"]), r"prompts\[0\]=array\(\[1.5\]\)"),
        (lambda: criterion_values(*pair, [[1]], [[2**40]], ["kl"]), r"responses\[0\]=\[1099511627776\]"),
        (lambda: criterion_values(*pair, [[1]], [[2]], "kl"), "criteria='kl': expected a list of names"),
        (lambda: criterion_values(*pair, [[1]], [[2]], ["kl"], sample_from="both"), "sample_from='both'"),
        (lambda: criterion_values(*pair, [[1]], [[2]], ["kl"], top_logprobs=0), "top_logprobs=0"),
        (lambda: criterion_values(*pair, [[1]], [[2]], ["kl"], cache_dtype="int3"), "cache dtype 'int3'"),
        (lambda: threshold_for_share("kl", [1.0], np.nan), "share=nan"),
        (lambda: threshold_for_share("none", [1.0], 0.1), "criterion='none'"),
        (lambda: threshold_for_share("kl", [1.0], 1.0), "share=1.0"),
        (lambda: threshold_for_share("kl", [], 0.1), r"values has shape \(0,\)"),
        (lambda: threshold_for_share("kl", [np.nan], 0.1), "no NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_cache_of_the_decoder_is_the_one_that_is_read(pair):
    """With an int8 cache the values move a little, as those of a decode with that cache do."""
    texts = ([[1, 2, 3]], [list(range(4, 40))])
    exact = criterion_values(*pair, *texts, ["kl"])["kl"][0]
    rounded = criterion_values(*pair, *texts, ["kl"], cache_dtype="int8")["kl"][0]
    assert 0 < np.abs(rounded - exact).max() < 0.3
