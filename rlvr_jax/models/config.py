"""Architecture of the dense Qwen2, Qwen2.5 and Qwen3 models, read from and written as a Hugging Face config.json."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlvr_jax.models.hf_config import ARCHITECTURES, MOST, check_yarn, is_number, is_size, parse_rope, read_fields

_REMAT = ("none", "attention", "dots", "full")
ATTENTIONS = ("auto", "plain", "chunked", "splash", "cudnn")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (Peng et al., arXiv 2309.00071), as the Qwen model cards document it.

    Attributes:
      factor: context extension factor, at least 1 (the model cards use 4.0).
      original_max_position_embeddings: context length in tokens before the extension (the model cards use 32768).
      attention_factor: multiplies cos and sin; None derives it from the factor, `0.1 ln(factor) + 1`, or from mscale.
      beta_fast, beta_slow: rotations over the original context that bound the ramp between the two regimes.
      mscale, mscale_all_dim: when both are set and attention_factor is not, it is the ratio of
        `0.1 mscale ln(factor) + 1` and `0.1 mscale_all_dim ln(factor) + 1`.
      truncate: round the ramp's bounds outwards to whole dimensions.
    """

    factor: float | int
    original_max_position_embeddings: int
    attention_factor: float | int | None = None
    beta_fast: float | int = 32.0
    beta_slow: float | int = 1.0
    mscale: float | int | None = None
    mscale_all_dim: float | int | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        check_yarn({name: value for name, value in given.items() if value is not None}, "YarnConfig")

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by; both queries and keys carry it, so scores grow by its square."""
        if self.attention_factor is not None:
            return float(self.attention_factor)

        def scale(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """A dense Qwen2 / Qwen2.5 / Qwen3 decoder: its architecture, and two run-time choices.

    Usually made by `QwenConfig.from_hf(folder)`. Hashable, so it can be a static argument of `jax.jit`. Nothing in
    the model's numbers depends on `max_position_embeddings`: it is a declared limit, and raising it (as the
    Qwen2.5-Math-7B recipes do, to 32768) is `dataclasses.replace` or `from_hf(folder, max_position_embeddings=32768)`.

    Attributes:
      model_type: "qwen2" (Qwen2, Qwen2.5: bias on q, k, v) or "qwen3" (normalised q and k).
      vocab_size: V, rows of the embedding (may exceed the tokenizer's length; the rest is padding).
      hidden_size: D. intermediate_size: F. num_layers: L.
      num_heads: N query heads. num_kv_heads: K, divides N (grouped-query attention).
      head_dim: H, even; need not be D / N.
      rope_theta: base of the rotary frequencies.
      rope_scaling: `YarnConfig`, or None for plain rotary embeddings.
      rms_norm_eps: epsilon of every RMS norm.
      tie_word_embeddings: the unembedding is the transposed embedding.
      qkv_bias, qk_norm: which of the two families' attention extras are present.
      max_position_embeddings: declared context length in tokens.
      initializer_range: standard deviation of `init_params`.
      dtype: compute dtype by name; None follows the parameters, see `compute_dtype`. Norms, softmax and rotary
        embeddings are float32 in any case, and logits are returned in float32.
      remat: what a training forward keeps for the backward pass: "none" keeps everything, "dots" the results of
        weight matmuls, "attention" each layer's input and what attention gave, "full" only each layer's input.
      attention: how a training forward computes attention: "auto" (what suits the platform), "plain", "chunked",
        "splash" (TPU) or "cudnn" (NVIDIA GPUs); see `rlvr_jax.models.kernels.attention`.

    Raises:
      ValueError: naming the field, its value and what was expected.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | int = 10_000.0
    rope_scaling: YarnConfig | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    dtype: str | None = None
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if not is_size(value, most):
                raise ValueError(f"QwenConfig: {name} is {value!r:.200}, expected an integer from 1 to {most:,}")
        if self.model_type not in ARCHITECTURES:
            raise ValueError(f"QwenConfig: model_type is {self.model_type!r}, expected one of {list(ARCHITECTURES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"QwenConfig: num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"QwenConfig: head_dim is {self.head_dim}, rotary embeddings need an even number")
        for name, low in (("rope_theta", 2), ("rms_norm_eps", 0), ("initializer_range", 0)):
            value = getattr(self, name)
            if not is_number(value, low):
                raise ValueError(f"QwenConfig: {name} is {value!r:.200}, expected a finite number of at least {low}")
        if self.remat not in _REMAT:
            raise ValueError(f"QwenConfig: remat is {self.remat!r}, expected one of {list(_REMAT)}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"QwenConfig: attention is {self.attention!r}, expected one of {list(ATTENTIONS)}")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"QwenConfig: dtype is {self.dtype!r}, expected None or one of {list(_DTYPES)}")

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any], **overrides: Any) -> "QwenConfig":
        """Reads a Hugging Face config: a folder, a config.json, or its content as a dict.

        Published configs (`rope_theta`, `rope_scaling`) and those written by transformers 5 (`rope_parameters`) are
        both understood. The dtype stored in the file is not taken over: `load_hf(dtype=...)` decides it.

        Args:
          source: path of a model folder or of a config.json, or the parsed content.
          **overrides: fields of `QwenConfig`, applied last, e.g. `max_position_embeddings=32768`, `remat="full"` or
            `rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}`.

        Returns:
          The config.

        Raises:
          ValueError: another architecture, a mixture of experts, a sliding window that a token would feel, another rope
            scaling than YaRN, a quantised checkpoint, a missing key, a value of another type or beyond its bounds, or
            an unknown override; each named with the file.
          FileNotFoundError: no such file.
        """
        unknown = set(overrides) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"QwenConfig.from_hf: unknown override {sorted(unknown)}, expected fields of QwenConfig")
        positions = overrides.get("max_position_embeddings")
        fields, where = read_fields(source, positions if isinstance(positions, int) else None)
        if isinstance(overrides.get("rope_scaling"), Mapping):
            declared = fields["max_position_embeddings"]
            parsed = parse_rope(overrides["rope_scaling"], declared, "override rope_scaling")
            overrides = overrides | {"rope_scaling": None if parsed is None else YarnConfig(**parsed)}
        try:
            if fields["rope_scaling"] is not None:
                fields["rope_scaling"] = YarnConfig(**fields["rope_scaling"])
            config = cls(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return dataclasses.replace(config, **overrides)

    def to_hf(self) -> dict[str, Any]:
        """The content of config.json, in the keys of the published Qwen configs, which transformers 4 and 5 read.

        Returns:
          A JSON-serialisable dict; `QwenConfig.from_hf` of it gives this config back but for `dtype`, `remat` and
          `attention`.

        Raises:
          ValueError: when the attention extras are not those of `model_type`, which no config.json can say.
        """
        if self.qkv_bias != (self.model_type == "qwen2") or self.qk_norm != (self.model_type == "qwen3"):
            raise ValueError(
                f"QwenConfig.to_hf: qkv_bias={self.qkv_bias}, qk_norm={self.qk_norm} cannot be written as a "
                f"{self.model_type} config"
            )
        scaling = None
        if self.rope_scaling is not None:
            defaults = YarnConfig(1.0, 1)
            scaling = {"rope_type": "yarn", "type": "yarn"}
            for field in dataclasses.fields(YarnConfig):
                value = getattr(self.rope_scaling, field.name)
                if field.default is dataclasses.MISSING or value != getattr(defaults, field.name):
                    scaling[field.name] = value
        content = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "use_cache": True,
        }
        return content | ({"attention_bias": False} if self.model_type == "qwen3" else {})

    def compute_dtype(self, param_dtype: Any) -> jnp.dtype:
        """What a model computes in, in a forward, a decode and a scoring alike: `dtype` where it is given.

        Where it is None, the dtype that the parameters are stored in, but float32 on CPU, where XLA has no fast
        bfloat16. So the log-probabilities that `generate` returns are those of `Qwen(config).apply`.
        """
        if self.dtype is not None:
            return jnp.dtype(self.dtype)
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else param_dtype)

    def with_dtype(self, params: Mapping[str, Any]) -> "QwenConfig":
        """The config with the `compute_dtype` for these parameters written out."""
        return dataclasses.replace(self, dtype=self.compute_dtype(params["embed"].dtype).name)


def platform_dtype() -> str:
    """The compute dtype that the devices are fast in: bfloat16, but float32 on CPU, where XLA has no fast bfloat16."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
