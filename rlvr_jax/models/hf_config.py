"""Reads a Hugging Face config.json that nobody vouches for: every value is checked, every fault names the file.

What a key means follows transformers 5. A key that changes the numbers and is not supported is refused. A key of which
the published models are full and which changes nothing is passed over.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from rlvr_jax.runs.files import read_json

logger = logging.getLogger(__name__)

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_EXPECTED = "expected a dense Qwen2, Qwen2.5 or Qwen3 model (model_type 'qwen2' or 'qwen3')"

# The largest size that is believed, far above every published model: a config.json may say anything.
MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_layers": 1 << 10,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 30,
}
_KEYS = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}

# Switches of other architectures or of storage formats. Each changes the numbers, so none may be passed over.
_REFUSED_KEYS = {
    "num_experts": "a mixture-of-experts (MoE) model",
    "num_local_experts": "a mixture-of-experts (MoE) model",
    "moe_intermediate_size": "a mixture-of-experts (MoE) model",
    "quantization_config": "a quantised checkpoint",
    "vision_config": "a vision-language model",
    "audio_config": "an audio-language model",
    "thinker_config": "an omni-modal model",
}
_ONE_VALUE = {"hidden_act": "silu", "attention_dropout": 0, "partial_rotary_factor": 1}

# The fields of `YarnConfig` that are numbers, and the least of each.
_YARN_NUMBERS = {
    "factor": 1,
    "attention_factor": 0,
    "beta_fast": 1e-3,
    "beta_slow": 1e-3,
    "mscale": 0,
    "mscale_all_dim": 0,
}
_YARN_KEYS = {*_YARN_NUMBERS, "original_max_position_embeddings", "truncate"}
# Of published rope settings, what transformers does not read. `attn_factor` and `extrapolation_factor` are vLLM's.
_ROPE_IGNORED = {"attn_factor", "extrapolation_factor", "finetuned", "mrope_section", "mrope_interleaved"}


def read_fields(source: str | Path | Mapping[str, Any], max_positions: int | None = None) -> tuple[dict[str, Any], str]:
    """The fields of a `QwenConfig` from a config.json; rope_scaling is None or a dict of `YarnConfig`'s fields.

    Args:
      source: a folder, a config.json, or its content.
      max_positions: the longest text that the model is for, where that is not what the file declares. A sliding window
        that covers it is full attention.

    Returns:
      The fields, and what to call the source in a message.

    Raises:
      ValueError, FileNotFoundError: as `QwenConfig.from_hf` says; naming the file, the key and its value.
    """
    hf, where = _read(source)
    model_type = _architecture(hf, where)
    sizes = {name: _size(hf, name, where) for name in ("hidden_size", "num_heads", "num_layers")}
    declared = _size(hf, "max_position_embeddings", where, 32768)
    _refuse_unsupported(hf, where)
    _refuse_windows(hf, where, sizes["num_layers"], max(declared, max_positions or 0))
    if hf.get("head_dim") is None and model_type == "qwen2" and sizes["hidden_size"] % sizes["num_heads"]:
        raise ValueError(
            f"{where}: no head_dim, and num_attention_heads {sizes['num_heads']} does not divide "
            f"hidden_size={sizes['hidden_size']}"
        )
    # 128 is what transformers assumes for a Qwen3 config without the key.
    head_dim = 128 if model_type == "qwen3" else max(1, sizes["hidden_size"] // sizes["num_heads"])
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{where}: rope_scaling is {rope!r:.200}, expected an object")
    other = hf.get("rope_parameters")  # what transformers passes over where both are there
    if (
        rope is not other
        and isinstance(other, Mapping)
        and other.get("rope_theta")
        and not {**rope, **hf}.get("rope_theta")
    ):
        raise ValueError(
            f"{where}: rope_scaling beside rope_parameters, which alone has rope_theta; expected one object with all"
        )
    # Of a key outside of the object, which goes before the one inside.
    original = {key: hf[key] for key in ("original_max_position_embeddings",) if hf.get(key) is not None}
    return {
        "model_type": model_type,
        **sizes,
        **{name: _size(hf, name, where) for name in ("vocab_size", "intermediate_size")},
        "num_kv_heads": _size(hf, "num_kv_heads", where, sizes["num_heads"]),
        "head_dim": _size(hf, "head_dim", where, head_dim),
        "rope_theta": _number(hf if rope.get("rope_theta") is None else rope, "rope_theta", where, 10_000.0),
        "rope_scaling": parse_rope({**rope, **original}, declared, where),
        "rms_norm_eps": _number(hf, "rms_norm_eps", where, 1e-6),
        "tie_word_embeddings": _flag(hf, "tie_word_embeddings", where),
        "qkv_bias": model_type == "qwen2",
        "qk_norm": model_type == "qwen3",
        "max_position_embeddings": declared,
        "initializer_range": _number(hf, "initializer_range", where, 0.02),
    }, where


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "config"
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a Hugging Face config.json")
    return read_json(path), str(path)


def is_size(value: Any, most: int) -> TypeGuard[int]:
    """Whether a value is an integer from 1 to `most`; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def is_number(value: Any, low: float | int = 0, high: float | int = 1e30) -> TypeGuard[float]:
    """Whether a value is a finite number from `low` to `high`; True is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _size(hf: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    key, most = _KEYS.get(name, name), MOST[name]
    value = default if hf.get(key) is None else hf[key]
    if value is None:
        raise ValueError(f"{where}: {key!r} is missing, expected a positive integer")
    if not is_size(value, most):
        raise ValueError(f"{where}: {key!r} is {value!r:.200}, expected an integer from 1 to {most:,}")
    return value


def _number(hf: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = default if hf.get(key) is None else hf[key]
    if not is_number(value):
        raise ValueError(f"{where}: {key!r} is {value!r:.200}, expected a finite number, not below 0")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str, where: str) -> bool:
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: {key!r} is {value!r:.200}, expected true or false")
    return bool(value)


def _architecture(hf: Mapping[str, Any], where: str) -> str:
    model_type = hf.get("model_type")
    if model_type not in list(ARCHITECTURES):
        moe = "a mixture-of-experts (MoE) model is " if "moe" in str(model_type)[:200] else ""
        raise ValueError(f"{where}: model_type {model_type!r:.200}: {moe}not supported; {_EXPECTED}")
    if hf.get("architectures") not in (None, [], [ARCHITECTURES[model_type]]):
        raise ValueError(
            f"{where}: architectures is {hf['architectures']!r:.200}, expected [{ARCHITECTURES[model_type]!r}]"
        )
    return model_type


def _refuse_unsupported(hf: Mapping[str, Any], where: str) -> None:
    for key, kind in _REFUSED_KEYS.items():
        if hf.get(key):
            raise ValueError(f"{where}: {key} is {hf[key]!r:.200}: {kind} is not supported; {_EXPECTED}")
    for key, allowed in _ONE_VALUE.items():
        if hf.get(key) is not None and hf[key] != allowed:
            raise ValueError(f"{where}: {key} is {hf[key]!r:.200}, expected {allowed!r}")
    if hf["model_type"] == "qwen3" and hf.get("attention_bias"):
        raise ValueError(f"{where}: attention_bias is {hf['attention_bias']!r:.200} on a qwen3 config, expected false")
    if hf.get("dual_chunk_attention_config"):
        logger.warning("%s: dual_chunk_attention_config is not applied (nor is it by transformers)", where)


def _refuse_windows(hf: Mapping[str, Any], where: str, num_layers: int, max_positions: int) -> None:
    """Refuses a sliding window that a layer would use: the layers from max_window_layers on, or those in layer_types.

    Published configs carry a window and switch it off. One that covers `max_positions` tokens is full attention.
    """
    # The defaults are those of transformers.
    window = hf.get("sliding_window", 4096) if _flag(hf, "use_sliding_window", where) else None
    first = 28 if hf.get("max_window_layers") is None else hf["max_window_layers"]
    if not is_number(first):
        raise ValueError(f"{where}: max_window_layers is {first!r:.200}, expected a number of layers")
    types = hf.get("layer_types")
    if types is None:
        types = [
            "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(num_layers)
        ]
    if not isinstance(types, list) or len(types) != num_layers:
        raise ValueError(f"{where}: layer_types is {types!r:.200}, expected a list of {num_layers} names")
    if all(kind == "full_attention" for kind in types):
        return
    slides = all(kind in ("full_attention", "sliding_attention") for kind in types)
    if slides and window is not None and is_size(window, 1 << 62) and window >= max_positions:
        return
    raise ValueError(
        f"{where}: sliding-window attention is not supported (use_sliding_window={hf.get('use_sliding_window')!r}, "
        f"sliding_window={hf.get('sliding_window')!r:.200}, max_window_layers={first!r}, layers "
        f"{[kind for kind in dict.fromkeys(map(str, types)) if kind != 'full_attention']!r:.200}), "
        f"expected full attention, or a window of at least {max_positions} tokens (max_position_embeddings)"
    )


def parse_rope(rope: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any] | None:
    """The fields of a `YarnConfig` from a `rope_scaling` or `rope_parameters` object; None for plain rotary embeddings.

    Keys that transformers does not read are passed over. With YaRN, `attn_factor` is said in the log: vLLM multiplies
    cos and sin by it, transformers does not, and what transformers computes is what is computed here.
    """
    rope = {key: value for key, value in rope.items() if value is not None and key != "rope_theta"}
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{where}: rope_type and type disagree: {kinds!r:.200}")
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "yarn") or (kind == "default" and rope.get("factor", 1) != 1):
        raise ValueError(
            f"{where}: rope scaling {kind!r:.200} with {rope!r:.200} is not supported, expected 'default' or 'yarn'"
        )
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where}: rope_scaling has another partial_rotary_factor than 1, which is not supported")
    unknown = set(rope) - _YARN_KEYS - _ROPE_IGNORED
    if unknown:
        raise ValueError(f"{where}: unknown rope_scaling keys {sorted(unknown)!r:.200}")
    if kind == "default":
        return None
    if rope.get("attn_factor", 1) != 1:
        logger.warning(
            "%s: attn_factor %r of rope_scaling is not applied (nor is it by transformers; vLLM multiplies by it)",
            *(where, rope["attn_factor"]),
        )
    given = {key: value for key, value in rope.items() if key in _YARN_KEYS}
    original = given.setdefault("original_max_position_embeddings", max_positions)
    if isinstance(original, float) and original.is_integer():
        given["original_max_position_embeddings"] = original = int(original)
    if is_size(original, MOST["max_position_embeddings"]):
        given.setdefault("factor", max_positions / original)
    check_yarn(given, where)
    return given


def check_yarn(given: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a field of a `YarnConfig`, of those that are given, that is no such value."""
    original, most = given["original_max_position_embeddings"], MOST["max_position_embeddings"]
    if not is_size(original, most):
        raise ValueError(
            f"{where}: rope_scaling: original_max_position_embeddings is {original!r:.200}, "
            f"expected a positive number of tokens, at most {most:,}"
        )
    for name, low in _YARN_NUMBERS.items():
        if name in given and not is_number(given[name], low):
            raise ValueError(
                f"{where}: rope_scaling: {name} is {given[name]!r:.200}, expected a finite number of at least {low}"
            )
    if not isinstance(given.get("truncate", True), bool):
        raise ValueError(f"{where}: rope_scaling: truncate is {given['truncate']!r:.200}, expected true or false")
    fast, slow = given.get("beta_fast", 32), given.get("beta_slow", 1)
    if fast < slow:
        raise ValueError(f"{where}: rope_scaling: beta_fast {fast} is below beta_slow {slow}")
