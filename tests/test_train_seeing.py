"""What a run shows and keeps of itself: trackers, display, times, weights, tokens, skipped updates."""

import contextlib
import dataclasses
import io
import json
import logging
import sys
import threading
import types

import numpy as np
import pytest
from rich.console import Console

from rlvr_jax.objectives.reweight import reweight
from rlvr_jax.runs.program import RunError
from tests.tiny import tiny_tokenizer
from train import config as c
from train.check.prepare import check
from train.records.display import Display
from train.records.metrics import MetricLog
from train.records.tokens import TokenTexts, token_rows
from train.records.trackers import open_trackers
from train.step.bad_batch import Skips, save_bad_batch
from train.step.metrics import PhaseClock, at_ratio_one, memory_metrics, phase_metrics, token_metrics


class Wandb(types.ModuleType):
    """As much of wandb as is used; `fails` says when."""

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.calls, self.fails = [], fails

    def init(self, **options):
        return self._note("init", options) or types.SimpleNamespace(
            id=options.get("id", f"made{len(self.calls)}"),
            define_metric=lambda *name, **options: self._note("define", name, options),
            log=lambda numbers: self._note("log", numbers),
            finish=lambda exit_code: self._note("finish", exit_code),
        )

    def _note(self, name, *given):
        self.calls.append((name, *given))
        if name in self.fails:
            raise OSError(f"no network for {name}")


class Trackio(types.ModuleType):
    def __init__(self):
        super().__init__("trackio")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        return types.SimpleNamespace(name=options["name"] + "-0" * (options["resume"] == "never"))

    def log(self, numbers, step):
        self.calls.append(("log", numbers, step))

    def finish(self):
        self.calls.append(("finish",))


CONFIG = {"seed": 3, "optim": {"lr": 0.1}}
RECORD = {"kind": "train", "trainer_steps": 7, "loss": 0.5, "entropy": float("nan"), "note": "text"}


def follow(folder, names, *, resume, records=(RECORD,)):
    with contextlib.ExitStack() as stack:
        trackers = open_trackers(stack, names, folder, CONFIG, project="p", run_name=None, resume=resume)
        log = MetricLog(folder, after_step=6 if resume else None, tensorboard=False, trackers=trackers)
        stack.callback(log.close)
        for record in records:
            log.write(record)


def test_wandb_gets_config_and_numbers_and_a_resume_goes_on_there(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    follow(tmp_path / "run", ("wandb",), resume=False)
    assert fake.calls == [
        ("init", {"project": "p", "name": "run", "dir": str(tmp_path / "run"), "config": CONFIG}),
        ("define", ("trainer_steps",), {}),
        ("define", ("*",), {"step_metric": "trainer_steps"}),
        ("log", {"train/trainer_steps": 7, "train/loss": 0.5, "trainer_steps": 7}),
        ("finish", 0),
    ]
    follow(tmp_path / "run", ("wandb",), resume=True)
    assert {k: fake.calls[5][1][k] for k in ("id", "resume")} == {"id": "made1", "resume": "allow"}
    follow(tmp_path / "run", ("wandb",), resume=False)  # begun again from nothing: another run there too
    assert "id" not in fake.calls[10][1]
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": "made11"}


def test_trackio_and_wandb_together(tmp_path, monkeypatch):
    wandb, trackio = Wandb(), Trackio()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    follow(tmp_path / "run", ("trackio", "wandb"), resume=False)
    follow(tmp_path / "run", ("trackio", "wandb"), resume=True)
    numbers = {"train/trainer_steps": 7, "train/loss": 0.5}
    assert trackio.calls == [
        ("init", {"project": "p", "name": "run", "config": CONFIG, "resume": "never"}),
        ("log", numbers, 7),
        ("finish",),
        ("init", {"project": "p", "name": "run-0", "config": CONFIG, "resume": "allow"}),  # the name that it had there
        ("log", numbers, 7),
        ("finish",),
    ]
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"trackio": "run-0", "wandb": "made1"}


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    fake = Wandb(fails=("log", "finish"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING):
        follow(tmp_path / "run", ("wandb",), resume=False, records=[RECORD | {"trainer_steps": i} for i in range(3)])
    assert [call[0] for call in fake.calls].count("log") == 3
    assert len(caplog.records) == 1
    assert "wandb failed and may lack records" in caplog.text
    assert "no network for log" in caplog.text
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails=("init",)))
    with pytest.raises(RunError, match=r"^log\.trackers: wandb did not start: OSError: no network for init"):
        follow(tmp_path / "run", ("wandb",), resume=False)


def test_the_end_of_a_run_that_failed_is_told(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(KeyError, match="trainer_steps"):
        follow(tmp_path, ("wandb",), resume=False, records=[{"kind": "train"}])
    assert fake.calls[-1] == ("finish", 1)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = c.Config(
        model=c.ModelConfig(path="nowhere"), data=c.DataConfig(train="nowhere"), log=c.LogConfig(trackers=("wandb",))
    )
    with pytest.raises(ValueError, match=r"^log\.trackers: wandb cannot be imported .*pip install wandb"):
        check(config)
    other = dataclasses.replace(config, log=c.LogConfig(trackers=("mlflow",)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^log\.trackers has 'mlflow': expected one of wandb, trackio"):
        check(other)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_time_left_of_long_steps_and_by_share_of_the_data():
    clock, console = Clock(), Console(file=io.StringIO(), width=200)
    with Display(console, total=10, done=2, shown={}, now=clock) as display:
        assert display.left() is None
        clock.now += 7200  # to compile and make the first step
        display.step({"trainer_steps": 3})
        assert "left" not in console.file.getvalue()
        clock.now += 300
        display.step({"trainer_steps": 4})
        assert "left 0:30:00" in console.file.getvalue()
        clock.now += 61  # the time left runs on between steps
        assert str(display.left()) == "0:28:59"
        display.phase("rollout 3/8 responses, 12 tokens/s")
        display.phase("rollout 4/8 responses, 12 tokens/s")
    lines = console.file.getvalue().splitlines()
    assert lines[-1] == "  rollout 3/8 responses, 12 tokens/s"  # a plain line where nothing was said for a minute
    with Display(console, total=None, done=0, shown={}, share=0.0, now=clock) as display:
        clock.now += 600
        display.step({"trainer_steps": 1}, share=0.25)
        clock.now += 60
        display.step({"trainer_steps": 2}, share=0.5)
    assert console.file.getvalue().splitlines()[-1] == "step 2    left 0:02:00"


def test_display_says_step_numbers_and_time_left():
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        with Display(console, total=4, done=1, shown={"acc": ("accuracy", ".2f"), "gap": ("gap", ".1e")}) as display:
            display.phase("rollout")
            display.step({"trainer_steps": 2, "accuracy": 0.5})
            display.step({"trainer_steps": 3, "accuracy": 0.5})
        text = console.file.getvalue()
        assert "step 2/4  acc 0.50\n" in text
        assert "step 3/4  acc 0.50  left 0:00:0" in text
        assert ("rollout" in text) == terminal


def test_the_live_line_says_the_phase_and_how_far_it_is():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with Display(console, total=4, done=0, shown={}) as display:
        display.phase("update 3/16 mini-batches [slow]")
    assert "update 3/16 mini-batches [slow]" in console.file.getvalue()


def test_times_by_phase_add_up():
    now = Clock()
    clock = PhaseClock(now)

    def spend(name, seconds):
        clock.phase(name)
        now.now += seconds

    for name, seconds in (("eval 3/4", 5), ("log", 2), ("save", 1), ("prepare", 0)):
        spend(name, seconds)
    outside = clock.take()
    for name, seconds in (("rollout 1/9 rows", 10), ("grade", 3), ("rollout", 4), ("prepare", 1)):
        spend(name, seconds)
    collecting = clock.take()
    beside = threading.Thread(target=clock.phase, args=("rollout",))
    for name, seconds in (("score", 7), ("update 1/2", 8)):
        spend(name, seconds)
    beside.start()
    beside.join()
    now.now += 1  # still the update's: another thread's phases go on beside
    spend("measure", 2)
    got = phase_metrics(outside, collecting, clock.take())
    assert got == {
        **{"seconds_rollout": 14, "seconds_grade": 3, "seconds_score": 7, "seconds_update": 9, "seconds_other": 3},
        **{"seconds_eval": 5, "seconds_save": 1, "seconds_export": 0, "seconds_log": 2, "seconds": 36},
        "seconds_microscope": 0,
    }


def test_memory_of_the_host_and_of_devices_that_say_it(monkeypatch):
    assert set(memory_metrics()) >= {"host_memory_peak_gib"}
    assert 0.05 < memory_metrics()["host_memory_peak_gib"] < 1000
    devices = [
        types.SimpleNamespace(memory_stats=lambda n=n: {"bytes_in_use": n * 2**30, "peak_bytes_in_use": n * 2**31})
        for n in (1, 3, 2)
    ] + [types.SimpleNamespace(memory_stats=lambda: None)]
    monkeypatch.setattr("jax.local_devices", lambda: devices)
    got = memory_metrics()
    assert (got["device_memory_gib"], got["device_memory_peak_gib"]) == (3, 6)


P = np.array([[0.5, 0.05, 0.9, 0.3], [0.2, 0.6, 0.3, 0.3], [0.4, 0.4, 0.3, 0.3]])
RESPONSE = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
A = np.array([1.0, -2.0, 0.0], np.float32)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("kind", ["low_prob", "current_linear"])
def test_weights_and_the_gradient_by_probability_of_a_step(kind, aggregation):
    algorithm = c.AlgorithmConfig(reweight=c.ReweightConfig(kind, 0.4, "positive"), aggregation=aggregation)
    logp, plain = np.log(P).astype(np.float32), np.broadcast_to(A[:, None], P.shape)
    chosen = np.ones_like(RESPONSE)
    early = "none" if kind == "current_linear" else kind  # what `step_advantages` leaves to the loss
    each = np.asarray(reweight(early, plain, logp, RESPONSE, alpha=0.4, where="positive"))
    weighed = at_ratio_one(algorithm, each, logp, RESPONSE, chosen)
    metrics, weight = token_metrics(algorithm, A, weighed, logp, RESPONSE, RESPONSE)
    expected = np.full(P.shape, np.nan)
    expected[0, :3], expected[1, :2] = 1 + 0.4 * (1 - P[0, :3]), 1
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    known = expected[np.isfinite(expected)]
    assert metrics["advantage_weight"] == pytest.approx(known.mean())
    assert metrics["advantage_weight_std"] == pytest.approx(known.std())
    assert metrics["advantage_weight_min"] == pytest.approx(1)
    assert metrics["advantage_weight_max"] == pytest.approx(1.38)
    assert metrics["advantage_weight_change"] == pytest.approx((known - 1).mean())
    size = 2 * np.abs(np.nan_to_num(expected) * A[:, None]) * (1 - P)
    assert metrics["gradient_l1"] == pytest.approx(size[RESPONSE > 0].mean(), rel=1e-6)
    counted = RESPONSE / (1 if aggregation == "token-mean" else RESPONSE.sum(1, keepdims=True))
    in_bin = (P >= 0.1) & (P < 0.25)
    assert metrics["gradient_share_p0.1-0.25"] == pytest.approx((size * counted)[in_bin].sum() / (size * counted).sum())
    assert metrics["token_share_p0.1-0.25"] == pytest.approx(counted[in_bin].sum() / counted.sum())
    for name in ("gradient_share", "token_share"):
        assert sum(x for key, x in metrics.items() if key.startswith(name)) == pytest.approx(1)


def test_a_step_that_is_not_finite_has_its_numbers_too():
    logp = np.full(P.shape, np.nan, np.float32)
    weighed = np.broadcast_to(A[:, None], P.shape) * logp
    metrics, _ = token_metrics(c.AlgorithmConfig(), A, weighed, logp, RESPONSE, RESPONSE)
    assert np.isnan(metrics["gradient_l1"])
    assert np.isnan(metrics["token_share_p0-0.01"])


def test_tokens_of_a_rollout_row():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("1+2=3")
    arrays = {
        "tokens_NR": np.array([[*ids[:3], 0], [*ids[3:], tokenizer.eos_token_id, 0]], np.int32),
        "response_NR": np.array([[1, 1, 1, 0], [1, 1, 1, 0]]),
        "weighed_NR": np.array([[0.0] * 4, [1.23456, -2.0, np.inf, 7.0]], np.float32),
        "weight_NR": np.array([[np.nan] * 4, [1.1, 1.0, 1.19999, np.nan]], np.float32),
        "old_logp_NR": np.array([[-0.1, -0.2, -0.3, 0.0], [-1.5, -0.00004, -9.0, 0.0]], np.float32),
    }
    texts = TokenTexts(tokenizer)
    assert token_rows(texts, arrays, 0) == {
        "tokens": [["1", 0, None, -0.1], ["+", 0, None, -0.2], ["2", 0, None, -0.3]]
    }
    assert token_rows(texts, arrays, 1) == {
        "tokens": [["=", 1.2346, 1.1, -1.5], ["3", -2.0, 1.0, -0.0], ["<|im_end|>", None, 1.2, -9.0]]
    }


def test_three_skipped_in_a_row_over_trainer_steps():
    assert Skips().after([False, True, True]) == (Skips(2, 2), None)
    assert Skips(2, 2).after([False, True]) == (Skips(1, 3), None)
    assert Skips(2, 2).after([True, False]) == (Skips(0, 3), 0)  # an update that is made later does not excuse them
    assert Skips(1, 5).after([True, True, True, True]) == (Skips(5, 9), 1)
    assert Skips(0, 0).after(np.array([True, True, True])) == (Skips(3, 3), 2)


def test_the_bad_batch_is_kept(tmp_path):
    logp = np.zeros((8, 3), np.float32)
    logp[5, 2] = np.nan
    arrays = {
        "mini_batch_N": np.array([0, 0, 1, 1, 2, 2, 3, -1]),
        "tokens_NR": np.arange(32).reshape(8, 4),
        "old_logp_NR": logp,
    }
    rows = [{"problem": str(i)} for i in range(6)]
    path = save_bad_batch(tmp_path, 12, arrays, 3, rows)
    assert path == tmp_path / "bad_batch_step_000012.npz"
    kept = np.load(path)
    np.testing.assert_array_equal(kept["mini_batch_N"], [1, 1, 2, 2, 3])
    np.testing.assert_array_equal(kept["tokens_NR"], arrays["tokens_NR"][2:7])
    said = json.loads(path.with_suffix(".json").read_text())
    assert said["trainer_step"] == 12
    assert said["rows"][0] == {"row": 0, "mini_batch": 1, "problem": "2", "not_finite": []}
    assert said["rows"][3] == {"row": 3, "mini_batch": 2, "problem": "5", "not_finite": ["old_logp_NR"]}
    assert said["rows"][4] == {"row": 4, "mini_batch": 3, "padding": True, "not_finite": []}
