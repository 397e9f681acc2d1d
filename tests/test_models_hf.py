"""Checkpoint folders: bit-identical round trips, and errors that name what is wrong."""

import dataclasses
import json
import os
import pickle
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import load_hf, save_hf
from rlvr_jax.models.qwen import ParamSpec, param_specs
from rlvr_jax.sharding.rules import ShardingRules, make_mesh
from tests.parity.variants import VARIANTS, shapes, weights
from tests.tiny import devices

QWEN2, QWEN3 = QwenConfig.from_hf(VARIANTS["qwen2_tied"]), QwenConfig.from_hf(VARIANTS["qwen3_untied_yarn"])


def write_folder(folder, name="qwen3_untied_yarn", **changed):
    """A folder as the safetensors library writes it; `changed` replaces tensors (None leaves one out)."""
    folder.mkdir(exist_ok=True)
    tensors = weights(name) | changed
    save_file({key: x for key, x in tensors.items() if x is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(VARIANTS[name]))
    return folder


def split_folder(folder, assign):
    """Turns a written folder into shards; `assign` maps the position of a tensor to its shard's number."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"part-{assign(i)}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: x for name, x in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return files


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def random_params(config, dtype=np.float32):
    """Random parameters, with negative zero, a subnormal, infinity and NaN among them."""
    random = np.random.default_rng(0)

    def leaf(spec):
        x = random.normal(size=spec.shape).astype(dtype)
        x.flat[:4] = np.array([-0.0, 1e-40, np.nan, np.inf], np.float32).astype(dtype)
        return jnp.asarray(x)

    return jax.tree.map(leaf, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("max_shard_bytes", [5e9, 9000])
def test_round_trip_is_bit_identical(config, dtype, max_shard_bytes, tmp_path):
    params = random_params(config, dtype)
    save_hf(tmp_path / "m", config, params, max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 5e9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]  # nothing temporary is left
    loaded_config, loaded = load_hf(tmp_path / "m", dtype=None)
    assert loaded_config == config
    assert_same_bits(params, loaded)


def test_layout_against_the_safetensors_library(tmp_path):
    """The library reads what is written, [out, in] per layer; and what it writes is read, whatever the dtype asked."""
    for name, config in (("qwen2_tied", QWEN2), ("qwen3_untied_yarn", QWEN3)):
        folder = write_folder(tmp_path / name, name)
        _, params = load_hf(folder, dtype=jnp.float32)
        N, H, D = config.num_heads, config.head_dim, config.hidden_size
        w = weights(name)
        np.testing.assert_array_equal(
            params["layers"]["q_proj"][1], w["model.layers.1.self_attn.q_proj.weight"].T.reshape(D, N, H)
        )
        np.testing.assert_array_equal(
            params["layers"]["o_proj"][0], w["model.layers.0.self_attn.o_proj.weight"].T.reshape(N, H, D)
        )
        save_hf(tmp_path / f"{name}-out", config, params)
        written = load_file(tmp_path / f"{name}-out" / "model.safetensors")
        assert {key: x.shape for key, x in written.items()} == shapes(VARIANTS[name])
        for key, x in written.items():
            np.testing.assert_array_equal(x, w[key], err_msg=key)
        with safe_open(tmp_path / f"{name}-out" / "model.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}


def test_conversion_rounds_to_nearest_even(tmp_path):
    folder = write_folder(tmp_path / "m")
    config, params = load_hf(folder)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    wanted = weights("qwen3_untied_yarn")["lm_head.weight"].T.astype(ml_dtypes.bfloat16)
    assert np.asarray(params["unembed"]).tobytes() == wanted.tobytes()
    save_hf(tmp_path / "wide", config, params, dtype=jnp.float32)
    _, wide = load_hf(tmp_path / "wide", dtype=None)
    assert_same_bits(jax.tree.map(lambda x: x.astype(jnp.float32), params), wide)


def test_mesh_places_every_parameter(tmp_path):
    folder = write_folder(tmp_path / "m")
    _, plain = load_hf(folder, dtype=jnp.float32)
    mesh = make_mesh(2, 2, 2)
    for rules in (None, ShardingRules(embed="tensor", heads=None, ffn="fsdp", layers="data", head_dim="fsdp")):
        _, sharded = load_hf(folder, dtype=jnp.float32, mesh=mesh, rules=rules)
        assert_same_bits(plain, sharded)
        assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(sharded))
        used = rules or ShardingRules()
        want = used.sharding(mesh, ("layers", "embed", "heads", "head_dim"), plain["layers"]["q_proj"].shape)
        assert sharded["layers"]["q_proj"].sharding == want
        shard = sharded["layers"]["q_proj"].addressable_shards[5]
        np.testing.assert_array_equal(shard.data, plain["layers"]["q_proj"][shard.index])
    save_hf(tmp_path / "again", QWEN3, sharded)
    assert_same_bits(plain, load_hf(tmp_path / "again", dtype=None)[1])


def test_loaded_arrays_survive_donation(tmp_path):
    """The CPU backend may take host buffers over without a copy; donating one must not write to another's memory."""
    _, params = load_hf(write_folder(tmp_path / "m"), dtype=jnp.float32, mesh=make_mesh(8, 1, 1))
    before = np.array(params["embed"])
    changed = jax.jit(lambda x: x.at[0, 0].set(7.0), donate_argnums=0)(params["embed"])
    fresh = load_hf(tmp_path / "m", dtype=jnp.float32)[1]["embed"]
    assert float(changed[0, 0]) == 7.0
    for shard in changed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data)[1:], before[1:])
    np.testing.assert_array_equal(fresh, before)


def test_errors_name_every_tensor(tmp_path):
    wrong = {
        "model.norm.weight": None,
        "model.layers.1.mlp.up_proj.weight": None,
        "model.layers.0.self_attn.q_proj.bias": np.zeros(96, np.float32),
        "model.layers.2.mlp.up_proj.weight": np.zeros((40, 32), np.float32),
        "model.layers.0.mlp.down_proj.weight": np.zeros((40, 32), np.float32),
        "lm_head.weight": np.zeros((61, 32), np.int32),
    }
    with pytest.raises(ValueError, match="problems with its tensors") as caught:
        load_hf(write_folder(tmp_path / "m", **wrong))
    lines = set(str(caught.value).split("\n  ")[1:])
    assert lines == {
        "missing: model.norm.weight [32]",
        "missing: model.layers.1.mlp.up_proj.weight [40, 32]",
        "unknown: model.layers.0.self_attn.q_proj.bias [96]",
        "unknown: model.layers.2.mlp.up_proj.weight [40, 32]",
        "wrong shape: model.layers.0.mlp.down_proj.weight is [40, 32], expected [32, 40]",
        "wrong dtype: lm_head.weight is I32, expected one of F64, F32, F16, BF16",
    }


def test_tied_copy_of_the_unembedding(tmp_path):
    """Published tied checkpoints may hold lm_head.weight too: a true copy is passed over, another matrix refused."""
    embed = weights("qwen2_tied")["model.embed_tokens.weight"]
    config, params = load_hf(write_folder(tmp_path / "m", "qwen2_tied", **{"lm_head.weight": embed}))
    assert config.tie_word_embeddings
    assert "unembed" not in params
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        load_hf(write_folder(tmp_path / "n", "qwen2_tied", **{"lm_head.weight": embed + 1}))


def test_sharded_folders(tmp_path):
    folder = write_folder(tmp_path / "m")
    _, whole = load_hf(folder, dtype=None)
    files = split_folder(folder, lambda i: i % 3)
    assert_same_bits(whole, load_hf(folder, dtype=None)[1])
    index = folder / "model.safetensors.index.json"

    # the same tensor in a second shard
    name = next(iter(files))
    other = next(file for file in files.values() if file != files[name])
    save_file(load_file(folder / other) | {name: weights("qwen3_untied_yarn")[name]}, folder / other)
    with pytest.raises(ValueError, match=f"duplicate: {name}"):
        load_hf(folder)

    # a tensor that the index promises and no shard holds
    split_folder(write_folder(tmp_path / "n"), lambda i: i % 2)
    index = tmp_path / "n" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"model.extra": "part-0.safetensors"}}))
    with pytest.raises(ValueError, match=r"missing: model\.extra"):
        load_hf(tmp_path / "n")

    # a shard that is not there, or lies elsewhere
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"model.extra": "part-9.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"part-9.*model.extra"):
        load_hf(tmp_path / "n")
    index.write_text(json.dumps({"weight_map": {"model.extra": "../part-0.safetensors"}}))
    with pytest.raises(ValueError, match=r"'../part-0.safetensors'"):
        load_hf(tmp_path / "n")
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        load_hf(tmp_path / "n")


def test_damaged_files(tmp_path):
    file = write_folder(tmp_path / "m") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="cut short"):
        load_hf(tmp_path / "m")
    file.write_bytes(whole[:5])
    with pytest.raises(ValueError, match="cut short"):
        load_hf(tmp_path / "m")
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    name, entry = next((k, v) for k, v in header.items() if k != "__metadata__")
    twice = (json.dumps(header)[:-1] + f', "{name}": {json.dumps(entry)}}}').encode()
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + whole[8 + int.from_bytes(whole[:8], "little") :])
    with pytest.raises(ValueError, match=f"duplicate tensors in the header: {name}"):
        load_hf(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="both"):
        load_hf(tmp_path / "m")


def test_pickle_is_never_read(tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()

    class Boom:
        def __reduce__(self):
            return (os._exit, (1,))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(FileNotFoundError, match=r"never read: pytorch_model.bin"):
        load_hf(folder)


def test_no_such_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_hf(tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Qwen/absent-model.*hub"):
        load_hf("Qwen/absent-model")


def test_hub_name_downloads_json_and_safetensors_only(tmp_path, monkeypatch):
    import huggingface_hub

    folder = write_folder(tmp_path / "m")
    asked = []

    def snapshot(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config, _ = load_hf("Some-Org/some.model")
    assert config == QWEN3
    assert asked == [("Some-Org/some.model", ["*.json", "*.safetensors", "*.jinja", "*.txt"])]


def test_save_refuses_what_does_not_fit(tmp_path):
    params = random_params(QWEN3)
    broken = params | {"final_norm": params["final_norm"][:-1], "extra": params["final_norm"]}
    with pytest.raises(ValueError, match="do not fit") as caught:
        save_hf(tmp_path / "m", dataclasses.replace(QWEN3, num_layers=3), broken)
    assert "wrong shape: ['final_norm']" in str(caught.value)
    assert "unknown: ['extra']" in str(caught.value)
    assert "wrong shape: ['layers']['q_proj']" in str(caught.value)
    with pytest.raises(ValueError, match="int32"):
        save_hf(tmp_path / "m", QWEN3, params, dtype=jnp.int32)
    assert not list(tmp_path.iterdir())


def test_save_never_leaves_half_a_checkpoint(tmp_path):
    params = random_params(QWEN3)
    save_hf(tmp_path / "m", QWEN3, params)
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        save_hf(tmp_path / "m", QWEN3, params)

    class Failing:
        eos_token_id = 3

        def save_pretrained(self, folder):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_hf(tmp_path / "m", QWEN3, params, tokenizer=Failing(), overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]

    # replacing a sharded checkpoint by a single file leaves no shard behind, and other files alone
    (tmp_path / "m" / "notes.txt").write_text("kept")
    save_hf(tmp_path / "m", QWEN3, params, overwrite=True, max_shard_bytes=9000)
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert_same_bits(params, load_hf(tmp_path / "m", dtype=None)[1])
    save_hf(tmp_path / "m", QWEN2, random_params(QWEN2), overwrite=True)
    assert load_hf(tmp_path / "m")[0] == QWEN2
    assert (tmp_path / "m" / "notes.txt").read_text() == "kept"


def test_configs_carry_the_tokenizers_ids(tmp_path):
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = None, 5, 6

        def save_pretrained(self, folder):
            with open(os.path.join(folder, "tokenizer.json"), "w") as file:
                file.write("{}")

    params = random_params(QWEN2, jnp.bfloat16)
    save_hf(tmp_path / "m", QWEN2, params, tokenizer=Tokenizer())
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    assert generation == {"eos_token_id": 5, "pad_token_id": 6}
    assert (content["eos_token_id"], content["pad_token_id"]) == (5, 6)
    assert content["torch_dtype"] == "bfloat16"
    assert (tmp_path / "m" / "tokenizer.json").exists()
    save_hf(tmp_path / "n", QWEN2, params, generation_config={"eos_token_id": [5, 7], "temperature": 0.7})
    generation = json.loads((tmp_path / "n" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [5, 7], "temperature": 0.7}


def test_peak_host_memory(tmp_path):
    """Loading 105 MB of float32 as bfloat16 grows the process by about the 52 MB that stay, not by multiples."""
    config = dataclasses.replace(QWEN3, hidden_size=512, intermediate_size=2048, num_layers=8, vocab_size=512)
    folder = tmp_path / "m"
    save_hf(folder, config, random_params(config))
    size = (folder / "model.safetensors").stat().st_size
    program = (
        "import resource, jax, jax.numpy as jnp\n"
        "from rlvr_jax.models.hf import load_hf\n"
        "jax.block_until_ready(jnp.zeros(3))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"before = peak(); params = load_hf({str(folder)!r}); print(peak() - before)"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=env)
    assert int(out.stdout) < 1.25 * size / 2, f"grew by {int(out.stdout) / 1e6:.0f} MB, file of {size / 1e6:.0f} MB"


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each process loads only its part of a mesh over both; saving gathers; a refusal reaches both, none waits."""
    write_folder(tmp_path / "m")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = f"""
import os, sys
import jax, jax.numpy as jnp
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:{port}", 2, int(sys.argv[1]))
from rlvr_jax.models.hf import load_hf, save_hf
from rlvr_jax.sharding.rules import make_mesh
config, params = load_hf({str(tmp_path / "m")!r}, dtype=jnp.float32, mesh=make_mesh(1, 2, 2))
here = sum(s.data.nbytes for s in params["layers"]["q_proj"].addressable_shards)
print("part", here / params["layers"]["q_proj"].nbytes)
save_hf({str(tmp_path / "out")!r}, config, params, max_shard_bytes=9000)
try:
    save_hf({str(tmp_path / "out")!r}, config, params)
except FileExistsError as error:
    print("refused", error)
"""
    env = os.environ | devices(2)
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(i)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for run in runs:
        out, _ = run.communicate(timeout=200)
        assert run.returncode == 0
        assert "part 0.5" in out
        assert "refused" in out
    assert_same_bits(load_hf(tmp_path / "m", dtype=None)[1], load_hf(tmp_path / "out", dtype=None)[1])
