"""The options of the loss in training: every one against its formula written anew, whatever the micro-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.models.qwen import init_params
from tests.test_train_wiring import MODEL, N, P, R, full_logprobs, groups, one_device, trainer
from train import config as c
from train.step.objective import make_loss, scalars

T, V, D, B = 0.7, 11, 5, 6


def apply(params, tokens_BT, positions_BT, mask_BT):
    """A bigram model: its hidden state is the token's embedding."""
    return params["embed"][tokens_BT], params["unembed"]


def small_batch(rng):
    mask = (np.arange(R) < rng.integers(1, R + 1, (B, 1))).astype(float)
    keep = mask * (rng.random((B, R)) < 0.7)
    keep[:, 0] = mask[:, 0]
    tokens = rng.integers(0, V, (B, P + R))
    values = {
        "old_logp_BT": rng.normal(-2.4, 0.4, (B, R)),
        "advantages_BT": np.repeat(rng.normal(size=(B, 1)), R, axis=1),
        "loss_mask_BT": keep,
        "reweight_mask_BT": mask,
        "response_BT": mask,
        "ref_logp_BT": rng.normal(-2.4, 0.4, (B, R)),
        "importance_BT": rng.uniform(0.5, 2.0, (B, R)),
    }
    values = {name: np.pad(x, ((0, 0), (P, 0))) for name, x in values.items()}  # 0 on the prompt
    return {"tokens_BT": tokens, "segment_BT": np.pad(mask.astype(int), ((0, 0), (P, 0)), constant_values=1)} | values


OPTIONS = {
    "grpo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "clip_dual": None,
        "kl_coef": 0.3,
        "aggregation": "seq-mean-token-mean",
    },
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "clip_dual": None, "aggregation": "seq-mean-token-sum-norm"},
    "gspo": {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.08, "aggregation": "seq-mean-token-mean"},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    "all": {"loss": "cispo", "clip_high": 0.3, "kl_coef": 0.2, "importance": "token"},
}


def written(name, algorithm, params, batch):
    """The loss of the whole batch from its formula, by plain jax."""
    logits = params["embed"][batch["tokens_BT"]] @ params["unembed"] / T
    logp = jax.nn.log_softmax(logits)[:, P - 1 : -1]
    logp = jnp.take_along_axis(logp, batch["tokens_BT"][:, P:, None], -1)[..., 0]
    batch = {key: x[:, P:] for key, x in batch.items()}
    A, keep, response = batch["advantages_BT"], batch["loss_mask_BT"], batch["response_BT"]
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    ratio = jnp.exp(logp - batch["old_logp_BT"])
    if algorithm.loss == "gspo":  # with A and the mask of the loss on each token: GSPO-token
        mean = ((logp - batch["old_logp_BT"]) * response).sum(1) / response.sum(1)
        ratio = jnp.exp(jax.lax.stop_gradient(mean)[:, None] + logp - jax.lax.stop_gradient(logp))
    if algorithm.loss == "cispo":
        each = -jax.lax.stop_gradient(jnp.minimum(jnp.maximum(ratio, low), high)) * A * logp
    else:
        inside = jnp.where(ratio < low, low, jnp.where(ratio > high, high, ratio))
        each = -jnp.minimum(ratio * A, inside * A)
    if name == "all":
        each = each * batch["importance_BT"]
    if algorithm.kl_coef:
        d = batch["ref_logp_BT"] - logp
        each = each + algorithm.kl_coef * (jnp.exp(d) - d - 1)
    if algorithm.aggregation == "token-mean":
        return (each * keep).sum() / keep.sum()
    divisor = keep.sum(1) if algorithm.aggregation == "seq-mean-token-mean" else 50
    return ((each * keep).sum(1) / divisor).mean()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loss_is_the_written_formula_in_any_number_of_parts(name):
    algorithm = c.AlgorithmConfig(**OPTIONS[name])
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {"embed": jnp.asarray(rng.normal(size=(V, D))), "unembed": jnp.asarray(rng.normal(size=(D, V)))}
        batch = small_batch(rng)
        if algorithm.importance == "none":  # a batch that has weights is weighted
            del batch["importance_BT"]
        settings = {key: np.float64(value) for key, value in scalars(algorithm, T).items()}
        exact = {"temperature": T, "kl_coef": algorithm.kl_coef}
        exact |= {key: getattr(algorithm, key) for key in ("clip_low", "clip_high", "clip_dual")}
        settings = {key: np.float64(exact.get(key, value)) for key, value in settings.items()}
        loss_fn = make_loss(algorithm, chunk=7, max_response=50)

        def summed(params, rows):
            return loss_fn(apply, params, {key: x[rows] for key, x in batch.items()} | settings)[0]

        def in_parts(params, parts):
            pieces = [summed(params, rows) for rows in np.array_split(np.arange(B), parts)]
            total, weight = (sum(x) for x in zip(*pieces, strict=True))
            return total / weight

        expected, slopes = jax.jit(jax.value_and_grad(lambda p: written(name, algorithm, p, batch)))(params)
        assert max(float(jnp.abs(x).max()) for x in slopes.values()) > 1e-3
        for parts in (1, 3):
            got, ours = jax.jit(jax.value_and_grad(in_parts), static_argnums=1)(params, parts)
            assert float(got) == pytest.approx(float(expected), rel=1e-10)
            for key in params:
                np.testing.assert_allclose(ours[key], slopes[key], rtol=1e-9, atol=1e-11)


def test_the_default_program_has_no_new_arguments():
    assert scalars(c.AlgorithmConfig(), T).keys() == {"temperature", "alpha", "clip_low", "clip_high", "clip_dual"}
    assert not c.AlgorithmConfig().needs_reference
    assert c.AlgorithmConfig(kl_coef=0.1).needs_reference


def test_importance_weights_and_the_penalty_reach_a_trainer_step():
    """At learning rate 0 every ratio is 1, so the loss is known from both models' log-probs alone."""
    cap, kl_coef = 1.3, 0.4
    algorithm = c.AlgorithmConfig(
        train_batch=2, mini_batch=1, importance="token", importance_cap=cap, kl_coef=kl_coef, clip_dual=None
    )
    config = c.Config(
        rollout=c.RolloutConfig(n=N, max_response=R, temperature=T),
        reward=c.RewardConfig(overlong_buffer=0),
        algorithm=algorithm,
        optim=c.OptimConfig(warmup=10),
    )
    rng = np.random.default_rng(1)
    made = [dataclasses.replace(g, logp=rng.normal(-4.3, 0.6, g.tokens.shape).astype(np.float32)) for g in groups(2)]
    reference = init_params(MODEL, jax.random.key(1), jnp.float32)
    with pytest.raises(ValueError, match="reference=None"), jax.set_mesh(one_device()):
        trainer(config)
    with jax.set_mesh(one_device()):
        ours = trainer(config, reference)
        before = jax.device_get(ours.state.params)
        outcome = ours.train(made, 0, lambda phase: None)
    tokens, mask = np.zeros((2 * N, P + R), np.int32), np.zeros((2 * N, P + R), np.int32)
    rollout = np.zeros((2 * N, R))
    for g, group in enumerate(made):
        k, width = 2 + g % 3, group.tokens.shape[1]
        for i in range(N):
            row = g * N + i
            tokens[row, P - k : P], tokens[row, P : P + width] = 7 + g, group.tokens[i]
            mask[row, P - k : P + group.lengths[i]] = 1
            rollout[row, :width] = group.logp[i]
    real = mask[:, P:] > 0
    score = jax.jit(lambda p: full_logprobs(MODEL, p, tokens, mask, T)[1][:, P - 1 :])
    old, ref = (np.float64(score(p)) for p in (before, reference))
    weight = np.minimum(np.exp(old - rollout), cap)
    d = ref - old
    penalty = np.exp(d) - d - 1
    each = -weight * outcome.advantage_N[:, None] + kl_coef * penalty
    halves = [slice(0, N), slice(N, 2 * N)]
    expected = np.mean([each[at][real[at]].mean() for at in halves])
    assert outcome.metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert outcome.metrics["importance_weight"] == pytest.approx(weight[real].mean(), rel=1e-4)
    assert outcome.metrics["importance_capped_share"] == pytest.approx((weight[real] == cap).mean())
    assert 0.1 < outcome.metrics["importance_capped_share"] < 0.9
    assert outcome.metrics["ref_kl"] == pytest.approx(
        np.mean([penalty[at][real[at]].mean() for at in halves]), rel=1e-4
    )
