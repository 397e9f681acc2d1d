"""The launch examples, with stand-ins for the launchers: what is started, and what follows each exit code."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
FLAGS = ["configs/demo_dapo.py", "--data.train", "/shared/two words.parquet"]
TRAIN = ["-m", "train", "--config", *FLAGS]
# Each notes how it was called; then:
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "gcloud": 'last=${*: -1}; exec bash -c "${last#--command=}"',
    "xpk": "",
    "scontrol": "",
    "sleep": "",
    ".venv/bin/python": "code=$(head -n1 codes); sed -i 1d codes; exit $code",
}


@pytest.fixture
def launch(tmp_path):
    """Runs a launch file where the program ends with `codes`, one a start; gives its own code and what was called."""
    for name, then in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        note = f'printf "%q " {path.name} "$@" >> {tmp_path}/said; echo >> {tmp_path}/said'
        path.write_text(f"#!/bin/bash\n{note}\n{then}\n")
        path.chmod(0o755)

    def run(file, *codes, **environment):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "said").write_text("")
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | environment
        done = subprocess.run(["bash", str(LAUNCH / file), *FLAGS], cwd=tmp_path, env=env)
        return done.returncode, [shlex.split(line) for line in (tmp_path / "said").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (69, True), (75, True), (137, True)]
)
def test_slurm(launch, code, requeued):
    ended, said = launch("slurm.sbatch", code, SLURM_JOB_ID="7")
    assert ended == code
    assert said[1] == ["python", *TRAIN]
    assert said[2:] == [["scontrol", "requeue", "7"]] * requeued
    _, said = launch("slurm.sbatch", code, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="20")
    assert len(said) == 2


def test_tpu_pod_over_ssh(launch):
    where = {"TPU": "mine", "ZONE": "here", "FOLDER": "."}
    ended, said = launch("tpu_pod_ssh.sh", 69, 75, 2, **where)
    assert ended == 2
    assert said[0][:8] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mine", "--zone=here", "--worker=all"]
    assert [call for call in said[1:] if call[0] == "python"] == [["python", *TRAIN, "--distributed.auto"]] * 3
    assert launch("tpu_pod_ssh.sh", 0, **where)[0] == 0
    assert launch("tpu_pod_ssh.sh", 75, 75, 75, RESTARTS="2", **where)[0] == 75


def test_xpk(launch):
    where = dict.fromkeys(("CLUSTER", "PROJECT", "ZONE", "STORAGE", "IMAGE"), "x")
    ended, said = launch("xpk.sh", **where)
    assert (ended, said[0][:3]) == (0, ["xpk", "workload", "create"])
    assert "--restart-on-exit-codes=69,75" in said[0]
    command = said[0][-1].removeprefix("--command=")
    assert shlex.split(command)[-len(TRAIN) :] == TRAIN


def test_skypilot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
