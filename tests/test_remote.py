"""Files at a URL: copies of what a run reads, and the folder of a run that is kept there."""

import contextlib
import dataclasses
import json
import threading
import time

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import decode.run
from decode.config import DecodeConfig, MeshConfig, Setting
from decode.results import compare
from rlvr_jax.data.sources import check_source, load_problems
from rlvr_jax.models.hf import checkpoint_folder
from rlvr_jax.runs import folder as run_folder
from rlvr_jax.runs import remote
from rlvr_jax.runs.checkpoint import Checkpoints, check_place
from rlvr_jax.runs.checkpoint_s3 import extend_orbax_to_s3
from rlvr_jax.runs.folder import RunFolder
from rlvr_jax.runs.remote import local_copy
from tests.test_checkpoint import a_state, bits
from tests.tiny import tiny_checkpoint, write_tiny_problems


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store in memory, and this machine's cache."""
    monkeypatch.setenv("RLVR_JAX_CACHE", str(tmp_path / "machine"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def put(store, path, text):
    store.pipe_file(path, text.encode())


def everything(store, root):
    return {name.removeprefix(root + "/"): store.cat_file(name).decode() for name in store.find(root)}


@pytest.fixture
def fetched(monkeypatch):
    """The paths that were read from the store, in order."""
    paths, read = [], MemoryFileSystem.get_file

    def get_file(self, path, to, **options):
        paths.append(path)
        time.sleep(0.02)
        return read(self, path, to, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return paths


def test_a_file_is_copied_once_and_again_when_it_changes(store, fetched):
    put(store, "/bucket/train.jsonl", "one")
    threads = [threading.Thread(target=local_copy, args=("memory://bucket/train.jsonl",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    copy = local_copy("memory://bucket/train.jsonl")
    assert copy.read_text() == "one"
    assert copy.parts[-3:] == ("memory", "bucket", "train.jsonl")
    assert fetched == ["/bucket/train.jsonl"]
    assert copy.stat().st_mtime == pytest.approx(store.modified("/bucket/train.jsonl").timestamp(), abs=1e-3)
    put(store, "/bucket/train.jsonl", "two")
    assert local_copy("memory://bucket/train.jsonl").read_text() == "two"
    assert len(fetched) == 2


def test_half_a_model_does_not_look_like_one(store, fetched, monkeypatch):
    url = "memory://bucket/model"
    for name in ("config.json", "a.safetensors", "b.safetensors", "tokenizer.json", "pytorch_model.bin", "more/c.json"):
        put(store, f"/bucket/model/{name}", name)
    folder = checkpoint_folder(url)
    assert sorted(p.name for p in folder.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "config.json",
        "tokenizer.json",
    ]
    assert fetched[-1].endswith("config.json")
    # One shard fewer, the other one new, and a connection that breaks.
    store.rm_file("/bucket/model/a.safetensors")
    put(store, "/bucket/model/b.safetensors", "B")

    def broken(self, path, to, **options):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", broken)
        with pytest.raises(OSError, match="memory://bucket/model: ConnectionError: gone"):
            checkpoint_folder(url)
    assert not (folder / "config.json").exists()
    checkpoint_folder(url)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        "b.safetensors": "B",
        "config.json": "config.json",
        "tokenizer.json": "tokenizer.json",
    }


def test_errors_name_the_url_and_what_is_missing(store, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/none\.jsonl: no such file or folder"):
        check_source("memory://bucket/none.jsonl", rule="math_verify")
    with pytest.raises(ValueError, match=r"nowhere://x/y\.jsonl: .*nowhere"):
        load_problems("nowhere://x/y.jsonl")
    put(store, "/bucket/model/readme.md", "")
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/model: no file that matches .*\.safetensors"):
        checkpoint_folder("memory://bucket/model")

    def absent(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote, "url_to_fs", absent)
    for scheme, package, extra in (("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")):
        with pytest.raises(
            ValueError, match=rf"{scheme}://b/c: .* package {package}: pip install 'rlvr-jax\[{extra}\]'"
        ):
            RunFolder(f"{scheme}://b/c")
    with pytest.raises(ValueError, match="az://b/c: no checkpoints can be written there, expected a folder, gs://"):
        check_place("az://b/c")


def test_a_run_goes_on_where_its_machine_was_lost(store, tmp_path, monkeypatch, fetched):
    url = "memory://bucket/run"
    with RunFolder(url).take() as folder:
        assert folder.checkpoints == "memory://bucket/run/checkpoints"
        (folder.local / "generated").mkdir()
        (folder.local / "generated" / "000001.npz").write_text("old batch")
        (folder.local / "metrics.jsonl").write_text("1\n")
        (folder.local / ".half.tmp").write_text("half")
        folder.sync()
        put(store, "/bucket/run/checkpoints/1/state", "orbax")  # which writes there itself
        (folder.local / "generated" / "000001.npz").unlink()
        (folder.local / "rollouts.jsonl").write_text("a\n")
        with open(folder.local / "metrics.jsonl", "a") as file:
            file.write("2\n")
        assert everything(store, "/bucket/run")["metrics.jsonl"] == "1\n"
        monkeypatch.setattr(run_folder, "WAIT_S", 0.0)
        with pytest.raises(ValueError, match=r"memory://bucket/run: another run of this machine works in .*/runs/"):
            RunFolder(url).take()
        folder.local.rename(tmp_path / "aside")  # cleared away by something else: nothing of it is removed at the URL
        with pytest.raises(FileNotFoundError, match=r"memory://bucket/run: not copied to, since .* is gone"):
            folder.sync()
        (tmp_path / "aside").rename(folder.local)
    there = {"metrics.jsonl": "1\n2\n", "rollouts.jsonl": "a\n", "checkpoints/1/state": "orbax"}
    assert everything(store, "/bucket/run") == there
    (folder.local / "metrics.jsonl").write_text("never sent")
    # The same machine, then a fresh one: what is at the URL is the run. What it does not need stays there.
    for machine in ("machine", "another"):
        monkeypatch.setenv("RLVR_JAX_CACHE", str(tmp_path / machine))
        del fetched[:]
        with RunFolder(url, needed=lambda name: name == "metrics.jsonl").take() as folder:
            assert [p.name for p in folder.local.iterdir()] == ["metrics.jsonl"]
            assert (folder.local / "metrics.jsonl").read_text() == "1\n2\n"
        assert fetched == ["/bucket/run/metrics.jsonl"]
        assert everything(store, "/bucket/run") == there


def test_copies_are_made_meanwhile_and_a_store_that_fails_is_told_once(store, monkeypatch, caplog):
    with RunFolder("memory://bucket/run", every_s=0.02).take() as folder:
        (folder.local / "metrics.jsonl").write_text("1\n")
        until = time.monotonic() + 10
        while "metrics.jsonl" not in everything(store, "/bucket/run") and time.monotonic() < until:
            time.sleep(0.01)
        assert everything(store, "/bucket/run") == {"metrics.jsonl": "1\n"}

        def broken(*_, **__):
            raise PermissionError("denied")

        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "put_file", broken)
            (folder.local / "a.json").write_text("{}")
            while "PermissionError: denied" not in caplog.text and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.2)
            assert caplog.text.count("memory://bucket/run: PermissionError: denied") == 1
            with pytest.raises(OSError, match="memory://bucket/run: PermissionError"):
                folder.sync()
    assert "a.json" in everything(store, "/bucket/run")
    with contextlib.suppress(KeyError), RunFolder("memory://bucket/run").take() as folder:
        (folder.local / "b.json").write_text("{}")
        raise KeyError  # whatever ends it
    assert "b.json" in everything(store, "/bucket/run")


class Bucket(LocalFileSystem):
    """s3:// as a local folder, for what does not need a server."""

    cachable = False
    root = ""

    @classmethod
    def _strip_protocol(cls, path):
        path = "/" + str(path).removeprefix("s3:").lstrip("/")
        return path if path.startswith(cls.root) else cls.root + path


def test_checkpoints_at_s3_are_whole_or_absent(tmp_path, monkeypatch):
    """Through orbax's commit files; what tensorstore would have at s3:// is a folder here."""
    from etils.epath import backend
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    monkeypatch.setattr(Bucket, "root", str(tmp_path))
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: Bucket(auto_mkdir=True))
    monkeypatch.setattr("rlvr_jax.runs.checkpoint.filesystem", lambda url: None)
    local, in_folder = tensorstore_utils.build_kvstore_tspec, Bucket._strip_protocol
    for module, name in ((gcs_utils, "is_gcs_path"), (tensorstore_utils, "build_kvstore_tspec")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    extend_orbax_to_s3()
    spec = tensorstore_utils.build_kvstore_tspec("s3://bucket/run/1/state", name="w")
    there = {"driver": "s3", "bucket": "bucket", "path": "run/1/state", "endpoint": "http://127.0.0.1:9"}
    assert {key: spec["base"][key] for key in there} == there
    assert tensorstore_utils.build_kvstore_tspec("gs://bucket/run", name="w")["base"]["driver"] == "gcs"
    monkeypatch.setattr(
        tensorstore_utils, "build_kvstore_tspec", lambda where, *a, **b: local(in_folder(where), *a, **b)
    )
    monkeypatch.setattr("rlvr_jax.runs.checkpoint.extend_orbax_to_s3", lambda: None)  # done
    state = a_state()
    with Checkpoints("s3://bucket/run", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, host={"step": step})
    assert (tmp_path / "bucket/run/3/commit_success.txt").is_file()
    (tmp_path / "bucket/run/3/commit_success.txt").unlink()  # as a machine that is lost before the end leaves it
    with Checkpoints("s3://bucket/run", keep=2) as checkpoints:
        assert checkpoints.steps == [2]
        restored = checkpoints.restore(state, checkpoints.latest)
        assert restored.host == {"step": 2}
        assert bits(restored.state) == bits(state)
        checkpoints.save(3, state, host={"step": 3})
        checkpoints.wait()
        assert checkpoints.latest == 3


def test_a_decoding_run_at_a_url(store, tmp_path, monkeypatch):
    """Inputs and results at URLs, cut short, on a fresh machine: the results of a run on local files."""
    tiny_checkpoint(tmp_path / "rl", num_layers=1)
    for path in (tmp_path / "rl").iterdir():
        store.pipe_file(f"/bucket/rl/{path.name}", path.read_bytes())
    write_tiny_problems(tmp_path / "problems.jsonl", 5)
    store.pipe_file("/bucket/problems.jsonl", (tmp_path / "problems.jsonl").read_bytes())
    options = {"n": 2, "max_new_tokens": 8, "slots": 4, "mesh": MeshConfig(1, 1, 1), "settings": (Setting("rl", "rl"),)}
    options |= {"compile_cache": str(tmp_path / "compiled")}
    options |= {"graders": ("tests.tiny_pair:contains_answer",), "grader_workers": 1, "save_tokens": True}
    here = DecodeConfig(
        **{"rl": str(tmp_path / "rl"), "out": str(tmp_path / "out"), "problems": str(tmp_path / "problems.jsonl")},
        **options,
    )
    decode.run.run(decode.run.check(here))
    urls = {name: f"memory://bucket/{name}" for name in ("rl", "out")}
    there = dataclasses.replace(here, problems="memory://bucket/problems.jsonl", **urls)
    put_text, count = decode.run.Writer.put, 0

    def put_some(self, *arguments, **keywords):
        nonlocal count
        count += 1
        if count > 4:
            raise KeyboardInterrupt
        return put_text(self, *arguments, **keywords)

    job = decode.run.check(there)
    with monkeypatch.context() as patch:
        patch.setattr(decode.run.Writer, "put", put_some)
        with pytest.raises(KeyboardInterrupt):
            decode.run.run(job)
    assert len(store.cat_file("/bucket/out/rl/seed0.rows.jsonl").splitlines()) >= 4
    monkeypatch.setenv("RLVR_JAX_CACHE", str(tmp_path / "another"))
    decode.run.run(decode.run.check(there))
    assert json.loads(store.cat_file("/bucket/out/rl/seed0.json")) == json.loads(
        (tmp_path / "out/rl/seed0.json").read_text()
    )
    assert not [name for name in store.find("/bucket/out") if "tokens.parts" in name]
    assert store.exists("/bucket/out/rl/tokens.parquet")
    assert store.exists("/bucket/out/summary.csv")
    compared = compare.read(compare.CompareConfig(("memory://bucket/out", here.out)))
    one, other = (found.outcome.record["avg_at_k"] for found in compared.found)
    assert one == other
