"""The decoder against stored numbers of transformers (tests/parity/make_expected.py writes them)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rlvr_jax.models import hf, qwen
from rlvr_jax.models.cache import init_cache
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.hf_names import checkpoint_slots
from tests.parity.variants import PROMPT, STEPS, VARIANTS, inputs, weights

STORED = Path(__file__).parent / "parity"
variants = pytest.mark.parametrize("name", list(VARIANTS))


@functools.cache
def model(name: str, folder: Path):
    """Config and float32 parameters by way of a folder that the safetensors library wrote; with the stored numbers."""
    folder = folder / name
    folder.mkdir()
    save_file(weights(name), folder / "model.safetensors")
    (folder / "config.json").write_text((STORED / f"{name}.config.json").read_text())
    config, params = hf.load_hf(folder, dtype=jnp.float32)
    return config, params, dict(np.load(STORED / f"{name}.npz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@variants
def test_config_of_both_styles(name, folder):
    assert QwenConfig.from_hf(VARIANTS[name]) == model(name, folder)[0]


@variants
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(name, side, folder):
    """With jit on the left, without on the right."""
    config, params, expected = model(name, folder)
    x = inputs(name)
    apply = qwen.Qwen(config).apply
    logits = (jax.jit(apply) if side == "left" else apply)(
        {"params": params}, x[f"tokens_{side}"], None, x[f"mask_{side}"]
    )
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits)[x[f"mask_{side}"] != 0] - expected[f"logits_{side}"]).max()
    assert error < 2e-5  # the requirement is 2e-4


@variants
def test_greedy_tokens(name, folder):
    """64 greedy steps through the cache give transformers' tokens."""
    config, params, expected = model(name, folder)
    tokens = inputs(name)["tokens_right"][:1, :PROMPT]
    step = jax.jit(functools.partial(qwen.cached_hidden_states, config), donate_argnums=3)
    cache = init_cache(config, 1, PROMPT + STEPS)
    positions, out = np.arange(PROMPT)[None], []
    for i in range(STEPS):
        hidden, cache = step(params, tokens, positions, cache)
        tokens = np.asarray(qwen.logits(config, params, hidden[:, -1])).argmax(-1)[:, None]
        out.append(int(tokens[0, 0]))
        positions = np.array([[PROMPT + i]])
    assert out == expected["greedy"].tolist()


@variants
def test_gradient_of_mean_nll(name, folder):
    config, params, expected = model(name, folder)
    x = inputs(name)

    def mean_nll(params):
        hidden = qwen.hidden_states(config, params, x["tokens_right"], None, x["mask_right"])
        logp = jax.nn.log_softmax(hidden[:, :-1].astype(jnp.float32) @ qwen.unembedding(config, params))
        picked = jnp.take_along_axis(logp, x["tokens_right"][:, 1:, None], -1)[..., 0]
        return -(picked * x["mask_right"][:, 1:]).sum() / x["mask_right"][:, 1:].sum()

    value, grads = jax.jit(jax.value_and_grad(mean_nll))(params)
    np.testing.assert_allclose(value, expected["nll"], rtol=1e-6)
    for key, slot in checkpoint_slots(config).items():
        want = expected[f"grad/{key}"]
        got = hf._to_host(slot, grads, np.dtype(np.float32))
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error < 1e-5, (key, error)  # the requirement is 1e-4
