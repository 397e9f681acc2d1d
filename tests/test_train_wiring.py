"""Every setting of a run reaches the arithmetic: whole steps against a reference, recorded calls, random numbers."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import train.sft as sft
from rlvr_jax.data.problems import Problem
from rlvr_jax.data.prompts import PromptSet, prompt_batches
from rlvr_jax.decoding.generate import Generation
from rlvr_jax.decoding.state import row_keys
from rlvr_jax.generation import language_model
from rlvr_jax.models.hf import load_hf
from rlvr_jax.models.qwen import hidden_states, init_params, logits
from rlvr_jax.rewards.pool import Graded
from rlvr_jax.runs.program import RunError
from rlvr_jax.sharding.rules import make_mesh
from tests.tiny import tiny_config, tiny_tokenizer
from train import config as c
from train.run.loop import _Run
from train.step.evaluate import evaluate
from train.step.rollout import Collector, Decoder, Group, eval_seed, rollout_seed
from train.step.trainer import Trainer

MODEL = tiny_config(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
P, R, N = 4, 8, 4  # prompt, response, responses a group
OPTIM = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.3, "clip_norm": 0.05}  # eps lets the clip be seen


def one_device(*_, **__):
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Compiling is most of what these tests take."""
    monkeypatch.setattr("train.check.prepare.make_mesh", one_device)


def problems(count):
    return [Problem(i, str(i), ({"role": "user", "content": "x"},), str(i), "s") for i in range(count)]


def groups(count):
    rng, made = np.random.default_rng(3), []
    for g in range(count):
        lengths = rng.integers(2, R + 1, N).astype(np.int32)
        tokens = np.where(np.arange(lengths.max()) < lengths[:, None], rng.integers(1, 48, (N, lengths.max())), 0)
        correct = np.arange(N) <= g % 3
        logp = np.zeros(tokens.shape, np.float32)
        made.append(Group(g, 0, 0, tokens.astype(np.int32), logp, lengths, lengths < R, correct, (None,) * N))
    return made


def trainer(config, reference=None):
    """A trainer on the ambient mesh, its prompts of 2, 3, 4, 2 tokens."""
    prompts = PromptSet(problems(4), [[7 + i] * (2 + i % 3) for i in range(4)])
    params = init_params(MODEL, jax.random.key(0), jnp.float32)
    params = jax.device_put(params, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))
    return Trainer(config, MODEL, params, prompts, P, reference)


def adamw_steps(params, gradients, lr, steps):
    """Clip by global norm, then Adam with decoupled weight decay, in float64; `gradients(params, step)`."""
    flat, tree = jax.tree.flatten(params)
    flat, o = [np.float64(p) for p in flat], OPTIM
    m = v = [np.zeros_like(p) for p in flat]
    for t in range(1, steps + 1):
        grads = gradients(jax.tree.unflatten(tree, [np.float32(p) for p in flat]), t - 1)
        grads = [np.float64(g) for g in jax.tree.leaves(grads)]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        assert norm > 2 * o["clip_norm"], "the clip must do something"
        grads = [g * o["clip_norm"] / norm for g in grads]
        m = [o["b1"] * a + (1 - o["b1"]) * g for a, g in zip(m, grads, strict=True)]
        v = [o["b2"] * a + (1 - o["b2"]) * g**2 for a, g in zip(v, grads, strict=True)]
        moments = zip(flat, m, v, strict=True)
        c1, c2 = 1 - o["b1"] ** t, 1 - o["b2"] ** t
        flat = [p - lr * (a / c1 / (np.sqrt(b / c2) + o["eps"]) + o["weight_decay"] * p) for p, a, b in moments]
    return jax.tree.unflatten(tree, flat)


def assert_moved_alike(actual, expected, before):
    """Equal to a thousandth of the update."""
    for got, want, old in zip(*map(jax.tree.leaves, (actual, expected, before)), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want - np.asarray(old)).max())


def full_logprobs(config, params, tokens, mask, temperature=1.0):
    """log softmax of every position from whole logits, and that of the next token."""
    logp = jax.nn.log_softmax(logits(config, params, hidden_states(config, params, tokens, None, mask)) / temperature)
    return logp, jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1)[..., 0]


CASES = {
    "low_prob": {
        "reweight": c.ReweightConfig("low_prob", 0.6, "positive", c.MaskConfig("lowest_logp", 0.6)),
        "loss_mask": c.MaskConfig("highest_entropy", 0.2),
        "aggregation": "seq-mean-token-mean",
        "normalize_by_std": False,
    },
    "current": {
        "reweight": c.ReweightConfig("current_linear", 0.6, "negative", c.MaskConfig("highest_delta_logp", 0.5)),
        "aggregation": "seq-mean-token-sum-norm",
        "normalize_by_std": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_step_is_the_written_formula(case):
    T, peak = 0.7, 0.1
    clips = {"clip_low": 0.01, "clip_high": 0.03, "clip_dual": 1.02}
    algorithm = c.AlgorithmConfig(train_batch=4, mini_batch=2, **clips, **CASES[case])
    config = c.Config(
        rollout=c.RolloutConfig(n=N, max_response=R, temperature=T),
        reward=c.RewardConfig(overlong_buffer=5, overlong_factor=0.5),
        algorithm=algorithm,
        optim=c.OptimConfig(lr=peak, warmup=10, **OPTIM),
    )
    reference = init_params(MODEL, jax.random.key(1), jnp.float32) if case == "current" else None
    made = groups(3)  # the fourth is missing: padding
    with jax.set_mesh(one_device()):
        ours = trainer(config, reference)
        before = jax.device_get(ours.state.params)
        outcome = ours.train(made, 5, lambda phase: None)
    after = ours.state.params
    tokens, mask = np.zeros((12, P + R), np.int32), np.zeros((12, P + R), np.int32)
    lengths = np.concatenate([g.lengths for g in made])
    for g, group in enumerate(made):
        for i in range(N):
            k, row = 2 + g % 3, g * N + i
            tokens[row, P - k : P], tokens[row, P : P + group.tokens.shape[1]] = 7 + g, group.tokens[i]
            mask[row, P - k : P + lengths[row]] = 1
    real = mask[:, P:] > 0

    def scored(params):
        logp, chosen = full_logprobs(MODEL, params, tokens, mask, T)
        return logp[:, P - 1 : -1], chosen[:, P - 1 :]

    logp, old = (np.float64(x) for x in jax.jit(scored)(before))
    entropy = -(np.exp(logp) * logp).sum(-1)
    score = np.where(np.concatenate([g.correct for g in made]), 1, -1) - np.maximum(lengths - (R - 5), 0) / 5 * 0.5
    centred = score.reshape(3, N) - score.reshape(3, N).mean(1, keepdims=True)
    std = score.reshape(3, N).std(1, ddof=1, keepdims=True) + 1e-6 if algorithm.normalize_by_std else 1
    A = np.broadcast_to((centred / std).reshape(-1, 1), (12, R))

    def threshold(values, share):
        return np.sort(values[real])[int(share * real.sum()) - 1]

    if case == "low_prob":
        chosen = (old <= threshold(old, 0.6)) & (A > 0)
        A = np.where(chosen & real, A * (1 + 0.6 * (1 - np.exp(old))), A)
        counted = real & (entropy >= threshold(entropy, 0.2))
    else:
        shift = old - np.float64(jax.jit(scored)(reference)[1])
        chosen, counted = real & (shift >= threshold(shift, 0.5)) & (A < 0), real

    def loss(params, mini_batch):
        now, keep, A_ = scored(params)[1], counted & mini_batch[:, None], A
        if case == "current":
            A_ = jnp.where(chosen, A * (1 + 0.6 * (1 - jnp.exp(jax.lax.stop_gradient(now)))), A)
        ratio = jnp.exp(now - old)
        inside = jnp.where(ratio < 0.99, 0.99, jnp.where(ratio > 1.03, 1.03, ratio))
        each = jnp.maximum(-A_ * ratio, -A_ * inside)
        each = jnp.where(keep, jnp.where(A_ < 0, jnp.minimum(each, -A_ * 1.02), each), 0)
        size = jnp.maximum(keep.sum(1), 1) if case == "low_prob" else R
        return (each.sum(1) / size).sum() / (keep.sum(1) > 0).sum()

    value_and_grad, losses = jax.jit(jax.value_and_grad(loss)), []

    def gradients(params, step):
        value, grads = value_and_grad(params, np.arange(12) // 8 == step)
        losses.append(float(value))
        return grads

    expected = adamw_steps(before, gradients, 0.5 * peak, 2)
    assert outcome.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-5)
    assert outcome.metrics["lr"] == pytest.approx(0.5 * peak)
    assert outcome.metrics["clip_fraction_low"] + outcome.metrics["clip_fraction_dual"] > 0
    np.testing.assert_allclose(outcome.score_N[:12], score, atol=1e-6)
    assert_moved_alike(after, expected, before)


def test_shuffled_weights_differ_from_step_to_step():
    algorithm = c.AlgorithmConfig(train_batch=2, mini_batch=2, reweight=c.ReweightConfig("shuffled", 0.9))
    rollout, reward = c.RolloutConfig(n=N, max_response=R), c.RewardConfig(overlong_buffer=0)
    optim = c.OptimConfig(lr=0.0)  # the policy stays, so only the permutation can make a difference
    config = c.Config(rollout=rollout, reward=reward, algorithm=algorithm, optim=optim)
    with jax.set_mesh(one_device()):
        ours = trainer(config)
        losses = [ours.train(groups(2), step, lambda phase: None).metrics["loss"] for step in (1, 2, 1)]
        data = np.array([jax.random.key_data(jax.random.fold_in(ours._key, step)) for step in range(64)])
    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-4
    # the permutation's keys are no row's: they would make it depend on the responses' random numbers
    problem, samples = (x.ravel().astype(np.uint32) for x in np.meshgrid(np.arange(16), np.arange(16)))
    rows = np.concatenate([row_keys(np.array([0, number], np.uint32), problem, samples) for number in range(4)])
    assert not set(map(tuple, rows)) & set(map(tuple, data))


class Recorder:
    def __init__(self):
        self.calls = []
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: "")

    def __call__(self, params, prompts, problem_ids, *, n, on_tokens, on_part=lambda part: None, **settings):
        self.calls.append({"problem_ids": list(problem_ids), "n": n, **settings})
        made = Generation(
            np.ones((n, 2), np.int32),
            np.zeros((n, 2), np.float32),
            np.full(n, 2),
            np.ones(n, bool),
            np.zeros(n, bool),
            np.full(n, 2),
        )
        on_part([made for _ in prompts])
        return [made for _ in prompts]

    def text(self, tokens):
        return ""


class HalfRight:
    def grade(self, rule, responses, answers):
        return [Graded(i % 2 == 0, None, None) for i in range(len(responses))]


SAMPLING = c.Config(
    seed=7,
    epochs=4,
    rollout=c.RolloutConfig(generation_batch=10, n=3, max_response=6, temperature=0.7, top_p=0.9, top_k=5, chunk=6),
    algorithm=c.AlgorithmConfig(train_batch=10, mini_batch=5),
    eval=c.EvalConfig(n=5, temperature=0.6, top_p=0.8, seed=11, pass_k=(1,)),
)
FIVE = PromptSet(problems(5), [[3 + i, 9] for i in range(5)])


def test_rollouts_and_evaluations_are_drawn_with_their_own_settings():
    recorder = Recorder()
    collector = Collector(SAMPLING, recorder, FIVE, HalfRight())
    for step in range(2):
        collector.collect(None, step, lambda phase: None)
    evaluate(SAMPLING, recorder, None, FIVE, HalfRight(), lambda phase: None)
    names = ("n", "temperature", "top_p", "top_k", "seed")
    assert [[call.get(name, 0) for name in names] for call in recorder.calls] == [
        [3, 0.7, 0.9, 5, rollout_seed(7, 0)],
        [3, 0.7, 0.9, 5, rollout_seed(7, 1)],
        [5, 0.6, 0.8, 0, eval_seed(11)],
    ]
    assert recorder.calls[2]["problem_ids"] == list(range(5))
    for call in recorder.calls[:2]:  # every prompt twice
        assert len(set(call["problem_ids"])) == 10


def test_a_prompt_twice_in_a_batch_has_two_different_groups():
    decoder = Decoder(language_model(MODEL), tiny_tokenizer(), (), 6, 6, None)
    params = decoder.model.prepare(init_params(MODEL, jax.random.key(0), jnp.float32))
    made = Collector(SAMPLING, decoder, FIVE, HalfRight()).collect(params, 0, lambda phase: None).groups
    for prompt in range(5):
        first, second = (g.tokens.tolist() for g in made if g.prompt == prompt)
        assert not [row for row in first if row in second]


def sft_config(path, **changes):
    (path / "config.json").write_text(json.dumps(MODEL.to_hf()))
    tiny_tokenizer().save_pretrained(path)
    rows = [{"prompt": f"{i}+1", "response": "34567"[: 1 + i % 4]} for i in range(10)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"init_config": str(path), "tokenizer": str(path), "data": str(path / "rows.jsonl"), "batch": 8}
    optim = sft.SFTOptim(lr=0.05, schedule="constant", warmup=2, **OPTIM)
    return sft.SFTConfig(**given | {"tensorboard": False, "optim": optim} | changes)


def test_an_sft_step_is_the_written_formula(tmp_path):
    config = sft_config(tmp_path, steps=1, run_dir=str(tmp_path / "one"))
    job = sft.check(config)
    with jax.set_mesh(job.mesh):
        before = jax.device_get(sft.initial_params(job))
    rows = next(prompt_batches(range(10), 8, config.seed))
    chats = [job.conversations[i] for i in rows]
    longest = max(len(chat.tokens) for chat in chats)
    tokens = np.stack([np.pad(chat.tokens, (0, longest - len(chat.tokens))) for chat in chats])
    present = np.arange(longest) < np.array([[len(chat.tokens)] for chat in chats])
    learnt = present & (np.arange(longest) >= np.array([[chat.context] for chat in chats]))

    def loss(params):
        chosen = full_logprobs(job.model_config, params, tokens, present)[1]
        return -jnp.sum(jnp.where(learnt[:, 1:], chosen, 0)) / learnt.sum()

    sft.run(job)
    after = load_hf(tmp_path / "one" / "hf", dtype=jnp.float32)[1]
    assert_moved_alike(after, adamw_steps(before, lambda params, _: jax.jit(jax.grad(loss))(params), 0.025, 1), before)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("3456", "3457"))
    with pytest.raises(ValueError, match=r"^the training data as the model reads them"):
        sft.check(dataclasses.replace(config, steps=2))


@pytest.mark.parametrize(("save_every", "found_at"), [(0, 3), (2, 2)], ids=["at the record", "at the checkpoint"])
def test_sft_ends_for_an_update_that_was_not_finite_between_records(tmp_path, monkeypatch, save_every, found_at):
    checkpoint = sft.CheckpointConfig(every=save_every)
    job = sft.check(sft_config(tmp_path, steps=3, log_every=3, run_dir=str(tmp_path / "bad"), checkpoint=checkpoint))
    batches = prompt_batches(range(10), 8, 0)
    marks = [sum(int(job.conversations[i].tokens.sum()) for i in next(batches)) for _ in range(3)]
    assert len(set(marks)) == 3
    make_loss = sft.make_loss

    def broken(chunk):
        def loss(apply, params, batch):
            (total, weight), metrics = make_loss(chunk)(apply, params, batch)
            return (total * jnp.where(batch["tokens_BT"].sum() == marks[1], jnp.nan, 1), weight), metrics

        return loss

    monkeypatch.setattr(sft, "make_loss", broken)
    with pytest.raises(RunError, match=rf"step {found_at}: .* not finite in 1 of the steps so far"):
        sft.run(job)
    assert not list((tmp_path / "bad" / "checkpoints").glob("[0-9]*"))  # nothing to resume from that has lost a step


@pytest.mark.parametrize(("every", "expected"), [(0, [0, 5]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (7, [0, 5])])
def test_the_first_and_the_last_model_are_evaluated_whatever_is_between(every, expected):
    evaluated = []

    class Stub:
        config = c.Config(eval=c.EvalConfig(every=every), checkpoint=c.CheckpointConfig(every=0))
        checkpoints = SimpleNamespace(check=lambda: None, latest=5)
        trainer_steps, evaluated = 0, None

        def _evaluate(self):
            evaluated.append(self.trainer_steps)
            self.evaluated = self.trainer_steps

    run = Stub()
    for run.trainer_steps in range(6):
        _Run._after_step(run, last=run.trainer_steps == 5)
    _Run._after_step(run, last=True)
    assert evaluated == expected
