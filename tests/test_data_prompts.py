"""Tokenised prompts and the order in which they are visited."""

import itertools
import json

import numpy as np
import pytest

from rlvr_jax.data.problems import Problem
from rlvr_jax.data.prompts import PromptSet, prompt_batches, tokenize_prompts
from rlvr_jax.data.text import encode_chat
from tests.test_data_text import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def problem(index, text):
    return Problem(index, str(index), ({"role": "user", "content": text},), "1", "test")


def test_prompts_are_tokenised_and_cut(tokenizer, caplog):
    problems = [problem(0, "abc"), problem(1, "a" * 30), problem(2, "abc"), problem(3, "x" * 31)]
    whole = [encode_chat(tokenizer, p.messages) for p in problems]
    assert [len(tokens) for tokens in whole] == [11, 38, 11, 39]
    everything = tokenize_prompts(tokenizer, problems)
    assert everything == PromptSet(problems, whole, 0, 0)
    assert len(everything) == 4
    cut = tokenize_prompts(tokenizer, problems, max_tokens=38)
    assert cut == PromptSet(problems, [*whole[:3], whole[3][-38:]], truncated=1, dropped=0)
    assert "1 cut on the left, 0 problems dropped" in caplog.text
    assert cut.summary(38) == "4 prompts of 4 problems; longer than 38 tokens: 1 cut on the left, 0 dropped"
    assert cut.summary(None) == "4 prompts of 4 problems"
    dropped = tokenize_prompts(tokenizer, problems, max_tokens=11, overlong="drop")
    assert dropped == PromptSet([problems[0], problems[2]], [whole[0], whole[2]], truncated=0, dropped=2)
    with pytest.raises(ValueError, match="problem '1': its prompt has 38 tokens, max_tokens = 37"):
        tokenize_prompts(tokenizer, problems, max_tokens=37, overlong="error")
    with pytest.raises(ValueError, match="all 4 prompts are longer than max_tokens = 2"):
        tokenize_prompts(tokenizer, problems, max_tokens=2, overlong="drop")
    with pytest.raises(ValueError, match="max_tokens = 0"):
        tokenize_prompts(tokenizer, problems, max_tokens=0)
    with pytest.raises(ValueError, match="no problems"):
        tokenize_prompts(tokenizer, [])


def draw(batches, count):
    return [batch.tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize(("prompts", "batch_size"), [(12, 4), (7, 3), (5, 5), (3, 8), (1, 1)])
def test_every_index_once_an_epoch(prompts, batch_size):
    epochs = 6
    batches = prompt_batches(range(prompts), batch_size, seed=3)
    seen = np.concatenate(draw(batches, -(-epochs * prompts // batch_size)))[: epochs * prompts].reshape(
        epochs, prompts
    )
    assert (np.sort(seen, axis=1) == np.arange(prompts)).all()
    if prompts >= 7:
        assert len({tuple(epoch) for epoch in seen}) == epochs  # another order each time
        assert (seen[0] != np.arange(prompts)).any()
    first = next(prompt_batches(range(prompts), batch_size, seed=3))
    assert first.dtype == np.int32
    assert first.shape == (batch_size,)


def test_the_order_follows_the_seed():
    orders = {seed: draw(prompt_batches(range(50), 10, seed), 8) for seed in (0, 1, 2**32 - 1)}
    assert orders[0] == draw(prompt_batches(range(50), 10, 0), 8)
    assert orders[0] != orders[1] != orders[2**32 - 1]
    in_order = draw(prompt_batches(range(5), 2, 0, shuffle=False), 6)
    assert in_order == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1]]


@pytest.mark.parametrize("taken", range(8))  # 7 prompts in threes: mid-epoch, across the edge and right on it
def test_exact_resume(taken):
    batches = prompt_batches(range(7), 3, seed=5)
    draw(batches, taken)
    text = json.dumps(batches.get_state())
    expected = draw(batches, 9)
    resumed = prompt_batches(range(7), 3, seed=5)
    draw(resumed, 2)
    resumed.set_state(json.loads(text))
    assert resumed.drawn == taken
    assert resumed.epoch == pytest.approx(taken * 3 / 7)
    assert draw(resumed, 9) == expected
    batches.set_state(json.loads(text))  # going back works too
    assert draw(batches, 9) == expected
    assert json.dumps(json.loads(text)) == text


def test_shards_make_up_the_batch_whatever_their_number():
    whole = draw(prompt_batches(range(10), 4, seed=1), 12)
    for count in (1, 2, 4):
        shards = [prompt_batches(range(10), 4, seed=1, shard_index=i, shard_count=count) for i in range(count)]
        drawn = [draw(shard, 12) for shard in shards]
        assert [list(itertools.chain(*parts)) for parts in zip(*drawn, strict=True)] == whole
    halves = [prompt_batches(range(10), 4, seed=1, shard_index=i, shard_count=2) for i in range(2)]
    draw(halves[0], 5)
    alone = prompt_batches(range(10), 4, seed=1)
    alone.set_state(halves[0].get_state())
    assert draw(alone, 7) == whole[5:]


@pytest.mark.parametrize("count", [2, 4])
def test_every_shard_resumes_where_all_stopped(count):
    whole = draw(prompt_batches(range(10), 8, seed=2), 9)
    shards = [prompt_batches(range(10), 8, seed=2, shard_index=i, shard_count=count) for i in range(count)]
    for shard in shards:
        draw(shard, 4)
    states = [json.dumps(shard.get_state()) for shard in shards]
    assert len(set(states)) == 1
    parts = []
    for i in range(count):
        resumed = prompt_batches(range(10), 8, seed=2, shard_index=i, shard_count=count)
        resumed.set_state(json.loads(states[0]))
        parts.append(draw(resumed, 5))
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole[4:]


def test_a_state_of_another_sequence_is_refused():
    state = prompt_batches(range(7), 3, seed=5).get_state()
    for other, part in [
        (prompt_batches(range(8), 3, seed=5), "prompts = 7, here 8"),
        (prompt_batches(range(7), 1, seed=5), "batch_size = 3, here 1"),
        (prompt_batches(range(7), 3, seed=6), "seed = 5, here 6"),
        (prompt_batches(range(7), 3, seed=5, shuffle=False), "shuffle = True, here False"),
    ]:
        with pytest.raises(ValueError, match=part):
            other.set_state(state)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"prompts": []}, "no prompts"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 3, "shard_count": 2}, "batch_size = 3: expected a positive multiple of shard_count = 2"),
        ({"shard_index": 1}, "shard_index = 1, shard_count = 1"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
    ],
)
def test_bad_arguments_are_named(arguments, part):
    with pytest.raises(ValueError, match=part):
        prompt_batches(**{"prompts": range(4), "batch_size": 2, "seed": 0, **arguments})
