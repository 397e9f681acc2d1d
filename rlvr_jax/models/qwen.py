"""The Qwen decoder: its parameters, the Flax module, and pure functions over the same parameters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlvr_jax.models import layers
from rlvr_jax.models.cache import KVCache, write_layer
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.kernels import attention
from rlvr_jax.models.kernels.cached_attention import cached_attention, live_chunks
from rlvr_jax.models.kernels.embedding import embed_tokens
from rlvr_jax.models.tokens import Batched, TokenLayout
from rlvr_jax.sharding.rules import constrain
from rlvr_jax.typing import Array, Float, Int

Params = Mapping[str, Any]

# Up to so many layers are not worth a loop, which keeps what the backward pass needs in stacked arrays and copies it.
_UNROLLED = 8
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(attention.SAVED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class ParamSpec(NamedTuple):
    """One parameter: its shape, the logical name of each axis (None is never sharded) and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str  # "normal" (standard deviation initializer_range), "ones" or "zeros"


def layer_specs(config: QwenConfig) -> dict[str, ParamSpec]:
    """The parameters of one layer, without the leading layer axis."""
    D, N, K, H, F = (
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
    )
    specs = {
        "attn_norm": ParamSpec((D,), (None,), "ones"),
        "q_proj": ParamSpec((D, N, H), ("embed", "heads", "head_dim"), "normal"),
        "k_proj": ParamSpec((D, K, H), ("embed", "kv_heads", "head_dim"), "normal"),
        "v_proj": ParamSpec((D, K, H), ("embed", "kv_heads", "head_dim"), "normal"),
        "o_proj": ParamSpec((N, H, D), ("heads", "head_dim", "embed"), "normal"),
        "mlp_norm": ParamSpec((D,), (None,), "ones"),
        "gate_proj": ParamSpec((D, F), ("embed", "ffn"), "normal"),
        "up_proj": ParamSpec((D, F), ("embed", "ffn"), "normal"),
        "down_proj": ParamSpec((F, D), ("ffn", "embed"), "normal"),
    }
    if config.qkv_bias:
        specs["q_bias"] = ParamSpec((N, H), ("heads", "head_dim"), "zeros")
        specs["k_bias"] = ParamSpec((K, H), ("kv_heads", "head_dim"), "zeros")
        specs["v_bias"] = ParamSpec((K, H), ("kv_heads", "head_dim"), "zeros")
    if config.qk_norm:
        specs["q_norm"] = ParamSpec((H,), (None,), "ones")
        specs["k_norm"] = ParamSpec((H,), (None,), "ones")
    return specs


def param_specs(config: QwenConfig) -> Params:
    """A tree like the parameters with a `ParamSpec` at every leaf; layers are stacked on a leading axis "layers"."""
    D, V, L = config.hidden_size, config.vocab_size, config.num_layers
    specs: Params = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), "normal"),
        "layers": {
            name: ParamSpec((L, *spec.shape), ("layers", *spec.axes), spec.init)
            for name, spec in layer_specs(config).items()
        },
        "final_norm": ParamSpec((D,), (None,), "ones"),
    }
    if not config.tie_word_embeddings:
        specs["unembed"] = ParamSpec((D, V), ("embed", "vocab"), "normal")
    return specs


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, ParamSpec)


def param_axes(config: QwenConfig) -> Params:
    """A tree like the parameters whose leaves are tuples of logical axis names, for `ShardingRules`."""
    return jax.tree.map(lambda spec: spec.axes, param_specs(config), is_leaf=_is_spec)


def _initializer(config: QwenConfig, init: str) -> Callable[..., jax.Array]:
    if init == "normal":
        return nn.initializers.normal(config.initializer_range)
    return nn.initializers.ones if init == "ones" else nn.initializers.zeros


def init_params(config: QwenConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters: normal with standard deviation `initializer_range`, norms one, biases zero."""
    specs, structure = jax.tree.flatten(param_specs(config), is_leaf=_is_spec)
    keys = jax.random.split(key, len(specs))
    leaves = [_initializer(config, spec.init)(k, spec.shape, dtype) for k, spec in zip(keys, specs, strict=True)]
    return jax.tree.unflatten(structure, leaves)


class Block(nn.Module):
    """One decoder layer; scanned over by `Qwen`, which stacks its parameters."""

    config: QwenConfig

    @nn.compact
    def __call__(
        self, x_MD: Array, cos_Mh: Array, sin_Mh: Array, tokens_BT: Array, segment_BT: Array | None
    ) -> tuple[Array, None]:
        p = {
            name: self.param(name, _initializer(self.config, spec.init), spec.shape, jnp.float32)
            for name, spec in layer_specs(self.config).items()
        }
        eps, layout = self.config.rms_norm_eps, TokenLayout.of(*tokens_BT.shape)
        q, k, v = layers.project_qkv(p, layout.between(x_MD), cos_Mh, sin_Mh, eps, layout)
        attended_MNH = attention.self_attention(q, k, v, segment_BT, layout, kind=self.config.attention)
        return layers.finish_block(p, x_MD, attended_MNH, eps, layout), None


class Qwen(nn.Module):
    """Dense Qwen2 / Qwen2.5 / Qwen3 causal language model.

    `Qwen(config).apply({"params": params}, tokens_BT)` with the parameters of `load_hf` or `init_params`:
    `embed [V, D]`, `layers` (each parameter stacked over layers, `[L, ...]`), `final_norm [D]` and, when the embeddings
    are not tied, `unembed [D, V]`. The forward runs one compiled layer body scanned over the layers, rematerialised as
    `config.remat` says, in `config.dtype`. For training use `hidden_states` and a chunked log-prob instead, which never
    holds `[B, T, V]`; for decoding `cached_hidden_states`.

    Attributes:
      config: the architecture.
    """

    config: QwenConfig

    def setup(self) -> None:
        specs = param_specs(self.config)

        def declare(name: str) -> jax.Array:
            return self.param(name, _initializer(self.config, specs[name].init), specs[name].shape, jnp.float32)

        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[self.config.remat], prevent_cse=False)
        self.embed = declare("embed")
        # Rematerialisation needs the loop: without it the compiler joins what is computed again with what was kept.
        unrolled = self.config.remat == "none" and self.config.num_layers <= _UNROLLED
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.config.num_layers,
            unroll=self.config.num_layers if unrolled else 1,
        )(self.config)
        self.final_norm = declare("final_norm")
        if not self.config.tie_word_embeddings:
            self.unembed = declare("unembed")

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None = None,
        mask_BT: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position.

        Args:
          tokens_BT: token ids. Those outside the vocabulary are clipped into it, so padding may hold any id.
          positions_BT: rotary positions; by default they count the unmasked tokens of each sequence from 0, so padding
            on either side leaves the numbers of the real tokens as they are.
          mask_BT: 0 on padding (left or right), non-zero elsewhere; None means no padding. Attention is causal by
            index and never looks at padding. What comes out at padding is finite and means nothing. A row may hold
            several sequences, one behind the other, marked 1, 2, 3, ...: they do not see one another.

        Returns:
          float32 [B, T, V]: logits at t predict token t + 1.
        """
        hidden_BTD = self.hidden(tokens_BT, positions_BT, mask_BT)
        weights = {"embed": self.embed} if self.config.tie_word_embeddings else {"unembed": self.unembed}
        return logits(self.config, weights, hidden_BTD)

    def hidden(self, tokens_BT: Array, positions_BT: Array | None = None, mask_BT: Array | None = None) -> Array:
        """As `__call__`, up to and with the final norm: [B, T, D] in the compute dtype."""
        if mask_BT is not None and mask_BT.shape != tokens_BT.shape:
            raise ValueError(f"mask_BT has shape {mask_BT.shape}, expected that of tokens_BT, {tokens_BT.shape}")
        if positions_BT is None:
            positions_BT = default_positions(tokens_BT, mask_BT)
        layout = TokenLayout.of(*tokens_BT.shape)
        cos_Mh, sin_Mh = (layout.flat(x_BTh) for x_BTh in _rope(self.config, positions_BT))
        x_MD = embed_tokens(self.embed, tokens_BT, self.config.compute_dtype(self.embed.dtype), layout)
        x_MD, _ = self.layers(x_MD, cos_Mh, sin_Mh, tokens_BT, mask_BT)
        return layout.apart(layers.rms_norm(x_MD, self.final_norm, self.config.rms_norm_eps))


def default_positions(tokens_BT: Array, mask_BT: Array | None) -> jax.Array:
    """Positions that count each sequence's unmasked tokens from 0; padding before them gets 0."""
    if mask_BT is None:
        return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    count_BT = jnp.cumsum(mask_BT != 0, axis=1) - 1
    highest_BT = jax.lax.cummax(jnp.asarray(mask_BT, jnp.int32), axis=1)
    begins_BT = jnp.diff(highest_BT, axis=1, prepend=0) > 0  # a gap inside a sequence begins none
    return jnp.maximum(count_BT - jax.lax.cummax(jnp.where(begins_BT, count_BT, 0), axis=1), 0)


def _rope(config: QwenConfig, positions_BT: Array) -> tuple[Array, Array]:
    frequencies, factor = layers.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return layers.rope_tables(positions_BT, frequencies, factor)


def _embed(config: QwenConfig, embed_VD: Array, tokens_BT: Array) -> Array:
    x_BTD = jnp.take(embed_VD, tokens_BT, axis=0, mode="clip").astype(config.compute_dtype(embed_VD.dtype))
    return constrain(x_BTD, "batch", "time", "act_embed")


def hidden_states(
    config: QwenConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"] | None = None,
    mask_BT: Array | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in the compute dtype: `Qwen.__call__` without the unembedding.

    For training and scoring: hand the result and `unembedding(config, params)` to a chunked log-prob.
    """
    hidden_BTD = Qwen(config).apply(
        {"params": computed(config, params)}, tokens_BT, positions_BT, mask_BT, method="hidden"
    )
    return cast(jax.Array, hidden_BTD)


def computed(config: QwenConfig, params: Params) -> Params:
    """The parameters in the compute dtype, but for the norms, which are applied in float32.

    Cast before the loop over the layers, their gradients come out of it in that dtype too, in half the memory.
    """
    dtype = config.compute_dtype(params["embed"].dtype)
    return jax.tree_util.tree_map_with_path(lambda path, x: x if "norm" in path[-1].key else x.astype(dtype), params)


def unstack_layers(config: QwenConfig, params: Params) -> Params:
    """The same parameters with `layers` as a tuple of one dict a layer, for `cached_hidden_states`.

    Done once before a decoding loop, the layers' slices are not cut out of the stacked arrays at every step.
    """
    per_layer = tuple({name: x[i] for name, x in params["layers"].items()} for i in range(config.num_layers))
    return {**params, "layers": per_layer}


def cached_hidden_states(
    config: QwenConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: KVCache,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states of new tokens given those in the cache, and the cache with the new tokens in it.

    The index of a token in the cache is its position: token (b, t) is written at `positions_BT[b, t]` and sees all
    indices up to it. So a prompt is prefilled right-padded with positions 0, 1, 2, ...; what the padding wrote is
    overwritten before any later token can see it. One function for prefill (T = prompt) and for decoding (T = 1).

    Args:
      config: the architecture.
      params: the parameters, stacked or from `unstack_layers`.
      tokens_BT: token ids.
      positions_BT: positions, different for each token of a row; rows may be at different places. A token outside
        0 .. S-1 is not written, and its hidden state means nothing.
      cache: of capacity S tokens; its dtype may differ from the compute dtype.

    Returns:
      hidden [B, T, D] after the final norm in the compute dtype, and the new cache. The old one may be donated.
    """
    if not isinstance(params["layers"], tuple):
        params = unstack_layers(config, params)
    eps = config.rms_norm_eps
    cos_BTh, sin_BTh = _rope(config, positions_BT)
    chunks = live_chunks(positions_BT, cache.length)
    x_BTD = _embed(config, constrain(params["embed"], "vocab", None), tokens_BT)
    written, layout = [], Batched()
    for p, layer in zip(params["layers"], cache.layers(), strict=True):
        q, k, v = layers.project_qkv(p, x_BTD, cos_BTh, sin_BTh, eps, layout)
        written.append(write_layer(layer, k, v, positions_BT))
        attended_BTNH = cached_attention(q, written[-1], positions_BT, chunks)
        x_BTD = layers.finish_block(p, x_BTD, attended_BTNH, eps, layout)
    return layers.rms_norm(x_BTD, params["final_norm"], eps), KVCache.of_layers(written)


def unembedding(config: QwenConfig, params: Params) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits: `unembed`, or the transposed embedding when they are tied."""
    if "unembed_VD" in params:
        return params["unembed_VD"].T
    return params["embed"].T if config.tie_word_embeddings else params["unembed"]


def logits(config: QwenConfig, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """float32 logits of hidden states, multiplied in the compute dtype of the hidden states."""
    layers_of = params.get("layers")
    if isinstance(layers_of, tuple) and "qkv" in layers_of[0]:
        return layers.linear(hidden, params["embed" if config.tie_word_embeddings else "unembed_VD"], jnp.float32)
    if config.tie_word_embeddings:
        return layers.einsum("...D,VD->...V", hidden, params["embed"], jnp.float32)
    return layers.einsum("...D,DV->...V", hidden, params["unembed"], jnp.float32)


def model_apply(config: QwenConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A model for `rlvr_jax.dapo`: `apply(params, tokens_BT, positions_BT, mask_BT) -> (hidden_BTD, unembed_DV)`."""

    def apply(params: Params, tokens_BT: Array, positions_BT: Array | None, mask_BT: Array) -> tuple:
        return hidden_states(config, params, tokens_BT, positions_BT, mask_BT), unembedding(config, params)

    return apply
