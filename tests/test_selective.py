"""Decoding with two models: against decoding one, closed forms, and criteria recomputed from whole forwards."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.criteria import CRITERIA, criterion_value, fires
from rlvr_jax.decoding.generate import decode
from rlvr_jax.decoding.selective import decode_selective
from rlvr_jax.generation import generate, generate_selective
from rlvr_jax.sharding.rules import make_mesh
from rlvr_jax.top_logprobs import published_top_logprobs
from tests.decoding_tools import (
    chi_square,
    compilations,
    full_logprobs,
    softmax,
    tiny_qwen,
    toy_logits,
    toy_model,
    toy_params,
)

MODELS = (toy_model(),) * 2
BASE, RL = toy_params(0), toy_params(1)
PARAMS = (BASE, RL)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2]]
ALONE = {"max_new_tokens": 16, "n": 2, "chunk": 8}
CALL = {**ALONE, "block": 4}
TAU = {
    "delta_logp": -0.3,
    "neg_delta_logp": -0.3,
    "abs_delta_logp": 0.8,
    "entropy_base": 1.8,
    "entropy_rl": 1.8,
    "kl": 0.7,
    "kl_reverse": 0.7,
    "js": 0.7,
    "js_true": 0.15,
    "random": 0.4,
    "none": None,
    "all": None,
}


def selective(prompts=PROMPTS, **settings):
    defaults = {"criterion": "delta_logp", "tau": -0.3, "gamma": 0.1}
    return decode_selective(MODELS, PARAMS, prompts, **{**CALL, **defaults, **settings})


def logp_of(params, tokens):
    return np.log(softmax(toy_logits(params, tokens)))


def positions(result, prompts=PROMPTS, n=2):
    """(row, place, the text before that place) of every drawn token."""
    for row, length in enumerate(result.lengths):
        for place in range(length):
            yield row, place, list(prompts[row // n]) + [int(token) for token in result.tokens[row, :place]]


def test_taus_and_criteria_are_complete():
    assert set(TAU) == set(CRITERIA)


@pytest.mark.parametrize("sample_from", ["base", "rl"])
def test_none_is_the_sampled_model_alone(sample_from):
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 4, "stop_tokens": (3,)}
    both = selective(criterion="none", tau=None, gamma=0.0, sample_from=sample_from, **settings)
    alone = decode(MODELS[0], BASE if sample_from == "base" else RL, PROMPTS, **ALONE, **settings)
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(both, name), getattr(alone, name))
    np.testing.assert_allclose(both.logp, alone.logp, atol=1e-6)
    assert not both.fired.any()
    np.testing.assert_array_equal(both.sampled_token, both.tokens)
    assert alone.finished.any()
    assert len(set(alone.lengths)) > 1


@pytest.mark.parametrize("sample_from", ["base", "rl"])
def test_all_without_extrapolation_is_greedily_the_rl_model(sample_from):
    result = selective(criterion="all", tau=None, gamma=0.0, sample_from=sample_from, temperature=0)
    alone = decode(MODELS[1], RL, PROMPTS, **ALONE, temperature=0)
    np.testing.assert_array_equal(result.tokens, alone.tokens)
    assert result.fired.all()


ROWS = 4000


def first_tokens(criterion, tau, gamma, **settings):
    call = {"max_new_tokens": 2, "n": ROWS, "chunk": 2, "block": 2, "criterion": criterion, "tau": tau, "gamma": gamma}
    return selective([[1, 2, 3]], **{**call, **settings})


def test_all_without_extrapolation_is_the_rl_model_in_distribution():
    result = first_tokens("all", None, 0.0)
    first = np.exp(logp_of(RL, [1, 2, 3]))
    second = np.stack([np.exp(logp_of(RL, [1, 2, 3, token])) for token in range(11)])
    assert abs(chi_square(result.tokens[:, 0], first)) < 4
    pairs = result.tokens[:, 0] * 11 + result.tokens[:, 1]
    assert abs(chi_square(pairs, (first[:, None] * second).reshape(-1))) < 4
    assert chi_square(result.tokens[:, 0], np.exp(logp_of(BASE, [1, 2, 3]))) > 4
    # The redraw has noise of its own: given what was drawn first, the second draw follows rl just the same.
    for token in range(11):
        redrawn = result.tokens[result.sampled_token[:, 0] == token, 0]
        assert len(redrawn) < 50 or abs(chi_square(redrawn, first)) < 5


@pytest.mark.parametrize(("gamma", "temperature", "top_p"), [(0.5, 1.0, 1.0), (0.5, 0.7, 1.0), (1.0, 1.0, 0.7)])
def test_extrapolated_tokens_follow_the_closed_form(gamma, temperature, top_p):
    base, rl = (logp_of(params, [1, 2, 3]) for params in PARAMS)
    expected = softmax(((1 + gamma) * rl - gamma * base) / temperature)
    order = np.sort(expected)[::-1]
    cut = order[np.searchsorted(np.cumsum(order), top_p)] if top_p < 1 else 0
    expected = np.where(expected >= cut, expected, 0)
    result = first_tokens("all", None, gamma, temperature=temperature, top_p=top_p)
    assert abs(chi_square(result.tokens[:, 0], expected / expected.sum())) < 4


def test_selection_mixes_kept_and_redrawn_tokens():
    """P(token) = P_base(token) where dlogp > tau, plus P(fires) times the extrapolated distribution."""
    base, rl = (logp_of(params, [1, 2, 3]) for params in PARAMS)
    extrapolated = softmax(1.5 * rl - 0.5 * base)
    kept = np.where(rl - base > -0.3, np.exp(base), 0)
    result = first_tokens("delta_logp", -0.3, 0.5)
    assert abs(chi_square(result.tokens[:, 0], kept + (1 - kept.sum()) * extrapolated)) < 4
    assert abs(result.fired[:, 0].mean() - (1 - kept.sum())) < 4 * np.sqrt(0.25 / ROWS)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_fires_where_it_says(criterion):
    """The record against both models' whole forwards over the emitted text."""
    result = selective(criterion=criterion, tau=TAU[criterion], gamma=0.3, temperature=0.9, sample_from="rl")
    expected, values, records, emitted = [], [], [], []
    for row, place, text in positions(result):
        base, rl = (jnp.asarray(logp_of(params, text), jnp.float32)[None] for params in PARAMS)
        y = result.sampled_token[row, place]
        records.append((result.delta_logp[row, place], rl[0, y] - base[0, y]))
        token = result.tokens[row, place]
        emitted.append((result.logp[row, place], np.log(softmax(toy_logits(RL, text) / 0.9))[token]))
        assert result.fired[row, place] or token == y
        values.append((base, rl, y))
        expected.append(result.fired[row, place])
    for pair in (records, emitted):
        recorded, recomputed = np.array(pair).T
        np.testing.assert_allclose(recorded, recomputed, atol=1e-4)
    base, rl = (np.concatenate([value[i] for value in values]) for i in (0, 1))
    y_B = np.array([value[2] for value in values])
    if criterion == "random":
        assert 0.2 < np.mean(expected) < 0.6
        return
    if criterion not in ("none", "all"):
        share = np.mean(expected)
        assert 0.02 < share < 0.98, f"tau should select some positions, not {share:.0%}"
        value_B = criterion_value(criterion, base, rl, y_B)
        assert np.abs(value_B - TAU[criterion]).min() > 1e-5, "a value on the threshold: choose another tau"
    np.testing.assert_array_equal(expected, fires(criterion, base, rl, y_B, TAU[criterion]))


def test_rows_of_different_temperatures():
    """dlogp is at temperature 1 whatever the row's temperature, logp at the row's own (0 counts as 1)."""
    temperature = np.array([1.0, 0.5, 0.0, 1.0, 0.5, 0.0])
    result = selective(criterion="none", tau=None, gamma=0.0, temperature=temperature)
    for row, place, text in positions(result):
        y = result.tokens[row, place]
        delta = logp_of(RL, text)[y] - logp_of(BASE, text)[y]
        np.testing.assert_allclose(result.delta_logp[row, place], delta, atol=1e-4)
        own = np.log(softmax(toy_logits(BASE, text) / (temperature[row] or 1.0)))[y]
        np.testing.assert_allclose(result.logp[row, place], own, atol=1e-4)


def test_random_does_not_look_at_the_token():
    result = first_tokens("random", 0.3, 0.0)
    assert abs(result.fired.mean() - 0.3) < 4 * np.sqrt(0.21 / (2 * ROWS))
    assert abs(chi_square(result.sampled_token[result.fired[:, 0], 0], np.exp(logp_of(BASE, [1, 2, 3])))) < 4
    # Its numbers are neither those of the draw nor the same at every step.
    assert abs(np.corrcoef(result.fired[:, 0], result.fired[:, 1])[0, 1]) < 4 / np.sqrt(ROWS)


def test_published_rule_sees_only_the_lists():
    k = 3
    result = selective(criterion="kl", tau=0.3, gamma=0.5, top_logprobs=k)
    exact = selective(criterion="kl", tau=0.3, gamma=0.5)
    assert (result.fired != exact.fired).any() or (result.tokens != exact.tokens).any()
    places = list(positions(result))
    base, rl = (np.stack([logp_of(params, text) for _, _, text in places]).astype(np.float32) for params in PARAMS)
    y_B, token_B, fired_B = (
        np.array([field[row, place] for row, place, _ in places])
        for field in (result.sampled_token, result.tokens, result.fired)
    )
    np.testing.assert_array_equal(fired_B, fires("kl", base, rl, y_B, 0.3, top_logprobs=k, sample_from="base"))
    candidates, _ = published_top_logprobs(base, rl, k, y_B)
    assert np.isfinite(np.asarray(candidates)[np.arange(len(token_B)), token_B])[fired_B].all()
    assert fired_B.sum() > 5


def test_rows_do_not_depend_on_companions_or_chunks():
    tau, gamma = np.linspace(-0.6, 0.2, 6), np.linspace(0, 1, 6)
    together = selective(tau=tau, gamma=gamma, stop_tokens=(3,), top_p=0.9)
    for prompt in range(3):
        rows = slice(2 * prompt, 2 * prompt + 2)
        alone = selective(
            [PROMPTS[prompt]],
            tau=tau[rows],
            gamma=gamma[rows],
            stop_tokens=(3,),
            top_p=0.9,
            problem_ids=[prompt],
            chunk=16,
            prompt_length=30,
        )
        for name in set(together._fields) - {"passes_sampled", "passes_other"}:
            np.testing.assert_allclose(getattr(together, name)[rows], getattr(alone, name), atol=1e-5, err_msg=name)
    assert 0 < together.fired.mean() < 1
    frozen = np.arange(16) >= together.lengths[:, None]
    assert frozen.any()
    for name in ("tokens", "logp", "fired", "delta_logp", "sampled_token"):
        assert not getattr(together, name)[frozen].any()


def test_nothing_is_compiled_again():
    selective()
    with compilations() as compiled:
        selective(tau=-0.1, gamma=0.0, seed=9, temperature=0.5, top_p=0.3, top_k=5, stop_tokens=(1,))
        selective([[1], [2], [3]], tau=np.zeros(6), gamma=np.ones(6))
        decode_selective(MODELS, (RL, BASE), PROMPTS, **CALL, criterion="delta_logp", tau=1, gamma=2)
    assert not compiled
    with compilations() as compiled:
        selective(criterion="kl", chunk=5)
    assert compiled, "the count itself must work"


@pytest.fixture(scope="module")
def qwens():
    base, rl = tiny_qwen("qwen2"), tiny_qwen("qwen3", seed=1)
    return (*base, *rl)


def test_qwen_pair_of_two_families(qwens):
    """Different architectures over one vocabulary: the record against whole forwards of both."""
    settings = {"max_new_tokens": 10, "n": 2, "temperature": 0.9, "top_p": 0.9, "stop_tokens": (5, 9)}
    result = generate_selective(*qwens, PROMPTS, criterion="delta_logp", tau=-0.3, gamma=0.5, **settings)
    texts = [PROMPTS[row // 2] + result.tokens[row, : result.lengths[row]].tolist() for row in range(6)]
    base_BTV, rl_BTV = (full_logprobs(*model, texts) for model in (qwens[:2], qwens[2:]))
    for row, length in enumerate(result.lengths):
        steps = len(PROMPTS[row // 2]) - 1 + np.arange(length)
        y = result.sampled_token[row, :length]
        delta = rl_BTV[row, steps, y] - base_BTV[row, steps, y]
        np.testing.assert_allclose(result.delta_logp[row, :length], delta, atol=1e-4)
        np.testing.assert_array_equal(result.fired[row, :length], result.delta_logp[row, :length] <= np.float32(-0.3))
    alone = generate(*qwens[:2], PROMPTS, **settings)
    none = generate_selective(*qwens, PROMPTS, criterion="none", tau=None, gamma=0.0, **settings)
    np.testing.assert_array_equal(none.tokens, alone.tokens)
    np.testing.assert_allclose(none.logp, alone.logp, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_the_same_tokens(qwens):
    prompts = [[1 + i, 2, 3][: 1 + i % 3] for i in range(4)]
    settings = {"criterion": "delta_logp", "tau": -0.3, "gamma": 0.5, "max_new_tokens": 8, "n": 2}
    expected = generate_selective(*qwens, prompts, **settings)
    sharded = generate_selective(*qwens, prompts, **settings, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    for name in expected._fields:
        np.testing.assert_allclose(getattr(sharded, name), getattr(expected, name), atol=1e-4, err_msg=name)


BAD = {
    "criterion": ({"criterion": "delta"}, "criterion='delta'"),
    "tau missing": ({"tau": None}, "tau=None"),
    "tau rows": ({"tau": np.zeros(3)}, "tau has shape"),
    "gamma": ({"gamma": float("inf")}, "gamma=inf"),
    "sample_from": ({"sample_from": "RL"}, "sample_from='RL'"),
    "block": ({"block": 0}, "block=0"),
    "top_logprobs": ({"top_logprobs": 0}, "top_logprobs=0"),
    "js_true": ({"criterion": "js_true", "top_logprobs": 50}, "js_true"),
    "prompts": ({"prompts": []}, "prompts is empty"),
    "temperature": ({"temperature": -1}, "temperature=-1"),
    "length": ({"max_new_tokens": 600}, "max_position_embeddings 512 of config_base"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_compiled(qwens, case):
    arguments, message = BAD[case]
    defaults = {"prompts": [[1, 2]], "criterion": "delta_logp", "tau": -0.3, "gamma": 0.0, "max_new_tokens": 2}
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        generate_selective(*qwens, **{**defaults, **arguments})
    assert not compiled
