"""Re-weightings: every kind on hand numbers and in float64, the controls, the selections, padding."""

import jax
import numpy as np
import pytest

from rlvr_jax.objectives.reweight import REWEIGHTINGS, reweight

# Two responses of one prompt: probabilities 1/2, 1/4 and 1/8, 1/2, 1; the rest is padding.
P = np.array([[0.5, 0.25, 1.0], [0.125, 0.5, 1.0]])
MASK = np.array([[1, 1, 0], [1, 1, 1]], np.float32)
LOGP = np.log(P).astype(np.float32)
ADVANTAGES = np.array([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]], np.float32)
LOG2 = np.log(2)
# Mean negative log-likelihoods 3/2 log 2 and 4/3 log 2: means of one group, spread log 2 / 12.
NLL = np.array([1.5 * LOG2, 4 / 3 * LOG2])

GROUP = np.array([0, 0])


@pytest.fixture(params=["jit", "eager"])
def run(request):
    def call(kind, *arrays, alpha=0.5, **options):
        traced = {name: options.pop(name) for name in ("group_B", "key", "token_mask_BT") if name in options}
        function = lambda arrays, alpha, traced: reweight(kind, *arrays, alpha=alpha, **traced, **options)  # noqa: E731
        arrays = arrays or (ADVANTAGES, LOGP, MASK)
        return np.asarray((jax.jit(function) if request.param == "jit" else function)(arrays, alpha, traced))

    return call


HAND = {
    "none": np.ones((2, 3)),
    "low_prob": [[1.25, 1.375, 1], [1.4375, 1.25, 1]],
    "high_prob": [[0.75, 0.625, 1], [0.5625, 0.75, 1]],
    "middle": [[0.75, 0.6875, 1], [0.5 + 7 / 64, 0.75, 0.5]],
    "inverse": [[1, 0.8, 1], [1 / 1.375, 1, 2]],
    "current_linear": [[1.25, 1.375, 1], [1.4375, 1.25, 1]],
    "current_focal": [[0.5**0.5, 0.75**0.5, 1], [0.875**0.5, 0.5**0.5, 0]],
    "ppl": [[1 - 0.5 * NLL[0]] * 2 + [1], [1 - 0.5 * NLL[1]] * 3],
    "ppl_norm": [[0.5, 0.5, 1], [1.5, 1.5, 1.5]],
    "ppl_norm_clamp": [[0.8, 0.8, 1], [1.2, 1.2, 1.2]],
    "uniform": [[1.2625, 1.2625, 1], [1.2625, 1.2625, 1.2625]],  # (1.25 + 1.375 + 1.4375 + 1.25 + 1) / 5
}


@pytest.mark.parametrize("kind", HAND)
def test_hand_case(run, kind):
    tolerance = 3e-5 if kind == "ppl_norm" else 1e-6  # z is (1 - 1e-6 / std) = 1 - 1.7e-5
    np.testing.assert_allclose(run(kind, group_B=GROUP), ADVANTAGES * HAND[kind], rtol=tolerance)


def test_the_hand_cases_and_the_next_test_cover_every_kind():
    assert set(HAND) | {"shuffled"} == set(REWEIGHTINGS)


def random_batch(seed=0, rows=12, steps=9):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, steps + 1, size=rows)
    lengths[3] = 0
    mask = (np.arange(steps) < lengths[:, None]).astype(np.float64)
    return rng.normal(size=(rows, steps)), -rng.exponential(size=(rows, steps)), mask, rng.integers(3, size=rows)


def reference_weights(kind, logp, mask, group, a):
    p = np.exp(logp)
    if kind in ("ppl", "ppl_norm", "ppl_norm_clamp"):
        nll = np.array([-row[m > 0].mean() if m.any() else 0.0 for row, m in zip(logp, mask, strict=True)])
        z = nll.copy()
        if kind != "ppl":
            for g in set(group):
                rows = [i for i in range(len(group)) if group[i] == g and mask[i].any()]
                z[rows] = (nll[rows] - np.mean(nll[rows])) / (np.std(nll[rows]) + 1e-6)
        weights = np.broadcast_to(1 - a * z[:, None], p.shape)
        return np.clip(weights, 0.8, 1.2) if kind.endswith("clamp") else weights
    low_prob = 1 + a * (1 - p)
    return {
        "none": np.ones_like(p),
        "low_prob": low_prob,
        "high_prob": a * p + 1 - a,
        "middle": a + p * (1 - p),
        "inverse": 1 / (1 + a - p),
        "current_linear": low_prob,
        "current_focal": (1 - p) ** a,
        "uniform": np.full_like(p, low_prob[mask > 0].mean()),
    }[kind]


@pytest.mark.parametrize("where", ["all", "positive", "negative"])
@pytest.mark.parametrize("kind", HAND)
def test_against_float64(kind, where):
    advantages, logp, mask, group = random_batch()
    token_mask = np.random.default_rng(9).integers(2, size=mask.shape)
    chosen = {"all": advantages == advantages, "positive": advantages > 0, "negative": advantages < 0}[where]
    chosen = chosen & (mask > 0)
    weights = reference_weights(kind, logp, mask, group, 0.3)
    with jax.enable_x64(True):
        options = {"alpha": 0.3, "where": where, "group_B": group}
        got = reweight(kind, advantages, logp, mask, **options)
        np.testing.assert_allclose(got, np.where(chosen, advantages * weights, advantages), rtol=1e-10)
        got = reweight(kind, advantages, logp, mask, token_mask_BT=token_mask, **options)
        expected = np.where(chosen & (token_mask > 0), advantages * weights, advantages)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_shuffled_moves_the_weights_and_keeps_them(run):
    rng = np.random.default_rng(0)
    logp = -rng.exponential(size=(20, 30)).astype(np.float32)
    mask = rng.integers(2, size=(20, 30)).astype(np.float32)
    ones = np.ones_like(mask)
    ordered = run("low_prob", ones, logp, mask)
    first, again, other = (run("shuffled", ones, logp, mask, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other)[mask > 0].mean() > 0.9
    assert (first != ordered)[mask > 0].mean() > 0.9
    np.testing.assert_array_equal(np.sort(first[mask > 0]), np.sort(ordered[mask > 0]))
    np.testing.assert_array_equal(first[mask == 0], 1)


def test_shuffled_is_uniform_over_permutations():
    logp = np.log(np.array([[0.1, 0.9, 0.5, 0.9]], np.float32))
    mask = np.array([[1, 0, 1, 1]], np.float32)
    ones = np.ones_like(mask)
    keys = jax.random.split(jax.random.key(0), 3000)
    draws = np.asarray(jax.vmap(lambda k: reweight("shuffled", ones, logp, mask, alpha=1.0, key=k))(keys))[:, 0]
    orders, counts = np.unique(draws[:, [0, 2, 3]].round(4), axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 500).max() < 100  # five standard deviations


def test_ppl_norm_of_one_response_and_of_equal_ones_is_one(run):
    logp = np.full((3, 4), -0.1, np.float32)
    mask = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(run("ppl_norm", mask, logp, mask, group_B=np.array([0, 0, 5])), 1)


def test_rows_of_no_group_keep_their_advantages(run):
    logp = np.concatenate([LOGP, 2 * LOGP]).astype(np.float32)
    advantages, mask = np.tile(ADVANTAGES, (2, 1)), np.tile(MASK, (2, 1))
    got = run("ppl_norm", advantages, logp, mask, group_B=np.array([0, 0, -1, -1]))
    np.testing.assert_allclose(got[:2], run("ppl_norm", group_B=GROUP), rtol=1e-6)
    np.testing.assert_array_equal(got[2:], advantages[2:])


@pytest.mark.parametrize("kind", HAND)  # all but shuffled, whose permutation depends on the batch's shape
def test_padding_of_any_content_changes_nothing(run, kind):
    expected = run(kind, group_B=GROUP)
    logp = np.full((4, 5), np.nan, np.float32)
    logp[1, 0] = -np.inf
    logp[:2, 1:4], mask = np.where(MASK > 0, LOGP, np.inf), np.zeros((4, 5), np.float32)
    mask[:2, 1:4] = MASK
    advantages = np.full((4, 5), 7.0, np.float32)
    advantages[:2, 1:4] = ADVANTAGES
    got = run(kind, advantages, logp, mask, group_B=np.array([0, 0, 0, -1]))
    np.testing.assert_allclose(got[:2, 1:4], expected, rtol=1e-6)
    np.testing.assert_array_equal(got[2:], 7)


def test_weights_carry_no_gradient_and_advantages_do():
    for kind in REWEIGHTINGS:
        options = {"alpha": 0.5, "group_B": GROUP, "key": jax.random.key(0)}
        weights = reweight(kind, np.ones_like(ADVANTAGES), LOGP, MASK, **options)
        d_advantages, d_logp = jax.grad(
            lambda a, p, kind=kind, options=options: reweight(kind, a, p, MASK, **options).sum(), argnums=(0, 1)
        )(ADVANTAGES, LOGP)
        np.testing.assert_array_equal(d_logp, 0)
        np.testing.assert_allclose(d_advantages, weights, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "alpha", "weight"), [("current_focal", 1.0, 1e-9), ("middle", 0.0, 1e-9), ("inverse", 1e-9, 0.5e9)]
)
def test_a_probability_near_one_keeps_its_distance_from_it(run, kind, alpha, weight):
    """p = 1 - 1e-9, which is 1 in float32: the weights are of 1 - p, not of p rounded."""
    one = np.ones((1, 1), np.float32)
    np.testing.assert_allclose(run(kind, one, -1e-9 * one, one, alpha=alpha), weight, rtol=1e-5)


def test_a_log_probability_rounded_above_zero():
    logp = np.full((1, 1), 1e-7, np.float32)
    one = np.ones((1, 1), np.float32)
    for kind in ("current_focal", "low_prob", "inverse"):
        assert np.isfinite(reweight(kind, one, logp, one, alpha=0.2)).all()


def test_alpha_is_traced():
    traces = []

    @jax.jit
    def run_alpha(alpha):
        traces.append(1)
        return reweight("low_prob", ADVANTAGES, LOGP, MASK, alpha=alpha)

    np.testing.assert_allclose(run_alpha(0.5), ADVANTAGES * HAND["low_prob"], rtol=1e-6)
    np.testing.assert_allclose(run_alpha(0.0), ADVANTAGES)
    assert len(traces) == 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'lowprob'.*low_prob.*shuffled"):
        reweight("lowprob", ADVANTAGES, LOGP, MASK, alpha=0.1)
    with pytest.raises(ValueError, match="where='pos'"):
        reweight("low_prob", ADVANTAGES, LOGP, MASK, alpha=0.1, where="pos")
    with pytest.raises(ValueError, match=r"group_B=None.*ppl_norm_clamp"):
        reweight("ppl_norm_clamp", ADVANTAGES, LOGP, MASK, alpha=0.1)
    with pytest.raises(ValueError, match="key=None"):
        reweight("shuffled", ADVANTAGES, LOGP, MASK, alpha=0.1)
    with pytest.raises(ValueError, match="alpha=0"):
        reweight("inverse", ADVANTAGES, LOGP, MASK, alpha=0)
