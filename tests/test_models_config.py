"""Reading and writing config.json."""

import dataclasses
import json
import math

import numpy as np
import pytest

from rlvr_jax.models import layers
from rlvr_jax.models.config import QwenConfig, YarnConfig

# As published with Qwen2.5-Math-7B and Qwen3-8B-Base (the keys that matter here).
QWEN25_MATH_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CARD_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_published_qwen25():
    config = QwenConfig.from_hf(QWEN25_MATH_7B, max_position_embeddings=32768)
    assert config == QwenConfig(
        "qwen2",
        152064,
        3584,
        18944,
        28,
        28,
        4,
        128,
        rope_theta=10000.0,
        qkv_bias=True,
        max_position_embeddings=32768,
    )


def test_published_qwen3():
    config = QwenConfig.from_hf(QWEN3_8B)
    assert config == QwenConfig(
        "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, rope_theta=1e6, qk_norm=True, max_position_embeddings=40960
    )
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": CARD_YARN},
        {"rope_theta": 1e6, "rope_scaling": {**CARD_YARN, "type": "yarn"}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}},
        {"rope_theta": None, "rope_parameters": CARD_YARN | {"rope_theta": 1e6, "attention_factor": None}},
    ],
    ids=["card", "both", "old", "transformers5"],
)
def test_yarn_of_the_model_cards(rope):
    config = QwenConfig.from_hf(QWEN3_8B | {"rope_scaling": None} | rope)
    assert config.rope_theta == 1e6
    assert config.rope_scaling == YarnConfig(4.0, 32768)
    assert QwenConfig.from_hf(QWEN3_8B, rope_scaling=CARD_YARN).rope_scaling == config.rope_scaling


def test_yarn_length_defaults_to_the_declared_one_not_the_overridden_one():
    scaling = {"rope_type": "yarn", "factor": 2.0}
    config = QwenConfig.from_hf(QWEN3_8B | {"rope_scaling": scaling}, max_position_embeddings=131072)
    assert config.rope_scaling == YarnConfig(2.0, 40960)
    assert config.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("yarn", "expected"),
    [
        (YarnConfig(4.0, 32768), 0.1 * math.log(4) + 1),
        (YarnConfig(1.0, 32768), 1.0),
        (YarnConfig(4.0, 32768, attention_factor=0.7), 0.7),
        (YarnConfig(8.0, 64, mscale=0.5, mscale_all_dim=2.0), (0.05 * math.log(8) + 1) / (0.2 * math.log(8) + 1)),
    ],
)
def test_yarn_factor_on_cos_and_sin(yarn, expected):
    assert yarn.cos_sin_factor == pytest.approx(expected, rel=1e-12)


def test_yarn_frequencies_by_hand():
    """H 8, theta 100, context 64: 64 / (2 pi) = 10.19 turns; bounds at 5 and 1 turns, not rounded."""
    yarn = YarnConfig(4.0, 64, beta_fast=5.0, beta_slow=1.0, truncate=False)
    frequencies, _ = layers.rope_frequencies(8, 100.0, yarn)
    plain = np.array([1.0, 100**-0.25, 100**-0.5, 100**-0.75])
    low, high = (
        8 * math.log(64 / (10 * math.pi)) / (2 * math.log(100)),
        8 * math.log(32 / math.pi) / (2 * math.log(100)),
    )
    ramp = np.clip((np.arange(4) - low) / (high - low), 0, 1)
    assert ramp[0] == 0
    assert 0 < ramp[1] < 1
    assert ramp[3] == 1
    np.testing.assert_allclose(frequencies, plain * (1 - ramp) + plain / 4 * ramp, rtol=1e-6)
    np.testing.assert_allclose(layers.rope_frequencies(8, 100.0, None)[0], plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_sliding_window": True, "max_window_layers": 27, "sliding_window": 4095}, "sliding-window"),
        ({"use_sliding_window": True, "sliding_window": None, "layer_types": ["sliding_attention"] * 28}, "sliding"),
        ({"model_type": "qwen3_moe"}, "mixture-of-experts.*"),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "qwen2_moe.*mixture-of-experts"),
        ({"num_experts": 8}, "num_experts.*mixture-of-experts"),
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "disagree"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "betafast": 3}}, "betafast"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3 does not divide"),
        ({"num_attention_heads": 27}, "head_dim"),
        ({"vocab_size": "152064"}, "vocab_size"),
    ],
)
def test_refusals_name_what_they_refuse(change, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        QwenConfig.from_hf(QWEN25_MATH_7B | change)


def test_refuses_attention_bias_on_qwen3():
    with pytest.raises(ValueError, match="attention_bias"):
        QwenConfig.from_hf(QWEN3_8B | {"attention_bias": True})


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"remat": "all"}, {"head_dim": 7}, {"num_layers": 0}])
def test_bad_fields(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        QwenConfig.from_hf(QWEN3_8B, **change)


def test_unknown_override():
    with pytest.raises(ValueError, match="sliding"):
        QwenConfig.from_hf(QWEN3_8B, sliding=3)


@pytest.mark.parametrize(
    "config",
    [
        QwenConfig.from_hf(QWEN25_MATH_7B),
        QwenConfig.from_hf(QWEN3_8B),
        QwenConfig.from_hf(QWEN3_8B, rope_scaling=CARD_YARN | {"beta_fast": 16.0, "truncate": False}, head_dim=80),
    ],
)
def test_round_trip_through_a_file(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert QwenConfig.from_hf(tmp_path) == config
    assert QwenConfig.from_hf(str(tmp_path / "config.json")) == config


def test_transformers_reads_what_is_written():
    from transformers import AutoConfig

    config = QwenConfig.from_hf(QWEN3_8B, rope_scaling=CARD_YARN)
    content = config.to_hf()
    theirs = AutoConfig.for_model(**content)
    assert theirs.rope_parameters["rope_type"] == "yarn"
    assert theirs.rope_parameters["factor"] == 4.0
    assert theirs.rope_parameters["rope_theta"] == 1e6
    assert theirs.rope_parameters["original_max_position_embeddings"] == 32768
    assert QwenConfig.from_hf(theirs.to_dict()) == config


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        QwenConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        QwenConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        QwenConfig.from_hf(tmp_path)
