"""Architectures of published models by name, for plans on machines that do not have their config.json."""

from typing import Any

from rlvr_jax.models.config import QwenConfig

# hidden, feed-forward, layers, heads, kv heads, head size, vocabulary, tied; from each model's published config.json.
_QWEN2_5 = {
    "0.5B": (896, 4_864, 24, 14, 2, 64, 151_936, True),
    "1.5B": (1_536, 8_960, 28, 12, 2, 128, 151_936, True),
    "3B": (2_048, 11_008, 36, 16, 2, 128, 151_936, True),
    "7B": (3_584, 18_944, 28, 28, 4, 128, 152_064, False),
    "14B": (5_120, 13_824, 48, 40, 8, 128, 152_064, False),
    "32B": (5_120, 27_648, 64, 40, 8, 128, 152_064, False),
}
_QWEN3 = {
    "0.6B": (1_024, 3_072, 28, 16, 8, 128, 151_936, True),
    "1.7B": (2_048, 6_144, 28, 16, 8, 128, 151_936, True),
    "4B": (2_560, 9_728, 36, 32, 8, 128, 151_936, True),
    "8B": (4_096, 12_288, 36, 32, 8, 128, 151_936, False),
    "14B": (5_120, 17_408, 40, 40, 8, 128, 151_936, False),
    "32B": (5_120, 25_600, 64, 64, 8, 128, 151_936, False),
}


def _config(family: str, sizes: tuple, max_positions: int, theta: float = 1e6) -> QwenConfig:
    hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary, tied = sizes
    return QwenConfig(
        family,
        vocabulary,
        hidden,
        ffn,
        layers,
        heads,
        kv_heads,
        head_dim,
        rope_theta=theta,
        tie_word_embeddings=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position_embeddings=max_positions,
    )


def _published() -> dict[str, QwenConfig]:
    models = {f"Qwen/Qwen2.5-{size}": _config("qwen2", sizes, 131_072) for size, sizes in _QWEN2_5.items()}
    for size in ("1.5B", "7B"):
        models[f"Qwen/Qwen2.5-Math-{size}"] = _config("qwen2", _QWEN2_5[size], 4_096, 10_000.0)
    for size, sizes in _QWEN3.items():
        models[f"Qwen/Qwen3-{size}-Base"] = _config("qwen3", sizes, 32_768)
        models[f"Qwen/Qwen3-{size}"] = _config("qwen3", sizes, 40_960)
    # The RL models that the decoding recipes name, trained from these.
    models["BytedTsinghua-SIA/DAPO-Qwen-32B"] = models["Qwen/Qwen2.5-32B"]
    models["Open-Reasoner-Zero/Open-Reasoner-Zero-32B"] = models["Qwen/Qwen2.5-32B"]
    models["ReasoningTransferability/UniReason-Qwen3-14B-RL"] = models["Qwen/Qwen3-14B-Base"]
    return models


PUBLISHED: dict[str, Any] = _published()
