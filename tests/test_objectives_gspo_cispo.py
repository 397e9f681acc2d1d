"""GSPO and CISPO on hand cases, and their gradients against formulas written anew in numpy."""

import jax
import numpy as np
import pytest

from rlvr_jax.objectives.policy import aggregate, cispo_loss, gspo_loss, policy_loss

NAMES = {"clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "approx_kl", "ratio"}


@pytest.fixture(params=["jit", "eager"])
def wrap(request):
    return jax.jit if request.param == "jit" else lambda f: f


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def batch(seed=0, B=6, T=7):
    """Log-probs, old ones, an advantage a response, a ragged mask; the last row is empty."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.0, (B, T))
    old = logp + rng.normal(0, 0.02, (B, T))
    advantages = np.repeat(rng.choice([-1.5, -0.5, 1.0, 2.0], (B, 1)), T, axis=1)
    mask = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(float)
    mask[-1] = 0
    return logp, old, advantages, mask


# A response of two tokens a case: the log-ratios of both, A, clip 0.1 / 0.2, the value of each token, which clip holds.
# s = exp(mean), and d = -A s where no clip holds, else 0.
GSPO = [
    ((0.2, -0.2), 2.0, -2.0, -2.0, (0, 0)),  # s = 1 although each token is far away
    ((np.log(1.5), np.log(1.5)), 2.0, -2.4, 0.0, (0, 1)),
    ((np.log(1.5), np.log(1.5)), -2.0, 3.0, 3.0, (0, 0)),
    ((np.log(0.25), 0.0), 2.0, -1.0, -1.0, (0, 0)),  # s = 1/2
    ((np.log(0.25), 0.0), -2.0, 1.8, 0.0, (1, 0)),
    ((np.log(1.21), 0.0), 1.0, -1.1, -1.1, (0, 0)),  # s = 1.1: the token alone would be held at 1.2
]


@pytest.mark.parametrize("case", GSPO)
def test_gspo_by_hand(case, wrap):
    log_ratio, advantage, value, slope, held = case
    old = np.array([[-1.0, -2.0, -3.0]])
    logp = old + np.array([[*log_ratio, 5.0]])  # the third token is masked
    arrays = old, np.full((1, 3), advantage), np.array([[1, 1, 0]])
    loss, metrics = wrap(lambda x: gspo_loss(x, *arrays, clip_low=0.1, clip_high=0.2))(logp)
    np.testing.assert_allclose(loss, [[value, value, 0]], rtol=1e-12)
    got = wrap(jax.grad(lambda x: gspo_loss(x, *arrays, clip_low=0.1, clip_high=0.2)[0].sum()))(logp)
    np.testing.assert_allclose(got, [[slope, slope, 0]], rtol=1e-12)
    assert metrics.keys() == NAMES
    assert tuple(float(metrics[f"clip_fraction_{x}"][0]) for x in ("low", "high", "dual")) == (*np.multiply(held, 2), 0)
    assert float(metrics["ratio"][0]) == pytest.approx(2 * np.exp(np.mean(log_ratio)))
    assert float(metrics["approx_kl"][0]) == pytest.approx(-np.sum(log_ratio))


def sequence_objective(logp, old, advantages, mask, low, high):
    """GSPO's own objective (2507.18071, eq. 5) to be minimised: the mean over the responses that are not empty."""
    length = mask.sum(1)
    real = length > 0
    s = np.exp(((logp - old) * mask).sum(1)[real] / length[real])
    A = advantages[real, 0]
    return -np.minimum(s * A, np.clip(s, 1 - low, 1 + high) * A).sum() / real.sum()


def differences(f, x, step=1e-6):
    slope = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (f(up) - f(down)) / (2 * step)
    return slope


@pytest.mark.parametrize("clips", [(3e-4, 4e-4), (0.005, 0.01), (0.2, 0.2)])
def test_the_token_form_has_the_value_and_gradient_of_the_sequence_objective(clips):
    logp, *others = batch()

    def ours(logp):
        loss, _ = gspo_loss(logp, *others, clip_low=clips[0], clip_high=clips[1])
        total, weight = aggregate(loss, others[-1], "seq-mean-token-mean")
        return total / weight

    assert float(ours(logp)) == pytest.approx(sequence_objective(logp, *others, *clips), rel=1e-12)
    expected = differences(lambda x: sequence_objective(x, *others, *clips), logp)
    np.testing.assert_allclose(jax.grad(ours)(logp), expected, rtol=1e-6, atol=1e-9)
    assert (expected != 0).any(), "some response must be free"


def test_the_ratio_is_over_the_response_whatever_the_mask_of_the_loss():
    logp, old, advantages, response = batch(3)
    chosen = response * (np.arange(7) % 2)
    whole, _ = gspo_loss(logp, old, advantages, response)
    part, metrics = gspo_loss(logp, old, advantages, chosen, response_BT=response)
    np.testing.assert_array_equal(part, np.where(chosen > 0, whole, 0))
    assert float(metrics["ratio"][1]) == chosen.sum()
    other, _ = gspo_loss(logp, old, advantages, chosen)
    assert np.abs(np.asarray(other) - np.asarray(part)).max() > 1e-5


def test_gspo_limits_the_sequence_ratio_and_its_gradient():
    values = np.array([[40.0, 50.0]]), np.zeros((1, 2)), np.array([[-1.0, -1.0]]), np.ones((1, 2))
    np.testing.assert_allclose(gspo_loss(*values)[0], np.exp(20.0), rtol=1e-12)
    np.testing.assert_array_equal(jax.grad(lambda x: gspo_loss(x, *values[1:])[0].sum())(values[0]), 0)


# ratio, A, logp, loss, slope, low, high with clip 0.5 / 1.0
CISPO = np.array(
    [
        [1.0, 2.0, -1.5, 3.0, -2.0, 0, 0],
        [1.6, -2.0, -0.5, -1.6, 3.2, 0, 0],
        [4.0, 2.0, -0.5, 2.0, -4.0, 0, 1],  # weight 2: held, but its gradient stays
        [4.0, -1.0, -3.0, -6.0, 2.0, 0, 1],
        [0.1, 1.0, -2.0, 1.0, -0.5, 1, 0],  # weight 1/2
        [0.1, 0.0, -2.0, 0.0, 0.0, 1, 0],
    ]
)


def test_cispo_by_hand(wrap):
    ratio, advantage, logp = CISPO[None, :, 0], CISPO[None, :, 1], CISPO[None, :, 2]
    arrays = logp - np.log(ratio), advantage, np.ones_like(logp)
    run = wrap(lambda x: cispo_loss(x, *arrays, clip_low=0.5, clip_high=1.0))
    loss, metrics = run(logp)
    np.testing.assert_allclose(loss[0], CISPO[:, 3], rtol=1e-12, atol=1e-15)
    slope = wrap(jax.grad(lambda x: cispo_loss(x, *arrays, clip_low=0.5, clip_high=1.0)[0].sum()))(logp)
    np.testing.assert_allclose(slope[0], CISPO[:, 4], rtol=1e-12, atol=1e-15)
    assert metrics.keys() == NAMES
    got = {name: tuple(map(float, pair)) for name, pair in metrics.items()}
    assert (got["clip_fraction_low"], got["clip_fraction_high"], got["clip_fraction_dual"]) == ((2, 6), (2, 6), (0, 6))
    assert got["ratio"] == pytest.approx((CISPO[:, 0].sum(), 6))


def test_the_default_bounds(wrap):
    """CISPO: 5 above and none below. GSPO: 1 - 3e-4 and 1 + 4e-4. DAPO: 0.8, 1.28, and 10 where A < 0."""
    ratio, one = np.array([[5.5, 4.9, 1e-3, 1.0005, 0.9996, 30.0]]), np.ones((1, 6))
    old = -np.log(ratio) - 1
    loss, metrics = wrap(cispo_loss)(-one, old, one, one)
    np.testing.assert_allclose(loss, np.minimum(ratio, 5.0), rtol=1e-12)
    assert (float(metrics["clip_fraction_low"][0]), float(metrics["clip_fraction_high"][0])) == (0, 2)
    rows = [x.reshape(6, 1) for x in (-one, old, one)]  # a response each
    loss, _ = wrap(gspo_loss)(*rows, rows[2])
    np.testing.assert_allclose(-loss[:, 0], np.minimum(ratio[0], 1.0004), rtol=1e-12)
    loss, _ = wrap(gspo_loss)(*rows[:2], -rows[2], rows[2])
    np.testing.assert_allclose(loss[:, 0], np.maximum(ratio[0], 1 - 3e-4), rtol=1e-12)
    loss, _ = wrap(policy_loss)(-one, old, one, one)
    np.testing.assert_allclose(-loss, np.minimum(ratio, 1.28), rtol=1e-12)
    loss, _ = wrap(policy_loss)(-one, old, -one, one)
    np.testing.assert_allclose(loss, np.clip(ratio, 0.8, 10), rtol=1e-12)


def test_cispo_is_reinforce_with_a_bounded_weight():
    """Against central differences of sum w A logp with w held fixed, and the policy gradient where no bound holds."""
    logp, old, advantages, mask = batch(1)
    old = logp + np.random.default_rng(2).normal(0, 1.0, logp.shape)
    weight = np.minimum(np.exp(logp - old), 1.4)
    expected = differences(lambda x: -(weight * advantages * x * mask).sum(), logp)
    got = jax.grad(lambda x: cispo_loss(x, old, advantages, mask, clip_high=0.4)[0].sum())(logp)
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=1e-8)
    near = logp - 0.01
    free = [jax.grad(lambda x, f=f: f(x, near, advantages, mask)[0].sum())(logp) for f in (cispo_loss, policy_loss)]
    np.testing.assert_allclose(free[0], free[1], rtol=1e-12)


@pytest.mark.parametrize("loss", [gspo_loss, cispo_loss])
def test_masks_padding_and_constants(loss, wrap):
    logp, old, advantages, mask = batch(5)
    expected, metrics = loss(logp, old, advantages, mask)
    junk = (np.nan, np.inf, -np.inf)
    values = [np.where(mask > 0, x, bad) for x, bad in zip((logp, old, advantages), junk, strict=True)]
    values = [np.pad(x, ((0, 1), (0, 2)), constant_values=bad) for x, bad in zip(values, junk, strict=True)]
    wide = np.pad(mask, ((0, 1), (0, 2)))
    got, padded = wrap(loss)(*values, wide)
    np.testing.assert_allclose(got[:6, :7], expected, rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(got)[wide == 0], 0)
    for name in NAMES:
        np.testing.assert_allclose(padded[name], metrics[name], rtol=1e-12)
    slopes = jax.grad(lambda *x: loss(*x, wide)[0].sum(), argnums=(0, 1, 2))(*values)
    assert np.isfinite(slopes[0]).all()
    np.testing.assert_array_equal(np.asarray(slopes[0])[wide == 0], 0)
    np.testing.assert_array_equal(slopes[1], 0)
    np.testing.assert_array_equal(slopes[2], 0)
    with pytest.raises((ValueError, TypeError)):  # the annotations, checked in tests, may be first
        loss(logp, old, advantages[:, :1], mask)
