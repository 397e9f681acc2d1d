"""Pairs over one tokenizer whose embeddings differ in padding rows: the padding is never seen, whatever it holds."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.check.inputs import read_inputs
from decode.config import DecodeConfig, MeshConfig, Setting
from decode.diagnose import run as diagnose
from decode.diagnose.config import DiagnoseConfig
from decode.draw import load
from rlvr_jax.generation import generate_selective
from rlvr_jax.microscope.pair import score_pair
from rlvr_jax.models.hf import save_hf
from rlvr_jax.models.qwen import init_params
from rlvr_jax.models.vocabulary import cut_vocabulary
from rlvr_jax.scoring import criterion_values
from tests.tiny import tiny_checkpoint, tiny_config, tiny_tokenizer, write_tiny_problems

ROWS = 8


def padded(config, params):
    """The model with rows of padding that would win every draw."""
    rows = jnp.full((ROWS, config.hidden_size), 3.0)
    more = {"embed": jnp.concatenate([params["embed"], rows])}
    if "unembed" in params:
        more["unembed"] = jnp.concatenate([params["unembed"], 100 * rows.T], axis=1)
    return dataclasses.replace(config, vocab_size=config.vocab_size + ROWS), params | more


@pytest.fixture(scope="module")
def models():
    """(config, params) of base and rl; untied, of one layer."""
    config = tiny_config(num_layers=1, tie_word_embeddings=False)
    return [(config, init_params(config, jax.random.key(seed))) for seed in range(2)]


def same(a, b):
    for name, one, other in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("wide", [0, 1])
def test_the_library_cuts_both_to_the_common_rows(models, wide, caplog):
    base, rl = models
    pair = [padded(*model) if i == wide else model for i, model in enumerate(models)]
    prompts, responses = [[1, 2, 3]], [[4, 5, 6, 7]]
    options = {"criterion": "kl", "tau": 0.1, "gamma": 0.5, "max_new_tokens": 6, "n": 4, "stop_tokens": (34,)}
    same(generate_selective(*base, *rl, prompts, **options), generate_selective(*pair[0], *pair[1], prompts, **options))
    assert "both models are cut to 48" in caplog.text
    plain, cut = (score_pair(*x[0], *x[1], prompts, responses, top=3, batch_tokens=8, chunk=8) for x in (models, pair))
    same(plain[0], cut[0])
    values = [criterion_values(*x[0], *x[1], prompts, responses, criteria=["kl"]) for x in (models, pair)]
    np.testing.assert_array_equal(values[0]["kl"][0], values[1]["kl"][0])
    with pytest.raises(ValueError, match="top=49: expected 1 to 48"):
        score_pair(*pair[0], *pair[1], prompts, responses, top=49)
    with pytest.raises(ValueError, match=r"prompts\[0\] has token 50"):
        generate_selective(*pair[0], *pair[1], [[50]], **options)


def test_cut_vocabulary_bounds(models):
    for size in (0, 49):
        with pytest.raises(ValueError, match="expected 1 to 48"):
            cut_vocabulary(*models[0], size)
    config, params = cut_vocabulary(*models[0], 40)
    assert (config.vocab_size, params["embed"].shape[0], params["unembed"].shape[1]) == (40, 40, 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """base, rl, and `wide`: rl with padding."""
    place = tmp_path_factory.mktemp("pair")
    for seed, role in enumerate(("base", "rl")):
        tiny_checkpoint(place / role, seed=seed, num_layers=1, tie_word_embeddings=False)
    config = tiny_config(num_layers=1, tie_word_embeddings=False)
    params = init_params(config, jax.random.key(1), jnp.float32)
    save_hf(place / "wide", *padded(config, params), tokenizer=tiny_tokenizer())
    write_tiny_problems(place / "problems.jsonl", 3)
    return place


def decoding(folders, rl):
    return DecodeConfig(
        base=str(folders / "base"),
        rl=str(folders / rl),
        problems=str(folders / "problems.jsonl"),
        max_new_tokens=4,
        mesh=MeshConfig(1, 1, 1),
        settings=(Setting(name="x", model="pair", criterion="all"),),
    )


def test_the_programs_read_the_common_rows_alone(folders, caplog):
    plain, wide = (read_inputs(decoding(folders, rl)) for rl in ("rl", "wide"))
    assert {role: model.vocab_size for role, model in wide.models.items()} == {"base": 48, "rl": 48}
    assert "the last 8 of rl, which are beyond every tokenizer, are left out" in caplog.text
    assert wide.stop_tokens == plain.stop_tokens
    loaded = [load("rl", x.folders["rl"], "float32", "model", None, x.models["rl"].vocab_size) for x in (plain, wide)]
    assert loaded[0].config == loaded[1].config
    jax.tree.map(np.testing.assert_array_equal, loaded[0].params, loaded[1].params)
    words = {"base": str(folders / "base"), "rl": str(folders / "wide"), "out": str(folders / "out"), "top": 48}
    config = DiagnoseConfig(
        **words, problems=str(folders / "problems.jsonl"), max_new_tokens=4, mesh=MeshConfig(1, 1, 1)
    )
    job = diagnose.checked(config)
    assert job.vocab_size == 48
    assert {model.vocab_size for model in job.decode.inputs.models.values()} == {48}


def test_a_token_in_the_rows_of_one_model_alone_is_refused(folders, tmp_path):
    """It is no padding: the wide model's own tokenizer defines it."""
    for path in (folders / "wide").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    last = content["added_tokens"][-1]
    content["added_tokens"] += [last | {"id": i, "content": f"<{i}>"} for i in range(last["id"] + 1, 50)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="goes up to id 49, the base model has 48 tokens"):
        read_inputs(decoding(folders, tmp_path))
