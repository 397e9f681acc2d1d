"""A run that is ended at any moment and started again is the run that was not: SIGKILL, SIGTERM, one step off."""

import collections
import errno
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
from unittest import mock

import jax
import pytest

from rlvr_jax.runs.program import PREEMPTED, Preempted, run_program
from rlvr_jax.sharding.rules import make_mesh
from tests.runs import ROOT, arguments, final_state, rows_of, train, without_times, write_inputs
from tests.tiny import compiled_once
from train.check.prepare import prepare
from train.run import loop
from train.run.loop import run

OTHER = {"rollout.max_response": 12}  # shapes of its own: other tests count what is compiled
PHASES = ("rollout", "grade", "score", "update", "log", "save", "eval")
# Of files, by a part of their path: the place where a killed process leaves half of one.
WRITES = ("/generated/batch_", "/rollouts/step_", "/eval/step_", "/metrics.jsonl", "/killed/hf", "/hf/tokenizer.json")
# Runs the training program. It kills itself a moment after the N-th time that a phase of a name begins or, given a part
# of a path instead of a name, when a file there is about to get its name, or half of a compiled program is written.
KILLED = """
import os, signal, sys, threading
phase, count, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
def die_at(place):
    if phase in str(place):
        os.kill(os.getpid(), signal.SIGKILL)
def dying(rename):
    return lambda old, new, *more: (die_at(new), rename(old, new, *more))
def put_half(cache, key, value):
    path = cache.path / (key + "-cache")
    path.write_bytes(value[: len(value) // 2])
    die_at(path)
if "/" in phase:
    os.rename, os.replace = dying(os.rename), dying(os.replace)
if phase == "/of_killed/":
    from jax._src.lru_cache import LRUCache
    LRUCache.put = put_half
from rlvr_jax.runs.program import run_program
from train.run.loop import _Run, run
from train.check.prepare import prepare
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
    write_inputs(path)
    with compiled_once(path / "cache"):
        yield path


def assert_same_run(one, other, step):
    """Parameters, optimizer, counters, place in the data, groups that wait, metrics, rollouts and evaluations."""
    states = [final_state(folder, step) for folder in (one, other)]
    assert states[0][0] == states[1][0]
    for _, host in states:
        for free in ("run_dir", "compile_cache", "checkpoint"):
            del host["config"][free]
    assert states[0][1] == states[1][1]
    assert without_times(rows_of(one / "metrics.jsonl")) == without_times(rows_of(other / "metrics.jsonl"))
    for kind in ("rollouts", "eval"):
        files = [{p.name: p.read_bytes() for p in (folder / kind).iterdir()} for folder in (one, other)]
        assert files[0] == files[1]
    assert not list(other.glob("generated/*"))


@pytest.mark.slow
def test_killed_at_random_moments_and_in_every_kind_of_write(place):
    steps, seed = 10, 5
    rng, hit = random.Random(seed), collections.Counter()
    options = OTHER | {"steps": steps, "checkpoint.every": 3}
    train(place, place / "whole", **options)
    options |= {"compile_cache": place / "of_killed"}  # of its own, which a kill can damage
    flags = arguments(place, place / "killed", **options)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    moments = [
        (phase, rng.choice((1, 1, 2)), rng.choice((0.0, rng.random() / 5))) for phase in PHASES for _ in range(3)
    ]
    rng.shuffle(moments)
    # A compiled program first, as long as there are some to compile; the export last, since it ends a run.
    moments = [("/of_killed/", 1, 0.0), *((one, 1, 0.0) for one in WRITES[:4]), *moments]
    moments += [("export", 1, 0.0), ("export", 1, 0.05), *((one, 1, 0.0) for one in WRITES[4:]), ("/killed/hf", 1, 0.0)]
    for phase, count, delay in moments:
        command = [sys.executable, "-c", KILLED, phase, str(count), str(delay), *flags]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != -signal.SIGKILL:  # it came to its end before that
            assert done.returncode == 0, done.stderr[-2000:]
        hit[phase] += done.returncode == -signal.SIGKILL
        assert "Traceback" not in done.stderr, done.stderr[-2000:]
    print(f"killed: {dict(hit)}")
    assert sum(hit[phase] for phase in PHASES) >= 20
    assert all(hit[one] for one in ("/of_killed/", "export", *WRITES))
    train(place, place / "killed", **options)
    assert_same_run(place / "whole", place / "killed", steps)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (place / "killed" / "hf" / name).read_bytes() == (place / "whole" / "hf" / name).read_bytes()
    assert not list((place / "killed").rglob(".*.tmp"))


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


def one_device():
    """One step off needs it; test_train_program resumes on eight."""
    return mock.patch("train.check.prepare.make_mesh", return_value=make_mesh(devices=jax.devices()[:1]))


def three_steps(one_step_off):
    # Checkpoints are rare, so that what SIGTERM saves is what the run goes on from.
    return OTHER | {"steps": 3, "checkpoint.every": 0, "rollout.one_step_off": one_step_off}


@pytest.fixture(scope="module")
def whole(place):
    """The folder of a run of three steps that nothing ended, made once."""

    @functools.cache
    def of(one_step_off):
        folder = place / f"whole_{one_step_off}"
        with one_device():
            records = train(place, folder, **three_steps(one_step_off))
        batches = [record["generation_batches"] for record in records]
        assert batches == sorted(batches)
        return folder

    return of


@pytest.mark.parametrize("one_step_off", [False, True])
def test_asked_to_end_it_saves_and_goes_on_as_if_nothing_had_been(place, whole, monkeypatch, capsys, one_step_off):
    options, folder = three_steps(one_step_off), whole(one_step_off)
    sampled = [row["sampled_at"] for row in rows_of(folder / "rollouts" / "step_000003.jsonl")]
    assert max(sampled) == (1 if one_step_off else 2)
    ended = place / f"ended_{one_step_off}"
    flags = arguments(place, ended, **options)
    for phase, count in (("update", 1), ("eval", 3), ("prepare", 2)):
        with monkeypatch.context() as patch:
            asked_to_end(patch, phase, count)
            patch.setattr(sys, "argv", ["train", *flags])
            before = signal.getsignal(signal.SIGTERM)
            with one_device():
                assert run_program(prepare, run) == PREEMPTED
            assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    assert "stopped on request (SIGTERM) after trainer step 2, saved; the same command resumes" in said
    assert "error:" not in said
    with one_device():
        train(place, ended, **options)
    assert_same_run(folder, ended, 3)


def test_on_a_full_disk_it_ends_with_one_sentence_and_resumes_with_room(place, whole, disk, monkeypatch, capfd):
    folder = disk(600) / "run"  # for one checkpoint of 370 kB
    options = three_steps(False) | {"checkpoint.every": 1}
    monkeypatch.setattr(sys, "argv", ["train", *arguments(place, folder, **options)])
    with one_device():
        assert run_program(prepare, run) == 1
        said = capfd.readouterr().err
        assert re.search(
            rf"^error: {folder}[^ ]*: .*{os.strerror(errno.ENOSPC)}.*; the same command resumes", said, re.M
        )
        assert "Traceback" not in said
        disk.resize(10_000)
        assert run_program(prepare, run) == 0
    assert_same_run(whole(False), folder, 3)


def test_a_generation_batch_that_was_finished_is_not_decoded_again(place, monkeypatch):
    """The second start takes it from its file. It also writes the profile that was asked for."""
    flags = arguments(place, place / "spooled", **OTHER, steps=1)
    with monkeypatch.context() as patch, one_device():
        patch.setattr(loop._Run, "_phase", ends_at("score"))
        with pytest.raises(Preempted):
            run(prepare(flags))
    assert list((place / "spooled" / "generated").glob("batch_*.npz"))
    decoded = []
    call = loop.Decoder.__call__
    monkeypatch.setattr(loop.Decoder, "__call__", lambda self, *a, **k: decoded.append(k["n"]) or call(self, *a, **k))
    with one_device():
        run(prepare([*flags, "--data.val", "None", "--log.profile-step", "1"]))
    assert decoded == []
    assert list((place / "spooled" / "profile").rglob("*.xplane.pb"))
    assert json.loads((place / "spooled" / "metrics.jsonl").read_text().splitlines()[-1])["trainer_steps"] == 1


def ends_at(phase):
    def end(self, name):
        if name.split()[0] == phase:
            raise Preempted(name)

    return end
