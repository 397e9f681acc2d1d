"""The policy loss on hand cases, its gradient (Lemma 3.1), its metrics, and the four reductions."""

import jax
import numpy as np
import pytest

from rlvr_jax.objectives.advantages import group_advantages
from rlvr_jax.objectives.logprobs import token_logprobs
from rlvr_jax.objectives.policy import AGGREGATIONS, aggregate, policy_loss
from rlvr_jax.objectives.reweight import reweight


@pytest.fixture(params=["jit", "eager"])
def wrap(request):
    return jax.jit if request.param == "jit" else lambda f: f


# One token a column: ratio, advantage, loss with clip 0.2 / 0.28 / 10, and which clip holds it.
CASES = np.array(
    [
        # r, A, loss, low, high, dual
        [1.0, 2.0, -2.0, 0, 0, 0],
        [1.1, 2.0, -2.2, 0, 0, 0],
        [1.5, 2.0, -2.56, 0, 1, 0],  # capped at 1.28
        [0.5, 2.0, -1.0, 0, 0, 0],  # not capped: the step would be uphill
        [0.5, -2.0, 1.6, 1, 0, 0],  # floored at 0.8
        [0.9, -2.0, 1.8, 0, 0, 0],
        [1.5, -2.0, 3.0, 0, 0, 0],
        [12.0, -2.0, 20.0, 0, 0, 1],  # dual clip at 10
        [12.0, 2.0, -2.56, 0, 1, 0],
        [3.0, 0.0, 0.0, 0, 0, 0],
    ]
)


def arrays(dtype=np.float32):
    ratio, advantage = CASES[None, :, 0], CASES[None, :, 1]
    old = np.full_like(ratio, -1.5)
    return tuple(x.astype(dtype) for x in (old + np.log(ratio), old, advantage, np.ones_like(ratio)))


def test_hand_cases_and_metrics(wrap):
    loss, metrics = wrap(policy_loss)(*arrays())
    np.testing.assert_allclose(loss[0], CASES[:, 2], rtol=1e-5, atol=1e-6)
    for column, name in ((3, "low"), (4, "high"), (5, "dual")):
        total, weight = metrics[f"clip_fraction_{name}"]
        assert (float(total), float(weight)) == (CASES[:, column].sum(), 10)
    assert metrics["ratio"][0] == pytest.approx(CASES[:, 0].sum(), rel=1e-5)
    assert metrics["approx_kl"][0] == pytest.approx(-np.log(CASES[:, 0]).sum(), rel=1e-5)


def test_clip_settings_are_arguments(wrap):
    run = wrap(lambda x, low, high, dual: policy_loss(*x, clip_low=low, clip_high=high, clip_dual=dual)[0])
    loss = run(arrays(), 0.4, 0.1, 2.0)
    np.testing.assert_allclose(loss[0], [-2, -2.2, -2.2, -1, 1.2, 1.8, 3, 4, -2.2, 0], rtol=1e-5, atol=1e-6)
    free = policy_loss(*arrays(), clip_dual=None)[0]
    assert free[0, 7] == pytest.approx(24, rel=1e-5)
    np.testing.assert_allclose(np.delete(free[0], 7), np.delete(CASES[:, 2], 7), rtol=1e-5, atol=1e-6)


def test_gradient_flows_only_where_no_clip_holds():
    with jax.enable_x64(True):
        logp, old, advantages, mask = arrays(np.float64)
        total = lambda *x: policy_loss(*x, mask)[0].sum()  # noqa: E731
        d_logp, d_old, d_advantages = jax.grad(total, argnums=(0, 1, 2))(logp, old, advantages)
        held = CASES[:, 3:].any(axis=1)
        np.testing.assert_allclose(d_logp[0], np.where(held, 0, -CASES[:, 0] * CASES[:, 1]), rtol=1e-12)
        np.testing.assert_array_equal(d_old, 0)
        np.testing.assert_array_equal(d_advantages, 0)


def test_log_ratio_is_limited_to_twenty():
    with jax.enable_x64(True):
        values = np.array([[30.0, -30.0]]), np.zeros((1, 2)), np.array([[-1.0, 1.0]]), np.ones((1, 2))
        loss, metrics = policy_loss(*values, clip_dual=None)
        np.testing.assert_allclose(loss, [[np.exp(20), -np.exp(-20)]], rtol=1e-12)
        assert metrics["ratio"][0] == pytest.approx(np.exp(20) + np.exp(-20))
        np.testing.assert_array_equal(
            jax.grad(lambda x: policy_loss(x, *values[1:], clip_dual=None)[0].sum())(values[0]), 0
        )


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_lemma_3_1_gradient_in_the_logits(alpha):
    """arXiv 2603.22117: the l1 norm of dJ/dz of one token is 2 |w| (1 - p), w = r A; by automatic differentiation."""
    rng = np.random.default_rng(0)
    B, T, V = 4, 6, 13
    with jax.enable_x64(True):
        logits = 6 * rng.normal(size=(B, T, V))
        targets = rng.integers(V, size=(B, T))
        targets[:2] = logits[:2].argmax(-1)  # likely tokens too
        mask = np.ones((B, T))
        logp = np.asarray(token_logprobs(logits, targets))
        old_logp = logp + rng.uniform(-0.15, 0.15, size=(B, T))
        advantages = np.asarray(group_advantages(np.array([1.0, -1, -1, 1]), np.array([0, 0, 0, 0])))
        advantages = np.broadcast_to(advantages[:, None], (B, T))
        advantages = np.asarray(reweight("low_prob", advantages, old_logp, mask, alpha=alpha))

        def objective(logits):
            return -policy_loss(token_logprobs(logits, targets), old_logp, advantages, mask)[0].sum()

        l1 = np.abs(jax.jit(jax.grad(objective))(logits)).sum(axis=-1)
        w = np.exp(logp - old_logp) * advantages
        np.testing.assert_allclose(l1, 2 * np.abs(w) * (1 - np.exp(logp)), rtol=1e-9)
        assert np.exp(logp).max() > 0.9
        assert np.exp(logp).min() < 0.1


def test_current_reweighting_inside_the_loss_uses_the_policy_but_not_its_gradient():
    with jax.enable_x64(True):
        logp, old, advantages, mask = arrays(np.float64)

        def loss(logp):
            weighted = reweight("current_linear", advantages, logp, mask, alpha=0.5)
            return policy_loss(logp, old, weighted, mask)[0].sum()

        weights = 1 + 0.5 * (1 - np.exp(logp))
        held = CASES[:, 3:].any(axis=1)
        expected = np.where(held, 0, -CASES[:, 0] * CASES[:, 1] * weights)
        np.testing.assert_allclose(jax.grad(loss)(logp), expected, rtol=1e-12)


def test_masked_tokens_are_exactly_zero_whatever_they_hold(wrap):
    values = [
        np.pad(x, ((0, 1), (0, 2)), constant_values=junk)
        for x, junk in zip(arrays(), (-np.inf, -np.inf, np.nan, 0), strict=True)
    ]
    loss, metrics = wrap(policy_loss)(*values)
    np.testing.assert_allclose(loss[0, :10], CASES[:, 2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(loss[1], 0)
    np.testing.assert_array_equal(loss[0, 10:], 0)
    for name, pair in policy_loss(*arrays())[1].items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-6)
    gradient = wrap(jax.grad(lambda x: policy_loss(x, *values[1:])[0].sum()))(values[0])
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)


VALUES = np.array([[1.0, 2, 3, 4], [10, 20, 30, 40], [5, 5, 5, 5]], np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)


@pytest.mark.parametrize(
    ("mode", "total", "weight"),
    [
        ("token-mean", 16, 4),
        ("seq-mean-token-sum", 16, 2),
        ("seq-mean-token-mean", 2 + 10, 2),
        ("seq-mean-token-sum-norm", 16 / 4, 2),
    ],
)
def test_aggregate_by_hand(mode, total, weight, wrap):
    for dtype in (np.float32, bool, np.int32):
        assert tuple(map(float, wrap(lambda v, m: aggregate(v, m, mode))(VALUES, MASK.astype(dtype)))) == (
            total,
            weight,
        )
    # Rows and columns of padding, of any content, change neither number (the norm takes its length as an argument).
    wide = np.pad(VALUES, ((0, 2), (1, 3)), constant_values=np.nan)
    got = wrap(lambda v, m: aggregate(v, m, mode, max_length=4))(wide, np.pad(MASK, ((0, 2), (1, 3))))
    assert tuple(map(float, got)) == (total, weight)
    assert tuple(map(float, aggregate(VALUES, 0 * MASK, mode))) == (0, 0)
    np.testing.assert_array_equal(jax.grad(lambda v: aggregate(v, 0 * MASK, mode)[0])(VALUES), 0)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_sums_over_micro_batches_are_those_of_the_batch(mode):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 7))
    mask = (np.arange(7) < rng.integers(0, 8, size=12)[:, None]).astype(np.float64)
    with jax.enable_x64(True):
        whole = aggregate(values, mask, mode)
        for parts in (2, 3, 12):
            pieces = [
                aggregate(v, m, mode) for v, m in zip(np.split(values, parts), np.split(mask, parts), strict=True)
            ]
            np.testing.assert_allclose(np.sum(pieces, axis=0), whole, rtol=1e-12)


def test_float_masks_weigh_tokens():
    assert tuple(map(float, aggregate(VALUES, 0.5 * MASK))) == (8, 2)
    assert tuple(map(float, aggregate(VALUES, 0.5 * MASK, "seq-mean-token-mean"))) == (12, 2)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"'mean'.*token-mean.*seq-mean-token-sum-norm"):
        aggregate(VALUES, MASK, "mean")
    with pytest.raises(ValueError, match="clip_dual=1"):
        policy_loss(*arrays(), clip_dual=1)
