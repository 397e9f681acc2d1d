"""What the formulas take: numbers of any dtype, shapes that fit, values in range however they are given."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import rlvr_jax as rj
from rlvr_jax.criteria import CRITERIA, criterion_value, fires_at
from rlvr_jax.evaluation import _checked, maj_per_problem
from rlvr_jax.objectives.diagnostics import logit_gradient_l1, shares_by_probability, token_weights, weight_statistics
from rlvr_jax.objectives.masks import TOKEN_MASKS
from rlvr_jax.objectives.reweight import REWEIGHTINGS
from rlvr_jax.objectives.segments import response_begins, response_sums
from rlvr_jax.top_logprobs import published_top_logprobs

# Whole numbers only, so that every dtype holds them.
LOGP = np.array([[0, -1, -3, -2], [-2, 0, -1, -1]])
OLD = np.array([[-1, -1, -2, -2], [-1, 0, -3, -1]])
ADVANTAGES = np.array([[1, 1, -1, 2], [-1, 0, 1, 1]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
GROUP, KEY = np.array([0, 0]), jax.random.key(0)


def everything(logp, old, advantages, mask):
    """Every objective of the library on one batch."""
    made = {
        f"reweight {kind}": rj.reweight(kind, advantages, old, mask, alpha=0.2, group_B=GROUP, key=KEY)
        for kind in REWEIGHTINGS
    }
    for quantile_kind in ("lowest_logp", "highest_entropy", "middle_delta_logp", "prob_below"):
        arrays = {"old_logp_BT": old, "entropy_BT": advantages, "ref_logp_BT": logp}
        made[quantile_kind] = rj.token_mask(quantile_kind, mask, quantile=0.5, **arrays).astype(jnp.float32)
    for loss in (rj.policy_loss, rj.gspo_loss, rj.cispo_loss):
        value, metrics = loss(logp, old, advantages, mask)
        made |= {loss.__name__: value} | {f"{loss.__name__} {name}": x for name, x in metrics.items()}
    for mode in ("token-mean", "seq-mean-token-mean"):
        made[mode] = rj.aggregate(advantages, mask, mode)
        made[f"{mode} of responses"] = rj.aggregate(advantages, mask, mode, segment_BT=np.array([[1, 1, 2, 2]] * 2))
    made["kl"] = rj.kl_penalty(logp, old, mask)
    made["importance"] = rj.importance_weights(old, logp, mask, kind="sequence")
    made["sums"] = response_sums(mask)
    made["advantages"] = rj.group_advantages(advantages[:, 0], GROUP)
    made["overlong"] = rj.overlong_penalty(mask.sum(axis=1) * 2, max_response=8, buffer=4)
    return made


@pytest.fixture(scope="module")
def in_float32():
    return jax.jit(everything)(*(jnp.asarray(x, jnp.float32) for x in (LOGP, OLD, ADVANTAGES, MASK)))


@pytest.mark.parametrize(("dtype", "mask_dtype"), [("int8", "uint8"), ("bfloat16", "bool")])
def test_numbers_of_every_dtype_are_computed_with_as_float32(dtype, mask_dtype, in_float32):
    got = jax.jit(everything)(*(jnp.asarray(x, dtype) for x in (LOGP, OLD, ADVANTAGES)), jnp.asarray(MASK, mask_dtype))
    for name, expected in in_float32.items():
        np.testing.assert_array_equal(got[name], expected, err_msg=name)
        assert {x.dtype.name for x in jax.tree.leaves(got[name])} == {"float32"}, name


def test_reweighted_integers_by_hand():
    """1 + 0.2 (1 - 1/2) = 1.1 on integer advantages, which would be 1 again if they stayed integers."""
    half = np.full((1, 3), np.log(0.5), np.float32)
    got = rj.reweight("low_prob", np.array([[1, 1, -1]]), half, np.ones((1, 3), int), alpha=0.2)
    np.testing.assert_allclose(got, [[1.1, 1.1, -1.1]], rtol=1e-6)
    np.testing.assert_allclose(rj.group_advantages(np.array([True, False]), GROUP), [0.5**0.5, -(0.5**0.5)], rtol=1e-5)
    # Unsigned lengths below the expected one: not a difference that wraps around.
    short = rj.overlong_penalty(np.array([2, 7], np.uint32), max_response=8, buffer=2)
    np.testing.assert_array_equal(short, [0, -0.5])


def test_a_mask_that_is_not_positive_leaves_a_token_out():
    values, mask = np.array([[1, 2, 4, 8]], np.float32), np.array([[-1, np.nan, 0.5, 0]], np.float32)
    for mode, expected in (("token-mean", (2, 0.5)), ("seq-mean-token-sum", (2, 1)), ("seq-mean-token-mean", (4, 1))):
        assert tuple(map(float, rj.aggregate(values, mask, mode))) == expected, mode
    np.testing.assert_array_equal(rj.policy_loss(values, values, values, mask)[0], [[0, 0, -4, 0]])


def test_where_responses_begin():
    begins = response_begins(np.array([[1, 1, 2, 0, 0], [0, 1, 2, 3, 3]]), (2, 5))
    np.testing.assert_array_equal(begins, [[1, 0, 1, 0, 0], [0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(response_begins(None, (2, 3)), [[1, 0, 0]] * 2)


@pytest.mark.parametrize("segment", [[[1, 1, 2, 0], [1, 2, 2, 2]], [[7, 7, 9, 0], [300, 10, 10, 10]]])
def test_responses_may_be_numbered_over_the_whole_batch(segment):
    """Numbers above T are responses like others: gspo's mean, and how many there are."""
    values, mask = np.array([[1.0, 3.0, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0]]), np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    segment = np.array(segment, np.int16)
    np.testing.assert_array_equal(response_sums(values * mask, segment), [[4, 4, 5, 0], [1, 9, 9, 9]])
    total, weight = jax.jit(rj.aggregate, static_argnums=2)(values, mask, "seq-mean-token-mean", segment_BT=segment)
    assert (float(total), float(weight)) == (2 + 5 + 1 + 3, 4)
    zeros = np.zeros((2, 4))
    loss, _ = rj.gspo_loss(np.log(values), zeros, -np.ones((2, 4)), mask, clip_low=1, clip_high=9, segment_BT=segment)
    expected = np.array([[3**0.5, 3**0.5, 5, 0], [1, 24 ** (1 / 3), 24 ** (1 / 3), 24 ** (1 / 3)]])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_batch_without_tokens_has_masks(shape):
    zeros = np.zeros(shape)
    for kind in TOKEN_MASKS:
        kept = rj.token_mask(kind, zeros, quantile=0.5, old_logp_BT=zeros, entropy_BT=zeros, ref_logp_BT=zeros)
        assert kept.shape == shape, kind


@pytest.mark.parametrize("dtype", ["int8", ml_dtypes.bfloat16, "float16"])
def test_diagnostics_of_every_dtype(dtype):
    wide = [x.astype(np.float32) for x in (ADVANTAGES, LOGP, OLD)]
    advantages, logp, old = (x.astype(dtype) for x in (ADVANTAGES, LOGP, OLD))
    np.testing.assert_allclose(logit_gradient_l1(advantages, logp, old), logit_gradient_l1(*wide), rtol=1e-6)
    np.testing.assert_allclose(token_weights(old, advantages, MASK), token_weights(wide[2], wide[0], MASK), rtol=1e-6)
    values = np.abs(advantages)
    for got, expected in zip(
        shares_by_probability(values, logp, MASK),
        shares_by_probability(np.abs(wide[0]), wide[1], MASK.astype(np.float32)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected)
    assert weight_statistics(advantages) == weight_statistics(wide[0])
    assert logit_gradient_l1(np.array([[-128]], np.int8), np.array([[-100]], np.int8))[0, 0] == pytest.approx(256)


def unchecked(function):
    """Without the annotations, which tests check and which would raise first."""
    return inspect.unwrap(function)


# Values out of range: as a Python number, a numpy scalar, an array of numpy or of jax.

BASE = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], np.float32))
RL = np.log(np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]], np.float32))
TOKEN = np.array([0, 1])
PER_TOKEN = [x.astype(np.float32) for x in (LOGP, OLD, ADVANTAGES, MASK)]
HIDDEN, TARGETS = np.ones((1, 2, 3), np.float32), np.zeros((1, 2), int)
OUT_OF_RANGE = {
    "alpha": (-1, lambda x: rj.reweight("inverse", *PER_TOKEN[:3], alpha=x)),
    "alpha of focal": (-0.5, lambda x: rj.reweight("current_focal", *PER_TOKEN[:3], alpha=x)),
    "alpha of low_prob": (np.nan, lambda x: rj.reweight("low_prob", *PER_TOKEN[:3], alpha=x)),
    "quantile": (-1, lambda x: rj.token_mask("lowest_logp", MASK, quantile=x, old_logp_BT=PER_TOKEN[0])),
    "epsilon": (-1e-6, lambda x: rj.group_advantages(PER_TOKEN[0][:, 0], GROUP, epsilon=x)),
    "clip_low": (-0.2, lambda x: rj.policy_loss(*PER_TOKEN, clip_low=x)),
    "clip_high": (-0.2, lambda x: rj.policy_loss(*PER_TOKEN, clip_high=x)),
    "clip_dual": (1, lambda x: rj.policy_loss(*PER_TOKEN, clip_dual=x)),
    "clip_low of gspo": (-1, lambda x: rj.gspo_loss(*PER_TOKEN, clip_low=x)),
    "clip_high of cispo": (-1, lambda x: rj.cispo_loss(*PER_TOKEN, clip_high=x)),
    "cap": (0, lambda x: rj.importance_weights(*PER_TOKEN[:2], MASK, cap=x)),
    "max_length": (0, lambda x: unchecked(rj.aggregate)(*PER_TOKEN[2:], "seq-mean-token-sum-norm", max_length=x)),
    "buffer": (-4, lambda x: unchecked(rj.overlong_penalty)(np.array([4]), max_response=8, buffer=x)),
    "factor": (np.nan, lambda x: unchecked(rj.overlong_penalty)(np.array([4]), max_response=8, buffer=4, factor=x)),
    "temperature": (-1, lambda x: rj.token_logprobs(HIDDEN, TARGETS, temperature=x)),
    "temperature chunked": (-0.5, lambda x: rj.chunked_logprobs(HIDDEN, RL.T @ RL, TARGETS, temperature=x)),
    "tau": (np.nan, lambda x: rj.fires("kl", BASE, RL, TOKEN, x)),
    "gamma": (np.inf, lambda x: rj.extrapolate(BASE, RL, x)),
}


@pytest.mark.parametrize("as_", [float, np.float32, np.float64, np.asarray, jnp.asarray], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_values_out_of_range_are_refused_however_they_are_given(name, as_):
    value, call = OUT_OF_RANGE[name]
    with pytest.raises(ValueError, match=rf"{name.split()[0]}=-?[\dnai].*: expected"):
        call(as_(value))


def test_values_in_range_are_taken_at_their_edges():
    assert np.isfinite(rj.policy_loss(*PER_TOKEN, clip_low=0, clip_high=np.float32(0), clip_dual=None)[0]).all()
    assert np.isfinite(rj.reweight("current_focal", *PER_TOKEN[:3], alpha=np.float64(0))).all()
    np.testing.assert_array_equal(rj.group_advantages(np.array([2, 2, 1, 3]), np.array([0, 0, 1, 1]), epsilon=0)[:2], 0)


def test_counts_that_are_no_integers_are_refused():
    correct = np.array([[1, 0, 1]])
    for k in (1.5, np.float32(2), "2", None, 0, np.int64(4)):
        with pytest.raises(ValueError, match=rf"k={k}: expected 1 to 3"):
            unchecked(_checked)(correct, k)
    with pytest.raises(ValueError, match=r"resamples=0\.5"):
        unchecked(maj_per_problem)(correct, [["1"] * 3], 2, resamples=0.5)


# Shapes are known when tracing, so these raise under jit too.

WIDE = jax.nn.log_softmax(np.zeros((2, 4), np.float32))
ONE = np.zeros((2, 1), np.float32)


@pytest.fixture(params=["jit", "eager"])
def wrap(request):
    return jax.jit if request.param == "jit" else lambda f: f


@pytest.mark.parametrize("other", [WIDE, ONE, WIDE[:1]], ids=["wider", "of one token", "of one row"])
def test_vocabularies_of_different_size_are_refused(other, wrap):
    calls = [lambda b, r, c=c: unchecked(rj.fires)(c, b, r, TOKEN, 0.5, KEY) for c in CRITERIA]
    calls += [
        lambda b, r, c=c: unchecked(criterion_value)(c, b, r, TOKEN, top_logprobs=1) for c in ("kl", "delta_logp")
    ]
    calls += [lambda b, r, f=f: unchecked(f)(b, r) for f in (rj.kl_divergence, rj.js_average, rj.js_divergence)]
    calls += [lambda b, r: unchecked(rj.delta_logp)(b, r), lambda b, r: unchecked(rj.extrapolate)(b, r, 0.1)]
    calls += [lambda b, r: unchecked(published_top_logprobs)(b, r, 2)]
    for call in calls:
        for pair in ((BASE, other), (other, RL)):
            with pytest.raises(ValueError, match="shapes differ"):
                wrap(call)(*pair)


def test_one_number_per_row_and_no_table(wrap):
    column, longer = np.zeros((2, 1), np.float32), np.zeros(3, np.float32)
    for tau in (column, longer, np.zeros(1, np.float32)):
        for criterion in ("kl", "delta_logp", "random"):
            with pytest.raises(ValueError, match=r"tau has shape .*: expected a number, or one per row, \(2,\)"):
                wrap(lambda t, c=criterion: unchecked(rj.fires)(c, BASE, RL, TOKEN, t, KEY))(tau)
        with pytest.raises(ValueError, match="gamma has shape"):
            wrap(lambda g: unchecked(rj.extrapolate)(BASE, RL, g))(tau)
    with pytest.raises(ValueError, match="tau has shape"):
        wrap(lambda t: unchecked(fires_at)("kl", np.zeros(2), t))(column)
    for criterion in CRITERIA:
        with pytest.raises(ValueError, match=r"token_B has shape \(3,\)"):
            wrap(lambda y, c=criterion: unchecked(rj.fires)(c, BASE, RL, y, 0.5, KEY))(np.zeros(3, int))


def test_tokens_outside_the_vocabulary_raise_or_are_nan():
    for token in (-1, -100, 3):
        tokens = np.array([token, 1])
        for criterion in ("delta_logp", "abs_delta_logp", "kl"):
            with pytest.raises(ValueError, match=rf"token_B={token}: expected token ids from 0 to 2"):
                rj.fires(criterion, BASE, RL, tokens, 0.5)
        for top in (None, 2):
            value = jax.jit(lambda y, top=top: criterion_value("delta_logp", BASE, RL, y, top_logprobs=top))(tokens)
            np.testing.assert_array_equal(np.isnan(value), [True, False])
        assert not jax.jit(lambda y: rj.fires("neg_delta_logp", BASE, RL, y, 99.0))(tokens)[0]


# Logits where log-probabilities belong.


@pytest.mark.parametrize("shift", [0.0, 5.0, -30.0, 400.0, -900.0])
def test_logits_are_not_taken_for_log_probabilities(shift):
    logits = np.random.default_rng(0).normal(size=(2, 3, 50)).astype(np.float32) * 3 + np.float32(shift)
    logp = jax.nn.log_softmax(logits)
    token = np.zeros(3, int)
    for as_ in (np.asarray, jnp.asarray):
        given = as_(logits)
        calls = [lambda x: rj.entropy(x), lambda x: rj.kl_divergence(x, logp), lambda x: rj.kl_divergence(logp, x)]
        calls += [lambda x: rj.js_average(logp, x), lambda x: rj.js_divergence(x, logp)]
        calls += [lambda x: rj.entropy(x[0, 0]), lambda x: rj.fires("kl", x[0], logp[0], token, 0.1)]
        calls += [lambda x: rj.fires("delta_logp", logp[1], x[1], token, 0.1)]
        for call in calls:
            with pytest.raises(ValueError, match=r"logp\w*: exp of a row sums to .*log_softmax"):
                call(given)


def test_log_probabilities_in_bfloat16_truncated_or_of_nothing_are_taken():
    logits = 4 * jax.random.normal(jax.random.key(0), (4, 3000))
    logp = jax.nn.log_softmax(logits)
    assert rj.entropy(logp.astype(jnp.bfloat16)).shape == (4,)
    cut = jax.nn.log_softmax(jnp.where(logits > 0, logits, -jnp.inf))
    assert np.isfinite(rj.kl_divergence(cut, logp)).all()
    np.testing.assert_array_equal(rj.entropy(np.full((2, 3), -np.inf, np.float32)), 0)
    assert np.isnan(rj.entropy(np.full((2, 3), np.nan, np.float32))).all()
    assert rj.entropy(np.zeros((0, 3), np.float32)).shape == (0,)
