"""Packing: every token lies where it is said to, rows are nearly full, and what is computed on it does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlvr_jax.dapo import make_scorer
from rlvr_jax.data.packing import PackedRows, pack, places
from rlvr_jax.models.qwen import default_positions, hidden_states, init_params, model_apply
from rlvr_jax.objectives.policy import AGGREGATIONS, aggregate
from rlvr_jax.training import TrainState, make_accumulating_step, make_train_step
from tests.tiny import tiny_config
from train.config import AlgorithmConfig, ReweightConfig
from train.step.objective import make_loss, scalars


def test_hand_made_packing():
    packing = pack([3, 6, 2, 4, 8], 10)
    assert packing.row_N.tolist() == [2, 1, 0, 1, 0]  # 8 + 2, 6 + 4, 3
    assert packing.start_N.tolist() == [0, 0, 8, 6, 0]
    assert packing.number_N.tolist() == [1, 1, 2, 2, 1]
    assert packing.rows == 3
    assert places(packing, np.array([1, 0, 1, 3, 7]), np.array([2, 0, 1, 1, 1])).tolist() == [21, 22, 9, 19, 7]
    assert pack([], 4).rows == 0
    for lengths in ([5], [0, 2]):
        with pytest.raises(ValueError, match="tokens: expected 1 to the 4 tokens of a row"):
            pack(lengths, 4)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
def test_rows_are_nearly_full_on_lengths_as_they_come(sigma):
    """Log-normal lengths of mean 0.4 of the longest, 512 responses: padding below 15%, no two tokens in one place."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(0.35), sigma, 512) * 2_000, 20, 2_000).astype(int) + 30
    packing = pack(lengths, 2_030)
    assert 1 - lengths.sum() / (packing.rows * packing.capacity) < 0.15
    at = places(packing, np.zeros(512, int), lengths)
    assert len(np.unique(at)) == lengths.sum()
    assert at.max() < packing.rows * packing.capacity


def responses(count=14, longest=8):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, longest + 1, count)
    response = np.arange(longest) < lengths[:, None]
    tokens = np.where(response, rng.integers(1, 48, response.shape), 0)
    return [list(rng.integers(1, 48, rng.integers(1, 5))) for _ in range(count)], tokens, response


def packed(row_length, micro_rows=2, several=True):
    prompts, tokens, response = responses()
    return PackedRows.of(prompts, tokens, response, row_length=row_length, micro_rows=micro_rows, several=several)


def test_one_sequence_a_row():
    packing = pack([3, 1, 2], 4, several=False)
    assert (packing.row_N.tolist(), packing.start_N.tolist(), packing.rows) == ([0, 1, 2], [0, 0, 0], 3)
    assert packing.number_N.tolist() == [1, 1, 1]


def test_what_is_spread_is_gathered():
    prompts, tokens, response = responses()
    rows = packed(13)
    assert len(rows.tokens) % 2 == 0
    np.testing.assert_array_equal(rows.gather(rows.spread(tokens)), tokens)
    whole = [prompt + list(t[r]) for prompt, t, r in zip(prompts, tokens, response, strict=True)]
    found = [
        list(row[seg == number])
        for row, seg in zip(rows.tokens, rows.segments, strict=True)
        for number in range(1, seg.max() + 1)
    ]
    assert sorted(found) == sorted(whole)
    assert rows.padding_share == pytest.approx(1 - sum(map(len, whole)) / rows.tokens.size)
    assert rows.padding_share < 0.2 < packed(12, 14).padding_share


def test_positions_begin_anew_with_every_sequence():
    segments = np.array([[0, 1, 1, 2, 2, 2, 0, 3], [1, 1, 0, 1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(
        default_positions(segments, segments), [[0, 0, 1, 0, 1, 2, 2, 0], [0, 1, 1, 2, 0, 0, 0, 0]]
    )


@pytest.mark.parametrize("qk_norm", [False, True])
def test_packed_sequences_do_not_see_one_another(qk_norm):
    config = tiny_config(qk_norm=qk_norm)
    params = init_params(config, jax.random.key(0))
    rows = packed(16)
    hidden = hidden_states(config, params, rows.tokens, None, rows.segments)
    assert rows.segments.max() > 1
    found = [
        rows.segments[row] == number + 1
        for row, number in np.argwhere(np.arange(9) < rows.segments.max(axis=1)[:, None])
    ]
    owner = np.argwhere(np.arange(9) < rows.segments.max(axis=1)[:, None])[:, 0]
    alone, mask = np.zeros((len(found), 16), np.int32), np.zeros((len(found), 16), np.int32)
    for i, (row, at) in enumerate(zip(owner, found, strict=True)):
        alone[i, : at.sum()], mask[i, : at.sum()] = rows.tokens[row, at], 1
    apart = hidden_states(config, params, alone, None, mask)
    for i, (row, at) in enumerate(zip(owner, found, strict=True)):
        np.testing.assert_allclose(hidden[row, at], apart[i, : at.sum()], atol=1e-5)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregation_of_packed_rows_is_that_of_rows_apart(mode):
    _, _, response = responses()
    rows = packed(16)
    rng = np.random.default_rng(2)
    values = rng.normal(size=response.shape).astype(np.float32)
    mask = response * (rng.random(response.shape) < 0.6)  # some responses lose all their tokens
    mask[3] = 0
    expected = aggregate(values, mask.astype(np.float32), mode, max_length=8)
    got = aggregate(
        rows.spread(values), rows.spread(mask.astype(np.float32)), mode, max_length=8, segment_BT=rows.segments
    )
    np.testing.assert_allclose(got, expected, rtol=2e-6)


ALGORITHM = AlgorithmConfig(reweight=ReweightConfig("current_linear", 0.5), aggregation="seq-mean-token-mean")


def update(row_length, micro_rows, several=True):
    """One update on the same responses, in rows of `row_length`; all numbers and the gradient."""
    config = tiny_config()
    params = init_params(config, jax.random.key(0))
    rows = packed(row_length, micro_rows, several)
    apply, optimizer = model_apply(config), optax.sgd(1.0)
    score = make_scorer(apply, chunk=16)
    parts = [score(params, *part, np.float32(0.7)) for part in rows.micro_batches()]
    logp, entropy = (rows.gather(np.concatenate(x)) for x in zip(*parts, strict=True))
    rng = np.random.default_rng(5)
    old = logp + 0.2 * rng.normal(size=logp.shape).astype(np.float32) * rows.response_NR
    advantage = np.broadcast_to(rng.normal(size=(len(logp), 1)), logp.shape).astype(np.float32)
    ones = rows.response_NR.astype(np.float32)
    spread = [rows.spread(x) for x in (old, advantage, ones, ones)]
    names = ("tokens_BT", "segment_BT", "old_logp_BT", "advantages_BT", "loss_mask_BT", "reweight_mask_BT")
    step = make_accumulating_step(apply, optimizer, make_loss(ALGORITHM, chunk=16, max_response=8))
    state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
    sums = None
    for part in rows.micro_batches(*spread):
        batch = dict(zip(names, part, strict=True)) | scalars(ALGORITHM, 0.7)
        sums = step.begin(state.params, batch) if sums is None else sums
        sums = step.add(state.params, sums, batch)
    state, metrics = step.finish(state, sums)
    assert step.add._cache_size() == 1
    gradient = jax.tree.map(lambda a, b: np.asarray(a - b), params, state.params)
    return {name: float(x) for name, x in metrics.items()}, gradient, logp, entropy


def test_the_update_depends_neither_on_packing_nor_on_micro_batches():
    expected = update(12, 14)  # hardly anything fits together
    assert expected[0]["weight"] == 14
    assert expected[0]["clip_fraction_high"] > 0
    for case in ((13, 1), (60, 2), (12, 7, False)):
        metrics, gradient, logp, entropy = update(*case)
        for name, value in expected[0].items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected[1]), strict=True):
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
        np.testing.assert_allclose(logp, expected[2], atol=1e-5)
        np.testing.assert_allclose(entropy, expected[3], atol=1e-5)


def test_the_step_taken_apart_is_the_step():
    def loss_fn(apply, params, batch):
        return (jnp.sum(batch["w"] * (params["x"] - batch["y"]) ** 2), jnp.sum(batch["w"])), {}

    batch = {"y": np.float32([1, 2, 3, 4]), "w": np.float32([1, 1, 2, 3])}
    whole = make_train_step(None, optax.adam(0.1), loss_fn, micro_batches=2)
    apart = make_accumulating_step(None, optax.adam(0.1), loss_fn)
    states = [TrainState.create({"x": jnp.float32(0.5)}, optax.adam(0.1)) for _ in range(2)]
    expected, metrics = whole(states[0], batch)
    sums = apart.begin(states[1].params, batch)
    for i in range(2):
        sums = apart.add(states[1].params, sums, {name: x[i::2] for name, x in batch.items()})
    got, got_metrics = apart.finish(states[1], sums)
    jax.tree.map(np.testing.assert_array_equal, (got, got_metrics), (expected, metrics))
