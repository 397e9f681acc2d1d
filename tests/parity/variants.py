"""The miniature models whose numbers are compared with transformers, and weights that both sides make by themselves."""

import numpy as np

_BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

# Hugging Face configs in the form of the published ones; the numbers in `sliding_window` are switched off there too.
VARIANTS = {
    "qwen2_tied": _BASE
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen2_untied": _BASE
    | {"model_type": "qwen2", "tie_word_embeddings": False, "rope_theta": 10000.0, "num_key_value_heads": 1},
    "qwen2_yarn": _BASE
    | {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_scaling": _YARN | {"type": "yarn"},
        "num_attention_heads": 2,
    },
    "qwen3_tied": _BASE
    | {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e6, "head_dim": 12, "attention_bias": False},
    "qwen3_untied_yarn": _BASE
    | {
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "rope_theta": 5e6,
        "rope_scaling": _YARN | {"rope_type": "yarn"},
        "head_dim": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}

PROMPT = 9  # tokens of the prompt that is continued greedily
STEPS = 64


def shapes(hf: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint by its Hugging Face name."""
    D, F, V = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    N, K = hf["num_attention_heads"], hf["num_key_value_heads"]
    H = hf.get("head_dim", D // N)
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, heads in (("q", N), ("k", K), ("v", K)):
            out[f"{layer}.self_attn.{name}_proj.weight"] = (heads * H, D)
            if hf["model_type"] == "qwen2":
                out[f"{layer}.self_attn.{name}_proj.bias"] = (heads * H,)
            elif name != "v":
                out[f"{layer}.self_attn.{name}_norm.weight"] = (H,)
        out[f"{layer}.self_attn.o_proj.weight"] = (D, N * H)
        out[f"{layer}.mlp.gate_proj.weight"] = out[f"{layer}.mlp.up_proj.weight"] = (F, D)
        out[f"{layer}.mlp.down_proj.weight"] = (D, F)
        out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (D,)
    if not hf["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    return out


def weights(name: str) -> dict[str, np.ndarray]:
    """float32 weights of a variant, wide enough that every part of the model shows in the logits.

    numpy's legacy generator, whose stream is frozen.
    """
    hf = VARIANTS[name]
    random = np.random.RandomState(list(VARIANTS).index(name))
    out = {}
    for key, shape in sorted(shapes(hf).items()):
        x = random.standard_normal(shape)
        x = 1 + 0.3 * x if "norm" in key else x * (0.5 if "bias" in key else 0.2)
        out[key] = x.astype(np.float32)
    return out


def inputs(name: str) -> dict[str, np.ndarray]:
    """Tokens [3, 40] of which the rows have 40, 23 and 7, and the same padded on the left and on the right."""
    random = np.random.RandomState(1000 + list(VARIANTS).index(name))
    lengths = np.array([40, 23, 7])
    tokens = random.randint(0, VARIANTS[name]["vocab_size"], (3, 40))
    right = (np.arange(40)[None] < lengths[:, None]).astype(np.int32)
    left = right[:, ::-1].copy()
    tokens_right = (tokens * right).astype(np.int32)
    tokens_left = np.stack([np.roll(row, 40 - n) for row, n in zip(tokens_right, lengths, strict=True)])
    return {"tokens_right": tokens_right, "mask_right": right, "tokens_left": tokens_left, "mask_left": left}
