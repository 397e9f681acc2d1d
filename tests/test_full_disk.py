"""A full disk is one sentence that names the folder; the same command resumes once there is room."""

import errno
import os

import jax
import jax.numpy as jnp
import pytest

from rlvr_jax.runs.checkpoint import Checkpoints
from rlvr_jax.runs.program import RunError, run_program, writing_to

FULL = os.strerror(errno.ENOSPC)


def not_written(folder):
    return f"^{folder}: a checkpoint could not be written: {FULL}; those before it are whole"


def test_a_checkpoint_that_does_not_fit_leaves_those_before_it(disk, capfd):
    folder = disk(150)
    little, much = {"x": jnp.zeros(4)}, {"x": jax.random.normal(jax.random.key(0), (100_000,))}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, little, host={})
    with pytest.raises(OSError, match=not_written(folder)), Checkpoints(folder) as checkpoints:
        checkpoints.save(2, much, host={})  # leaving waits for it
    assert "Traceback" not in capfd.readouterr().err
    disk.resize(10_000)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(2, much, host={})
        checkpoints.wait()
        assert checkpoints.steps == [1, 2]


def test_what_the_background_runs_into_is_told_at_the_next_look(tmp_path, monkeypatch):
    def fail():
        raise ValueError(f'RESOURCE_EXHAUSTED: Error writing "x": {FULL} [tensorstore_spec=...]')

    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.check()
        monkeypatch.setattr(checkpoints._manager, "check_for_errors", fail)
        with pytest.raises(OSError, match=not_written(tmp_path / "c")):
            checkpoints.check()
        monkeypatch.setattr(checkpoints._manager, "check_for_errors", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
            checkpoints.check()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, FULL), f"runs/x: {FULL}; the same command resumes"),
        (OSError(errno.ENOSPC, FULL, "/data/y"), f"[Errno 28] {FULL}: '/data/y'; the same command resumes"),
        (OSError("gs://bucket/x: no answer"), "gs://bucket/x: no answer; the same command resumes"),
    ],
)
def test_an_error_of_writing_names_a_place(error, said):
    with pytest.raises(RunError) as raised, writing_to("runs/x"):
        raise error
    assert str(raised.value).startswith(said)


def test_a_run_that_ends_so_exits_with_1(monkeypatch, capsys):
    def run(job):
        with writing_to(job):
            raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr("sys.argv", ["program"])
    assert run_program(lambda argv: "runs/x", run) == 1
    assert f"error: runs/x: {FULL}; the same command resumes from what is saved" in capsys.readouterr().err
