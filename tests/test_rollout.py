"""Dynamic sampling and the carry-over, with a stub for the decoder and the grader."""

import dataclasses
import json

import numpy as np
import pytest

from rlvr_jax.data.problems import Problem
from rlvr_jax.data.prompts import PromptSet
from rlvr_jax.decoding.generate import Generation
from rlvr_jax.rewards.pool import Graded
from rlvr_jax.runs.program import RunError
from train.config import AlgorithmConfig, Config, RolloutConfig
from train.step.rollout import Collector, Decoder, Group

PROMPTS = 12
HARD = {1, 4, 7}  # no response is right
EASY = {2, 5}  # every response is right


class StubDecoder:
    """Response i of a prompt has i + 1 tokens, all of them the prompt's number."""

    def __init__(self):
        self.seeds = []

    def __call__(self, params, prompts, problem_ids, *, n, seed, on_part, **_):
        self.seeds.append(seed)
        made = []
        assert len(set(problem_ids)) == len(prompts)  # equal ids would draw equal random numbers
        for (identity,) in prompts:
            lengths = np.arange(1, n + 1, dtype=np.int32)
            cells = (np.arange(8) < lengths[:, None]) * np.int32(identity)
            made.append(Generation(cells, cells * np.float32(-0.25), lengths, lengths < n, lengths < 0, lengths))
        half = len(made) // 2
        on_part(made[:half])
        on_part(made[half:])
        return made

    def text(self, tokens):
        return f"{tokens[0]}:{len(tokens)}"


class StubPool:
    def grade(self, rule, responses, answers):
        verdicts = []
        for response in responses:
            prompt, length = map(int, response.split(":"))
            verdicts.append(Graded(prompt in EASY or (prompt not in HARD and length == 1), str(length), None))
        return verdicts


class FailingPool:
    def grade(self, rule, responses, answers):
        return [
            Graded(False, None, "KeyError: 'x'" if i else "rule returned the score nan") for i in range(len(responses))
        ]


class ScoringPool:
    """Graded rewards: all alike for the hard and the easy, all above 0 for the rest; the third response fails."""

    def grade(self, rule, responses, answers):
        verdicts = []
        for response in responses:
            prompt, length = map(int, response.split(":"))
            if prompt in HARD or prompt in EASY:
                score = -0.5 if prompt in HARD else 0.75
                verdicts.append(Graded(prompt in EASY, str(length), None, score))
            elif length == 3:
                verdicts.append(Graded(False, None, "exceeded the time limit of 1 s"))
            else:
                verdicts.append(Graded(True, str(length), None, 0.1 * length))
        return verdicts


def collector(*, generation_batch=4, train_batch=3, epochs=2, pool=None, **algorithm):
    problems = [Problem(i, str(i), ({"role": "user", "content": "x"},), "a", "s") for i in range(PROMPTS)]
    config = Config(
        epochs=epochs,
        rollout=RolloutConfig(n=3, generation_batch=generation_batch, max_response=8),
        algorithm=AlgorithmConfig(train_batch=train_batch, mini_batch=1, **algorithm),
    )
    decoder = StubDecoder()
    return Collector(
        config, decoder, PromptSet(problems, [[i] for i in range(PROMPTS)], 2, 1), pool or StubPool()
    ), decoder


def collect(source, step):
    return source.collect(None, step, lambda phase: None)


def same(a: Group, b: Group) -> bool:
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        and np.asarray(getattr(a, field.name)).dtype == np.asarray(getattr(b, field.name)).dtype
        for field in dataclasses.fields(Group)
    )


@pytest.mark.parametrize(("lengths", "invalid"), [([0, 0], 2), ([0, 3], 2), ([2, 3], 1), ([2, 3], 0)])
def test_logits_that_are_not_finite_are_said(monkeypatch, caplog, lengths, invalid):
    rows = np.zeros((2, 4), np.int32)
    lengths, ended = np.array(lengths, np.int32), np.arange(2) < invalid
    made = Generation(rows, rows.astype(np.float32), lengths, ~ended, ended, lengths)
    monkeypatch.setattr("train.step.rollout.decode", lambda *_, **__: made)
    decoder = Decoder(None, None, (), 4, 64, None)
    if not lengths.any():  # would be read as a model that answers nothing
        with pytest.raises(RunError, match="no response has a token, since the logits are not finite"):
            decoder({}, [[1]], [0], prompt_length=1, at_once=None)
        return
    decoder({}, [[1]], [0], prompt_length=1, at_once=None)
    assert (f"{invalid} of 2 responses ended where" in caplog.text) == (invalid > 0)


def test_only_groups_whose_accuracy_varies_are_kept_in_order():
    source, _ = collector(train_batch=7, generation_batch=PROMPTS)
    groups, metrics = collect(source, 0)
    assert len(groups) == PROMPTS - len(HARD) - len(EASY)
    assert {group.prompt for group in groups} == set(range(PROMPTS)) - HARD - EASY
    assert metrics["groups_kept_share"] == pytest.approx(7 / 12)
    assert metrics["groups_all_correct_share"] == pytest.approx(2 / 12)
    assert metrics["groups_all_wrong_share"] == pytest.approx(3 / 12)
    assert metrics["accuracy"] == pytest.approx((7 / 3 + 2) / 12)
    assert metrics["response_length"] == 2
    assert metrics["response_cut_share"] == pytest.approx(1 / 3)


def test_without_dynamic_sampling_every_group_is_kept():
    source, _ = collector(train_batch=PROMPTS, generation_batch=PROMPTS, dynamic_sampling=False)
    assert {group.prompt for group in collect(source, 0).groups} == set(range(PROMPTS))


def test_surplus_is_first_in_line_for_the_next_step():
    source, decoder = collector(generation_batch=PROMPTS, train_batch=3)
    first, second, third = (collect(source, step) for step in range(3))
    assert [len(x.groups) for x in (first, second, third)] == [3, 3, 3]
    assert [x.metrics["groups_carried_over"] for x in (first, second)] == [4, 1]
    assert [x.metrics["generation_batches_this_step"] for x in (first, second, third)] == [1, 0, 1]
    assert [x.metrics["carried_share"] for x in (first, second, third)] == [0, 1, pytest.approx(1 / 3)]
    assert [g.sampled_at for g in third.groups] == [0, 2, 2]
    assert len({g.prompt for x in (first, second) for g in x.groups} | {third.groups[0].prompt}) == 7
    assert source.generation_batches == 2
    assert len(set(decoder.seeds)) == 2  # the second epoch draws other responses to the same problems


def test_surplus_can_be_discarded():
    source, _ = collector(generation_batch=PROMPTS, train_batch=3, surplus="discard")
    first, second = collect(source, 0), collect(source, 1)
    assert first.metrics["groups_discarded"] == 4
    assert all(group.sampled_at == 1 for group in second.groups)


def test_too_few_groups_is_an_error_or_a_partly_filled_batch():
    source, _ = collector(generation_batch=4, train_batch=8, max_generation_batches=2)
    with pytest.raises(RunError, match=r"trainer step 0: 2 generation batches .* 8 are needed"):
        collect(source, 0)
    source, _ = collector(generation_batch=4, train_batch=8, max_generation_batches=2, when_short="pad")
    assert 0 < len(collect(source, 0).groups) < 8


@pytest.mark.parametrize("when_short", ["error", "pad"])
def test_when_every_grading_fails_the_message_gives_the_errors(when_short):
    few = {"generation_batch": 4, "max_generation_batches": 2, "when_short": when_short}
    with pytest.raises(RunError) as raised:
        collect(collector(pool=FailingPool(), **few)[0], 0)
    assert "all 24 gradings failed: KeyError: 'x' (20 times); rule returned the score nan (4 times)" in str(
        raised.value
    )
    assert "too hard" not in str(raised.value)
    assert "when_short" not in str(raised.value)


def test_too_few_groups_names_what_would_help():
    class Hard(FailingPool):
        def grade(self, rule, responses, answers):
            return [Graded(False, None, None) for _ in responses[1:]] + super().grade(rule, responses[:1], answers)

    few = {"generation_batch": 4, "max_generation_batches": 2}
    with pytest.raises(
        RunError, match=r"too hard or too easy .*; 4 of 24 gradings failed, such as: rule.*when_short=pad"
    ):
        collect(collector(pool=Hard(), **few)[0], 0)
    with pytest.raises(RunError, match=r"too hard or too easy .*; 4 of 24 gradings failed, such as: rule.*nan$"):
        collect(collector(pool=Hard(), when_short="pad", **few)[0], 0)


def test_the_end_of_the_data_gives_a_last_partly_filled_batch_then_none():
    source, _ = collector(generation_batch=5, train_batch=4, epochs=1)
    sizes = []
    while groups := collect(source, len(sizes)).groups:
        sizes.append(len(groups))
    assert source.generation_batches == 3  # 12 prompts in batches of 5
    assert all(size == 4 for size in sizes[:-1])
    assert source.done


def test_state_round_trip_continues_identically():
    one, _ = collector(generation_batch=PROMPTS, train_batch=2)
    collect(one, 0)
    plain, arrays = one.snapshot().state()
    assert len(plain["carried"]) == 5
    other, _ = collector(generation_batch=PROMPTS, train_batch=2)
    other.set_state(plain, arrays)
    for step in range(1, 5):
        a, b = collect(one, step), collect(other, step)
        assert len(a.groups) == 2
        assert all(same(x, y) for x, y in zip(a.groups, b.groups, strict=True))
    assert one.generation_batches == other.generation_batches
    empty, _ = collector()
    assert empty.snapshot().state()[1] == {}


def test_graded_rewards_are_the_scores_and_decide_what_is_kept():
    source, _ = collector(train_batch=7, generation_batch=PROMPTS, pool=ScoringPool())
    groups, metrics = collect(source, 0)
    assert {group.prompt for group in groups} == set(range(PROMPTS)) - HARD - EASY
    assert all(group.score.tolist() == [np.float32(0.1), np.float32(0.2), -1.0] for group in groups)
    assert all(group.score.dtype == np.float32 for group in groups)
    assert groups[0].errors == (None, None, "exceeded the time limit of 1 s")
    assert metrics["grading_errors"] == 7
    assert metrics["accuracy"] == pytest.approx((7 * 2 + 2 * 3) / 36)


def test_scores_of_two_right_answers_may_differ():
    fields = {name: np.ones(2, np.int32) for name in ("lengths", "finished")}
    rest = {"prompt": 0, "sampled_at": 0, "generation_batch": 0, "predictions": (None,) * 2} | fields
    cells = {name: np.ones((2, 1)) for name in ("tokens", "logp")}
    both = np.array([True, True])
    assert Group(**rest, **cells, correct=both, score=np.array([0.5, 1.0], np.float32)).varies
    assert not Group(**rest, **cells, correct=both, score=np.array([0.5, 0.5], np.float32)).varies
    plain = Group(**rest, **cells, correct=np.array([True, False]))
    assert plain.varies
    assert plain.score.tolist() == [1.0, -1.0]
    assert plain.errors == (None, None)
    assert not Group(**rest, **cells, correct=both).varies


def test_the_checkpoint_carries_scores_and_errors():
    one, _ = collector(generation_batch=PROMPTS, train_batch=2, pool=ScoringPool())
    collect(one, 0)
    plain, arrays = one.snapshot().state()
    other, _ = collector(generation_batch=PROMPTS, train_batch=2, pool=ScoringPool())
    other.set_state(json.loads(json.dumps(plain)), arrays)
    a, b = collect(one, 1), collect(other, 1)
    assert all(same(x, y) for x, y in zip(a.groups, b.groups, strict=True))
    assert a.groups[0].errors[2] is not None
    assert a.groups[0].score[0] == np.float32(0.1)


def test_a_checkpoint_from_before_there_were_scores():
    one, _ = collector(generation_batch=PROMPTS, train_batch=2)
    collect(one, 0)
    plain, arrays = one.snapshot().state()
    plain["carried"] = [{k: v for k, v in group.items() if k != "errors"} for group in plain["carried"]]
    other, _ = collector(generation_batch=PROMPTS, train_batch=2)
    other.set_state(plain, {name: x for name, x in arrays.items() if name != "score"})
    a, b = collect(one, 1), collect(other, 1)
    assert all(same(x, y) for x, y in zip(a.groups, b.groups, strict=True))


def test_long_prompts_are_counted_in_the_metrics():
    source, _ = collector()
    metrics = collect(source, 0).metrics
    assert (metrics["prompts_truncated"], metrics["prompts_dropped"]) == (2, 1)
