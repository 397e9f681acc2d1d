"""Runs whose inputs, results and checkpoints are at s3://, against a server of moto on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import fsspec
import pytest

from rlvr_jax.runs.checkpoint import Checkpoints
from rlvr_jax.runs.program import PREEMPTED
from rlvr_jax.runs.remote import fetch, listing
from tests.runs import ROOT, arguments, without_times, write_inputs
from tests.test_checkpoint import a_state, bits
from tests.test_train_processes import DISTURBED, assert_same_run
from tests.tiny import devices

pytest.importorskip("moto", reason="needs moto[server,s3] and s3fs")
pytest.importorskip("s3fs", reason="needs moto[server,s3] and s3fs")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket with the inputs of a run; its server's address and keys are in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    before = dict(os.environ)
    os.environ.update(names, AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=address)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(address + "/moto-api/data.json", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.2)
        store = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        store.mkdir("bucket")
        place = tmp_path_factory.mktemp("inputs")
        write_inputs(place, num_layers=1)
        store.put(f"{place}/", "bucket/in/", recursive=True)
        yield store, place
    finally:
        server.kill()
        os.environ.clear()
        os.environ.update(before)


def start(place, run_dir, machine, disturbed=("-1", "none", "0", "0"), index=0, processes=1, port=0, **changes):
    """A process of a training run on a machine of its own: nothing is shared but the bucket."""
    options = {"steps": 3, "eval__every": 3, "rollout__max_response": 8, "model__remat": "none"} | changes
    flags = arguments(place, run_dir, **options)
    if processes > 1:
        flags += ["--distributed.coordinator", f"127.0.0.1:{port}", "--distributed.processes", str(processes)]
        flags += ["--distributed.process", str(index), "--distributed.timeout-s", "6"]
    environment = os.environ | devices(4 // processes) | {"PYTHONPATH": str(ROOT), "RLVR_JAX_CACHE": str(machine)}
    command = [sys.executable, "-c", DISTURBED, *map(str, disturbed), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def ended(process):
    _, err = process.communicate(timeout=400)
    return process.returncode, err


@pytest.fixture(scope="module")
def whole(bucket):
    """The run on a local disk, never cut short."""
    _, place = bucket
    code, err = ended(start(place, place / "whole", place / "no_cache"))
    assert code == 0, err
    return place / "whole"


def fetched(store, url, folder):
    fetch(store, {name: x for name, x in listing(store, url).items() if not name.startswith("checkpoints/")}, folder)
    return folder


def test_checkpoints_through_orbax_are_whole_or_absent(bucket):
    store, _ = bucket
    state, url = a_state(), "s3://bucket/checkpoints"
    with Checkpoints(url, keep=2) as checkpoints:
        assert checkpoints.latest is None
        for step in (1, 2, 3):
            checkpoints.save(step, state, host={"step": step})
    store.rm_file("bucket/checkpoints/3/commit_success.txt")  # as a machine that is lost before the end leaves it
    with Checkpoints(url, keep=2) as checkpoints:
        assert checkpoints.steps == [2]
        restored = checkpoints.restore(state, 2)
        assert restored.host == {"step": 2}
        assert bits(restored.state) == bits(state)
        checkpoints.save(3, state, host={"step": 3})
        checkpoints.wait()
        assert checkpoints.latest == 3


def test_a_run_whose_machine_is_lost_goes_on_to_the_same_bits(bucket, whole, tmp_path):
    store, place = bucket
    inputs = {"model__path": "s3://bucket/in/model"} | {
        f"data__{name}": f"s3://bucket/in/{name}.jsonl" for name in ("train", "val")
    }
    code, err = ended(
        start(place, "s3://bucket/lost", tmp_path / "first", (0, "update", 5, signal.SIGKILL.value), **inputs)
    )
    assert code == -signal.SIGKILL, err
    code, err = ended(start(place, "s3://bucket/lost", tmp_path / "second", **inputs))
    assert code == 0, err
    assert "resumed s3://bucket/lost after trainer step" in err
    run = fetched(store, "bucket/lost", tmp_path / "run")
    ours, theirs = (
        without_times([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        for folder in (run, whole)
    )
    assert ours == theirs
    for name in ("hf/model.safetensors", *(f"{kind}/step_000003.jsonl" for kind in ("rollouts", "eval"))):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert not [path for path in Path(run).rglob("*") if path.name.startswith(".")]


@pytest.mark.slow
def test_processes_that_share_no_disk_asked_to_end_and_one_that_goes_on(bucket, whole, tmp_path):
    store, place = bucket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = (1, "update", 2, signal.SIGTERM.value)
    begun = [start(place, "s3://bucket/two", tmp_path / f"{i}", asked, i, 2, port) for i in range(2)]
    for code, err in map(ended, begun):
        assert code == PREEMPTED, err
    code, err = ended(start(place, "s3://bucket/two", tmp_path / "one"))
    assert code == 0, err
    assert_same_run(whole, fetched(store, "bucket/two", tmp_path / "run"))
