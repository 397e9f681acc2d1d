"""Token log-probabilities: hand values, float64, gradients, and the absence of a [B, T, V] array when chunked."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from rlvr_jax.objectives.logprobs import chunked_logprobs, token_logprobs


@pytest.fixture(params=["jit", "eager"])
def wrap(request):
    return jax.jit if request.param == "jit" else lambda f: f


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def problem(rows=3, steps=7, width=5, vocabulary=11, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, steps, width)).astype(dtype)
    unembed = rng.normal(size=(width, vocabulary)).astype(dtype)
    targets = rng.integers(vocabulary, size=(rows, steps))
    return hidden, unembed, targets


def reference(hidden, unembed, targets, temperature=1.0):
    """Log-probabilities and entropies in float64, one token at a time."""
    logp, entropy = np.zeros(targets.shape), np.zeros(targets.shape)
    for b, t in np.ndindex(*targets.shape):
        logits = np.float64(hidden[b, t]) @ np.float64(unembed) / temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        logp[b, t], entropy[b, t] = np.log(p[targets[b, t]]), -(p * np.log(p)).sum()
    return logp, entropy


def test_token_logprobs_by_hand(wrap):
    logits = np.log(np.array([[[1.0, 2.0, 5.0], [4.0, 4.0, 8.0]]]))
    targets = np.array([[1, 2]])
    np.testing.assert_allclose(np.exp(wrap(token_logprobs)(logits, targets)), [[2 / 8, 8 / 16]], rtol=1e-6)
    # Temperature 1/2 squares the odds: 4 / (1 + 4 + 25) and 64 / (16 + 16 + 64).
    half = wrap(lambda x, y, t: token_logprobs(x, y, temperature=t))(logits, targets, 0.5)
    np.testing.assert_allclose(np.exp(half), [[4 / 30, 64 / 96]], rtol=1e-6)


def test_token_logprobs_shift_excluded_and_bfloat16():
    logits = np.array([[[1e4, 1e4 - 1.0, -np.inf]]], np.float32)
    assert token_logprobs(logits, np.array([[1]]))[0, 0] == pytest.approx(-1 - np.log1p(np.exp(-1)), rel=1e-6)
    assert token_logprobs(logits, np.array([[2]]))[0, 0] == -np.inf
    low = token_logprobs(jnp.zeros((1, 1, 1000), jnp.bfloat16), np.array([[0]]))
    assert low.dtype == jnp.float32
    assert low[0, 0] == pytest.approx(-np.log(1000), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 6, 8, 21, 1024])
def test_chunked_forward_and_gradient_in_float64(chunk, x64):
    hidden, unembed, targets = problem()
    rng = np.random.default_rng(1)
    weight, entropy_weight = rng.normal(size=targets.shape), rng.normal(size=targets.shape)

    def full(hidden, unembed, temperature):
        logits = hidden @ unembed / temperature
        logp = jax.nn.log_softmax(logits)
        entropy = -(jnp.exp(logp) * logp).sum(-1)
        return (weight * token_logprobs(hidden @ unembed, targets, temperature=temperature)).sum() + (
            entropy_weight * entropy
        ).sum()

    def chunked(hidden, unembed, temperature):
        logp, entropy = chunked_logprobs(hidden, unembed, targets, temperature=temperature, chunk=chunk, entropy=True)
        return (weight * logp).sum() + (entropy_weight * entropy).sum()

    temperature = 0.7
    logp, entropy = chunked_logprobs(hidden, unembed, targets, temperature=temperature, chunk=chunk, entropy=True)
    expected_logp, expected_entropy = reference(hidden, unembed, targets, temperature)
    np.testing.assert_allclose(logp, expected_logp, rtol=1e-12)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-12)
    for got, expected in zip(
        jax.jit(jax.grad(chunked, argnums=(0, 1, 2)))(hidden, unembed, temperature),
        jax.jit(jax.grad(full, argnums=(0, 1, 2)))(hidden, unembed, temperature),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_chunked_without_entropy_and_finite_differences(wrap, x64):
    hidden, unembed, targets = problem(rows=2, steps=3)

    def loss(hidden, unembed, temperature):
        return chunked_logprobs(hidden, unembed, targets, temperature=temperature, chunk=4).sum()

    np.testing.assert_allclose(
        wrap(lambda h, u: chunked_logprobs(h, u, targets, chunk=4))(hidden, unembed),
        reference(hidden, unembed, targets)[0],
        rtol=1e-12,
    )
    d_hidden, d_unembed, d_temperature = wrap(jax.grad(loss, argnums=(0, 1, 2)))(hidden, unembed, 1.3)
    step = 1e-6
    for array, gradient in ((hidden, d_hidden), (unembed, d_unembed)):
        index = tuple(size // 2 for size in array.shape)
        ends = []
        for sign in (1, -1):
            moved = array.copy()
            moved[index] += sign * step
            ends.append(float(loss(moved, unembed, 1.3) if array is hidden else loss(hidden, moved, 1.3)))
        assert gradient[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    numeric = float(loss(hidden, unembed, 1.3 + step) - loss(hidden, unembed, 1.3 - step)) / (2 * step)
    assert d_temperature == pytest.approx(numeric, rel=1e-6)


def test_float32_agrees_with_the_full_computation():
    hidden, unembed, targets = problem(rows=4, steps=16, width=32, vocabulary=300, dtype=np.float32)
    logp = chunked_logprobs(hidden, unembed, targets, chunk=13)
    np.testing.assert_allclose(logp, token_logprobs(hidden @ unembed, targets), atol=2e-5)
    np.testing.assert_allclose(logp, reference(hidden, unembed, targets)[0], atol=2e-5)
    assert logp.dtype == jnp.float32


def test_bfloat16_products_and_a_float32_sum_over_chunks():
    """Equal tokens, one a chunk: a bfloat16 sum of the unembedding's gradient would stop growing after 256 of them."""
    steps, width, vocabulary = 1024, 4, 8
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(np.broadcast_to(rng.normal(size=width), (1, steps, width)), jnp.bfloat16)
    unembed = jnp.asarray(rng.normal(size=(width, vocabulary)), jnp.float32)
    targets = np.zeros((1, steps), int)

    def gradients(hidden, unembed, chunk):
        return jax.grad(lambda h, u: chunked_logprobs(h, u, targets, chunk=chunk).sum(), argnums=(0, 1))(
            hidden, unembed
        )

    d_hidden, d_unembed = gradients(hidden, unembed, 1)
    assert (d_hidden.dtype, d_unembed.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = np.float64(unembed.astype(jnp.bfloat16))
    p = np.exp(np.float64(hidden[0, 0]) @ rounded)
    p /= p.sum()
    exact = steps * np.outer(np.float64(hidden[0, 0]), (np.arange(vocabulary) == 0) - p)
    np.testing.assert_allclose(d_unembed, exact, rtol=1e-2)
    logp = chunked_logprobs(hidden, unembed, targets, chunk=100)
    assert logp.dtype == jnp.float32
    np.testing.assert_allclose(logp, np.log(p[0]), atol=1e-5)  # bfloat16 operands, float32 result
    low = gradients(hidden, unembed.astype(jnp.bfloat16), 1)[1]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(low), exact, rtol=2e-2)


def test_temperature_is_traced():
    hidden, unembed, targets = problem(dtype=np.float32)
    traces = []

    @jax.jit
    def run(temperature):
        traces.append(1)
        return chunked_logprobs(hidden, unembed, targets, temperature=temperature, chunk=4)

    for temperature in (0.5, 1.0, 2.0):
        np.testing.assert_allclose(run(temperature), reference(hidden, unembed, targets, temperature)[0], atol=1e-5)
    assert len(traces) == 1


def test_nothing_to_score_and_bad_arguments():
    hidden, unembed, targets = problem(dtype=np.float32)
    assert chunked_logprobs(hidden[:, :0], unembed, targets[:, :0]).shape == (3, 0)
    assert [x.shape for x in chunked_logprobs(hidden[:0], unembed, targets[:0], entropy=True)] == [(0, 7)] * 2
    for bad in ({"chunk": 0}, {"temperature": 0.0}, {"temperature": -1}):
        name = next(iter(bad))
        with pytest.raises(ValueError, match=name):
            chunked_logprobs(hidden, unembed, targets, **bad)
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(hidden, targets, temperature=0)


# No array of B * T * V elements, in the program JAX traces or the one XLA compiles.


def largest_in_jaxpr(jaxpr) -> int:
    """The most elements any array has in a jaxpr or in a jaxpr inside it."""
    sizes = [0]
    for variable in [*jaxpr.invars, *jaxpr.outvars, *jaxpr.constvars]:
        sizes.append(math.prod(getattr(variable.aval, "shape", ())))
    for equation in jaxpr.eqns:
        sizes += [math.prod(getattr(v.aval, "shape", ())) for v in [*equation.invars, *equation.outvars]]
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_in_jaxpr(inner))
    return max(sizes)


def largest_in_hlo(text: str) -> int:
    return max(math.prod(int(n) for n in dims.split(",")) for dims in re.findall(r"[a-z]\w*\[(\d+(?:,\d+)*)\]", text))


def full_logprobs(hidden, unembed, targets):
    return token_logprobs(hidden @ unembed, targets)


def small_chunks(hidden, unembed, targets):
    return chunked_logprobs(hidden, unembed, targets, chunk=16)


def small_chunks_with_entropy(hidden, unembed, targets):
    return sum(chunked_logprobs(hidden, unembed, targets, chunk=16, entropy=True))


def test_chunked_holds_no_logits_forward_or_backward():
    rows, steps, width, vocabulary, chunk = 4, 32, 8, 211, 16
    arguments = problem(rows, steps, width, vocabulary, np.float32)
    everything = rows * steps * vocabulary

    def measure(logprobs):
        def loss(hidden, unembed):
            return logprobs(hidden, unembed, arguments[2]).sum()

        sizes = []
        for function in (loss, jax.value_and_grad(loss, argnums=(0, 1))):
            sizes.append(largest_in_jaxpr(jax.make_jaxpr(function)(*arguments[:2]).jaxpr))
            sizes.append(largest_in_hlo(jax.jit(function).lower(*arguments[:2]).compile().as_text()))
        return sizes

    # The checkers see the array when it is there, also inside a nested function ...
    assert measure(full_logprobs) == [everything] * 4
    assert measure(jax.jit(jax.checkpoint(full_logprobs))) == [everything] * 4
    # ... and chunked, the largest array is the logits of one chunk.
    assert measure(small_chunks) == [chunk * vocabulary] * 4
    assert measure(small_chunks_with_entropy) == [chunk * vocabulary] * 4


def test_more_rows_than_a_chunk_still_respects_the_chunk():
    arguments = problem(37, 2, 4, 101, np.float32)
    jaxpr = jax.make_jaxpr(lambda h, u: chunked_logprobs(h, u, arguments[2], chunk=5))(*arguments[:2])
    assert largest_in_jaxpr(jaxpr.jaxpr) <= max(5 * 101, 37 * 2 * 4 + 8 * 4)
    np.testing.assert_allclose(chunked_logprobs(*arguments, chunk=5), reference(*arguments)[0], atol=1e-5)


# Many devices.


def gradients_of(logprobs, weight):
    def loss(hidden, unembed, targets):
        logp = logprobs(hidden, unembed, targets)
        return (weight * logp).sum(), logp

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("chunk", [4, 24, 1024])
def test_batch_sharded_over_eight_devices(chunk):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    hidden, unembed, targets = problem(rows=16, steps=6, width=8, vocabulary=40, dtype=np.float32)
    weight = np.random.default_rng(2).normal(size=targets.shape).astype(np.float32)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, Spec(*spec)))  # noqa: E731
    expected = gradients_of(full_logprobs, weight)(hidden, unembed, targets)
    for unembed_spec in ((), (None, "data"), ("data", None)):
        got = gradients_of(lambda h, u, y: chunked_logprobs(h, u, y, chunk=chunk), weight)(
            place(hidden, "data"), place(unembed, *unembed_spec), place(targets, "data")
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_each_device_scores_its_own_rows_of_a_chunk():
    """Chunks that were runs of neighbouring tokens would put a whole chunk on every device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    hidden, unembed, targets = problem(rows=16, steps=16, width=2, vocabulary=101, dtype=np.float32)
    rows, whole = NamedSharding(mesh, Spec("data")), NamedSharding(mesh, Spec())
    step = jax.jit(
        jax.grad(lambda h, u, y: chunked_logprobs(h, u, y, chunk=64).sum(), argnums=(0, 1)),
        in_shardings=(rows, whole, rows),
        out_shardings=(rows, whole),
    )
    assert largest_in_hlo(step.lower(hidden, unembed, targets).compile().as_text()) == 64 // 8 * 101


@pytest.mark.parametrize("sizes", [(8,), (2, 2, 2)], ids=str)
def test_inside_shard_map_on_each_devices_rows(sizes):
    axes = ("data", "fsdp", "tensor")[: len(sizes)]
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
    hidden, unembed, targets = problem(rows=16, steps=6, width=8, vocabulary=40, dtype=np.float32)
    weight = np.random.default_rng(2).normal(size=targets.shape).astype(np.float32)

    def local(hidden, unembed, targets):
        unembed = jax.lax.pcast(unembed, axes, to="varying")
        return chunked_logprobs(hidden, unembed, targets, chunk=5)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(Spec(axes), Spec(), Spec(axes)), out_specs=Spec(axes))
    got = gradients_of(mapped, weight)(hidden, unembed, targets)
    expected = gradients_of(full_logprobs, weight)(hidden, unembed, targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_a_mesh_of_explicit_axes_is_left_alone():
    hidden, unembed, targets = problem(dtype=np.float32)
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)):
        got = chunked_logprobs(hidden, unembed, targets, chunk=4)
    np.testing.assert_allclose(got, reference(hidden, unembed, targets)[0], atol=1e-5)


@pytest.mark.parametrize("chunk", [8, 1024])
def test_bfloat16_gradients_run_on_cpu_and_agree_with_float32(chunk):
    # One chunk alone is a program of its own: XLA unrolls the loop, and its CPU backend lacks that bfloat16 product.
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(16, 24, 32)), jnp.bfloat16)
    unembed = jnp.asarray(rng.normal(size=(32, 50)), jnp.bfloat16)
    targets = jnp.asarray(rng.integers(50, size=(16, 24)))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(hidden, unembed):
        return chunked_logprobs(hidden, unembed, targets, chunk=chunk).sum()

    for low, full in zip(
        gradients(hidden, unembed), gradients(hidden.astype(jnp.float32), unembed.astype(jnp.float32)), strict=True
    ):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(low.astype(jnp.float32), full, atol=0.01 * float(jnp.abs(full).max()))
