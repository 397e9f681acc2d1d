"""Generating with Qwen models: `generate` and `generate_selective`, the decoders bound to the models.

Arguments are checked before anything is compiled. Nothing is compiled again for other parameters of the same shapes,
another seed, temperature, top-p, top-k, tau or gamma, or for prompts whose longest falls in the same bucket.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlvr_jax.criteria import Named
from rlvr_jax.decoding.batch import Ids, Prompts, check_prompts, check_stop_tokens
from rlvr_jax.decoding.checks import Numbers, check_count
from rlvr_jax.decoding.engine import OnChunk
from rlvr_jax.decoding.generate import Generation, decode
from rlvr_jax.decoding.selective import SelectiveGeneration, decode_selective
from rlvr_jax.decoding.state import LanguageModel
from rlvr_jax.models import cache as kv_cache
from rlvr_jax.models import decode_weights, qwen
from rlvr_jax.models.cache import KVCache
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.vocabulary import common_vocabulary
from rlvr_jax.sharding.decode_layout import decode_mesh
from rlvr_jax.sharding.rules import constrain
from rlvr_jax.typing import Array

Params = Any


def generate(
    config: QwenConfig,
    params: Params,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    n: int = 1,
    temperature: Numbers = 1.0,
    top_p: Numbers = 1.0,
    top_k: Numbers = 0,
    seed: int = 0,
    stop_tokens: Ids = (),
    slots: int | None = None,
    mesh: Mesh | None = None,
    on_chunk: OnChunk | None = None,
) -> Generation:
    """Draws `n` responses to each prompt.

    Args:
      config, params: the model, from `load_hf` or `init_params`. It computes in what `Qwen(config).apply` computes in,
        `config.compute_dtype`; log-probabilities are float32 always.
      prompts: token ids, lists of any lengths.
      max_new_tokens: the most tokens of a response.
      n: responses a prompt.
      temperature: 0 is greedy. top_p: in [0, 1]. top_k: 0 for no limit. Numbers, or one for each of the
        len(prompts) * n rows.
      seed: a row's tokens depend on its prompt, its settings, the seed and the indices of prompt and sample alone.
      stop_tokens: ids that end a response (none: always max_new_tokens).
      slots: rows decoded at once, refilled as they end; by default all. No token depends on it.
      mesh: splits the rows over its data and fsdp axes and the weights over its tensor axis, see `decode_layout`;
        parameters from `load_hf` with that mesh are laid out anew. None takes the ambient mesh, if there is one.
      on_chunk: called now and then with the number of finished rows and of tokens drawn so far.

    Returns:
      A `Generation`: numpy arrays, row = prompt * n + sample.

    Raises:
      ValueError: naming the argument, its value and what was expected.
    """
    config = _resolved("config", config, params)
    _check_tokens("config", config, prompts, stop_tokens, max_new_tokens)
    return decode(
        language_model(config),
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_tokens=stop_tokens,
        slots=slots,
        mesh=_mesh(mesh, config),
        on_chunk=on_chunk,
    )


def generate_selective(
    config_base: QwenConfig,
    params_base: Params,
    config_rl: QwenConfig,
    params_rl: Params,
    prompts: Prompts,
    *,
    criterion: Named,
    tau: Numbers | None,
    gamma: Numbers,
    max_new_tokens: int,
    sample_from: str = "base",
    block: int | None = None,
    top_logprobs: int | None = None,
    n: int = 1,
    temperature: Numbers = 1.0,
    top_p: Numbers = 1.0,
    top_k: Numbers = 0,
    seed: int = 0,
    stop_tokens: Ids = (),
    slots: int | None = None,
    mesh: Mesh | None = None,
    on_chunk: OnChunk | None = None,
) -> SelectiveGeneration:
    """Draws `n` responses to each prompt by selective replacement / extrapolation (arXiv 2603.22117, section 4.1).

    Each token is drawn from the model that `sample_from` names. Where `criterion` selects it, it is drawn again from
    softmax(((1 + gamma) log pi_RL - gamma log pi_Base) / temperature). gamma = 0 is replacement. Published settings:
    temperature 1, top-p 0.7, delta_logp, tau -0.3 to -0.4, gamma 0.05 to 0.1; an extrapolation wants gamma = 0 at the
    same tau and the RL model at lower temperatures beside it.

    Args:
      config_base, params_base, config_rl, params_rl: the two models, over the same tokenizer. Where one has more
        rows of padding, both are cut to the fewer rows, so their distributions are over those tokens.
      criterion: delta_logp, neg_delta_logp, abs_delta_logp, entropy_base, entropy_rl, kl, kl_reverse, js, js_true,
        random, none or all; see `fires`.
      tau: threshold, a number or one a row (None for none and all).
      gamma: a number or one a row.
      sample_from: "base" or "rl".
      block: tokens drafted by the sampled model before the other one scores them all in one pass; the response does not
        depend on it. None chooses from the rate at which the criterion fires.
      top_logprobs: None sees whole distributions; 50 is the published code's rule.
      The others are those of `generate`.

    Returns:
      A `SelectiveGeneration`: also `fired`, `delta_logp` and `sampled_token`, each [R, max_new_tokens].

    Raises:
      ValueError: naming the argument, its value and what was expected.
    """
    base = _resolved("config_base", config_base, params_base)
    rl = _resolved("config_rl", config_rl, params_rl)
    for name, config in (("config_base", base), ("config_rl", rl)):
        _check_tokens(name, config, prompts, stop_tokens, max_new_tokens)
    base, params_base, rl, params_rl = common_vocabulary(base, params_base, rl, params_rl)
    return decode_selective(
        (language_model(base), language_model(rl)),
        (params_base, params_rl),
        prompts,
        criterion=criterion,
        tau=tau,
        gamma=gamma,
        sample_from=sample_from,
        block=block,
        top_logprobs=top_logprobs,
        max_new_tokens=max_new_tokens,
        n=n,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop_tokens=stop_tokens,
        slots=slots,
        mesh=_mesh(mesh, base, rl),
        on_chunk=on_chunk,
    )


def language_model(config: QwenConfig, cache_dtype: str | None = None) -> LanguageModel:
    """The functions of a Qwen model for `decoding`; the same object for the same arguments, so programs are reused.

    Args:
      config: the architecture.
      cache_dtype: what keys and values are kept in: None for the config's compute dtype (float32 where it leaves that
        open), "int8" with a scale for each token and head, or the name of a float type.

    Raises:
      ValueError: a dtype of another kind.
    """
    return _language_model(config, kv_cache.cache_dtype(config, cache_dtype).name)


@functools.lru_cache(maxsize=64)
def _language_model(config: QwenConfig, cache_dtype: str) -> LanguageModel:
    constrained = kv_cache.constrain_cache

    def forward(params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, cache: KVCache) -> tuple:
        hidden_BTD, cache = qwen.cached_hidden_states(config, params, tokens_BT, positions_BT, cache)
        return hidden_BTD, constrained(cache)

    def logits(params: Params, hidden: jax.Array) -> Array:
        return constrain(qwen.logits(config, params, hidden), "batch", *[None] * (hidden.ndim - 2), "vocab")

    return LanguageModel(
        forward=forward,
        logits=logits,
        init_cache=lambda batch, length: constrained(kv_cache.init_cache(config, batch, length, cache_dtype)),
        grow_cache=kv_cache.grow_cache,
        insert_cache=lambda cache, prompts, source_B: constrained(kv_cache.insert_cache(cache, prompts, source_B)),
        prepare=functools.partial(decode_weights.prepare, config),
    )


def _mesh(mesh: Mesh | None, *configs: QwenConfig) -> Mesh | None:
    mesh = jax.sharding.get_mesh() if mesh is None else mesh
    return None if mesh.empty else decode_mesh(mesh, [config.num_kv_heads for config in configs])


def _resolved(name: str, config: QwenConfig, params: Params) -> QwenConfig:
    """The config with its compute dtype written out."""
    expected = (config.vocab_size, config.hidden_size)
    shape = jnp.shape(params["embed"]) if isinstance(params, Mapping) and "embed" in params else None
    if shape != expected:
        raise ValueError(
            f"the embedding in the parameters of {name} has shape {shape}: expected {expected}, "
            "(vocab_size, hidden_size) of the config"
        )
    return config.with_dtype(params)


def _check_tokens(name: str, config: QwenConfig, prompts: Prompts, stop_tokens: Ids, max_new_tokens: int) -> None:
    """The checks that need the config; the others are those of `decode`."""
    arrays = check_prompts(prompts)
    named = {f"prompts[{index}]": tokens for index, tokens in enumerate(arrays)}
    for argument, tokens in (named | {"stop_tokens": check_stop_tokens(stop_tokens)}).items():
        if tokens.max() >= config.vocab_size:
            raise ValueError(
                f"{argument} has token {tokens.max()}: expected ids below vocab_size {config.vocab_size} of {name}"
            )
    longest = max(len(tokens) for tokens in arrays)
    total = longest + check_count("max_new_tokens", max_new_tokens)
    if total > config.max_position_embeddings:
        raise ValueError(
            f"the longest prompt ({longest} tokens) + max_new_tokens={max_new_tokens} is {total}: expected at most "
            f"max_position_embeddings {config.max_position_embeddings} of {name}"
        )
