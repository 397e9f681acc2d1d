"""`python -m train`, end to end on a tiny model: resume, shapes, files."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from decode.diagnose.inputs import read_given
from rlvr_jax.data.text import load_tokenizer
from rlvr_jax.data.token_ids import unpack_ids
from rlvr_jax.microscope import files
from rlvr_jax.microscope.pair import score_pair
from rlvr_jax.models.hf import load_hf
from rlvr_jax.models.qwen import hidden_states, logits
from rlvr_jax.runs.program import run_program
from rlvr_jax.training import with_learning_rate
from tests.runs import ROOT, arguments, final_state, rows_of, train, without_times, write_inputs
from tests.tiny import compiled_once, write_tiny_problems
from tests.tiny_rules import marks
from train.check.prepare import prepare
from train.records.metrics import MetricLog
from train.run.loop import run

LOOKS = {"log__microscope_every": 2, "log__microscope_responses": 5}
COMPILE = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    write_inputs(path)
    with compiled_once(path / "cache"):
        yield path


@pytest.fixture(scope="module")
def whole(place):
    """Four uninterrupted steps, with the number of compilations when each record was written."""
    compiled, seen = [0], {}

    def count(event, duration, **_):
        compiled[0] += event == COMPILE

    jax.clear_caches()  # of what other tests of this process compiled
    jax.monitoring.register_event_duration_secs_listener(count)
    write = MetricLog.write

    def noted(self, record):
        seen[record["kind"], record["trainer_steps"]] = compiled[0]
        write(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricLog, "write", noted)
        records = train(place, place / "whole", **LOOKS)
    jax.monitoring.unregister_event_duration_listener(count)
    return records, seen


def test_two_steps_and_two_after_a_resume_are_four_steps(place, whole):
    train(place, place / "resumed", steps=2, **LOOKS)
    # what a run killed after its checkpoint would have left behind
    with open(place / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "trainer_steps": 3, "loss": 1}\n{"kind": "tra')
    records = train(place, place / "resumed", steps=4, **LOOKS)
    assert [(r["kind"], r["trainer_steps"]) for r in records] == [
        ("eval", 0),
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
    ]
    assert without_times(records) == without_times(whole[0])
    ours, ours_host = final_state(place / "resumed", 4)
    theirs, theirs_host = final_state(place / "whole", 4)
    assert ours == theirs
    assert ours_host["collector"] == theirs_host["collector"]
    assert any("params" in name for name in ours)
    assert any(r["carried_share"] > 0 for r in records if r["kind"] == "train" and r["trainer_steps"] > 2)
    for step in (3, 4):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert rows_of(place / "resumed" / name) == rows_of(place / "whole" / name)
    for file in (place / "whole" / "microscope").rglob("*.parquet"):
        assert pq.read_table(place / "resumed" / file.relative_to(place / "whole")).equals(pq.read_table(file))


def test_nothing_is_compiled_after_the_warm_up(whole):
    records, seen = whole
    assert seen["train", 1] > 10
    late = [r for r in records if r["kind"] == "train" and r["trainer_steps"] > 2]
    assert sum(r["generation_batches_this_step"] for r in late) > 0
    assert seen["train", 4] == seen["eval", 2], "a step compiled something again"
    assert seen["eval", 4] == seen["train", 4], "an evaluation compiled something again"


def test_records_hold_the_counters_and_the_numbers_of_a_step(whole):
    steps = [r for r in whole[0] if r["kind"] == "train"]
    assert [r["trainer_steps"] for r in steps] == [1, 2, 3, 4]
    assert [r["optimizer_steps"] for r in steps] == [2, 4, 6, 8]
    assert [r["lr"] for r in steps] == [0, 1.5e-3, 3e-3, 3e-3]
    made = np.cumsum([r["generation_batches_this_step"] for r in steps])
    assert [r["generation_batches"] for r in steps] == made.tolist()
    first = steps[0]
    # sampler and trainer are the same policy in the first step, and nothing moves at learning rate 0
    assert 0 < first["rollout_gap_max_abs"] < 1e-4
    assert first["rollout_gap_fresh_mean_abs"] == first["rollout_gap_mean_abs"]
    assert abs(first["ratio"] - 1) < 1e-5
    assert first["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert max(r["approx_kl"] for r in steps[2:]) > 1e-6
    assert 1 < first["advantage_weight"] <= 1.2
    assert 0 < first["entropy"] < np.log(48)
    assert first["groups_kept_share"] > 0
    assert all(r["rollout_gap_fresh_max_abs"] is None or r["rollout_gap_fresh_max_abs"] < 1e-4 for r in steps)
    for record in whole[0]:
        assert record["kind"] != "eval" or {"avg@4", "pass@1", "pass@4"} <= record.keys()
    for r in steps:
        parts = sum(r[f"seconds_{name}"] for name in ("rollout", "grade", "score", "update", "other"))
        assert r["seconds"] == pytest.approx(parts)
        assert min(r["seconds_score"], r["seconds_update"], r["seconds_log"]) > 0
        assert r["seconds_other"] >= 0
        assert (r["skipped_in_a_row"], r["skipped_total"]) == (0, 0)
        assert sum(x for name, x in r.items() if name.startswith("gradient_share_")) == pytest.approx(1)
        assert 1 <= r["advantage_weight_min"] <= r["advantage_weight"] <= r["advantage_weight_max"] <= 1.2
        assert r["epoch"] == r["generation_batches"] * 8 / 40
    assert min(steps[0]["seconds_eval"], steps[1]["seconds_save"], steps[2]["seconds_eval"]) > 0  # before these steps


def documented():
    """(record, pattern of the name, whether it is always there) of each row of the table in docs/metrics.md."""
    table = re.findall(r"^\| (\w+) \| `(.+?)` \|.*\| (.*?) \|$", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    assert len(table) > 60
    for record, name, there in table:
        pattern = re.sub(r"@\w(?=_|$)", r"@\\d+", name).replace("pA-B", r"p[\d.]+-[\d.]+")
        for kind in ("train", "eval") if record == "both" else (record,):
            yield kind, pattern, there == "always"


def test_every_number_is_documented_and_every_documented_number_is_there(whole):
    for record in whole[0]:
        rows = [(pattern, always) for kind, pattern, always in documented() if kind == record["kind"]]
        unknown = [key for key in record if not any(re.fullmatch(pattern, key) for pattern, _ in rows)]
        assert not unknown, f"not in docs/metrics.md: {unknown}"
        missing = [p for p, always in rows if always and not any(re.fullmatch(p, key) for key in record)]
        assert not missing, f"docs/metrics.md says always: {missing}"


def test_rollouts_are_readable_and_consistent(place, whole):
    rows = rows_of(place / "whole" / "rollouts" / "step_000001.jsonl")
    assert len(rows) == 16
    tokenizer = load_tokenizer(place / "model")
    for row in rows:
        assert "<|im_start|>user\n" in row["prompt"]
        assert row["correct"] == (row["answer"] in row["response"])
        assert row["error"] is None
        assert row["score"] == pytest.approx((1 if row["correct"] else -1) - max(0, row["length"] - 8) / 8)
        assert row["finished"] or row["length"] == 16
        assert row["mean_logp"] < 0
        texts, advantages, weights, logps = zip(*row["tokens"], strict=True)
        assert re.sub(r"<\|\w+\|>", "", "".join(texts)) == row["response"]
        assert len(texts) == row["length"]
        assert [tokenizer.decode([token]) for token in unpack_ids(row["ids"])] == list(texts)
        assert np.mean(logps) == pytest.approx(row["mean_logp"], abs=1e-4)
        np.testing.assert_allclose(weights, 1 + 0.2 * (1 - np.exp(logps)), atol=1e-4)  # low_prob, alpha 0.2
        np.testing.assert_allclose(advantages, row["advantage"] * np.array(weights), atol=3e-4)
    for g in range(4):
        scores = np.array([row["score"] for row in rows[4 * g : 4 * g + 4]])
        advantage = [row["advantage"] for row in rows[4 * g : 4 * g + 4]]
        np.testing.assert_allclose(
            advantage, (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6), rtol=1e-4, atol=1e-5
        )
        assert len({row["correct"] for row in rows[4 * g : 4 * g + 4]}) == 2
    record = next(r for r in whole[0] if r["kind"] == "train")
    assert record["score"] == pytest.approx(np.mean([row["score"] for row in rows]), rel=1e-5)
    assert record["loss_weight"] == pytest.approx(sum(row["length"] for row in rows))
    for kind in ("rollouts", "eval"):  # what a diagnosis scores
        there = [row for file in (place / "whole" / kind).iterdir() for row in rows_of(file)]
        given = read_given([str(place / "whole" / kind)], tokenizer)
        assert sorted(len(one.tokens) for one in given) == sorted(row["length"] for row in there)


def test_the_microscope_sees_the_step_s_rollouts_with_both_policies(place, whole):
    """rl is the policy that the trainer scores with before its updates, base the folder that training began with."""
    folder = place / "whole" / "microscope"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000004"]
    for step in (2, 4):
        seen = files.read_scored(folder / f"step_{step:06d}", range(5))
        rows = rows_of(place / "whole" / "rollouts" / f"step_{step:06d}.jsonl")
        assert {one.source for one in seen} == {f"step {step}"}
        for one in seen:
            (row,) = (r for r in rows if "".join(t[0] for t in r["tokens"]) == one.text and r["prompt"] == one.prompt)
            assert (row["correct"], row["answer"]) == (one.correct, one.answer)
            np.testing.assert_allclose(one.columns.logp_rl, [token[3] for token in row["tokens"]], atol=2e-4)
        config, params = load_hf(place / "model", dtype="float32")
        tokenizer = load_tokenizer(place / "model")
        texts = [tokenizer.encode(one.prompt) for one in seen], [one.columns.token.tolist() for one in seen]
        for one, initial in zip(seen, score_pair(config, params, config, params, *texts), strict=True):
            np.testing.assert_allclose(one.columns.logp_base, initial.logp_base, atol=1e-4)
    assert np.abs(seen[0].columns.delta_logp).max() > 0.01


def test_a_reward_of_ones_own_may_be_a_number(place):
    changes = {"steps": 1, "reward__rule": "tests.tiny_rules:marks", "data__val": None, "reward__memory_mb": 512}
    (record,) = train(place, place / "marks", **changes)
    rows = rows_of(place / "marks" / "rollouts" / "step_000001.jsonl")
    for row in rows:
        reward, _ = marks(row["response"], row["answer"])
        assert row["score"] == pytest.approx(reward - max(0, row["length"] - 8) / 8, abs=1e-6)
        assert row["correct"] == (reward > 0)
    for g in range(4):
        assert len({marks(row["response"], "")[0] for row in rows[4 * g : 4 * g + 4]}) > 1
    assert (record["prompts_truncated"], record["prompts_dropped"]) == (0, 0)


def test_evaluation_is_that_of_its_rows(place, whole):
    rows = rows_of(place / "whole" / "eval" / "step_000004.jsonl")
    record = next(r for r in whole[0] if (r["kind"], r["trainer_steps"]) == ("eval", 4))
    correct = np.array([row["correct"] for row in rows]).reshape(8, 4)
    assert record["avg@4"] == pytest.approx(correct.mean())
    assert record["pass@4"] == pytest.approx(correct.any(axis=1).mean())
    assert record["avg@4_low"] <= record["avg@4"] <= record["avg@4_high"]


def test_tensorboard_has_the_numbers(place, whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "whole" / "tensorboard"))
    events.Reload()
    logged = [(e.step, e.value) for e in events.Scalars("train/entropy")]
    wanted = [(r["trainer_steps"], r["entropy"]) for r in whole[0] if r["kind"] == "train"]
    assert [step for step, _ in logged] == [step for step, _ in wanted]
    np.testing.assert_allclose([v for _, v in logged], [v for _, v in wanted], rtol=1e-6)


def test_the_export_is_the_trained_model(place, whole):
    folder = place / "whole" / "hf"
    config, params = load_hf(folder, dtype=jnp.float32)
    _, before = load_hf(place / "model", dtype=jnp.float32)
    assert np.abs(np.asarray(params["embed"]) - np.asarray(before["embed"])).max() > 1e-4
    # the export's log-probs are those that the last evaluation's sampler would have seen
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("1+2=3")) == "1+2=3"
    out = logits(config, params, hidden_states(config, params, jnp.array([tokenizer.encode("1+2")])))
    assert np.isfinite(out).all()
    states, _ = final_state(place / "whole", 4)
    assert states["['params']['embed']"] == np.asarray(params["embed"]).tobytes()


def test_a_finished_run_ends_at_once_and_stays_as_it_is(place, whole):
    files = [path for path in (place / "whole").rglob("*") if path.is_file() and path.parent.name != "tensorboard"]
    before = {path: path.read_bytes() for path in files if path.name not in (".lock", "config.json")}
    for steps in (4, 2):
        assert train(place, place / "whole", steps=steps, **LOOKS) == whole[0]
        assert {path: path.read_bytes() for path in before} == before


def test_another_configuration_does_not_continue_a_run(place, whole):
    with pytest.raises(
        ValueError, match=r"optim\.lr: the checkpoint was made with 0\.003, the configuration says 0\.1"
    ):
        prepare(arguments(place, place / "whole", optim__lr=0.1))
    assert prepare(arguments(place, place / "whole", steps=9, eval__every=3)).resume_from == 4


def test_epochs_masks_and_the_reference_model(place):
    """One epoch of few problems ends in a partly filled batch; a mask by dlogp runs the base model beside."""
    write_tiny_problems(place / "few.jsonl", 14)
    records = train(
        place,
        place / "few",
        **{
            "data__train": place / "few.jsonl",
            "steps": "None",
            "epochs": 1,
            "algorithm__train_batch": 6,
            "algorithm__mini_batch": 2,
            "algorithm__reweight__kind": "current_linear",
            "algorithm__loss_mask__kind": "ends_delta_logp",
            "data__val": None,
            "optim__warmup": 0,
            "log__rollouts": 1,
            "checkpoint__export_every": 1,
        },
    )
    assert {r["kind"] for r in records} == {"train"}
    assert records[-1]["generation_batches"] == 2
    assert 0 < records[-1]["padding_share"] < 1
    assert records[-1]["groups_trained"] < 6
    assert records[0]["delta_logp"] == pytest.approx(0, abs=1e-5)  # the base model is the policy
    assert 0 < records[-1]["loss_token_share"] < 1  # at first every dlogp is 0, and equal values share one fate
    assert len(rows_of(place / "few" / "rollouts" / "step_000001.jsonl")) == 4
    last = records[-1]["trainer_steps"]
    weights = [(place / "few" / name / "model.safetensors").read_bytes() for name in ("hf", f"hf_step_{last}")]
    assert weights[0] == weights[1]


def program(place, run_dir, monkeypatch, capsys, **changes):
    monkeypatch.setattr(sys, "argv", ["train", *arguments(place, run_dir, **changes)])
    code = run_program(prepare, run)
    return code, " ".join(capsys.readouterr().err.split())


def test_no_group_that_varies_is_one_sentence_and_exit_code_1(place, monkeypatch, capsys):
    code, err = program(
        place,
        place / "never",
        monkeypatch,
        capsys,
        reward__rule="tests.tiny_rules:never",
        algorithm__max_generation_batches=2,
        eval__every=0,
    )
    assert code == 1
    assert "error: trainer step 0: 2 generation batches (algorithm.max_generation_batches) gave 0 groups" in err


def test_three_updates_in_a_row_that_are_not_finite_end_the_run_with_their_batch(place, monkeypatch, capsys):
    """Two in the first trainer step; the third after a resume, since the checkpoint has the count."""
    # A learning rate that no configuration may have.
    monkeypatch.setattr("train.step.trainer.with_learning_rate", lambda state, lr: with_learning_rate(state, 1e30))
    changes = {"data__val": None, "algorithm__dynamic_sampling": False}
    folder = place / "blown"
    code, err = program(place, folder, monkeypatch, capsys, steps=1, **changes)
    assert code == 0, err
    code, err = program(place, folder, monkeypatch, capsys, **changes)
    assert code == 1, err
    assert "trainer step 2: the loss or its gradient was not finite in 3 mini-batches in a row" in err
    assert f"{folder}/bad_batch_step_000002.npz" in err
    assert "newest checkpoint is of step 1" in err
    records = rows_of(folder / "metrics.jsonl")
    assert [(r["skipped"], r["skipped_in_a_row"], r["skipped_total"]) for r in records] == [(2, 2, 2), (2, 4, 4)]
    bad = np.load(folder / "bad_batch_step_000002.npz")
    said = json.loads((folder / "bad_batch_step_000002.json").read_text())["rows"]
    rollouts = rows_of(folder / "rollouts" / "step_000002.jsonl")[:8]  # the first mini-batch of the step
    assert [row["problem"] for row in said] == [row["problem"] for row in rollouts]
    assert [row["response"] for row in said] == [row["response"] for row in rollouts]
    assert [row["not_finite"] for row in said] == [[]] * 8  # the update is what was not
    assert bad["response_NR"].sum(axis=1).tolist() == [row["length"] for row in rollouts]
    np.testing.assert_allclose(
        bad["old_logp_NR"].sum(1), [row["mean_logp"] * row["length"] for row in rollouts], rtol=1e-5
    )
