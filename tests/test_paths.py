"""Paths as people write them: the home folder, empty names, characters that orbax takes for something else."""

import dataclasses
import os
import pwd
from pathlib import Path

import jax.numpy as jnp
import pytest

from demo.__main__ import prepare as prepare_demo
from rlvr_jax.models.hf import checkpoint_folder
from rlvr_jax.runs.checkpoint import Checkpoints, check_place
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.paths import at_home, config_at_home, same_place
from rlvr_jax.runs.program import parse_config
from rlvr_jax.runs.remote import local
from train.check.examine import examine
from train.config import Config
from train.run.resume import run_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder_is_written_out_as_a_shell_does(home):
    me = pwd.getpwuid(os.getuid())
    for given, expected in {
        "~/x": f"{home}/x", "~": str(home),
        f"~{me.pw_name}/x": f"{me.pw_dir}/x", "./~/x": "./~/x", "a~/x": "a~/x", "gs://b/~/x": "gs://b/~/x",
        "~ 3 apples": "~ 3 apples", "": "",
    }.items():  # fmt: skip
        assert at_home(given) == expected
    with pytest.raises(ValueError, match=r"~nobody-here/x: no home folder of that name; write \./~nobody-here/x"):
        at_home("~nobody-here/x")


@dataclasses.dataclass(frozen=True)
class Inner:
    files: tuple[str, ...] = ()
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    out: str = "x"
    count: int = 3
    inner: Inner = Inner()


def test_the_home_folder_is_written_out_in_flags_and_recipes(home):
    config = Outer("~/o", 3, Inner(("~/a", "b"), "~"))
    assert config_at_home(config) == Outer(f"{home}/o", 3, Inner((f"{home}/a", "b"), str(home)))
    same = Outer("o", 3, Inner(("a",), None))
    assert config_at_home(same) is same
    recipe = home / "recipe.py"
    recipe.write_text(f"from {Outer.__module__} import Outer, Inner\nconfig = Outer('~/o', inner=Inner(('~/a',)))\n")
    words = {"prog": "x", "description": ""}
    for argv in ([f"--config={recipe}"], ["--config=~/recipe.py"], ["--out=~/o", "--inner.files", "~/a"]):
        assert parse_config(Outer, argv, **words) == Outer(f"{home}/o", 3, Inner((f"{home}/a",)))


def test_the_home_folder_is_written_out_by_the_library_too(home):
    (home / "model").mkdir()
    assert checkpoint_folder("~/model") == home / "model"
    assert local("~/x.jsonl") == f"{home}/x.jsonl"
    folder = RunFolder("~/run")
    assert (folder.local, folder.checkpoints) == (home / "run", f"{home}/run/checkpoints")
    with Checkpoints("~/run/checkpoints") as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, host={})
    assert (home / "run" / "checkpoints" / "1").is_dir()


def test_one_path_spelled_two_ways_is_one_path(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "x").mkdir()
    os.symlink(home / "x", home / "link")
    for spelling in ("x", "./x", "x/", f"{home}/x", "~/x", "x/../x", "link"):
        assert same_place(spelling, str(home / "x"))
    assert not same_place("x", "y")


@pytest.mark.parametrize("name", ["lr=[1e-5]", "a\\b", "lr]", "x*", "what?"])
def test_a_folder_whose_checkpoints_could_not_be_read_is_refused_at_once(tmp_path, name):
    bad = next(character for character in "[]*?\\" if character in name)
    for refused in (
        lambda: run_folder(str(tmp_path / name)),
        lambda: Checkpoints(tmp_path / name / "checkpoints"),
        lambda: check_place(f"gs://bucket/{name}"),
        lambda: prepare_demo(["--out", str(tmp_path / name)]),
    ):
        with pytest.raises(ValueError, match="could not be read back") as error:
            refused()
        assert f"does not take {bad} in a path" in str(error.value)
        assert name in str(error.value)
    assert not list(tmp_path.iterdir())
    (check,) = [c for c in examine(Config(run_dir=str(tmp_path / name))).checks if c.name == "run_dir"]
    assert check.ok is False
    (tmp_path / name).mkdir()
    os.symlink(tmp_path / name, tmp_path / "plain")  # what the message offers
    with Checkpoints(tmp_path / "plain" / "c") as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(3.0)}, host={})
    with Checkpoints(tmp_path / "plain" / "c") as checkpoints:
        assert checkpoints.restore({"w": jnp.zeros(3)}, 1).state["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_current_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected a path"):
        run_folder(name)
    assert not list(Path().iterdir())
