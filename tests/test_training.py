import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlvr_jax.dapo import make_scorer
from rlvr_jax.models.qwen import init_params, model_apply, param_axes
from rlvr_jax.objectives.tokens import Tokens
from rlvr_jax.sharding.rules import ShardingRules, make_mesh
from rlvr_jax.training import (
    TrainState,
    adamw,
    make_train_step,
    warmup_constant,
    warmup_cosine,
    with_learning_rate,
)
from tests.tiny import tiny_config
from train.config import AlgorithmConfig, MaskConfig, ReweightConfig
from train.step.objective import advantages, make_loss, scalars

P, R, N, GROUPS = 5, 7, 16, 4


def squares(apply, params, batch):
    """A researcher's own loss: weighted squared error of a linear model."""
    error = (apply(params, batch["x"]) - batch["y"]) ** 2 * batch["w"]
    return (jnp.sum(error) * batch["scale"], jnp.sum(batch["w"])), {"error": (jnp.sum(error), jnp.sum(batch["w"]))}


def linear(params, x):
    return x @ params["a"] + params["b"]


def linear_problem(rows=8):
    rng = np.random.default_rng(1)
    params = {"a": rng.normal(size=3).astype(np.float32), "b": np.float32(0.3)}
    batch = {
        "x": rng.normal(size=(rows, 3)).astype(np.float32),
        "y": rng.normal(size=rows).astype(np.float32),
        "w": rng.integers(0, 4, rows).astype(np.float32),
        "scale": np.float32(2.0),
    }
    return jax.tree.map(jnp.asarray, params), batch


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_own_loss_gives_the_hand_computed_update(micro_batches):
    params, batch = linear_problem()
    x, y, w = (np.float64(batch[name]) for name in "xyw")
    a, b = np.float64(params["a"]), np.float64(params["b"])
    residual = x @ a + b - y
    grad_a = 2 * 2 * (residual * w) @ x / w.sum()
    grad_b = 2 * 2 * (residual * w).sum() / w.sum()
    optimizer = optax.sgd(0.1)
    step = make_train_step(linear, optimizer, squares, micro_batches=micro_batches)
    state, metrics = step(TrainState.create(params, optimizer), batch)
    np.testing.assert_allclose(state.params["a"], a - 0.1 * grad_a, rtol=1e-5)
    np.testing.assert_allclose(state.params["b"], b - 0.1 * grad_b, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 2 * (residual**2 * w).sum() / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"], (residual**2 * w).sum() / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((grad_a**2).sum() + grad_b**2), rtol=1e-5)
    assert (int(state.step), float(metrics["skipped"]), float(metrics["weight"])) == (1, 0, w.sum())


def test_mean_of_means_would_differ():
    """The batch above has micro-batches of unequal weight, so the test above can tell the two apart."""
    _, batch = linear_problem()
    assert len({float(batch["w"][i::2].sum()) for i in range(2)}) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_leaves_the_state_as_it_was(bad):
    params, batch = linear_problem()
    optimizer = adamw()
    step = make_train_step(linear, optimizer, squares)
    state = with_learning_rate(TrainState.create(params, optimizer), 0.1)
    state, _ = step(state, batch)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, batch | {"y": np.full(8, bad, np.float32)})
    assert float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), before)
    state, metrics = step(state, batch)
    assert (float(metrics["skipped"]), int(state.step)) == (0, 2)
    assert np.isfinite(metrics["loss"])


def test_a_non_finite_update_leaves_the_state_as_it_was():
    params, batch = linear_problem()
    optimizer = optax.chain(optax.adamw(0.1), optax.scale(np.nan))  # loss and gradient are finite, the update is not
    step = make_train_step(linear, optimizer, squares)
    before = jax.tree.map(np.array, params)
    state, metrics = step(TrainState.create(params, optimizer), batch)
    assert metrics["skipped"] == 1
    assert int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_a_batch_of_weight_zero_changes_nothing():
    params, batch = linear_problem()
    optimizer = adamw()
    step = make_train_step(linear, optimizer, squares, micro_batches=2)
    state = with_learning_rate(TrainState.create(params, optimizer), 0.1)
    state, _ = step(state, batch)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, batch | {"w": np.zeros(8, np.float32)})
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), before)
    assert (float(metrics["loss"]), float(metrics["skipped"]), float(metrics["error"])) == (0, 0, 0)


def test_learning_rate_is_set_without_compiling_again():
    params, batch = linear_problem()
    optimizer = adamw(weight_decay=0.0)
    step = make_train_step(linear, optimizer, squares)
    state = TrainState.create(params, optimizer)
    a = np.array(params["a"])
    state, _ = step(state, batch)
    np.testing.assert_array_equal(state.params["a"], a)  # learning rate 0
    state, _ = step(with_learning_rate(state, 0.01), batch)
    moved = np.abs(np.array(state.params["a"]) - a)
    np.testing.assert_allclose(moved, 0.01, rtol=1e-4)  # Adam's step on a repeated gradient
    assert step._cache_size() == 1


def test_adamw_against_float64():
    """Clip by global norm, then Adam with decoupled decay, two steps."""
    optimizer, lr, wd = adamw(weight_decay=0.1, clip_norm=1.0), 0.05, 0.1
    p, m, v = np.array([1.0, -2.0, 0.5]), 0.0, 0.0
    state = with_learning_rate(TrainState.create({"p": jnp.asarray(p, jnp.float32)}, optimizer), lr)
    for t, grad in enumerate([np.array([3.0, 4.0, 0.0]), np.array([0.1, -0.2, 0.3])], start=1):
        g = grad * min(1.0, 1.0 / np.linalg.norm(grad))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - lr * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + wd * p)
        updates, opt_state = optimizer.update({"p": jnp.asarray(grad, jnp.float32)}, state.opt_state, state.params)
        state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    np.testing.assert_allclose(state.params["p"], p, rtol=2e-5)


def test_bad_micro_batches():
    params, batch = linear_problem()
    optimizer = optax.sgd(0.1)
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        make_train_step(linear, optimizer, squares, micro_batches=0)
    with pytest.raises(ValueError, match="micro_batches=3 does not divide the 8 rows"):
        make_train_step(linear, optimizer, squares, micro_batches=3)(TrainState.create(params, optimizer), batch)


def test_schedules():
    assert [warmup_constant(s, peak=2.0, warmup=4) for s in (0, 1, 4, 9)] == [0, 0.5, 2, 2]
    assert warmup_constant(0, peak=2.0, warmup=0) == 2
    assert [warmup_cosine(s, peak=2.0, warmup=2, total=6) for s in (0, 1)] == [1, 2]
    np.testing.assert_allclose([warmup_cosine(s, peak=2.0, warmup=2, total=6) for s in (2, 4, 6, 9)], [2, 1, 0, 0])


def dapo_rows():
    """4 groups of 4 responses, the last group missing (padding rows), prompts and responses of all lengths."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 48, (N, P + R)).astype(np.int32)
    mask = np.zeros((N, P + R), np.int32)
    response = np.zeros((N, R), np.int32)
    for row in range(N - 4):
        prompt, length = 1 + row % P, 1 + (5 * row) % R
        mask[row, P - prompt : P + length] = 1
        response[row, :length] = 1
    group = np.repeat(np.arange(GROUPS), 4).astype(np.int32)
    group[N - 4 :] = -1
    score = np.where(rng.random(N) < 0.5, 1.0, -1.0).astype(np.float32) * (group >= 0)
    return tokens, mask, response, group, score


def at_tokens(**values_NR):
    """Values of responses that begin in column P, in columns of the whole rows."""
    return {name: jnp.pad(jnp.asarray(x), ((0, 0), (P, 0))) for name, x in values_NR.items()}


def dapo_update(mesh_sizes, micro_batches, algorithm):
    """Scores, advantages, re-weighting and one update, all compiled, on a mesh or on one device."""
    config = tiny_config()
    params = init_params(config, jax.random.key(0))
    mesh, rules = None, ShardingRules()
    if mesh_sizes is not None:
        mesh = make_mesh(*mesh_sizes)
        params = jax.tree.map(
            lambda x, axes: jax.device_put(x, rules.sharding(mesh, axes, x.shape)),
            params,
            param_axes(config),
        )

    def put(x):
        if mesh is None or np.ndim(x) == 0:
            return x
        return jax.device_put(x, rules.sharding(mesh, ("batch", "time")[: np.ndim(x)], np.shape(x)))

    tokens, mask, response, group, score = (put(x) for x in dapo_rows())
    apply, optimizer = model_apply(config), optax.sgd(1.0)
    with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
        old_logp, entropy = (x[:, P:] for x in make_scorer(apply, chunk=16)(params, tokens, mask, np.float32(1.0)))
        # an older policy, so that ratios differ from 1
        old_logp = old_logp - 0.3 * jnp.sin(jnp.arange(R)) * response
        given = Tokens(response, old_logp, entropy, group_B=group, key=jax.random.key(3))
        _, made = advantages(algorithm, score, given, np.float32(0.5))
        batch = {"tokens_BT": tokens, "segment_BT": mask} | scalars(algorithm, 1.0) | at_tokens(**made.arrays())
        weighted = made.advantages_BT
        state = TrainState.create(params, optimizer)
        step = make_train_step(
            apply,
            optimizer,
            make_loss(algorithm, chunk=16, max_response=R),
            micro_batches=micro_batches,
            shardings=None if mesh is None else jax.tree.map(lambda x: x.sharding, state),
        )
        before = jax.tree.map(np.array, params)
        state, metrics = step(state, batch)
        gradient = jax.tree.map(lambda a, b: a - np.array(b), before, state.params)  # sgd at rate 1
        state, _ = step(state, batch)
        assert step._cache_size() == 1  # the new state lies where the old one lay
    return np.array(weighted), gradient, {name: float(x) for name, x in metrics.items()}


def assert_same(actual, expected):
    for name, value in expected[2].items():
        np.testing.assert_allclose(actual[2][name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-7)
    for a, b in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


PAPER = AlgorithmConfig(train_batch=GROUPS, reweight=ReweightConfig("low_prob", 0.5))


@pytest.fixture(scope="module")
def one_device():
    return dapo_update(None, 1, PAPER)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_dapo_step_does_not_depend_on_micro_batches(one_device, micro_batches):
    assert_same(dapo_update(None, micro_batches, PAPER), one_device)


@pytest.mark.parametrize(("mesh", "micro_batches"), [((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 4, 2), 4)])
def test_dapo_step_does_not_depend_on_the_mesh(one_device, mesh, micro_batches):
    assert one_device[2]["grad_norm"] > 1e-3
    assert_same(dapo_update(mesh, micro_batches, PAPER), one_device)


def test_dapo_loss_is_the_formula_in_float64(one_device):
    """Group advantages, 1 + a (1 - p), the two clips and the mean over all tokens, from whole logits."""
    tokens, mask, response, group, score = dapo_rows()
    config = tiny_config()
    params = init_params(config, jax.random.key(0))
    hidden, unembed = model_apply(config)(params, tokens, None, mask)
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    logp = np.take_along_axis(logp[:, P - 1 : -1], tokens[:, P:, None], axis=-1)[..., 0]
    old_logp = logp - 0.3 * np.sin(np.arange(R))
    total = 0.0
    for row in range(N - 4):
        others = score[group == group[row]]
        advantage = (score[row] - others.mean()) / (others.std(ddof=1) + 1e-6)
        for t in range(response[row].sum()):
            a = advantage * (1 + 0.5 * (1 - np.exp(old_logp[row, t])))
            ratio = np.exp(logp[row, t] - old_logp[row, t])
            value = max(-a * ratio, -a * np.clip(ratio, 0.8, 1.28))
            total += min(value, -a * 10) if a < 0 else value
    np.testing.assert_allclose(one_device[2]["loss"], total / response.sum(), rtol=2e-5)
    assert one_device[2]["weight"] == response.sum()
    assert one_device[2]["clip_fraction_high"] + one_device[2]["clip_fraction_low"] > 0.05


def test_reweighting_enters_the_step(one_device):
    plain = dapo_update(None, 1, AlgorithmConfig(train_batch=GROUPS))
    weight = one_device[0][:12] / np.where(plain[0][:12] == 0, 1, plain[0][:12])
    real = dapo_rows()[2][:12].astype(bool) & (plain[0][:12] != 0)
    assert real.sum() > 20
    assert weight[real].min() >= 1
    assert weight[real].max() > 1.3  # 1 + 0.5 (1 - p)
    assert abs(one_device[2]["grad_norm"] - plain[2]["grad_norm"]) > 1e-3


def test_masks_and_weights_of_the_current_policy_do_not_depend_on_layout():
    algorithm = AlgorithmConfig(
        train_batch=GROUPS,
        reweight=ReweightConfig("current_focal", 0.5, where="positive", mask=MaskConfig("prob_below", 0.5)),
        loss_mask=MaskConfig("lowest_logp", 0.8),
        aggregation="seq-mean-token-mean",
    )
    assert_same(dapo_update((2, 2, 2), 2, algorithm), dapo_update(None, 1, algorithm))


def test_padding_rows_count_for_nothing(one_device):
    """12 real rows alone give the loss, the gradient and the metrics of 12 real rows and 4 of padding."""
    rows = dapo_rows()
    config = tiny_config()
    params = init_params(config, jax.random.key(0))
    apply, optimizer = model_apply(config), optax.sgd(1.0)
    tokens, mask, response, group, score = (x[:12] for x in rows)
    old_logp, entropy = (x[:, P:] for x in make_scorer(apply, chunk=16)(params, tokens, mask, np.float32(1.0)))
    old_logp = old_logp - 0.3 * jnp.sin(jnp.arange(R)) * response
    given = Tokens(response, old_logp, entropy, group_B=group, key=jax.random.key(3))
    _, made = advantages(PAPER, score, given, np.float32(0.5))
    batch = {"tokens_BT": tokens, "segment_BT": mask} | scalars(PAPER, 1.0) | at_tokens(**made.arrays())
    weighted = made.advantages_BT
    step = make_train_step(apply, optimizer, make_loss(PAPER, chunk=16, max_response=R))
    before = jax.tree.map(np.array, params)
    state, metrics = step(TrainState.create(params, optimizer), batch)
    gradient = jax.tree.map(lambda a, b: a - np.array(b), before, state.params)
    expected = (one_device[0][:12], one_device[1], one_device[2])
    assert_same((np.array(weighted), gradient, {name: float(x) for name, x in metrics.items()}), expected)
