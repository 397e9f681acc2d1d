"""Live comparison with torch and transformers: `make test-parity`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.generation import generate
from rlvr_jax.models import hf, layers, qwen
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf_names import checkpoint_slots
from tests.parity.variants import PROMPT, STEPS, VARIANTS, inputs

pytestmark = pytest.mark.parity
variants = pytest.mark.parametrize("name", list(VARIANTS))


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tmp_path_factory):
    """A transformers model with random weights, and what `load_hf` makes of the folder that it saves (in shards)."""
    import torch
    import transformers

    hf_config = dict(VARIANTS[request.param]) | {"initializer_range": 0.2}
    theirs_config = transformers.AutoConfig.for_model(hf_config.pop("model_type"), **hf_config)
    torch.manual_seed(7)
    theirs = transformers.AutoModelForCausalLM.from_config(theirs_config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("hf") / request.param
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config, params = hf.load_hf(folder, dtype=jnp.float32)
    return request.param, theirs, config, params


def their_logits(model, tokens, mask):
    import torch

    mask = torch.from_numpy(np.asarray(mask)).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return (
            model(torch.from_numpy(tokens).long(), attention_mask=mask, position_ids=positions).logits.float().numpy()
        )


def report(name, what, value):
    print(f"\n[parity] {name} {what}: {value:.2e}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(pair, side):
    name, theirs, config, params = pair
    x = inputs(name)
    tokens, mask = x[f"tokens_{side}"], x[f"mask_{side}"]
    ours = np.asarray(qwen.Qwen(config).apply({"params": params}, tokens, None, mask))
    error = np.abs(ours - their_logits(theirs, tokens, mask))[mask != 0].max()
    report(name, f"logits, {side} padding, max abs", error)
    assert error < 2e-4


def test_far_positions(pair):
    """Where float32 angles are coarse: positions up to 100,000."""
    import torch

    name, theirs, config, params = pair
    tokens = inputs(name)["tokens_right"][:1]
    positions = np.sort(np.random.RandomState(0).choice(100_000, tokens.shape, replace=False))
    ours = np.asarray(qwen.Qwen(config).apply({"params": params}, tokens, positions))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(positions)).logits.numpy()
    frequencies, _ = layers.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    np.testing.assert_array_max_ulp(frequencies, theirs.model.rotary_emb.inv_freq.numpy(), maxulp=1)
    report(name, "logits at far positions, max abs", np.abs(ours - wanted).max())
    assert np.abs(ours - wanted).max() < 2e-4


def test_greedy_tokens(pair):
    name, theirs, config, params = pair
    import torch

    prompt = inputs(name)["tokens_right"][:1, :PROMPT]
    prompt_t = torch.from_numpy(prompt).long()
    mask = torch.ones_like(prompt_t)  # not given, it would be guessed from the padding id
    wanted = theirs.generate(prompt_t, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    ours = generate(config, params, [prompt[0].tolist()], max_new_tokens=STEPS, temperature=0.0)
    assert ours.tokens[0].tolist() == wanted[0, PROMPT:].tolist()


def test_gradient_of_mean_nll(pair):
    import torch

    name, theirs, config, params = pair
    x = inputs(name)
    for side in ("left", "right"):
        tokens, mask = x[f"tokens_{side}"], x[f"mask_{side}"]
        weight = (mask[:, 1:] * mask[:, :-1]).astype(np.float32)

        def mean_nll(params, tokens=tokens, mask=mask, weight=weight):
            logp = jax.nn.log_softmax(qwen.Qwen(config).apply({"params": params}, tokens, None, mask)[:, :-1])
            return -(jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0] * weight).sum() / weight.sum()

        grads = jax.jit(jax.grad(mean_nll))(params)
        torch_tokens, torch_mask = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
        positions = (torch_mask.cumsum(1) - 1).clamp(min=0)
        theirs.zero_grad()
        logits = theirs(torch_tokens, attention_mask=torch_mask, position_ids=positions).logits
        nll = -logits.log_softmax(-1)[:, :-1].gather(-1, torch_tokens[:, 1:, None])[..., 0]
        ((nll * torch.from_numpy(weight)).sum() / weight.sum()).backward()
        parameters, worst = dict(theirs.named_parameters()), 0.0
        for key, slot in checkpoint_slots(config).items():
            wanted = parameters[key].grad.numpy()
            got = hf._to_host(slot, grads, np.dtype(np.float32))
            worst = max(worst, np.abs(got - wanted).max() / np.abs(wanted).max())
        report(name, f"gradient, {side} padding, relative to each tensor's largest entry", worst)
        assert worst < 1e-4


def test_bfloat16_is_as_near_to_float32_as_theirs(pair):
    import torch

    name, theirs, config, params = pair
    x = inputs(name)
    tokens, mask = x["tokens_right"], x["mask_right"]
    exact = their_logits(theirs, tokens, mask)
    theirs_low = their_logits(theirs.to(torch.bfloat16), tokens, mask)
    theirs.to(torch.float32)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = dataclasses.replace(config, dtype="bfloat16")
    ours_low = np.asarray(qwen.Qwen(config).apply({"params": low}, tokens, None, mask))
    ours, reference = (np.sqrt(np.mean((y - exact)[mask != 0] ** 2)) for y in (ours_low, theirs_low))
    report(name, "bf16 logits, root mean square error, ours", ours)
    report(name, "bf16 logits, root mean square error, transformers", reference)
    assert ours < 1.2 * reference


@variants
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_what_is_saved(name, dtype, tmp_path):
    """Weights bit for bit, config, generation config and tokenizer; sharded."""
    import torch
    import transformers

    config = QwenConfig.from_hf(VARIANTS[name])
    params = qwen.init_params(config, jax.random.key(1), jnp.dtype(dtype))
    tokenizer = small_tokenizer()
    hf.save_hf(tmp_path / "ours", config, params, tokenizer=tokenizer, max_shard_bytes=20_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == getattr(torch, dtype)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    for key, wanted in theirs.state_dict().items():
        if key in checkpoint_slots(config):
            ours = hf._to_host(checkpoint_slots(config)[key], params, np.dtype(jnp.dtype(dtype)))
            bits = wanted.contiguous().view(torch.int16 if dtype == "bfloat16" else torch.int32).numpy()
            np.testing.assert_array_equal(ours.view(bits.dtype), bits, err_msg=key)
    assert QwenConfig.from_hf(theirs.config.to_dict()) == config
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again("c a b")["input_ids"] == tokenizer("c a b")["input_ids"] == [2, 0, 1]

    theirs.save_pretrained(tmp_path / "theirs")
    _, back = hf.load_hf(tmp_path / "theirs", dtype=None)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, back)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == dtype


def small_tokenizer():
    import tokenizers
    import transformers

    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "<eos>": 3}, unk_token="<eos>")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
