"""What published and converted checkpoints hold beside the plain case: it loads where it changes no number."""

import logging
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlvr_jax.models.config import QwenConfig, YarnConfig
from rlvr_jax.models.hf import load_hf
from tests.parity.variants import weights
from tests.test_models_config import CARD_YARN, QWEN3_8B, QWEN25_MATH_7B
from tests.test_models_hf import assert_same_bits, write_folder

TIED = "qwen2_tied"
EMBED = "model.embed_tokens.weight"


def test_attn_factor_is_passed_over_with_a_word(caplog):
    """DeepSeek-R1-0528-Qwen3-8B: transformers computes 0.1 ln 4 + 1 whatever attn_factor says."""
    rope = CARD_YARN | {"attn_factor": 0.8782488562869419}
    config = QwenConfig.from_hf(QWEN3_8B | {"max_position_embeddings": 131072, "rope_scaling": rope})
    assert config.rope_scaling == YarnConfig(4.0, 32768)
    assert config.rope_scaling.cos_sin_factor == pytest.approx(0.1 * math.log(4) + 1, rel=1e-12)
    assert "attn_factor 0.8782488562869419" in caplog.text
    assert "is not applied" in caplog.text


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (CARD_YARN | {"finetuned": True, "extrapolation_factor": 1.0, "attn_factor": 1.0}, YarnConfig(4.0, 32768)),
        (CARD_YARN | {"original_max_position_embeddings": 32768.0, "mscale": None}, YarnConfig(4.0, 32768)),
        ({"rope_type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}, None),
        ({"type": "default", "mrope_section": [16, 24, 24], "mrope_interleaved": True}, None),
        ({"rope_type": "default", "rope_theta": 1e6, "original_max_position_embeddings": 32768}, None),
        ({"factor": None, "type": None}, None),
    ],
)
def test_rope_keys_that_change_nothing(rope, expected, caplog):
    assert QwenConfig.from_hf(QWEN3_8B | {"rope_scaling": rope}).rope_scaling == expected
    assert not caplog.records


def test_the_original_length_outside_of_the_object_goes_first():
    """As transformers 5 reads it; passed over, every frequency would be another."""
    for rope in (CARD_YARN, {"type": "yarn", "factor": 4.0}):
        config = QwenConfig.from_hf(QWEN3_8B | {"rope_scaling": rope, "original_max_position_embeddings": 4096})
        assert config.rope_scaling == YarnConfig(4.0, 4096)
    assert QwenConfig.from_hf(QWEN3_8B | {"original_max_position_embeddings": 4096}).rope_scaling is None
    with pytest.raises(ValueError, match="original_max_position_embeddings is 'x'"):
        QwenConfig.from_hf(QWEN3_8B | {"rope_scaling": CARD_YARN, "original_max_position_embeddings": "x"})


def test_a_rope_theta_that_would_be_lost_is_refused():
    """YaRN added, as the model cards say, to a config.json that transformers 5 wrote: theta would become 10,000."""
    written = {key: value for key, value in QWEN3_8B.items() if key != "rope_theta"}
    written["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert QwenConfig.from_hf(written | {"rope_scaling": None}).rope_theta == 1e6
    with pytest.raises(ValueError, match="rope_scaling beside rope_parameters, which alone has rope_theta"):
        QwenConfig.from_hf(written | {"rope_scaling": CARD_YARN})
    assert QwenConfig.from_hf(written | {"rope_scaling": CARD_YARN, "rope_theta": 5e5}).rope_theta == 5e5
    assert QwenConfig.from_hf(written | {"rope_scaling": CARD_YARN | {"rope_theta": 5e5}}).rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "'default' with {'factor': 2.0}"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": CARD_YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": CARD_YARN | {"long_factor": [1.0]}}, "long_factor"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [16, 24, 24]}}, "'mrope'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
    ],
)
def test_rope_keys_that_change_numbers_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        QwenConfig.from_hf(QWEN3_8B | change)


# Keys of published Qwen2, Qwen2.5, Qwen3 and tuned configs that do not change what the model computes.
HARMLESS = {
    "_name_or_path": "Qwen/Qwen2.5-7B",
    "attention_bias": False,
    "attention_probs_dropout_prob": 0.0,
    "auto_map": {"AutoModel": "modeling.Model"},
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": [151645, 151643],
    "finetuned": True,
    "layer_types": None,
    "max_window_layers": 21,
    "output_router_logits": False,
    "pad_token_id": None,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "quantization_config": None,
    "rope_scaling": None,
    "sliding_window": 131072,
    "tokenizer_class": "Qwen2Tokenizer",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "unsloth_fixed": True,
    "use_cache": False,
    "use_mrope": False,
    "use_sliding_window": False,
}


@pytest.mark.parametrize("base", [QWEN25_MATH_7B, QWEN3_8B])
def test_harmless_keys(base, caplog):
    expected = QwenConfig.from_hf(base)
    for key, value in HARMLESS.items():
        assert QwenConfig.from_hf(base | {key: value}) == expected, key
    assert QwenConfig.from_hf(base | HARMLESS) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    "window",
    [
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 36},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 99},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 40960, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 128, "layer_types": ["full_attention"] * 36},
        {"use_sliding_window": True, "sliding_window": 99999, "layer_types": ["sliding_attention"] * 36},
        {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 0},
    ],
)
def test_windows_that_no_token_feels(window):
    assert QwenConfig.from_hf(QWEN3_8B | window) == QwenConfig.from_hf(QWEN3_8B)


@pytest.mark.parametrize(
    "window",
    [
        {"use_sliding_window": True, "sliding_window": 40959, "max_window_layers": 35},
        {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": None},  # from layer 28 on
        {"use_sliding_window": True, "max_window_layers": 0},  # of 4096 tokens
        {"use_sliding_window": False, "layer_types": ["full_attention"] * 35 + ["sliding_attention"]},
        {"layer_types": ["chunked_attention"] * 36},
    ],
)
def test_windows_that_are_felt_are_refused(window):
    with pytest.raises(ValueError, match="sliding-window attention is not supported"):
        QwenConfig.from_hf(QWEN3_8B | {"sliding_window": 4096} | window)


def test_a_window_must_cover_raised_positions():
    window = {"use_sliding_window": True, "sliding_window": 40960, "max_window_layers": 0}
    with pytest.raises(ValueError, match="at least 65536 tokens"):
        QwenConfig.from_hf(QWEN3_8B | window, max_position_embeddings=65536)


def test_buffers_are_passed_over(tmp_path):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)}
    buffers["model.rotary_emb.inv_freq"] = np.ones(8, np.float64)
    plain = load_hf(write_folder(tmp_path / "m"), dtype=None)[1]
    assert_same_bits(plain, load_hf(write_folder(tmp_path / "n", **buffers), dtype=None)[1])
    with pytest.raises(ValueError, match=r"unknown: model\.layers\.0\.rotary_emb\.weight"):
        load_hf(write_folder(tmp_path / "o", **{"model.layers.0.rotary_emb.weight": np.ones(8, np.float32)}))


@pytest.mark.parametrize(
    ("embed", "head"),
    [
        (np.float32, np.float16),
        (np.float32, ml_dtypes.bfloat16),
        (ml_dtypes.bfloat16, np.float32),
        (np.float16, np.float64),
    ],
)
def test_a_tied_copy_may_have_another_dtype(embed, head, tmp_path):
    matrix = weights(TIED)[EMBED]
    folder = write_folder(tmp_path / "m", TIED, **{EMBED: matrix.astype(embed), "lm_head.weight": matrix.astype(head)})
    params = load_hf(folder, dtype=jnp.float32)[1]
    np.testing.assert_array_equal(params["embed"], matrix.astype(embed).astype(np.float32))
    other = matrix.copy()
    other[-1, -1] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_hf(write_folder(tmp_path / "n", TIED, **{EMBED: matrix.astype(embed), "lm_head.weight": other}))


def test_a_shared_matrix_that_is_a_single_number(tmp_path):
    folder = write_folder(tmp_path, TIED, **{name: np.ones((), np.float32) for name in (EMBED, "lm_head.weight")})
    with pytest.raises(ValueError, match=r"wrong shape: model\.embed_tokens\.weight is \[\]"):
        load_hf(folder)


def test_a_shared_matrix_under_the_other_name(tmp_path):
    """safetensors drops one of two names of the same memory, and which one is its choice."""
    plain = load_hf(write_folder(tmp_path / "m", TIED), dtype=None)[1]
    folder = write_folder(tmp_path / "n", TIED, **{EMBED: None, "lm_head.weight": weights(TIED)[EMBED]})
    assert_same_bits(plain, load_hf(folder, dtype=None)[1])


def test_an_adapter_beside_the_weights_is_named(tmp_path, caplog):
    folder = write_folder(tmp_path / "m")
    plain = load_hf(folder, dtype=None)[1]
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x": np.ones(2, np.float32)}, folder / "adapter_model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert_same_bits(plain, load_hf(folder, dtype=None)[1])
    assert f"{folder}: holds full weights and an adapter" in caplog.text
    assert "the adapter is not applied" in caplog.text


def test_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"holds an adapter .* merge it into its base model first"):
        load_hf(tmp_path)


def test_a_smaller_vocabulary_reads_the_first_rows(tmp_path):
    for name in (TIED, "qwen3_untied_yarn"):
        folder = write_folder(tmp_path / name, name)
        config, whole = load_hf(folder, dtype=None)
        cut_config, cut = load_hf(folder, dtype=None, overrides={"vocab_size": 40})
        assert (config.vocab_size, cut_config.vocab_size) == (61, 40)
        expected = whole | {"embed": whole["embed"][:40]}
        expected |= {"unembed": whole["unembed"][:, :40]} if "unembed" in whole else {}
        assert_same_bits(expected, cut)
        with pytest.raises(ValueError, match=r"embed_tokens\.weight is \[61, 32\], expected \[62, 32\]"):
            load_hf(folder, overrides={"vocab_size": 62})
