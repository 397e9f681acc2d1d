"""`python -m decode` and `python -m train.sft` as several processes: what one process would have made."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from rlvr_jax.models.hf import load_hf
from rlvr_jax.runs.program import PREEMPTED
from rlvr_jax.runs.watch import PEER_LOST
from tests.runs import ROOT
from tests.test_train_processes import TIMEOUT_S, ended, finished
from tests.tiny import devices, tiny_checkpoint, tiny_config, tiny_tokenizer, write_tiny_problems

DEVICES = 4
# Runs a program. The process of a number sends itself a signal when it has named a phase that begins so N times.
DISTURBED = """
import importlib, os, sys
module, process, phase, count, number = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
sys.argv[1:] = sys.argv[6:]
from rlvr_jax.runs.distributed import Cluster
from rlvr_jax.runs.program import run_program
named, left = Cluster.phase, [count]
def name_and_disturb(self, name, step=None):
    named(self, name, step)
    if self.index == process and name.startswith(phase):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
Cluster.phase = name_and_disturb
program = importlib.import_module(module)
sys.exit(run_program(program.prepare, program.run))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    for seed, role in enumerate(("base", "rl")):
        tiny_checkpoint(path / role, seed=seed, num_layers=1)
    write_tiny_problems(path / "problems.jsonl", 6)
    (path / "init").mkdir()
    (path / "init" / "config.json").write_text(json.dumps(tiny_config(num_layers=1).to_hf()))
    tiny_tokenizer().save_pretrained(path / "init")
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    (path / "rows.jsonl").write_text(20 * (json.dumps({"messages": turns}) + "\n"))
    return path


def start(module, processes, flags, disturbed=("-1", "none", "0", "0")):
    """The processes of a program over 4 devices, begun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = []
    for index in range(processes):
        here = list(map(str, flags))
        if processes > 1:
            here += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", str(processes)]
            here += ["--distributed.process", str(index), "--distributed.timeout-s", str(TIMEOUT_S)]
        environment = os.environ | devices(DEVICES // processes) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DISTURBED, module, *map(str, disturbed), *here]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen(command, cwd=ROOT, env=environment, **streams))
    return begun


def decode(place, out, processes, disturbed=("-1", "none", "0", "0"), tau=None):
    """With a threshold, or with one that is found for a share."""
    flags = ["--base", place / "base", "--rl", place / "rl", "--problems", place / "problems.jsonl", "--out", out]
    flags += ["--criterion", "delta_logp", "--gamma", 0.5, "--top-p", 1.0, "--n", 4, "--slots", 4, "--save-tokens"]
    flags += ["--graders", "tests.tiny_pair:contains_answer", "--grader-workers", 1, "--compile-cache", "None"]
    if tau is None:
        flags += ["--match-rate", 0.3, "--calibration.responses", 6, "--controls.on", "False", "--max-new-tokens", 40]
    else:
        flags += ["--tau", tau, "--block", 4, "--max-new-tokens", 12, "--limit", 2]
    return start("decode.run", processes, flags, disturbed)


def assert_same_responses(one, other):
    """Token for token, with the same verdicts; log-probabilities and thresholds to 1e-4."""
    (setting,) = [path.parent.name for path in one.glob("*/seed0.json")]
    assert (other / setting / "seed0.json").read_bytes() == (one / setting / "seed0.json").read_bytes()
    if (one / "calibration.json").exists():
        taus = [
            json.loads((folder / "calibration.json").read_text())["thresholds"][0]["tau"] for folder in (one, other)
        ]
        assert taus[1] == pytest.approx(taus[0], abs=1e-4)
    ours, theirs = (pq.read_table(folder / setting / "tokens.parquet").to_pylist() for folder in (one, other))
    for row, expected in zip(theirs, ours, strict=True):
        assert row["tokens"] == expected["tokens"]
        np.testing.assert_allclose(row["logp"], expected["logp"], atol=1e-4)
    assert any(any(row["fired"]) for row in ours)


@pytest.fixture(scope="module")
def whole(place):
    """The decode of one process."""
    finished(decode(place, place / "whole", 1))
    return place / "whole"


def test_two_processes_decode_what_one_does(place):
    begun = decode(place, place / "two", 2, tau=-1.0)
    finished(decode(place, place / "one", 1, tau=-1.0))  # beside it
    (code, err), (other, quiet) = ended(begun)
    assert (code, other) == (0, 0), err + quiet
    assert "setting 1 of 1" in err
    assert "setting" not in quiet
    assert_same_responses(place / "one", place / "two")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_a_decode_whose_process_died_goes_on_with_another_number_of_processes(place, whole, processes):
    out = place / f"killed_{processes}"
    (code, err), (killed, _) = ended(decode(place, out, 2, (1, "decode,", 4, signal.SIGKILL.value)))
    assert killed == -signal.SIGKILL
    assert code == PEER_LOST, err
    says = r"error: process 1 of 2 \(host .+?\) has not answered for \d+ s; it was last in phase 'decode, \d+ responses"
    assert re.search(says, err), err
    there = len((next(out.glob("*/seed0.rows.jsonl"))).read_text().splitlines())
    assert there
    finished(decode(place, out, processes))
    assert_same_responses(whole, out)


@pytest.mark.slow
def test_a_decode_asked_to_end_and_one_during_calibration(place, whole):
    out = place / "asked"
    for phase in ("calibrate,", "decode,"):
        for code, err in ended(decode(place, out, 2, (1, phase, 2, signal.SIGTERM.value))):
            assert code == PREEMPTED, err
            assert "stopped on request (SIGTERM), responses that had ended are saved" in err
    finished(decode(place, out, 2))
    assert_same_responses(whole, out)
    code, err = ended(decode(place, place / "asked_1", 1, (0, "decode,", 2, signal.SIGTERM.value)))[0]
    assert code == PREEMPTED, err
    finished(decode(place, place / "asked_1", 1))
    assert_same_responses(whole, place / "asked_1")


def sft(place, run_dir, processes, disturbed=("-1", "none", "0", "0")):
    flags = ["--init-config", place / "init", "--tokenizer", place / "init", "--data", place / "rows.jsonl"]
    flags += ["--run-dir", run_dir, "--batch", 8, "--steps", 40, "--optim.lr", 1e-4, "--compile-cache", "None"]
    return start("train.sft", processes, flags, disturbed)


@pytest.mark.slow
def test_supervised_training_in_several_processes(place):
    finished(sft(place, place / "sft", 1))
    for code, err in ended(sft(place, place / "sft_2", 2, (0, "update", 4, signal.SIGTERM.value))):
        assert code == PREEMPTED, err
        assert re.search(r"stopped on request \(SIGTERM\) after step \d+, saved;", err)
    finished(sft(place, place / "sft_2", 4))
    runs = [place / "sft", place / "sft_2"]
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert len(losses[0]) == 40
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    params = [load_hf(run / "hf", dtype=jnp.float32)[1] for run in runs]
    for ours, theirs in zip(*map(jax.tree.leaves, params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
