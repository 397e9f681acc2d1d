"""Optional packages themselves, where they are installed: a reasoning-gym task, wandb (offline), trackio."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.runs import ROOT, arguments, rows_of
from tests.test_train_seeing import follow
from tests.tiny import tiny_checkpoint
from train.check.prepare import prepare
from train.run.loop import run


def test_a_run_on_a_reasoning_gym_task(tmp_path):
    gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is an optional dependency")
    tiny_checkpoint(tmp_path / "model")
    settings = "max_digits=1&max_terms=2"
    changes = {
        "steps": 2,
        "data.train": f"reasoning_gym:basic_arithmetic?size=40&seed=1&{settings}",
        "data.val": f"reasoning_gym:basic_arithmetic?size=6&seed=1001&{settings}",
        "reward.rule": "reasoning_gym",
        "algorithm.dynamic_sampling": False,  # random responses are seldom right
        "eval.n": 2,
    }
    flags = arguments(tmp_path, tmp_path / "run", **changes)
    run(prepare(flags))
    records = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [(r["kind"], r["trainer_steps"]) for r in records] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    task = gym.create_dataset("basic_arithmetic", size=40, seed=1, max_digits=1, max_terms=2)
    rows = [row for step in (1, 2) for row in rows_of(tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl")]
    assert len(rows) == 32
    for row in rows:
        name, seed, index = row["problem"].split("/")
        answer = task[int(index)]["answer"]
        assert (name, seed, json.loads(row["answer"])["answer"]) == ("basic_arithmetic", "1", answer)
        assert (row["correct"], row["error"]) == (row["prediction"] == answer, None)


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an optional dependency")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    identities = []
    for resume in (False, True, False):
        follow(folder, ("wandb",), resume=resume)
        identities.append(json.loads((folder / "trackers.json").read_text())["wandb"])
    assert identities[0] == identities[1] != identities[2]
    files = [path.name for path in (folder / "wandb").glob("offline-run-*/run-*.wandb")]
    assert {f"run-{identity}.wandb" for identity in identities} == set(files)


TRACKIO = """
import json, sys
from pathlib import Path
from trackio.sqlite_storage import SQLiteStorage
from tests.test_train_seeing import RECORD, follow
folder = Path(sys.argv[1])
follow(folder, ("trackio",), resume=False)
follow(folder, ("trackio",), resume=True, records=[RECORD | {"trainer_steps": 8, "loss": 0.25}])
logged = [row for row in SQLiteStorage.get_logs("p", "run") if "train/loss" in row]
print(json.dumps([(row["step"], row["train/trainer_steps"], row["train/loss"]) for row in logged]))
"""


def test_trackio_itself(tmp_path):
    """In a process of its own: its folder is read from the environment once."""
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is an optional dependency")
    (tmp_path / "run").mkdir()
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRACKIO, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [[7, 7, 0.5], [8, 8, 0.25]]
