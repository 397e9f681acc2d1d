"""Writes what transformers computes for `variants.py`: one .npz and one config.json a variant, beside this file.

    python tests/parity/make_expected.py        (needs torch; the tests that read the result do not)

Stored: float32 logits with left and with right padding at the real tokens, the tokens of 64 greedy steps, the mean
negative log-likelihood of the right-padded batch and its gradient in every weight.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from variants import PROMPT, STEPS, VARIANTS, inputs, weights

HERE = Path(__file__).parent


def build(name: str) -> torch.nn.Module:
    """The transformers model of a variant with its weights, float32, eager attention."""
    hf = dict(VARIANTS[name])
    config_class, model_class = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[hf.pop("model_type")]
    model = model_class._from_config(config_class(**hf), attn_implementation="eager", dtype=torch.float32)
    state = {key: torch.from_numpy(x) for key, x in weights(name).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.eval()


def logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits at the real tokens, [number of them, V]; positions count the real tokens."""
    mask_t = torch.from_numpy(mask).long()
    positions = (mask_t.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long(), attention_mask=mask_t, position_ids=positions).logits
    return out.numpy()[mask != 0]


def main() -> None:
    """Writes all variants."""
    for name in VARIANTS:
        model, x = build(name), inputs(name)
        stored = {
            "logits_right": logits(model, x["tokens_right"], x["mask_right"]),
            "logits_left": logits(model, x["tokens_left"], x["mask_left"]),
        }
        prompt = torch.from_numpy(x["tokens_right"][:1, :PROMPT]).long()
        margins = []
        with torch.no_grad():
            for _ in range(STEPS):
                last = model(prompt).logits[:, -1]
                top = last.topk(2).values
                margins.append(float(top[0, 0] - top[0, 1]))
                prompt = torch.cat([prompt, last.argmax(-1, keepdim=True)], 1)
        stored["greedy"] = prompt[0, PROMPT:].numpy().astype(np.int32)

        tokens, mask = torch.from_numpy(x["tokens_right"]).long(), torch.from_numpy(x["mask_right"])
        logp = model(tokens, attention_mask=mask.long()).logits.log_softmax(-1)[:, :-1]
        nll = -logp.gather(-1, tokens[:, 1:, None])[..., 0]
        loss = (nll * mask[:, 1:]).sum() / mask[:, 1:].sum()
        loss.backward()
        stored["nll"] = np.float32(loss.item())
        parameters = dict(model.named_parameters())
        stored |= {f"grad/{key}": parameters[key].grad.numpy() for key in weights(name)}

        np.savez_compressed(HERE / f"{name}.npz", **stored)
        config = json.loads(model.config.to_json_string(use_diff=False))
        (HERE / f"{name}.config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        print(f"{name}: nll {stored['nll']:.4f}, smallest greedy margin {min(margins):.4f}, ", end="")
        print(f"largest logit {abs(stored['logits_right']).max():.1f}, {len(set(stored['greedy'].tolist()))} tokens")


if __name__ == "__main__":
    main()
