"""What a program removes is what it wrote, whatever else lies in the folder that it was given."""

from pathlib import Path

import pytest

from rlvr_jax.models import hf
from rlvr_jax.runs.files import remove_leftovers
from rlvr_jax.runs.program import compile_cache
from train.step.groups import Spool

COMPILED = f"jit_step-{'0a' * 32}-cache"


def keep(folder):
    names = ("damaged-cache", f"{'0a' * 32}-cache-notes", "batch_x.npz", "batch_1.npz", ".x.1.tmp")
    for name in names:
        (folder / name).write_text("mine")
    (folder / "pip-cache").mkdir()
    return {path.name for path in folder.iterdir()}


def begin_with_a_compile_cache(folder):
    (folder / COMPILED).write_bytes(b"cut")
    with compile_cache(str(folder), folder):
        pass


def discard_generation_batches(folder):
    (folder / "batch_00000001.npz").write_bytes(b"")
    Spool(folder, 1, "run").discard(2)


@pytest.mark.parametrize("remove", [begin_with_a_compile_cache, discard_generation_batches])
def test_files_of_other_names_stay(tmp_path, remove):
    mine = keep(tmp_path)
    remove(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == mine


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "rollouts").mkdir()
    for name in (".a.json.17.tmp", ".hf.17.tmp/model.safetensors", "rollouts/.x.18.tmp", "rollouts/kept.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in (".mine.tmp", ".mine.x.tmp", "a.17.tmp", "pip-cache/x", "other/.y.3.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path, "roll*", "not there")
    assert not (tmp_path / ".hf.17.tmp").exists()
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".mine.tmp", ".mine.x.tmp", "a.17.tmp", "other/.y.3.tmp", "pip-cache/x", "rollouts/kept.jsonl"]


def test_an_export_replaces_a_model_and_leaves_the_rest(tmp_path):
    new, folder = tmp_path / "new", tmp_path / "hf"
    new.mkdir()
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (new / name).write_text("new")
    old = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model.safetensors")
    for name in (*old, "adapter_model.safetensors", "notes.txt"):
        (folder / name).write_text("old")
    hf._move_into_place(Path(new), folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        **{"config.json": "new", "model.safetensors": "new"},
        **{"adapter_model.safetensors": "old", "notes.txt": "old"},
    }
