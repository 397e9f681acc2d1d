"""Sums of many terms are float32 and reproducible in bfloat16 too: against float64, on a mesh, in a GPU's program."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlvr_jax.models.kernels.attention import _copied
from rlvr_jax.models.kernels.embedding import embed_tokens
from rlvr_jax.models.qwen import init_params, model_apply, param_axes
from rlvr_jax.models.tokens import TokenLayout
from rlvr_jax.objectives.policy import AGGREGATIONS, aggregate, cispo_loss, gspo_loss, policy_loss
from rlvr_jax.objectives.segments import response_sums
from rlvr_jax.objectives.tokens import Tokens
from rlvr_jax.scatter import _added, _summed_in_order, scatter_sum
from rlvr_jax.sharding.rules import ShardingRules, make_mesh
from rlvr_jax.training import TrainState, make_train_step
from tests.tiny import tiny_config
from train.config import AlgorithmConfig, MaskConfig, ReweightConfig
from train.step.objective import advantages, make_loss, scalars

MANY = 8192  # a sum of so many ones in bfloat16 is 256


def on(mesh_sizes):
    return contextlib.nullcontext() if mesh_sizes is None else jax.set_mesh(make_mesh(*mesh_sizes))


# The two forms of `scatter_sum`: the CPU's and the GPU's.
FORMS = [jax.jit(form, static_argnames="size") for form in (_added, _summed_in_order)]


@pytest.mark.parametrize("form", FORMS)
def test_scatter_sum_against_float64(form):
    rng = np.random.default_rng(0)
    values, index = rng.normal(size=(500, 3)).astype(np.float32), rng.integers(-5, 30, size=500)
    expected = np.zeros((20, 3))
    for value, i in zip(values.astype(np.float64), index, strict=True):
        if 0 <= i < 20:
            expected[i] += value
    np.testing.assert_allclose(form(values, np.where(index < 0, 20, index), size=20), expected, atol=2e-5)
    np.testing.assert_allclose(scatter_sum(values, index, 20), expected, atol=2e-5)
    np.testing.assert_array_equal(form(values[:0, 0], index[:0], size=2), np.zeros(2))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_ids_of_few_bits_that_do_not_hold_the_size(dtype):
    table = jnp.arange(70_000.0)[:, None]
    tokens = np.array([[3, 100]], dtype)
    found = embed_tokens(table, tokens, jnp.float32, TokenLayout.of(1, 2))
    np.testing.assert_array_equal(found[:, 0], [3, 100])
    np.testing.assert_array_equal(scatter_sum(jnp.ones(2), tokens[0], 70_000).nonzero()[0], [3, 100])
    if dtype.startswith("int"):
        np.testing.assert_array_equal(scatter_sum(jnp.ones(2), np.array([-1, 3], dtype), 300), np.arange(300) == 3)


@pytest.mark.parametrize("form", FORMS)
def test_scatter_sum_of_many_equal_rows(form):
    got = form(jnp.ones(MANY, jnp.bfloat16), jnp.full(MANY, 3), size=5)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, MANY * (np.arange(5) == 3))


@pytest.mark.parametrize("mesh_sizes", [None, (1, 2, 4)])
def test_the_embeddings_gradient(mesh_sizes):
    """Equal tokens and a cotangent of 1: their number. Zipf tokens: float64, but for the last rounding."""
    rng = np.random.default_rng(1)
    table = jnp.zeros((16, 8), jnp.bfloat16)
    zipf = np.minimum(rng.zipf(1.3, size=(8, MANY // 8)), 15)
    cotangent = jnp.asarray(rng.normal(1.0, 0.5, size=(8, MANY // 8, 8)), jnp.bfloat16)

    @jax.jit
    def gradient(tokens, cotangent):
        layout = TokenLayout.of(*tokens.shape)

        def loss(table):
            x_BTD = layout.apart(embed_tokens(table, tokens, jnp.bfloat16, layout))
            return jnp.sum(x_BTD.astype(jnp.float32) * cotangent.astype(jnp.float32))

        return jax.grad(loss)(table)

    with on(mesh_sizes):
        equal = gradient(jnp.full(zipf.shape, 5), jnp.ones_like(cotangent))
        mixed = gradient(jnp.asarray(zipf), cotangent)
    np.testing.assert_array_equal(equal.astype(jnp.float32), MANY * (np.arange(16) == 5)[:, None] * np.ones(8))
    exact = np.zeros((16, 8))
    np.add.at(exact, zipf, np.asarray(cotangent, np.float64))
    np.testing.assert_allclose(np.asarray(mixed, np.float64), exact, rtol=2**-8 if mesh_sizes is None else 2**-7)


def test_the_gradient_of_copied_heads():
    weight = np.array([256, 1, 1, 1, 1, 1, 1, 1], np.float32)[None, :, None]
    d = jax.grad(lambda k: jnp.sum(_copied(k, 8).astype(jnp.float32) * weight))(jnp.ones((1, 1, 2), jnp.bfloat16))
    np.testing.assert_array_equal(d.astype(jnp.float32), 264)  # 263 in bfloat16; added one by one it would be 256


def test_micro_batches_are_added_in_float32():
    micro_batches = 512
    batch = {"x": np.ones(micro_batches, np.float32), "w": np.eye(1, micro_batches, dtype=np.float32)[0]}

    def loss(apply, params, batch):
        return (jnp.sum(params["p"] * batch["x"].astype(jnp.bfloat16)), jnp.sum(batch["w"])), {}

    state = TrainState.create({"p": jnp.ones((), jnp.bfloat16)}, optax.sgd(0.1))
    _, metrics = make_train_step(None, optax.sgd(0.1), loss, micro_batches=micro_batches)(state, batch)
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (micro_batches, micro_batches)


def test_losses_metrics_and_responses_of_bfloat16_are_added_in_float32():
    ones = jnp.ones((1, MANY), jnp.bfloat16)
    for mode in AGGREGATIONS:
        total, weight = aggregate(ones, ones, mode, max_length=1)
        expected = {"token-mean": (MANY, MANY), "seq-mean-token-mean": (1, 1)}.get(mode, (MANY, 1))
        assert (float(total), float(weight)) == expected, mode
    for loss in (policy_loss, gspo_loss, cispo_loss):
        value, metrics = loss(-ones, -ones, ones, ones)
        assert value.dtype == jnp.float32
        assert tuple(map(float, metrics["ratio"])) == (MANY, MANY), loss
    for segment in (None, np.ones((1, MANY), int)):
        np.testing.assert_array_equal(response_sums(ones, segment), np.full((1, MANY), MANY))


# The whole update: which sums its program has, and what it gives.


def dapo_gradient(algorithm, model_type="qwen2", tokens=None, **options):
    """(function of the parameters, parameters): the gradient of the loss of a batch, in bfloat16 unless said."""
    config = tiny_config(model_type, **{"dtype": "bfloat16", "num_layers": 1} | options)
    tokens = np.zeros((4, 16), np.int32) if tokens is None else tokens
    ones = np.ones(tokens.shape, np.float32)
    batch = {"tokens_BT": tokens, "segment_BT": np.ones_like(tokens), "old_logp_BT": -4 * ones, "response_BT": ones}
    batch |= {"advantages_BT": ones, "loss_mask_BT": ones, "reweight_mask_BT": ones} | scalars(algorithm, 1.0)
    loss = make_loss(algorithm, chunk=tokens.size // 2, max_response=tokens.shape[1])
    params = init_params(config, jax.random.key(0))
    return jax.grad(lambda params: loss(model_apply(config), params, batch)[0][0]), params


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def narrow_sums(jaxpr):
    """Sums over an array's dimension, or into places, in 16 bits. Sums over devices cross them in the compute dtype."""
    names = ("reduce_sum", "scatter-add", "cumsum", "reduce_window_sum")
    found = [e for e in equations(jaxpr) if e.primitive.name in names]
    assert len(found) > 5
    return [e for e in found if jnp.dtype(e.outvars[0].aval.dtype).itemsize < 4]


@pytest.mark.parametrize("mesh_sizes", [None, (1, 2, 4)])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_no_sum_of_the_update_is_in_the_compute_dtype(model_type, mesh_sizes):
    """Biases (qwen2), norms (qwen3), embedding, unembedding, copied heads (4 devices, 2 kv heads), softmax, losses."""
    gradient, params = dapo_gradient(AlgorithmConfig(), model_type, attention="chunked", remat="full")
    with on(mesh_sizes):
        assert not narrow_sums(jax.make_jaxpr(gradient)(params).jaxpr)


def test_narrow_sums_are_seen():
    bias = jnp.zeros(8, jnp.bfloat16)
    program = jax.make_jaxpr(
        jax.grad(lambda b: sum(jnp.sum((jnp.ones((4, 8), jnp.bfloat16) + b).astype(jnp.float32)) for _ in "123456"))
    )
    assert len(narrow_sums(program(bias).jaxpr)) >= 1


def shared_float_scatters(text):
    """Scatters of a StableHLO program that add or compare floats in places that need not differ."""
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines) if "stablehlo.scatter" in line and "unique_indices = true" not in line]
    bodies = ["".join(lines[n + 1 : n + 3]) for n in starts]
    return [body for body in bodies if "stablehlo.add" in body and "tensor<i" not in body]


def test_no_float_is_added_by_atomics_on_a_gpu():
    """XLA's GPU backend does so for a scatter that adds, unless its places are known to differ."""
    gspo = AlgorithmConfig(loss="gspo", aggregation="seq-mean-token-mean")
    for algorithm in (AlgorithmConfig(), gspo):
        gradient, params = dapo_gradient(algorithm)
        text = jax.jit(gradient).trace(params).lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo.scatter" in text
        assert not shared_float_scatters(text)
    ones, group = np.ones((8, 16), np.float32), np.zeros(8, np.int32)
    for reweighting in (
        ReweightConfig("ppl_norm", 0.5, mask=MaskConfig("lowest_logp", 0.5)),
        ReweightConfig("shuffled"),
    ):
        algorithm = AlgorithmConfig(train_batch=4, reweight=reweighting)
        tokens = Tokens(ones, ones, ones, group_B=group, key=jax.random.key(0))
        lowered = advantages.trace(algorithm, ones[:, 0], tokens, np.float32(0.5)).lower(lowering_platforms=("cuda",))
        assert not shared_float_scatters(lowered.as_text())
    atomic = jax.jit(lambda x, i: jnp.zeros(4).at[i].add(x)).trace(ones[0], np.zeros(16, np.int32))
    assert len(shared_float_scatters(atomic.lower(lowering_platforms=("cuda",)).as_text())) == 1


def test_the_update_in_bfloat16_is_the_float32_one_with_and_without_a_mesh():
    """Few different tokens, so every row of the embedding's gradient is a sum of hundreds of alike terms."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.5, size=(8, 512)), 47).astype(np.int32)
    gradient, params = dapo_gradient(AlgorithmConfig(), tokens=tokens, dtype="float32")
    exact = jax.device_get(jax.jit(gradient)(params))
    gradient, _ = dapo_gradient(AlgorithmConfig(), tokens=tokens)
    alone = jax.device_get(jax.jit(gradient)(params))

    def meshed(*axes):
        mesh, rules = make_mesh(*axes), ShardingRules()
        place = lambda x, names: jax.device_put(x, rules.sharding(mesh, names, x.shape))  # noqa: E731
        with jax.set_mesh(mesh):
            placed = jax.tree.map(place, params, param_axes(tiny_config("qwen2", num_layers=1)))
            return jax.device_get(jax.jit(gradient)(placed))

    def errors(got, expected):
        found = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), got, expected)
        assert max(jax.tree.leaves(found)) < 0.1, found
        assert found["embed"] < 0.05
        return np.array(jax.tree.leaves(found))

    assert errors(meshed(4, 2, 1), alone).max() < 0.01
    # Split over "tensor", products are rounded in other places, and in fewer of them on jax 0.12.
    assert (errors(meshed(2, 2, 2), exact) < 1.1 * errors(alone, exact)).all()
