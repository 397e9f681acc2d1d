"""Model folders from strangers: each fault is one sentence with the file's name, in bounded time and memory."""

import json
import random
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf import load_hf
from rlvr_jax.models.tensorfile import read_header
from tests.mutations import mutated, refusal
from tests.test_models_config import QWEN3_8B
from tests.test_models_hf import assert_same_bits, write_folder

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(autouse=True)
def bounded():
    """Each test takes seconds and grows the process by less than 300 MB, whatever a file says."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads", "max_position_embeddings"])
@pytest.mark.parametrize("value", [1_000_000_000_000, -3, 0, 2.0, True, "64", [64], float("nan")])
def test_sizes_are_integers_within_bounds(key, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B | {key: value}))
    with pytest.raises(ValueError, match=r"config\.json: .*(expected an integer from 1 to|NaN is no number)") as caught:
        QwenConfig.from_hf(tmp_path)
    assert key in str(caught.value) or value != value


def test_a_million_layers(tmp_path):
    folder = write_folder(tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 1_000_000}))
    with pytest.raises(ValueError, match=r"config\.json: 'num_hidden_layers' is 1000000, expected .* to 1,024"):
        load_hf(folder)
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 1000}))
    with pytest.raises(ValueError, match=r"(?s)missing: model\.layers\.2\..*\n  and \d+ more$") as caught:
        load_hf(folder)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' is '1e-6'"),
        ({"rms_norm_eps": -1.0}, "'rms_norm_eps' is -1.0"),
        ({"rope_theta": 0}, "rope_theta is 0.0"),
        ({"rope_theta": True}, "'rope_theta' is True"),
        ({"rope_theta": 10**400}, "not JSON|'rope_theta' is 1000"),
        ({"initializer_range": [0.02]}, "'initializer_range'"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' is 'false', expected true or false"),
        ({"use_sliding_window": "no"}, "'use_sliding_window'"),
        ({"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers is 'all'"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"layer_types": [{}] * 36}, "layers"),
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"architectures": 3}, "architectures is 3"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"rope_scaling": {"rope_type": {}, "factor": 2.0}}, "rope scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": True}}, "factor is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, "truncate is 1"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}}, "original_max_position"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}}, "beta_slow is 0"),
    ],
)
def test_odd_values_are_named(change, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B | change))
    with pytest.raises(ValueError, match=rf"config\.json: .*({named})"):
        QwenConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f'{{"model_type": {DEEP}}}', "nested too deeply"),
        ('{"rms_norm_eps": NaN}', "NaN is no number"),
        ('{"rope_theta": -Infinity}', "-Infinity is no number"),
        ("9" * 5000, "not JSON"),
        ('{"a": "' + "x" * (1 << 24) + '"}', "more than 16,777,216 bytes"),
        ("\x00\x01", "not JSON"),
    ],
    ids=["deep", "nan", "infinity", "digits", "huge", "binary"],
)
def test_text_that_is_no_json(text, named, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: .*{named}"):
        QwenConfig.from_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text[: 1 << 20] if len(text) > 1 << 21 else text)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: "):
        load_hf(tmp_path)


def write_raw(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),
        ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20),
        ({"a": entry([2], 0, 8)}, 4),
        ({"a": entry([2], 0, 8)}, 12),
        ({"a": entry([2], 8, 0)}, 8),
        ({"a": entry([-2], 0, 8)}, 8),
        ({"a": entry([2**40, 2**40], 0, 8)}, 8),
        ({"a": entry([3], 0, 8)}, 8),
        ({"a": entry([2.0], 0, 8)}, 8),
        ({"a": entry([2], 0, 2**70)}, 8),
        ({"a": entry([2], 0, 8, "X9")}, 8),
        ({"a": entry([2], 0, 8, 7)}, 8),
        ({"a": 3}, 0),
        ([1], 0),
        (b'{"a": NaN}', 0),
        (b"\xff\xfe", 0),
        (f'{{"a": {DEEP}}}'.encode(), 0),
        (b'{"a":%b,"a":%b}' % ((json.dumps(entry([2], 0, 8)).encode(),) * 2), 8),
    ],
    ids=[
        *("overlap", "same bytes", "gap", "beyond the file", "bytes left over", "backwards", "negative", "overflow"),
        *("wrong size", "float", "huge offset", "dtype", "dtype number", "no entry", "list", "nan", "binary", "deep"),
        "twice",
    ],
)
def test_headers_that_do_not_describe_the_file(header, size, tmp_path):
    path = write_raw(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=r"x\.safetensors: ") as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 99_000_000, 17_000_000, 100])
def test_header_lengths(length, tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {}, length=length)
    with pytest.raises(ValueError, match=r"x\.safetensors: not a safetensors file"):
        read_header(path)


def test_a_long_header_is_refused_before_it_is_read(tmp_path):
    one = '"t%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    raw = "{" + ",".join(one % i for i in range(300_000)) + "}"
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"x\.safetensors: .*its header has 18,000,001 bytes"):
        read_header(write_raw(tmp_path / "x.safetensors", raw.encode()))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "weight_map",
    [
        *(None, [], 3, {}, {"a": 3}, {"a": None}, {"a": ["x.safetensors"]}, {"a": {}}),
        *({"a": "/etc/passwd"}, {"a": "/tmp/x.safetensors"}, {"a": "../x.safetensors"}, {"a": "b/../../x.safetensors"}),
        *({"a": ""}, {"a": "."}, {"a": ".."}, {"a": "x\0.safetensors"}, {"a": "x.bin"}),
    ],
    ids=str,
)
def test_index_names_files_of_the_folder_alone(weight_map, tmp_path):
    folder = write_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json: .*(weight_map|expected a \.safetensors file)"):
        load_hf(folder)


def test_mutated_configs_load_or_are_refused_by_name(tmp_path):
    """1,500 configs with one to three changes; the file's name is in every refusal, and a valid one is hashable."""
    rng, loaded = random.Random(0), 0
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.9}
    more = {"rope_scaling": yarn, "layer_types": ["full_attention"] * 36, "architectures": ["Qwen3ForCausalLM"]}
    for trial in range(1500):
        content = QWEN3_8B | more
        for _ in range(rng.randint(1, 3)):
            content = mutated(content, rng)
        (tmp_path / "config.json").write_text(json.dumps(content))
        config, said = refusal(lambda: QwenConfig.from_hf(tmp_path))
        if said is not None:
            assert str(tmp_path / "config.json") in said, trial
            assert "\n" not in said
            assert len(said) < 1500
            continue
        loaded += 1
        assert hash(config) is not None
        assert QwenConfig.from_hf(config.to_hf()) == config
        if config.rope_scaling is not None:
            assert np.isfinite(config.rope_scaling.cos_sin_factor)
    assert 150 < loaded < 1350, "both happen"


def test_mutated_headers_load_or_are_refused_by_name(tmp_path):
    folder = write_folder(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header.pop("__metadata__", None)
    _, expected = load_hf(folder, dtype=jnp.float32)
    rng, loaded = random.Random(1), 0
    for trial in range(300):
        if trial % 3:
            write_raw(file, mutated(header, rng), data)
        else:  # bytes of the header or of its length
            at, raw = rng.randrange(8 + length), bytearray(whole)
            raw[at] = rng.randrange(256)
            file.write_bytes(raw)
        read, said = refusal(lambda: load_hf(folder, dtype=jnp.float32))
        if said is not None:
            assert str(folder) in said, trial
            assert len(said) < 3000
            continue
        loaded += 1
        assert jax.tree.map(jnp.shape, read[1]) == jax.tree.map(jnp.shape, expected)
    assert loaded < 100
    write_raw(file, header, data)
    assert_same_bits(load_hf(folder, dtype=jnp.float32)[1], expected)
