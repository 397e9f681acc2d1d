"""`python -m train` as several processes: the same run as one process, whoever dies, hangs or is asked to end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.models.hf import load_hf
from rlvr_jax.runs.program import PREEMPTED, RUN_ERROR
from rlvr_jax.runs.watch import PEER_LOST
from tests.runs import ROOT, arguments, rows_of, write_inputs
from tests.tiny import devices

DEVICES = 4
TIMEOUT_S = 6.0
# Runs the training program. In the process of a number, when a phase of a name begins for the N-th time: a signal, or
# (signal 0) the main thread stands still for ever.
DISTURBED = """
import os, sys, time
process, phase, count, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.argv[1:] = sys.argv[5:]
from rlvr_jax.runs.distributed import cluster
from rlvr_jax.runs.program import run_program
from train.run.loop import _Run, run
from train.check.prepare import prepare
named, left = _Run._phase, [count]
def name_and_disturb(self, name):
    named(self, name)
    if cluster().index == process and name.split()[0] == phase:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number) if number else time.sleep(1e6)
_Run._phase = name_and_disturb
sys.exit(run_program(prepare, run))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    write_inputs(path, num_layers=1)
    return path


def start(place, run_dir, processes, disturbed=("-1", "none", "0", "0"), **changes):
    """The processes of a run over 4 devices, begun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"steps": 3, "eval__every": 3, "rollout__max_response": 8, "model__remat": "none"} | changes
    begun = []
    for index in range(processes):
        flags = arguments(place, run_dir, **options)
        if processes > 1:
            flags += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", str(processes)]
            flags += ["--distributed.process", str(index), "--distributed.timeout-s", str(TIMEOUT_S)]
        environment = os.environ | devices(DEVICES // processes) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DISTURBED, *map(str, disturbed), *flags]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command, cwd=ROOT, env=environment, **streams))
    return begun


def ended(begun, limit_s=400.0):
    """(exit code, stderr) of each process."""
    until, found = time.monotonic() + limit_s, []
    try:
        for process in begun:
            _, err = process.communicate(timeout=until - time.monotonic())
            found.append((process.returncode, err))
    finally:
        for process in begun:
            process.kill()
    return found


def finished(begun):
    for code, err in ended(begun):
        assert code == 0, err[-2000:]


def assert_same_run(one, other):
    """Numbers of a step to 1e-5 of their value or 1e-6, parameters to 2e-6; responses, verdicts, counters are equal."""
    records = [rows_of(folder / "metrics.jsonl") for folder in (one, other)]
    assert [(r["kind"], r["trainer_steps"]) for r in records[0]] == [
        (r["kind"], r["trainer_steps"]) for r in records[1]
    ]
    for ours, theirs in zip(*records, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if not re.match("kind|seconds|rollout_tokens_per_s|.*_memory_", name):
                assert value == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), (ours["trainer_steps"], name)
    for kind, numbers in (("rollouts", ("advantage", "mean_logp", "tokens")), ("eval", ())):
        names = sorted(path.name for path in (one / kind).iterdir())
        assert names == sorted(path.name for path in (other / kind).iterdir())
        for name in names:
            rows = [
                [{k: x for k, x in row.items() if k not in numbers} for row in rows_of(folder / kind / name)]
                for folder in (one, other)
            ]
            assert rows[0] == rows[1], name
    params = [load_hf(folder / "hf", dtype=jnp.float32)[1] for folder in (one, other)]
    for ours, theirs in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    assert not list(other.glob("generated/*"))


@pytest.fixture(scope="module")
def whole(place):
    """The run of one process."""
    finished(start(place, place / "whole", 1))
    return place / "whole"


def test_two_processes_one_killed_then_four_are_the_run_of_one(place, request):
    begun = start(place, place / "killed", 2, (1, "update", 5, signal.SIGKILL.value))
    whole = request.getfixturevalue("whole")  # beside it
    (code, err), (killed, _) = ended(begun)
    assert killed == -signal.SIGKILL
    assert code == PEER_LOST, err
    sentence = re.search(r"error: process 1 of 2 \(host (.+?)\) has not answered for (\d+) s; it was last in (.*)", err)
    assert sentence, err
    assert sentence[1] == socket.gethostname()
    assert int(sentence[2]) <= TIMEOUT_S + 3
    assert sentence[3].startswith("phase '")
    assert re.search("after trainer step [12]", sentence[3])  # where it was when last heard of
    (code, err), *others = ended(start(place, place / "killed", 4))
    assert [code, *(code for code, _ in others)] == [0] * 4, err
    assert re.search(r"resumed .*killed after trainer step [12]\n", err), err
    assert_same_run(whole, place / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_are_one(place, whole, processes):
    """With dynamic sampling, an evaluation, carried groups; then a step more by another number of processes."""
    folder = place / f"of_{processes}"
    finished(start(place, folder, processes))
    assert_same_run(whole, folder)
    finished(start(place, folder, 6 - processes, steps=4))
    assert rows_of(folder / "metrics.jsonl")[-1]["trainer_steps"] == 4


@pytest.mark.slow
def test_the_coordinator_killed(place, whole):
    folder = place / "headless"
    (killed, _), *others = ended(start(place, folder, 3 - 1, (0, "score", 2, signal.SIGKILL.value)))
    assert killed == -signal.SIGKILL
    for code, err in others:
        assert code == PEER_LOST, err
        assert "error: process 0 of 2" in err
        assert "is gone; it was last in phase" in err
    finished(start(place, folder, 1))
    assert_same_run(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_stopped_process(place, process):
    """As a machine that stands still: no answer, and no closed connection either."""
    begun = start(place, place / f"stopped_{process}", 2, (process, "update", 3, signal.SIGSTOP.value))
    try:
        _, err = begun[1 - process].communicate(timeout=400)
        assert begun[1 - process].returncode == PEER_LOST, err
        assert f"error: process {process} of 2" in err
        assert "has not answered for" in err
        begun[process].send_signal(signal.SIGCONT)  # it finds itself alone
        begun[process].communicate(timeout=60)
        assert begun[process].returncode not in (0, None)
    finally:
        for one in begun:
            one.kill()


@pytest.mark.slow
def test_a_main_thread_that_stands_still(place):
    """Both have begun the phase, so who is the cause is seen from where their main threads are."""
    begun = start(
        place, place / "stuck", 2, (1, "score", 2, 0), distributed__hang_s=20
    )  # sooner than gloo, which waits 30 s
    said = ended(begun)
    for code, err in said:
        assert code == PEER_LOST, err
        assert re.search(r"process [01] of 2 \(host .+\) has made no progress for \d+ s", err), err
        assert "in phase 'score' after trainer step 1" in err
    assert re.search(r"this is process 0, at \w+\.py:\d+", said[0][1])
    assert "(this is process 1, at <string>:" in said[1][1]


@pytest.mark.slow
def test_asked_to_end_all_end_at_one_point_and_go_on(place, whole):
    folder = place / "asked"
    for phase, count in (("update", 1), ("rollout", 2)):
        for code, err in ended(start(place, folder, 2, (1, phase, count, signal.SIGTERM.value), checkpoint__every=0)):
            assert code == PREEMPTED, err
            assert "stopped on request (SIGTERM) after trainer step" in err
            assert "error:" not in err
    finished(start(place, folder, 4, checkpoint__every=0))
    assert_same_run(whole, folder)


@pytest.mark.slow
def test_a_process_with_other_data_is_refused(place):
    begun = start(place, place / "other", 2)
    begun[1].kill()
    begun[1].wait()
    flags = list(begun[1].args)
    flags[flags.index("--data.train") + 1] = str(place / "val.jsonl")
    environment = os.environ | devices(DEVICES // 2) | {"PYTHONPATH": str(ROOT)}
    begun[1] = subprocess.Popen(flags, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    said = ended(begun)
    assert all(code in (2, PEER_LOST) for code, _ in said)
    assert any("the configuration, the training problems or the code: process" in err for _, err in said)


@pytest.mark.slow
def test_a_part_that_one_process_cannot_read_is_damage_to_all(place, whole):
    folder = place / "damaged"
    finished(start(place, folder, 2))
    parts = [path for path in (folder / "checkpoints" / "3" / "state" / "ocdbt.process_1").rglob("*") if path.is_file()]
    assert parts
    for path in parts:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for code, err in ended(start(place, folder, 2)):
        assert code in (RUN_ERROR, PEER_LOST), err  # whoever ends first is why the other one must end
        assert "checkpoints/3: damaged: ValueError: " in err
        assert "--checkpoint.fallback resumes from" in err
    finished(start(place, folder, 2, checkpoint__fallback=True))
    assert (folder / "checkpoints" / "3.damaged").is_dir()
    assert_same_run(whole, folder)
