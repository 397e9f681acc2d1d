"""What makes a start the run of its folder: configuration and content, not paths; nothing is begun over another run."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decode.results.files import CONTENT_OF
from rlvr_jax.runs.checkpoint import Checkpoints
from rlvr_jax.runs.distributed import Cluster
from rlvr_jax.runs.fingerprint import BLOCK_BYTES, BLOCKS, of_tokenizer, of_weights
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.lock import FolderInUse, lock
from tests.runs import arguments, write_inputs
from tests.tiny import tiny_tokenizer, write_tiny_problems
from train import sft
from train.check.examine import examine
from train.check.prepare import check, configuration, prepare
from train.run.resume import resumable, run_folder
from train.run.same_run import record_of, require_same_run, write_record


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("same")
    write_inputs(path, hidden_size=16, num_layers=1)
    (path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}+1", "response": "{i + 1}"}}\n' for i in range(8)))
    return path


def started(place, folder, **changes):
    """A run's configuration, checked: what a start compares."""
    return check(configuration(arguments(place, folder, **changes)))


def saved(job, step=3, record=None):
    """Its folder as the run leaves it after a step."""
    write_record(job.folder.local, job.config, job.record)
    with Checkpoints(job.folder.checkpoints) as checkpoints:
        checkpoints.save(step, {"w": jnp.ones(2)}, host={"config": job.record if record is None else record})
    job.folder.release()


def change_weights(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + np.float32(1)}, path)


def change_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def change_tokenizer(folder):
    path = folder / "tokenizer.json"
    tokens = json.loads(path.read_text())
    tokens["added_tokens"][0]["rstrip"] = True
    path.write_text(json.dumps(tokens))


def change_architecture(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5e5}))


def change_stop_tokens(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 2]}))


def change_problems(folder):
    write_tiny_problems(folder.parent / "train.jsonl", 41)


def change_answers(folder):
    write_tiny_problems(folder.parent / "train.jsonl", 40, answer="8")


def test_a_run_goes_on_wherever_its_inputs_lie(place, tmp_path, monkeypatch):
    saved(started(place, tmp_path / "run"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(place, elsewhere)
    monkeypatch.chdir(elsewhere)
    for model, data in (("model", "train.jsonl"), ("./model/", f"{elsewhere}/../elsewhere/train.jsonl")):
        job = started(place, tmp_path / "run", model__path=model, data__train=data)
        assert job.resume_from == 3
        job.folder.release()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "weights of model.path"),
        (change_template, "chat template"),
        (change_tokenizer, "tokenizer files"),
        (change_architecture, "architecture of model.path"),
        (change_stop_tokens, "stop tokens"),
        (change_problems, "training problems of data.train"),
        (change_answers, "answers of data.train"),
    ],
)
def test_content_that_has_changed_is_named(place, tmp_path, change, named):
    source = tmp_path / "inputs"
    shutil.copytree(place, source)
    saved(started(source, tmp_path / "run"))
    change(source / "model")
    with pytest.raises(ValueError, match=f"^{named}: the content is not what the run began with; use another") as error:
        started(source, tmp_path / "run")
    assert len(str(error.value)) < 150  # and no hashes in it


def test_a_run_that_an_older_version_began_is_known_by_its_data_alone(place, tmp_path, caplog):
    job = started(place, tmp_path / "run")
    older = {name: value for name, value in job.record.items() if name != "inputs"}
    saved(job, record=older)
    assert started(place, tmp_path / "run").resume_from == 3
    assert "an older version began this run" in caplog.text
    saved(job, step=4, record=older | {"data_sha256": "a" * 64})
    with pytest.raises(ValueError, match=r"training data as the model reads them \(problems") as error:
        started(place, tmp_path / "run")
    assert "aaaa" not in str(error.value)


def test_an_input_that_is_gone_counts_and_a_new_one_does_not():
    record = {"lr": 1, "inputs": {"a": "1"}, "data_sha256": "2"}
    require_same_run(record | {"inputs": {}}, record, (), defaults={})
    require_same_run({"inputs": {"a": "1"}, "data_sha256": "2"}, record, (), defaults={"lr": 1})
    with pytest.raises(ValueError, match=r"^b: the content"):
        require_same_run(record | {"inputs": {"a": "1", "b": "1"}}, record, (), defaults={})
    with pytest.raises(ValueError, match=r"^lr: the checkpoint was made with 2"):
        require_same_run(record | {"lr": 2}, record, (), defaults={})


def test_sft_compares_content_too(place, tmp_path):
    source = tmp_path / "inputs"
    shutil.copytree(place, source)
    config = sft.SFTConfig(
        model=str(source / "model"), data=str(source / "rows.jsonl"), batch=8, run_dir=str(tmp_path / "run")
    )
    saved(sft.check(config))
    os.rename(source / "model", source / "moved")
    moved = dataclasses.replace(config, model=str(source / "moved"), tokenizer=str(place / "model"))
    job = sft.check(moved)
    assert job.resume_from == 3
    job.folder.release()
    change_weights(source / "moved")
    with pytest.raises(ValueError, match=r"^weights of model: the content is not"):
        sft.check(moved)
    tiny_tokenizer().save_pretrained(tmp_path / "random")
    shutil.copy(place / "model" / "config.json", tmp_path / "random")
    random = {"init_config": str(tmp_path / "random"), "tokenizer": str(tmp_path / "random")}
    with pytest.raises(ValueError, match="of model: the content is not"):
        sft.check(dataclasses.replace(config, model="", **random))


# ---- a folder without a checkpoint -----------------------------------------------------------------------------------


def left(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def test_results_of_another_run_are_not_begun_over(place, tmp_path, caplog):
    folder = tmp_path / "run"
    job = started(place, folder)
    write_record(folder, job.config, job.record)
    job.folder.release()
    started(place, folder, optim__lr=0.5).folder.release()  # there is nothing to lose yet
    for lost in ("metrics.jsonl", "rollouts/step_000001.jsonl", "generated/batch_00000000.npz"):
        left(folder, lost)
        caplog.clear()
        with pytest.raises(ValueError, match=rf"{folder} holds the results of another run \({lost[:5]}.*optim\.lr"):
            started(place, folder, optim__lr=0.5)
        started(place, folder, seed=0, eval__every=7).folder.release()
        assert "begins again at its first step" in caplog.text
        (folder / lost).unlink()
    left(folder, "metrics.jsonl")
    (folder / "inputs.json").write_text(json.dumps({"inputs": job.record["inputs"] | {"answers of data.train": "?"}}))
    with pytest.raises(ValueError, match=r"another run \(metrics\.jsonl\): answers of data\.train: the content"):
        started(place, folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl, and no config\.json says of which run"):
        started(place, folder)


def test_a_folder_of_something_else_is_left_alone(place, tmp_path):
    for folder, key in ((place / "model", "architectures"), (tmp_path / "sft", "batch"), (tmp_path / "broken", "")):
        if folder.name == "sft":
            write_record(folder, sft.SFTConfig(), record_of(sft.SFTConfig(), {}, []))
        elif folder.name == "broken":
            left(folder, "config.json")
            (folder / "config.json").write_text("{")
        before = (folder / "config.json").read_bytes()
        with pytest.raises(ValueError, match=rf"{folder}/config\.json: .*{key}.*use another folder for the results"):
            started(place, folder)
        assert (folder / "config.json").read_bytes() == before
        lock(folder).close()  # a refused start holds nothing


# ---- one writer ------------------------------------------------------------------------------------------------------


def test_a_second_start_leaves_the_first_one_s_save_alone(place, tmp_path):
    folder = tmp_path / "run"
    saved(started(place, folder))
    unfinished = folder / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(folder / "checkpoints" / "3", unfinished)
    files = sorted(unfinished.rglob("*"))
    first = prepare(arguments(place, folder))
    for changes in ({}, {"optim__lr": 0.5}):
        with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()} on"):
            prepare(arguments(place, folder, **changes))
    first.folder.release()
    with pytest.raises(ValueError, match=r"optim\.lr"):
        prepare(arguments(place, folder, optim__lr=0.5))
    second = prepare(arguments(place, folder))
    assert sorted(unfinished.rglob("*")) == files
    with second.folder, Checkpoints(second.folder.checkpoints):  # who holds the folder clears up, in the background
        until = time.monotonic() + 20
        while unfinished.exists() and time.monotonic() < until:
            time.sleep(0.05)
    assert not unfinished.exists()
    assert resumable(run_folder(str(folder)), second.record, ()) == 3
    lock(folder).close()


def test_process_0_of_several_holds_the_lock_and_a_dry_run_none(place, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    found = examine(configuration(arguments(place, folder)))
    assert all(check.ok for check in found.checks)
    assert not folder.exists()
    monkeypatch.setattr("rlvr_jax.runs.folder.cluster", lambda: Cluster(1, 2))
    RunFolder(str(folder)).take()
    assert not folder.exists()
    monkeypatch.setattr("rlvr_jax.runs.folder.cluster", lambda: Cluster(0, 2))
    monkeypatch.setattr("rlvr_jax.runs.folder.WAIT_S", 0.0)
    with RunFolder(str(folder)).take(), pytest.raises(FolderInUse):
        RunFolder(str(folder)).take()


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_weights_are_known_by_their_content(tmp_path):
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 40)
    first = of_weights(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert of_weights(tmp_path / "b") == first
    for place in (0, 5_000, 10_239):
        changed = bytearray(weights.read_bytes())
        changed[place] ^= 1
        (tmp_path / "b" / "model.safetensors").write_bytes(changed)
        assert of_weights(tmp_path / "b") != first
    os.rename(weights, tmp_path / "a" / "other.safetensors")
    assert of_weights(tmp_path / "a") != first


def test_one_matrix_of_a_large_file_counts(tmp_path):
    size = 40 * BLOCKS * BLOCK_BYTES
    path = Path(tmp_path / "model.safetensors")
    with open(path, "wb") as file:
        file.truncate(size)  # zeros that take no room
    seen = {of_weights(tmp_path)}
    for start in (0, size // 3, size - (1 << 20)):
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(b"\1" * (1 << 20))
        seen.add(of_weights(tmp_path))
    assert len(seen) == 4
    assert of_weights(tmp_path) in seen


def test_a_tokenizer_on_the_hub_counts_by_its_name_and_template(tmp_path):
    """It has no files here, so nothing may say that two of them are the same."""
    assert of_tokenizer("t", tmp_path / "owner" / "name").keys() == of_tokenizer("t", None).keys() == {"chat template"}
    assert of_tokenizer("t", tmp_path).keys() == set(CONTENT_OF["tokenizer"])
