"""The exported folder: what of the base model's settings it keeps."""

import json

import jax
import pytest

from rlvr_jax.data.text import load_tokenizer, stop_token_ids
from rlvr_jax.models.qwen import init_params
from tests.tiny import tiny_config, tiny_tokenizer
from train.run.export import export

TOKENIZER = tiny_tokenizer()
END, PAD, START = (TOKENIZER.convert_tokens_to_ids(f"<|{name}|>") for name in ("im_end", "endoftext", "im_start"))


@pytest.fixture(scope="module")
def model():
    config = tiny_config(num_layers=1)
    return config, init_params(config, jax.random.key(0))


@pytest.mark.parametrize(
    ("of_config", "settings", "expected"),
    [
        ([PAD, END], None, {"eos_token_id": [END, PAD], "pad_token_id": PAD}),
        (PAD, None, {"eos_token_id": [END, PAD], "pad_token_id": PAD}),
        (None, None, {"eos_token_id": [END], "pad_token_id": PAD}),
        (PAD, {"temperature": 0.6}, {"temperature": 0.6, "eos_token_id": [END, PAD]}),
        (PAD, {"eos_token_id": [END, START], "top_k": 20}, {"eos_token_id": [END, START], "top_k": 20}),
    ],
)
def test_the_export_stops_where_the_policy_did(model, of_config, settings, expected, tmp_path):
    base, hf = tmp_path / "base", tmp_path / "hf"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"eos_token_id": of_config}))
    if settings is not None:
        (base / "generation_config.json").write_text(json.dumps(settings))
    TOKENIZER.save_pretrained(base)
    export(hf, *model, TOKENIZER, base=base, tokenizer_folder=base, dtype="float32")
    assert json.loads((hf / "generation_config.json").read_text()) == expected
    assert json.loads((hf / "config.json").read_text())["eos_token_id"] == expected["eos_token_id"]
    assert set(stop_token_ids(load_tokenizer(hf), hf)) == set(stop_token_ids(TOKENIZER, base))
