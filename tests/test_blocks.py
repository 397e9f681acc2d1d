"""Verified blocks and slots change how much work a decode is, never a token of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.criteria import CRITERIA
from rlvr_jax.decoding.batch import make_queue
from rlvr_jax.decoding.blocks import BlockChoice, block_cost, expected_tokens
from rlvr_jax.decoding.engine import EngineStats, serve
from rlvr_jax.decoding.selective import decode_selective, make_rule
from rlvr_jax.direction import extrapolate
from rlvr_jax.generation import generate_selective, language_model
from rlvr_jax.sharding.rules import make_mesh
from tests.decoding_tools import chi_square, softmax, tiny_qwen, toy_logits, toy_model, toy_params

MODELS = (toy_model(),) * 2
SAME = ("tokens", "lengths", "finished", "invalid", "fired", "sampled_token")
CLOSE = ("logp", "delta_logp")
# Thresholds near which the pair below fires on a twentieth to a third of the tokens.
TAU = {
    "delta_logp": -0.5,
    "neg_delta_logp": -0.5,
    "abs_delta_logp": 0.8,
    "entropy_base": 1.8,
    "entropy_rl": 1.8,
    "kl": 0.2,
    "kl_reverse": 0.2,
    "js": 0.2,
    "js_true": 0.045,
    "random": 0.15,
    "none": None,
    "all": None,
}


def near(params, seed: int, scale: float):
    """Parameters a little away from `params`, as after a short training."""
    rng = np.random.default_rng(seed)
    moved = {name: x + scale * rng.normal(size=np.shape(x)).astype(np.float32) for name, x in params.items()}
    return moved | {"decay": params["decay"]}


BASE = toy_params(0)
RL = near(BASE, 1, 0.12)


def request(criterion: str, rows_of_prompt: int = 4, prompts: int = 16, vocabulary: int = 11, **settings):
    """Ragged prompts, several stop tokens, tau and gamma that differ from row to row."""
    rng = np.random.default_rng(5)
    rows = prompts * rows_of_prompt
    tau = TAU[criterion] if "tau" not in settings else settings.pop("tau")
    return {
        "prompts": [rng.integers(0, vocabulary, rng.integers(1, 20)).tolist() for _ in range(prompts)],
        "criterion": criterion,
        "tau": None if tau is None else tau * np.linspace(0.9, 1.1, rows),
        "gamma": np.linspace(0, 1.5, rows),
        "n": rows_of_prompt,
        "max_new_tokens": 40,
        "stop_tokens": (3, 7),
        "top_p": 0.95,
        "seed": 3,
        **settings,
    }


def assert_same(first, second, atol: float = 1e-5) -> None:
    for name in SAME:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    for name in CLOSE:
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=atol, err_msg=name)


def fired_share(result) -> float:
    return result.fired.sum() / result.lengths.sum()


def check_criterion(criterion: str, sample_from: str) -> None:
    call = request(criterion, sample_from=sample_from)
    single = decode_selective(MODELS, (BASE, RL), **call, block=1, chunk=40)
    np.testing.assert_array_equal(single.passes_sampled, single.lengths)
    np.testing.assert_array_equal(single.passes_other, single.lengths)
    # Another block, fewer slots than rows, another chunk and other bounds of the prompts, all at once.
    other = decode_selective(MODELS, (BASE, RL), **call, block=6, chunk=25, slots=7, prompt_length=30)
    assert_same(single, other)
    if criterion not in ("none", "all"):
        assert 0.01 < fired_share(single) < 0.6, fired_share(single)


@pytest.mark.parametrize(("criterion", "sample_from"), [("delta_logp", "base"), ("kl", "rl"), ("random", "base")])
def test_tokens_are_those_of_single_steps(criterion, sample_from):
    check_criterion(criterion, sample_from)


@pytest.mark.slow
@pytest.mark.parametrize("sample_from", ["base", "rl"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_tokens_are_those_of_single_steps_for_every_criterion(criterion, sample_from):
    check_criterion(criterion, sample_from)


@pytest.mark.slow
@pytest.mark.parametrize("top_logprobs", [3])
def test_the_published_rule_in_blocks(top_logprobs):
    call = request("kl", tau=0.02, top_logprobs=top_logprobs)
    single = decode_selective(MODELS, (BASE, RL), **call, block=1)
    assert_same(single, decode_selective(MODELS, (BASE, RL), **call, block=4))
    assert single.fired.any()


def qwen_pair(scale: float = 0.0037):
    config, base = tiny_qwen("qwen2")
    rng = np.random.default_rng(8)
    rl = jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype(np.float32), base)
    return config, base, config, rl


def test_a_thousand_rows_of_a_qwen_pair():
    """At about 3% selected and responses of 256 tokens and more a token costs at most 1.35 passes in sequence."""
    pair = qwen_pair()
    prompts = [[1 + i % 7, 5 + i % 11, i % 64][: 1 + i % 3] for i in range(250)]
    call = {"criterion": "delta_logp", "tau": -0.3, "gamma": 0.5, "n": 4, "max_new_tokens": 48, "stop_tokens": (9, 33)}
    single = generate_selective(*pair, prompts, **call, block=1)
    blocks = generate_selective(*pair, prompts, **call, block=8)
    assert_same(single, blocks, atol=1e-4)
    assert len(single.lengths) == 1000
    assert 0.01 < fired_share(single) < 0.06
    assert 0 < single.finished.mean() < 1


def test_passes_of_long_responses():
    config, base, _, rl = qwen_pair()
    call = {"criterion": "delta_logp", "tau": -0.3, "gamma": 0.5, "n": 4, "max_new_tokens": 300}
    model = language_model(dataclasses.replace(config, dtype="float32"))
    result = decode_selective((model, model), (base, rl), [[1, 2], [3]], **call, chunk=300)
    passes = (result.passes_sampled + result.passes_other).sum() / result.lengths.sum()
    assert 0.02 < fired_share(result) < 0.05
    assert passes <= 1.35, passes


def test_nothing_is_drafted_past_the_end():
    """Every response ends at its first token, so a block of 16 drafts one."""
    call = request("delta_logp", stop_tokens=tuple(range(11)))
    result = decode_selective(MODELS, (BASE, RL), **call, block=16)
    np.testing.assert_array_equal(result.lengths, 1)
    np.testing.assert_array_equal(result.passes_sampled, 1)
    assert result.finished.all()


def test_a_limit_ends_a_block():
    call = request("none", max_new_tokens=5)
    result = decode_selective(MODELS, (BASE, RL), **call, block=4)
    assert result.lengths.max() == 5
    full = result.lengths == 5
    assert set(result.passes_sampled[full].tolist()) == {5}, "four drafts and one, not four and four"
    assert set(result.passes_other[full].tolist()) == {2}


def test_steps_that_give_nothing_are_counted():
    """Drafts that are dropped are no idle slots, and the pass that finds a row poisoned is one of its passes."""
    toy, poison = MODELS[0], 5

    def forward(params, tokens_BT, positions_BT, cache):
        hidden_BTD, cache = toy.forward(params, tokens_BT, positions_BT, cache)
        return jnp.where(tokens_BT[..., None] == poison, jnp.nan, hidden_BTD), cache

    models = (toy._replace(forward=forward), toy)
    queue = make_queue([[1, 2], [3], [4, 6, 1]], n=4, tau=-0.3, max_new_tokens=12, stop_tokens=(7,), seed=2)
    stats = EngineStats()
    for row in serve(models, (BASE, RL), queue, rule=make_rule("delta_logp", -0.3), slots=1, block=3, stats=stats):
        poisoned = bool(row.tokens[-1] == poison) and len(row.tokens) < 12
        assert row.invalid == poisoned
        assert row.passes[0] >= len(row.tokens) + poisoned
        assert (row.passes[0] + 2) // 3 <= row.passes[1] <= len(row.tokens) + poisoned
    assert stats.sampled_passes > stats.tokens, "some drafts were dropped"
    assert stats.idle_share == 0
    stats = EngineStats()
    for row in serve(models, (BASE, RL), queue, rule=make_rule("delta_logp", -0.3), block=1, stats=stats):
        assert row.passes == (len(row.tokens) + row.invalid,) * 2
    assert 0 < stats.idle_share < 1


def test_pairs_of_tokens_follow_the_closed_form():
    """With noise of other rows: the joint law of two tokens against P(kept) + P(fires) x the extrapolated law."""
    rows, tau, gamma = 6000, -0.1, 0.8

    def law(text):
        base, rl = (np.log(softmax(toy_logits(params, text))) for params in (BASE, RL))
        kept = np.where(rl - base > tau, np.exp(base), 0)
        return kept + (1 - kept.sum()) * np.exp(np.asarray(extrapolate(base[None], rl[None], gamma)[0], np.float64))

    result = decode_selective(
        MODELS, (BASE, RL), [[1, 2, 3]], criterion="delta_logp", tau=tau, gamma=gamma, n=rows, max_new_tokens=3, block=3
    )
    first = law([1, 2, 3])
    second = np.stack([law([1, 2, 3, token]) for token in range(11)])
    pairs = result.tokens[:, 0] * 11 + result.tokens[:, 1]
    assert abs(chi_square(pairs, (first[:, None] * second).reshape(-1))) < 4
    assert result.fired[:, 1][result.fired[:, 0]].any(), "second tokens after a rejected block must be among them"


def test_a_block_is_chosen_from_the_rate():
    assert expected_tokens(0.0, 8) == 8
    assert expected_tokens(1.0, 8) == 1
    assert expected_tokens(0.5, 2) == pytest.approx(1.5)  # 1 + P(the first does not fire)
    assert block_cost(0.0, 4, 0, 100.0) == pytest.approx(5 / 4), "nothing but reading: four drafts and one pass"
    assert block_cost(0.0, 4, 100, 100.0) == pytest.approx((4 * 2 + 5) / 4)
    choice = BlockChoice(rows=1, block=None)
    choice.saw(0, 10_000)
    assert choice.block == 16
    choice.saw(100, 10_000)
    assert choice.block == 16, "another program for less than a tenth"
    choice.saw(30_000, 30_000)
    assert choice.block == 1
    fixed = BlockChoice(rows=1, block=5)
    fixed.saw(1000, 1000)
    assert fixed.block == 5


def test_a_block_is_chosen_for_the_rows_of_a_device():
    queue = make_queue([[1, 2]] * 16, n=4, max_new_tokens=2)
    taken = {}
    for mesh in (None, make_mesh(data=8)):
        stats = EngineStats()
        assert len(list(serve(MODELS, (BASE, RL), queue, rule=make_rule("none", None), mesh=mesh, stats=stats))) == 64
        taken[mesh is not None] = set(stats.blocks)
    assert taken == {False: {1}, True: {4}}, "at 64 rows arithmetic is what costs on CPU, at 8 reading the weights"


@pytest.mark.parametrize("broken", ["sampled", "other"])
def test_a_poisoned_row_ends_alone(broken):
    """A token whose embedding is NaN in one model ends the row that draws it; the others are as they were."""
    config, base, _, rl = qwen_pair()
    poison = 33
    call = request("random", vocabulary=64, max_new_tokens=24)
    call = {name: value for name, value in call.items() if name != "prompts"} | {"block": 4, "slots": 9}
    prompts = [[1, 2], [3], [4, poison, 5], [6, 7, 8], [9, 10, 11, 12]] * 3 + [[13]]

    def run(base, rl):
        return generate_selective(config, base, config, rl, prompts, **call)

    expected = run(base, rl)
    poisoned = [base, rl]
    which = 0 if broken == "sampled" else 1
    poisoned[which] = dict(poisoned[which], embed=poisoned[which]["embed"].at[poison].set(np.nan))
    result = run(*poisoned)
    given = np.repeat([poison in prompt for prompt in prompts], 4)
    drew = np.array(
        [poison in row[: length - 1] for row, length in zip(expected.tokens, expected.lengths, strict=True)]
    )
    drew &= ~given
    assert drew.any()
    np.testing.assert_array_equal(result.invalid, drew | given)
    assert not result.lengths[given].any()
    clean = ~drew & ~given
    np.testing.assert_array_equal(result.tokens[clean], expected.tokens[clean])
    for row in np.flatnonzero(drew):
        length = result.lengths[row]
        assert result.tokens[row, length - 1] == poison, "it ends with the token whose successor cannot be scored"
        np.testing.assert_array_equal(result.tokens[row, :length], expected.tokens[row, :length])
