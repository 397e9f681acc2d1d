"""The direction of an update: dlogp, entropy, divergences, criteria, extrapolation, the published top-k rule."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.criteria import CRITERIA, MEASURED, criterion_value, fires
from rlvr_jax.direction import delta_logp, entropy, extrapolate, js_average, js_divergence, kl_divergence
from rlvr_jax.top_logprobs import published_top_logprobs

INF = np.inf
LOG2 = np.log(2.0)


@pytest.fixture(params=["jit", "eager"])
def wrap(request):
    return jax.jit if request.param == "jit" else lambda f: f


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_pair(seed=0, rows=5, vocabulary=17, scale=2.0):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(rows, vocabulary)) * scale
    return log_softmax(base), log_softmax(base + rng.normal(size=(rows, vocabulary)))


# p = (1/2, 1/2, 0), q = (1/4, 1/4, 1/2): every value below can be checked on paper.
P = np.array([-LOG2, -LOG2, -INF])
Q = np.log(np.array([0.25, 0.25, 0.5]))


def test_hand_computed_entropies_and_divergences(wrap):
    assert wrap(entropy)(P) == pytest.approx(LOG2, rel=1e-6)
    assert wrap(entropy)(Q) == pytest.approx(1.5 * LOG2, rel=1e-6)
    assert wrap(kl_divergence)(P, Q) == pytest.approx(LOG2, rel=1e-6)
    assert wrap(kl_divergence)(Q, P) == INF
    assert wrap(js_average)(P, Q) == INF
    # m = (3/8, 3/8, 1/4): KL(p || m) = log(4/3); KL(q || m) = 1/2 log(2/3) + 1/2 log 2.
    expected = 0.5 * (np.log(4 / 3) + 0.5 * np.log(2 / 3) + 0.5 * LOG2)
    assert wrap(js_divergence)(P, Q) == pytest.approx(expected, rel=1e-6)


def test_divergences_against_float64_sums(wrap, x64):
    base, rl = random_pair()
    p, q = np.exp(rl), np.exp(base)
    m = (p + q) / 2
    kl, kl_reverse = (p * np.log(p / q)).sum(-1), (q * np.log(q / p)).sum(-1)
    np.testing.assert_allclose(wrap(entropy)(base), -(q * np.log(q)).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(wrap(kl_divergence)(rl, base), kl, rtol=1e-12)
    np.testing.assert_allclose(wrap(js_average)(rl, base), (kl + kl_reverse) / 2, rtol=1e-12)
    js = ((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2
    np.testing.assert_allclose(wrap(js_divergence)(rl, base), js, rtol=1e-12)
    np.testing.assert_allclose(js_divergence(base, rl), js, rtol=1e-12)
    assert (js < kl / 4 + kl_reverse / 4 + 1e-12).all()


def test_disjoint_supports_and_underflow_give_no_nan():
    left, right = np.array([0.0, -INF]), np.array([-INF, 0.0])
    assert js_divergence(left, right) == pytest.approx(LOG2, rel=1e-6)
    assert entropy(left) == 0
    assert kl_divergence(left, right) == INF
    assert kl_divergence(left, left) == 0
    # exp(-200) is 0 in float32: it must not meet the infinite ratio.
    assert kl_divergence(np.array([0.0, -200.0], np.float32), np.array([0.0, -INF], np.float32)) == 0
    grad = jax.grad(lambda logp: kl_divergence(logp, Q.astype(np.float32)) + entropy(logp))(P.astype(np.float32))
    assert np.isfinite(grad).all()


def test_delta_logp_hand_values_and_infinities(wrap):
    base = np.array([-1.0, -2.0, -INF, -1.0, -INF], np.float32)
    rl = np.array([-0.5, -3.5, -1.0, -INF, -INF], np.float32)
    np.testing.assert_array_equal(wrap(delta_logp)(base, rl), [0.5, -1.5, INF, -INF, 0.0])


def test_bfloat16_is_widened():
    logp = jnp.asarray(log_softmax(np.zeros(1000))[None], jnp.bfloat16)
    assert entropy(logp).dtype == jnp.float32
    # A bfloat16 sum of 1000 equal terms stalls at a fraction of the total.
    exact = -(np.exp(np.float64(logp[0, 0])) * np.float64(logp[0, 0])) * 1000
    assert entropy(logp)[0] == pytest.approx(exact, rel=1e-5)


# Two rows. Row 0: token 0 loses, row 1: token 0 gains. base, rl as probabilities.
BASE = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], np.float32))
RL = np.log(np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]], np.float32))
TOKEN = np.array([0, 0])
KL = 0.25 * LOG2  # both ways, both rows: 1/2 log 2 - 1/4 log 2
JS = 0.5 * 2 * (0.5 * np.log(0.5 / 0.375) + 0.25 * np.log(0.25 / 0.375))


@pytest.mark.parametrize(
    ("criterion", "tau", "expected"),
    [
        ("delta_logp", -LOG2 + 1e-4, [True, False]),
        ("delta_logp", -LOG2 - 1e-4, [False, False]),
        ("delta_logp", LOG2 + 1e-4, [True, True]),
        ("neg_delta_logp", -LOG2 + 1e-4, [False, True]),
        ("neg_delta_logp", LOG2 - 1e-4, [False, True]),
        ("abs_delta_logp", LOG2 - 1e-4, [True, True]),
        ("abs_delta_logp", LOG2 + 1e-4, [False, False]),
        ("entropy_base", 1.5 * LOG2 - 1e-4, [True, True]),
        ("entropy_base", 1.5 * LOG2 + 1e-4, [False, False]),
        ("entropy_rl", 1.5 * LOG2 - 1e-4, [True, True]),
        ("kl", KL - 1e-4, [True, True]),
        ("kl", KL + 1e-4, [False, False]),
        ("kl_reverse", KL - 1e-4, [True, True]),
        ("kl_reverse", KL + 1e-4, [False, False]),
        ("js", KL - 1e-4, [True, True]),
        ("js", KL + 1e-4, [False, False]),
        ("js_true", JS - 1e-4, [True, True]),
        ("js_true", JS + 1e-4, [False, False]),
        ("none", None, [False, False]),
        ("all", None, [True, True]),
    ],
)
def test_every_criterion_on_a_hand_case(criterion, tau, expected, wrap):
    run = wrap(lambda base, rl, token, tau: fires(criterion, base, rl, token, tau))
    np.testing.assert_array_equal(run(BASE, RL, TOKEN, tau), expected)


def test_thresholds_are_inclusive_and_entropies_are_not_swapped():
    base, rl = log_softmax([[5.0, 0, 0]]).astype(np.float32), log_softmax([[0.0, 0, 0]]).astype(np.float32)
    token = np.array([1])
    for criterion in ("delta_logp", "neg_delta_logp", "abs_delta_logp", "entropy_rl", "kl", "kl_reverse", "js"):
        tau = criterion_value(criterion, base, rl, token)
        assert fires(criterion, base, rl, token, tau).all(), criterion
    assert criterion_value("entropy_rl", base, rl, token)[0] == pytest.approx(np.log(3), rel=1e-6)
    assert criterion_value("entropy_base", base, rl, token)[0] < 0.2
    p, q = np.exp(np.float64(rl)), np.exp(np.float64(base))
    assert criterion_value("kl", base, rl, token)[0] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert criterion_value("kl_reverse", base, rl, token)[0] == pytest.approx((q * np.log(q / p)).sum(), rel=1e-5)


def test_tau_per_row_and_traced():
    compiled = []

    @jax.jit
    def run(tau):
        compiled.append(1)
        return fires("delta_logp", BASE, RL, TOKEN, tau)

    np.testing.assert_array_equal(run(jnp.array([-1.0, 1.0])), [False, True])
    np.testing.assert_array_equal(run(jnp.array([-0.5, 0.5])), [True, False])
    assert len(compiled) == 1


def test_random_criterion_rates_and_row_keys(wrap):
    rows = 4000
    logp = np.zeros((rows, 1), np.float32)
    token = np.zeros(rows, int)
    run = wrap(lambda tau, key: fires("random", logp, logp, token, tau, key))
    for key in (jax.random.key(0), jax.random.split(jax.random.key(1), rows)):
        assert np.mean(run(0.3, key)) == pytest.approx(0.3, abs=0.03)
        assert run(1.0, key).all()
        assert not run(0.0, key).any()


@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_random_criterion_gives_every_row_a_number_of_its_own(rows):
    logp = np.zeros((*rows, 1), np.float32)
    fired = inspect.unwrap(fires)("random", logp, logp, np.zeros(rows, int), 0.5, jax.random.key(0))
    assert fired.shape == rows


def test_random_criterion_of_a_row_does_not_depend_on_its_companions():
    keys = jax.random.split(jax.random.key(7), 64)
    logp = np.zeros((64, 2), np.float32)
    every = fires("random", logp, logp, np.zeros(64, int), 0.5, keys)
    part = fires("random", logp[40:43], logp[40:43], np.zeros(3, int), 0.5, keys[40:43])
    np.testing.assert_array_equal(every[40:43], part)
    raw = fires("random", logp, logp, np.zeros(64, int), 0.5, np.asarray(jax.random.key_data(keys)))
    np.testing.assert_array_equal(every, raw)
    one = jax.random.key(3)
    np.testing.assert_array_equal(
        fires("random", logp, logp, np.zeros(64, int), 0.5, one),
        fires("random", logp, logp, np.zeros(64, int), 0.5, jax.random.key_data(one)),
    )


def test_criteria_with_excluded_tokens_are_never_nan():
    base = np.array([[0.0, -INF, -INF], [-INF, -LOG2, -LOG2]], np.float32)
    rl = np.array([[-INF, 0.0, -INF], [-INF, 0.0, -INF]], np.float32)
    for criterion in MEASURED:
        for token in (0, 1, 2):
            assert not np.isnan(criterion_value(criterion, base, rl, np.full(2, token))).any(), (criterion, token)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'surprise'.*delta_logp.*js_true.*random"):
        fires("surprise", BASE, RL, TOKEN, 0.0)
    with pytest.raises(ValueError, match="tau=None"):
        fires("kl", BASE, RL, TOKEN, None)
    with pytest.raises(ValueError, match="key=None"):
        fires("random", BASE, RL, TOKEN, 0.5)
    with pytest.raises(ValueError, match=r"shape \(5,\).*2 rows"):
        fires("random", BASE, RL, TOKEN, 0.5, jax.random.split(jax.random.key(0), 5))
    with pytest.raises(ValueError, match="random"):
        criterion_value("random", BASE, RL, TOKEN)
    with pytest.raises(ValueError, match="sample_from='both'"):
        fires("delta_logp", BASE, RL, TOKEN, 0.0, top_logprobs=2, sample_from="both")
    with pytest.raises(ValueError, match="js_true"):
        fires("js_true", BASE, RL, TOKEN, 0.0, top_logprobs=2)
    with pytest.raises(ValueError, match="top_logprobs=0"):
        published_top_logprobs(BASE, RL, 0)


def test_extrapolate_hand_case(wrap):
    # Probabilities proportional to rl^2 / base: row 0: (1/8, 1, 1/4) / (11/8), row 1: (1, 1/8, 1/4) / (11/8).
    np.testing.assert_allclose(
        np.exp(wrap(extrapolate)(BASE, RL, 1.0)), [[1 / 11, 8 / 11, 2 / 11], [8 / 11, 1 / 11, 2 / 11]], rtol=1e-6
    )


def test_extrapolate_against_float64_and_its_two_forms(wrap, x64):
    base, rl = random_pair(3)
    gamma = np.array([0.0, 0.05, 0.1, 1.0, -1.0])
    result = np.asarray(wrap(extrapolate)(base, rl, gamma))
    np.testing.assert_allclose(result, log_softmax((1 + gamma[:, None]) * rl - gamma[:, None] * base), atol=1e-12)
    reweighted = np.exp(rl) * np.exp(gamma[:, None] * (rl - base))
    np.testing.assert_allclose(np.exp(result), reweighted / reweighted.sum(-1, keepdims=True), atol=1e-12)
    np.testing.assert_allclose(result[-1], base[-1], atol=1e-12)  # gamma = -1 is base


def test_extrapolate_gamma_zero_is_rl_bit_for_bit(wrap):
    rl = jax.nn.log_softmax(4 * jax.random.normal(jax.random.key(0), (3, 5000)))
    base = jax.nn.log_softmax(4 * jax.random.normal(jax.random.key(1), (3, 5000)))
    base = base.at[:, 7].set(-INF)
    np.testing.assert_array_equal(wrap(extrapolate)(base, rl, 0.0), rl)
    # An rl that is not normalised is normalised at gamma = 0 too.
    np.testing.assert_allclose(jnp.exp(wrap(extrapolate)(base, rl - 1, 0.0)).sum(-1), 1, rtol=1e-5)


def test_extrapolate_with_excluded_tokens(wrap):
    base = np.array([[-LOG2, -LOG2, -INF, -INF]], np.float32)
    rl = np.log(np.array([[0.25, 0.25, 0.5, 1.0]], np.float32))
    rl[0, 3] = -INF
    run = wrap(extrapolate)
    np.testing.assert_array_equal(run(base, rl, 0.0), rl)
    np.testing.assert_array_equal(np.exp(run(base, rl, 0.5)), [[0, 0, 1, 0]])  # the limit
    np.testing.assert_allclose(np.exp(run(base, rl, -0.5)), [[0.5, 0.5, 0, 0]], rtol=1e-6)
    both = np.log(np.array([[0.75, 0.25, 1.0]], np.float32))
    both[0, 2] = -INF
    np.testing.assert_array_equal(run(both, both, 0.3)[0, 2], -INF)
    np.testing.assert_allclose(np.exp(run(both, both, 0.3)), [[0.75, 0.25, 0]], rtol=1e-6)
    nothing = np.full((1, 3), -INF, np.float32)
    assert not np.isnan(run(nothing, nothing, 0.3)).any()


def test_extrapolate_takes_the_limit_of_a_small_base_probability(wrap):
    """Base excludes two of four tokens: what is left is shared as rl^(1 + gamma), as where base is nearly 0 there."""
    rl = np.log(np.array([[0.1, 0.2, 0.3, 0.4]] * 3, np.float32))
    base = np.log(np.array([[0.5, 0.5, 1, 1]] * 3, np.float32))
    gamma = np.array([1.0, 0.25, 3.0], np.float32)
    share = 0.3 ** (1 + gamma) / (0.3 ** (1 + gamma) + 0.4 ** (1 + gamma))
    for floor in (-INF, -1e4):
        base[:, 2:] = floor
        got = np.exp(wrap(extrapolate)(base, rl, gamma))
        np.testing.assert_allclose(got, np.stack([0 * share, 0 * share, share, 1 - share], axis=1), atol=2e-3)
    # One row's exclusion is not another's, and gamma = 0 beside it stays rl.
    base[1:] = np.log(0.25)
    got = np.exp(wrap(extrapolate)(base, rl, np.array([0.0, 1.0, 0.0], np.float32)))
    np.testing.assert_allclose(
        got, [[0.1, 0.2, 0.3, 0.4], [1 / 30, 4 / 30, 9 / 30, 16 / 30], [0.1, 0.2, 0.3, 0.4]], rtol=1e-5
    )
    # A large gamma leaves the token that gained most.
    np.testing.assert_allclose(np.exp(wrap(extrapolate)(base[1:], rl[1:], 1e6)), [[0, 0, 0, 1]] * 2, atol=1e-6)


# The published rule, written again with dictionaries as an engine returns them.
def engine_list(logp, k, token=None):
    listed = {int(v): float(logp[v]) for v in np.argsort(-logp, kind="stable")[:k]}
    if token is not None:
        listed[int(token)] = float(logp[token])
    return listed


def published_number(criterion, sampled, other, token, k, sample_from):
    lists = {"sampled": engine_list(sampled, k, token), "other": engine_list(other, k)}
    base, rl = ("sampled", "other") if sample_from == "base" else ("other", "sampled")

    def normalise(values):
        values = np.asarray(values)
        return values - np.log(np.exp(values).sum())

    def look_up(name, v):
        return lists[name].get(v, min(lists[name].values()))

    def kl(p, q):
        log_p = normalise(list(lists[p].values()))
        log_q = normalise([look_up(q, v) for v in lists[p]])
        return (np.exp(log_p) * (log_p - log_q)).sum()

    def h(name):
        log_p = normalise(list(lists[name].values()))
        return -(np.exp(log_p) * log_p).sum()

    delta = look_up(rl, token) - look_up(base, token)
    return {
        "delta_logp": delta,
        "neg_delta_logp": -delta,
        "abs_delta_logp": abs(delta),
        "entropy_base": h(base),
        "entropy_rl": h(rl),
        "kl": kl(rl, base),
        "kl_reverse": kl(base, rl),
        "js": (kl(rl, base) + kl(base, rl)) / 2,
    }[criterion]


@pytest.mark.parametrize("sample_from", ["base", "rl"])
@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("js_true", "random", "none", "all")])
def test_published_rule_against_dictionaries(criterion, sample_from, wrap, x64):
    base, rl = random_pair(11, rows=6)
    # Flat rows, far apart, and drawn tokens both inside and outside the lists.
    token = np.array([0, 3, int(base[2].argmin()), int(rl[3].argmin()), int(rl[4].argmax()), int(base[5].argmax())])
    for k in (1, 4):
        got = wrap(lambda b, r, t, k=k: criterion_value(criterion, b, r, t, top_logprobs=k, sample_from=sample_from))(
            base, rl, token
        )
        sampled, other = (base, rl) if sample_from == "base" else (rl, base)
        expected = [
            published_number(criterion, s, o, t, k, sample_from) for s, o, t in zip(sampled, other, token, strict=True)
        ]
        np.testing.assert_allclose(got, expected, atol=1e-12)
        tau = float(np.median(expected))
        fired = fires(criterion, base, rl, token, tau + 1e-9, top_logprobs=k, sample_from=sample_from)
        low = criterion in ("delta_logp", "neg_delta_logp")
        wanted = np.array(expected) <= tau + 1e-9 if low else np.array(expected) >= tau + 1e-9
        np.testing.assert_array_equal(fired, wanted)


def test_published_rule_with_the_whole_vocabulary_is_the_exact_one(x64):
    base, rl = random_pair(12)
    token = np.arange(5)
    for criterion in ("delta_logp", "entropy_base", "entropy_rl", "kl", "kl_reverse", "js"):
        exact = criterion_value(criterion, base, rl, token)
        np.testing.assert_allclose(criterion_value(criterion, base, rl, token, top_logprobs=17), exact, atol=1e-12)


@pytest.mark.parametrize("with_token", [False, True])
def test_published_candidates_against_dictionaries(with_token, wrap):
    sampled, other = (x.astype(np.float32) for x in random_pair(13))
    token = sampled.argmin(-1) if with_token else None
    run = wrap(lambda s, o: published_top_logprobs(s, o, 4, token))
    s_BV, o_BV = (np.asarray(x) for x in run(sampled, other))
    for row in range(5):
        mine = engine_list(sampled[row], 4, None if token is None else token[row])
        theirs = engine_list(other[row], 4)
        expected_s, expected_o = np.full(17, -INF), np.full(17, -INF)
        for v, logp in mine.items():
            expected_s[v], expected_o[v] = logp, theirs.get(v, min(theirs.values()))
        np.testing.assert_allclose(s_BV[row], expected_s, rtol=1e-6)
        np.testing.assert_allclose(o_BV[row], expected_o, rtol=1e-6)
    # A drawn token that is listed anyway changes nothing.
    again = published_top_logprobs(sampled, other, 4, sampled.argmax(-1))
    np.testing.assert_array_equal(again[1], published_top_logprobs(sampled, other, 4)[1])
    # The pair extrapolates: softmax of the weighted candidates' log-probabilities, nothing elsewhere.
    extra = np.asarray(extrapolate(s_BV, o_BV, 0.1), np.float64)
    listed = np.isfinite(s_BV)
    weights = np.where(listed, np.exp(1.1 * np.where(listed, o_BV, 0) - 0.1 * np.where(listed, s_BV, 0)), 0)
    np.testing.assert_allclose(np.exp(extra), weights / weights.sum(-1, keepdims=True), atol=1e-6)


def test_equal_values_at_the_published_cut_keep_exactly_k():
    flat = np.log(np.full((1, 6), 1 / 6, np.float32))
    sampled, _ = published_top_logprobs(flat, flat, 2)
    np.testing.assert_array_equal(np.isfinite(sampled), [[True, True, False, False, False, False]])
