"""A damaged checkpoint is named, never restored in silence; an older one stands in for it where the user says so."""

import errno
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlvr_jax.runs import checksums
from rlvr_jax.runs.checkpoint import Checkpoints, DamagedCheckpoint
from rlvr_jax.runs.program import RunError
from rlvr_jax.sharding.rules import make_mesh
from train.run.resume import restore, resumable, run_folder

HOST = {"config": {"lr": 1e-3}, "names": ["a", None], "by_number": {2: 1, 10: 2}}
ARRAYS = {"tokens": np.arange(5, dtype=np.int32), "logp": np.linspace(0, 1, 300), "empty": np.zeros((0, 3))}


@pytest.fixture(scope="module")
def state():
    mesh = make_mesh(fsdp=4, tensor=2)
    w = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    return {
        "w": jax.device_put(w, NamedSharding(mesh, P("fsdp", "tensor"))),
        "b": jnp.ones(5, jnp.bfloat16),
        "step": jnp.int32(3),
    }


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run's folder with checkpoints of steps 1, 2 and 3, whose states are alike but for `step`."""
    run = tmp_path_factory.mktemp("damage") / "run"
    with Checkpoints(run / "checkpoints") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state | {"step": jnp.int32(step)}, host=HOST, arrays=ARRAYS)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def content(restored):
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(restored.state)]
    return leaves, restored.host, {name: (x.shape, x.tobytes()) for name, x in restored.arrays.items()}


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in files_of(folder)}


def try_all(run, state, damage):
    """The outcome of a restore for each file of the newest checkpoint, damaged by `damage`, and put back."""
    outcomes = []
    with Checkpoints(run / "checkpoints") as checkpoints:
        whole = content(checkpoints.restore(state, 3))
        for path in files_of(run / "checkpoints" / "3"):
            data = path.read_bytes()
            for made in damage(data):
                path.unlink() if made is None else path.write_bytes(made)
                try:
                    same = content(checkpoints.restore(state, 3)) == whole
                    assert same, f"{path} damaged: other values, in silence"
                    outcomes.append((path.name, "same"))
                except DamagedCheckpoint as error:
                    said = str(error)
                    outcomes.append((path.name, "refused"))
                    assert said.startswith(f"{run / 'checkpoints' / '3'}: damaged: ")
                    assert len(said.splitlines()) == 1
                path.write_bytes(data)
    return outcomes


def test_every_flipped_bit_is_harmless_or_refused(run, state, capfd):
    rng = random.Random(0)

    def flipped(data):
        for _ in range(3):
            bit = rng.randrange(8 * len(data))
            yield bytes(byte ^ ((at == bit // 8) << bit % 8) for at, byte in enumerate(data))

    outcomes = try_all(run, state, flipped)
    refused = sum(what == "refused" for _, what in outcomes)
    assert len(outcomes) >= 60
    assert refused >= 20
    assert ("metadata", "refused") in outcomes  # host/metadata
    assert "Traceback" not in capfd.readouterr().err


def test_cut_empty_and_missing_files_are_harmless_or_refused(run, state):
    outcomes = try_all(run, state, lambda data: (data[: len(data) // 2], data[:-1], b"", None))
    for needed in ("metadata", "_METADATA", "manifest.ocdbt"):
        assert (needed, "refused") in outcomes


@pytest.mark.parametrize("part", ["host", "state", "arrays"])
def test_a_missing_part_is_named(run, state, part):
    shutil.rmtree(run / "checkpoints" / "3" / part)
    with Checkpoints(run / "checkpoints") as checkpoints, pytest.raises(DamagedCheckpoint, match="checkpoints/3: dam"):
        checkpoints.restore(state, 3)


def test_a_change_of_one_host_value_is_found(run):
    path = run / "checkpoints" / "3" / "host" / "metadata"
    path.write_text(path.read_text().replace("0.001", "0.002"))
    with Checkpoints(run / "checkpoints") as checkpoints, pytest.raises(DamagedCheckpoint, match="by its checksum"):
        checkpoints.host(3)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied", "x"), ValueError("UNAVAILABLE: no answer from x")]
)
def test_trouble_of_the_place_is_no_damage(run, state, monkeypatch, error):
    def refuse(*_, **__):
        raise Exception("Encountered error while reading array index") from error  # as orbax does

    monkeypatch.setattr("rlvr_jax.runs.checkpoint.ocp.StandardCheckpointHandler.restore", refuse)
    with Checkpoints(run / "checkpoints") as checkpoints, pytest.raises(OSError, match="checkpoints/3: cannot be read"):
        checkpoints.restore(state, 3)


def test_a_state_of_another_form_is_no_damage(run, state):
    with (
        Checkpoints(run / "checkpoints") as checkpoints,
        pytest.raises(ValueError, match=r"state\['b'\] was saved") as e,
    ):
        checkpoints.restore(state | {"b": jnp.ones(5)}, 3)
    assert not isinstance(e.value, DamagedCheckpoint)


def test_a_checkpoint_without_checksums_is_taken_with_a_warning(run, state, caplog):
    path = run / "checkpoints" / "3" / "host" / "metadata"
    outer = json.loads(path.read_text())
    path.write_text(json.dumps({name: outer[name] for name in ("host", "empty")}))  # as older versions wrote it
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore(state, 3)
    assert int(restored.state["step"]) == 3
    assert restored.arrays.keys() == ARRAYS.keys()
    assert "without checksums" in caplog.text


def damage_state(run, step):
    path = run / "checkpoints" / str(step) / "state" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:-20])


def resumed(run, state, **options):
    step = resumable(run_folder(str(run)), {"lr": 1e-3}, (), **options)
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = restore(checkpoints, state, step, fallback=options.get("fallback", False))
        assert checkpoints.latest == restored.step
        checkpoints.save(restored.step + 1, state, host=HOST)
        checkpoints.wait()
        assert checkpoints.latest == restored.step + 1
    return restored


def test_damage_ends_a_start_with_how_to_go_on(run, state):
    damage_state(run, 3)
    with pytest.raises(RunError, match=r"checkpoints/3: damaged: .*--checkpoint\.fallback .*steps 1, 2\)"):
        resumed(run, state)
    (run / "checkpoints" / "3" / "host" / "metadata").write_text("")
    with pytest.raises(ValueError, match=r"checkpoints/3: damaged: .*--checkpoint\.fallback .*steps 1, 2\)"):
        resumed(run, state)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2", "3"]


def test_fallback_takes_the_newest_whole_one_and_keeps_the_damaged(run, state, caplog):
    damage_state(run, 2)
    (run / "checkpoints" / "3" / "host" / "metadata").write_text("")
    before = [bytes_of(run / "checkpoints" / name) for name in "23"]
    restored = resumed(run, state, fallback=True)
    assert (restored.step, int(restored.state["step"])) == (1, 1)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2", "2.damaged", "3.damaged"]
    assert [bytes_of(run / "checkpoints" / f"{name}.damaged") for name in "23"] == before
    assert "checkpoints/3: damaged" in caplog.text
    assert "checkpoints/2: damaged" in caplog.text


def test_where_all_are_damaged_none_is_moved(run, state):
    for step in (1, 2, 3):
        damage_state(run, step)
    with pytest.raises(RunError, match="no older checkpoint exists"):
        resumed(run, state, fallback=True)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2", "3"]


# ---- checksums -----------------------------------------------------------------------------------------------------


def by_hand(words):
    """The formula of `checksums.of_tree`, in Python's integers."""
    total = 0
    for place, word in enumerate(words):
        h = (int(word) + place * 0x9E3779B9) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        total += h ^ h >> 16
    return total % 2**32


def test_a_checksum_is_its_formula_on_every_dtype_and_mesh():
    values = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    values[0, :3] = [np.nan, -0.0, 1e-42]
    tree = {
        "f": values,
        "h": values.astype(jnp.bfloat16),
        "i": np.arange(-24, 24, dtype=np.int32).reshape(8, 6),
        "y": np.arange(48, dtype=np.int8).reshape(8, 6),
        "t": values > 0,
    }
    sums = {name: one[2] for name, one in checksums.of_tree(jax.tree.map(jnp.asarray, tree)).items()}
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}
    assert sums == {f"['{name}']": by_hand(x.view(unsigned[x.dtype.itemsize]).ravel()) for name, x in tree.items()}
    sharded = jax.device_put(tree, NamedSharding(make_mesh(fsdp=4, tensor=2), P("fsdp", "tensor")))
    assert {name: one[2] for name, one in checksums.of_tree(sharded).items()} == sums
    assert checksums.of_tree({"x": jnp.zeros((2, 3))}) != checksums.of_tree({"x": jnp.zeros((3, 2))})
    swapped = values[::-1].copy()
    assert checksums.of_tree({"f": swapped})["['f']"] != checksums.of_tree({"f": values})["['f']"]
