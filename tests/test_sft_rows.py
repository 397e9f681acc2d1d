"""Packed conversations: the same loss and gradient as one per row, few shapes, little padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlvr_jax.data.packing import PackedRows
from rlvr_jax.data.prompts import prompt_batches
from rlvr_jax.models.qwen import init_params, model_apply
from rlvr_jax.sharding.rules import make_mesh
from rlvr_jax.training import TrainState, make_accumulating_step
from tests.tiny import tiny_config, tiny_tokenizer
from train.step.sft_rows import Conversation, Rows, encode
from train.step.sft_step import make_loss, update


def conversations(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [
        Conversation(random.integers(0, 48, n).astype(np.int32), int(random.integers(1, n))) for n in map(int, lengths)
    ]


def test_rows_hold_every_conversation_once_and_apart():
    made = conversations([5, 2, 130, 40, 300, 7])
    rows = Rows(made, 6, most_rows=6, shards=1).of(np.array([4, 0, 2, 5, 1, 3]))
    mask = rows.spread(rows.response_NR.astype(np.int32))
    found = []
    for tokens, segments, learnt in zip(rows.tokens, rows.segments, mask, strict=True):
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            assert (np.diff(at) == 1).all()
            found.append((tokens[at].tolist(), int((learnt[at] == 0).sum()), learnt[at].tolist()))
    assert sorted((tokens, context) for tokens, context, _ in found) == sorted((t.tolist(), c) for t, c in made)
    assert all(learnt == sorted(learnt) for *_, learnt in found)  # zeros, then ones
    assert rows.segments.shape[1] == 300
    assert (mask[rows.segments == 0] == 0).all()


def test_the_update_is_that_of_one_conversation_per_row():
    config = tiny_config(num_layers=1)
    made = conversations([9, 14, 30, 140, 12, 25, 61, 3], seed=1)
    packed = Rows(made, 8, most_rows=1, shards=1).of(np.arange(8))
    alone = PackedRows.of(
        [one.tokens[: one.context] for one in made],
        np.stack([np.pad(one.tokens[one.context :], (0, 140 - len(one.tokens) + one.context)) for one in made]),
        np.stack([np.arange(140) < len(one.tokens) - one.context for one in made]),
        row_length=140,
        micro_rows=1,
        several=False,
    )
    assert (len(packed), len(alone)) == (3, 8)  # parts, all of one shape
    optimizer, mesh = optax.sgd(1.0), make_mesh(fsdp=1, devices=jax.devices()[:1])
    step = make_accumulating_step(model_apply(config), optimizer, make_loss(64))
    start = jax.device_get(init_params(config, jax.random.key(0), jnp.float32))
    results = []
    with jax.set_mesh(mesh):
        for rows in (packed, alone):
            state = TrainState.create(jax.device_put(start, NamedSharding(mesh, PartitionSpec())), optimizer)
            state, metrics = update(step, state, rows, mesh)
            # the change of the parameters is the gradient
            results.append((jax.tree.map(np.subtract, start, jax.device_get(state.params)), jax.device_get(metrics)))
    (grads, metrics), (expected, as_alone) = results
    assert metrics["weight"] == as_alone["weight"] == sum(len(one.tokens) - one.context for one in made)
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(as_alone[name], rel=2e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def computed(made, batch, steps, **options):
    """Tokens computed, tokens there are, and the shapes that are compiled, over some steps."""
    rows, shapes, tokens, real = Rows(made, batch, **options), set(), 0, 0
    for chosen in itertools.islice(prompt_batches(made, batch, 0), steps):
        packed = rows.of(chosen)
        assert (packed.segments > 0).sum() == sum(len(made[i].tokens) for i in chosen)
        shapes.add((packed.micro_rows, packed.segments.shape[1]))
        tokens, real = tokens + packed.segments.size, real + int((packed.segments > 0).sum())
    return tokens, real, shapes


def test_one_long_conversation_costs_its_own_step_alone():
    lengths = np.random.default_rng(0).integers(20, 90, 768)
    lengths[100] = 1934
    tokens, real, shapes = computed(conversations(lengths), 64, 24, most_rows=64, shards=1)
    assert tokens < 1.35 * real  # one per row: 64 * 1934 * 24, 35 times as many
    assert len(shapes) == 2
    assert {length for _, length in shapes} == {242, 1934}


@pytest.mark.parametrize("shards", [1, 8])
def test_few_shapes_and_whole_shards_whatever_the_lengths(shards):
    lengths = np.minimum(np.random.default_rng(1).lognormal(5, 1.2, 600), 4000).astype(int) + 2
    tokens, real, shapes = computed(conversations(lengths), 16, 60, most_rows=16, shards=shards)
    assert len({length for _, length in shapes}) == len(shapes) <= 6  # each length has one number of rows
    assert all(rows % shards == 0 for rows, _ in shapes)
    assert all(rows * length <= 16 * lengths.max() for rows, length in shapes)
    assert tokens < (1.5 if shards == 1 else 4) * real


def test_rows_do_not_depend_on_the_steps_before():
    made = conversations(np.random.default_rng(2).integers(5, 700, 50))
    batches = list(itertools.islice(prompt_batches(made, 8, 0), 6))
    straight, resumed = (Rows(made, 8, most_rows=8, shards=1) for _ in range(2))
    before = [straight.of(batch) for batch in batches]
    for batch, rows in list(zip(batches, before, strict=True))[3:]:
        again = resumed.of(batch)
        assert again.micro_rows == rows.micro_rows
        np.testing.assert_array_equal(again.tokens, rows.tokens)
        np.testing.assert_array_equal(again.segments, rows.segments)


def test_what_is_cut_and_what_is_dropped(tmp_path, caplog):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "1+1", "response": "2222222222"}\n{"prompt": "' + "1+" * 40 + '1", "response": "2"}\n')
    (kept,) = encode(tiny_tokenizer(), str(path), 12)
    assert (len(kept.tokens), kept.context) == (12, 11)
    assert "1 conversations dropped, nothing to learn in their first 12 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"c\.jsonl: no conversation has an assistant token within max_tokens=11"):
        encode(tiny_tokenizer(), str(path), 11)
