"""Names and shapes of the tensors in a Hugging Face checkpoint of these models, and where each belongs."""

from typing import NamedTuple

import numpy as np

from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.qwen import param_specs

_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}
TOP_NAMES = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "unembed": "lm_head.weight"}


class Slot(NamedTuple):
    """Where a tensor of the folder belongs: a parameter, or one layer of a stacked one."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]  # in the folder: [out, in] for matmul weights
    transposed: bool  # ours are [in, out], with heads split off


def checkpoint_slots(config: QwenConfig) -> dict[str, Slot]:
    """Every tensor that a folder of this config holds, by name, in the order in which it is written."""
    specs = param_specs(config)

    def hf_shape(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        if name == "embed" or name.endswith("norm"):
            return shape, False
        if name.endswith("bias"):
            return (int(np.prod(shape)),), False
        inputs = shape[:-1] if name in ("o_proj", "down_proj", "unembed", "gate_proj", "up_proj") else shape[:1]
        return (int(np.prod(shape[len(inputs) :])), int(np.prod(inputs))), True

    slots = {TOP_NAMES["embed"]: Slot(("embed",), None, *hf_shape("embed", specs["embed"].shape))}
    for layer in range(config.num_layers):
        for name, suffix in _LAYER_NAMES.items():
            if name in specs["layers"]:
                shape = specs["layers"][name].shape[1:]
                slots[f"model.layers.{layer}.{suffix}"] = Slot(("layers", name), layer, *hf_shape(name, shape))
    for name in ("final_norm", "unembed"):
        if name in specs:
            slots[TOP_NAMES[name]] = Slot((name,), None, *hf_shape(name, specs[name].shape))
    return slots
