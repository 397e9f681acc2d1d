"""Numbers that a run rests on: float32 products, the tail of sharp distributions, the gradient at ratio 1, seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from rlvr_jax.decoding.sampling import sample
from rlvr_jax.objectives.logprobs import chunked_logprobs
from rlvr_jax.objectives.policy import policy_loss
from train.step.rollout import eval_seed, rollout_seed


def products(jaxpr):
    """The parameters of every dot_general, in programs inside programs too."""
    found = []
    for equation in jaxpr.eqns:
        found += [equation.params] if equation.primitive.name == "dot_general" else []
        for x in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(x, Jaxpr | ClosedJaxpr):
                found += products(getattr(x, "jaxpr", x))
    return found


@pytest.mark.parametrize("entropy", [False, True])
def test_float32_scoring_multiplies_in_float32(entropy):
    def total(hidden, unembed):
        out = chunked_logprobs(hidden, unembed, np.zeros((2, 6), np.int32), chunk=4, entropy=entropy)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, out))

    shapes = np.ones((2, 6, 16), np.float32), np.ones((16, 40), np.float32)
    for function, least in ((total, 1), (jax.value_and_grad(total, (0, 1)), 4)):
        made = products(jax.make_jaxpr(function)(*shapes).jaxpr)
        assert len(made) >= least  # a gradient: the scores, the scores again, and one for each operand
        assert all(set(x["precision"] or ()) == {jax.lax.Precision.HIGHEST} for x in made)


def test_the_tail_of_a_sharp_distribution_is_drawn_at_its_rate():
    V, rows, calls, rest, top = 4096, 4000, 100, 3e-4, 1234
    p = np.full(V, rest / (V - 1))
    p[top] = 1 - rest
    logits_V = jnp.log(p).astype(jnp.float32)

    @jax.jit
    def tail(key):
        drawn = sample(jnp.broadcast_to(logits_V, (rows, V)), jax.random.split(key, rows), temperature=1.0)
        return jnp.bincount(drawn // 128, (drawn != top).astype(jnp.int32), length=V // 128)

    counts = sum(np.asarray(tail(key)) for key in jax.random.split(jax.random.key(5), calls))
    expected = rows * calls * rest
    assert abs(counts.sum() - expected) < 4 * np.sqrt(expected)
    each = expected / len(counts)
    assert counts.max() < each + 5 * np.sqrt(each)  # Poisson of mean 3.75: above 13 in any of 32 blocks, 1 in 500
    assert (counts == 0).sum() <= 4  # 0.75 expected


def test_the_gradient_of_the_policy_loss_at_ratio_one_is_minus_the_advantage():
    A = jnp.array([[1.5, -0.5, 2.0, -3.0]])
    for clips in ({"clip_low": 0.0, "clip_high": 0.0}, {}):
        old, mask = jnp.log(jnp.full((1, 4), 0.3)), jnp.ones((1, 4))
        got = jax.grad(lambda logp, old=old, mask=mask, clips=clips: policy_loss(logp, old, A, mask, **clips)[0].sum())
        np.testing.assert_allclose(got(old), -A, rtol=1e-6)


def test_no_two_decodes_of_any_run_share_a_seed():
    evals = {eval_seed(seed) for seed in range(51)}
    rollouts = {rollout_seed(seed, batch) for seed in range(51) for batch in range(1001)}
    assert (len(evals), len(rollouts), len(evals & rollouts)) == (51, 51 * 1001, 0)
    assert max(eval_seed(2**31 - 1), rollout_seed(2**31 - 1, 2**32 - 1)) < 2**64
