"""A run that is ended at any moment and started again is the run that was not: SIGKILL, SIGTERM, one step off."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_train_program import arguments, final_state, rows_of, train, without_times

from rlvr_jax.program import PREEMPTED, Preempted, run_program
from rlvr_jax.sharding import make_mesh
from tests.tiny import compiled_once, tiny_checkpoint, write_tiny_problems
from train import loop
from train.loop import run
from train.prepare import prepare

ROOT = Path(__file__).parent.parent
OTHER = {"rollout.max_response": 12}  # shapes of its own: other tests count what is compiled
PHASES = ("rollout", "grade", "score", "update", "log", "save", "eval")
# Runs the training program; kills itself a moment after the N-th time that a phase of a name begins.
KILLED = """
import os, signal, sys, threading
phase, count, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
from rlvr_jax.program import run_program
from train.loop import _Run, run
from train.prepare import prepare
named = _Run._phase
left = [count]
def name_and_die(self, name):
    named(self, name)
    if name.split()[0] == phase:
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
_Run._phase = name_and_die
sys.exit(run_program(prepare, run))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("kills")
    tiny_checkpoint(path / "model")
    write_tiny_problems(path / "train.jsonl", 40)
    write_tiny_problems(path / "val.jsonl", 8)
    with compiled_once(path / "cache"):
        yield path


def assert_same_run(one, other, step):
    """Parameters, optimizer, counters, place in the data, groups that wait, metrics, rollouts and evaluations."""
    states = [final_state(folder, step) for folder in (one, other)]
    assert states[0][0] == states[1][0]
    for _, host in states:
        del host["config"]["run_dir"]
    assert states[0][1] == states[1][1]
    assert without_times(rows_of(one / "metrics.jsonl")) == without_times(rows_of(other / "metrics.jsonl"))
    for kind in ("rollouts", "eval"):
        files = [{p.name: p.read_bytes() for p in (folder / kind).iterdir()} for folder in (one, other)]
        assert files[0] == files[1]
    assert not list(other.glob("generated/*"))


@pytest.mark.slow
def test_killed_at_twenty_one_random_moments(place):
    steps, seed = 10, 5
    rng, hit = random.Random(seed), collections.Counter()
    options = OTHER | {"steps": steps, "checkpoint.every": 3}
    train(place, place / "whole", **options)
    flags = arguments(place, place / "killed", **options)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    moments = [
        (phase, rng.choice((1, 1, 2)), rng.choice((0.0, rng.random() / 5))) for phase in PHASES for _ in range(3)
    ]
    rng.shuffle(moments)
    for phase, count, delay in moments:
        command = [sys.executable, "-c", KILLED, phase, str(count), str(delay), *flags]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != -signal.SIGKILL:  # it came to its end before that
            assert done.returncode == 0, done.stderr[-2000:]
        hit[phase] += done.returncode == -signal.SIGKILL
    print(f"killed: {dict(hit)}")
    assert sum(hit.values()) >= 20
    train(place, place / "killed", **options)
    assert_same_run(place / "whole", place / "killed", steps)


def asked_to_end(monkeypatch, phase, count):
    """SIGTERM when a phase of this name begins for the `count`-th time."""
    named, left = loop._Run._phase, [count]

    def name_and_ask(self, name):
        if name.split()[0] == phase:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        named(self, name)

    monkeypatch.setattr(loop._Run, "_phase", name_and_ask)


@pytest.mark.parametrize("one_step_off", [False, True])
def test_asked_to_end_it_saves_and_goes_on_as_if_nothing_had_been(place, monkeypatch, capsys, one_step_off):
    # One device, which one step off needs; test_train_program resumes on eight.
    monkeypatch.setattr("train.prepare.make_mesh", lambda *_, **__: make_mesh(devices=jax.devices()[:1]))
    # Checkpoints are rare, so that what SIGTERM saves is what the run goes on from.
    options = OTHER | {"steps": 3, "checkpoint.every": 0, "rollout.one_step_off": one_step_off}
    folder = place / f"whole_{one_step_off}"
    records = train(place, folder, **options)
    sampled = [row["sampled_at"] for row in rows_of(folder / "rollouts" / "step_000003.jsonl")]
    assert max(sampled) == (1 if one_step_off else 2)
    assert [record["generation_batches"] for record in records] == sorted(r["generation_batches"] for r in records)
    ended = place / f"ended_{one_step_off}"
    flags = arguments(place, ended, **options)
    for phase, count in (("update", 1), ("eval", 3), ("prepare", 2)):
        with monkeypatch.context() as patch:
            asked_to_end(patch, phase, count)
            patch.setattr(sys, "argv", ["train", *flags])
            before = signal.getsignal(signal.SIGTERM)
            assert run_program(prepare, run) == PREEMPTED
            assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    assert "stopped on request (SIGTERM) after trainer step 2, saved; the same command resumes" in said
    assert "error:" not in said
    train(place, ended, **options)
    assert_same_run(folder, ended, 3)


def test_a_generation_batch_that_was_finished_is_not_decoded_again(place, monkeypatch):
    flags = arguments(place, place / "spooled", **OTHER, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_phase", ends_at("score"))
        with pytest.raises(Preempted):
            run(prepare(flags))
    assert list((place / "spooled" / "generated").glob("batch_*.npz"))
    decoded = []
    call = loop.Decoder.__call__
    monkeypatch.setattr(loop.Decoder, "__call__", lambda self, *a, **k: decoded.append(k["n"]) or call(self, *a, **k))
    run(prepare([*flags, "--data.val", "None", "--log.profile-step", "1"]))
    assert decoded == []
    assert list((place / "spooled" / "profile").rglob("*.xplane.pb"))
    assert json.loads((place / "spooled" / "metrics.jsonl").read_text().splitlines()[-1])["trainer_steps"] == 1


def ends_at(phase):
    def end(self, name):
        if name.split()[0] == phase:
            raise Preempted(name)

    return end
