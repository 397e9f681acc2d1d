"""What the decoding tests share: a count of compilations, a toy model with a cache, tiny Qwen models, chi-square."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rlvr_jax.decoding.state import LanguageModel
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.qwen import Qwen, init_params

_compiled: list[str] = []


def _listen(event: str, _seconds: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry for each program that XLA compiles inside the block, the smallest eager operation included."""
    before = len(_compiled)
    inside: list[str] = []
    yield inside
    inside.extend(_compiled[before:])


def toy_model() -> LanguageModel:
    """A language model whose every token sees its whole history, through a cache of token ids indexed by position.

    hidden(t) = sum over s <= t of decay^(t - s) embed[token_s]: junk left in the cache, a position that is off by one
    or a token fed twice changes the logits.
    """

    def forward(params, tokens_BT, positions_BT, cache_BS):
        rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
        cache_BS = cache_BS.at[rows_B1, positions_BT].set(tokens_BT, mode="drop")
        age_BTS = positions_BT[:, :, None] - jnp.arange(cache_BS.shape[1])
        weight_BTS = jnp.where(age_BTS >= 0, params["decay"] ** jnp.maximum(age_BTS, 0), 0.0)
        return jnp.einsum("BTS,BSD->BTD", weight_BTS, params["embed"][cache_BS]), cache_BS

    def insert(cache_BS, prompts_PL, source_B):
        new_BL = prompts_PL[jnp.maximum(source_B, 0)]
        return cache_BS.at[:, : new_BL.shape[1]].set(
            jnp.where(source_B[:, None] >= 0, new_BL, cache_BS[:, : new_BL.shape[1]])
        )

    return LanguageModel(
        forward=forward,
        logits=lambda params, hidden: hidden @ params["unembed"],
        init_cache=lambda batch, length: jnp.full((batch, length), 1, jnp.int32),  # junk, not a neutral zero
        grow_cache=lambda cache, length: jnp.pad(cache, ((0, 0), (0, length - cache.shape[1])), constant_values=2),
        insert_cache=insert,
    )


def toy_params(seed: int, vocabulary: int = 11, width: int = 8, scale: float = 1.2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.normal(size=(vocabulary, width)).astype(np.float32),
        "unembed": (rng.normal(size=(width, vocabulary)) * scale / np.sqrt(width)).astype(np.float32),
        "decay": np.float32(0.8),
    }


def toy_logits(params: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """float64 logits of the token after `tokens`."""
    ages = np.arange(len(tokens))[::-1]
    hidden = (params["decay"].astype(np.float64) ** ages) @ params["embed"][list(tokens)].astype(np.float64)
    return hidden @ params["unembed"].astype(np.float64)


def full_logprobs(config: QwenConfig, params: dict, texts: list[list[int]], temperature: float = 1.0) -> np.ndarray:
    """[texts, longest, V]: log softmax(logits / temperature) of whole right-padded texts, without a cache."""
    tokens_BT = np.zeros((len(texts), max(len(text) for text in texts)), np.int32)
    for row, text in enumerate(texts):
        tokens_BT[row, : len(text)] = text
    logits_BTV = _forward(config, params, tokens_BT)
    return np.log(softmax(np.asarray(logits_BTV, np.float64) / temperature))


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, tokens_BT):
    return Qwen(config).apply({"params": params}, tokens_BT)


def assert_same(first, second, atol: float = 1e-5) -> None:
    """Two trees of arrays of the same dtypes: equal, floats to `atol`."""
    for (path, a), b in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype, path
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, atol=atol, err_msg=str(path))
        else:
            np.testing.assert_array_equal(a, b, err_msg=str(path))


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def chi_square(tokens: np.ndarray, p: np.ndarray) -> float:
    """How far counts of `tokens` are from `p`, in standard deviations of chi-square; inf off the support."""
    counts = np.bincount(tokens, minlength=len(p))
    if counts[p == 0].sum():
        return np.inf
    expected = counts.sum() * p
    rare = expected < 5  # too few for the statistic: one cell together
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    free = max(len(expected) - 1, 1)
    return (((counts - expected) ** 2 / expected).sum() - len(expected) + 1) / np.sqrt(2 * free)


def tiny_qwen(model_type: str = "qwen3", seed: int = 0, **fields: object) -> tuple[QwenConfig, dict]:
    """A two-layer model with weights wide enough that its distributions are not flat."""
    config = QwenConfig(
        model_type=model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        max_position_embeddings=512,
        **fields,
    )
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    normal = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 1 + 0.1 * x if "norm" in path[-1].key else 0.3 * x, normal
    )
    return config, jax.device_put(params)
