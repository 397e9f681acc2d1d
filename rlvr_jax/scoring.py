"""Given responses scored by two models at once: the numbers that criteria compare with their thresholds.

Teacher forcing: every token of a response is judged as `decode_selective` would have judged it, given the tokens before
it. So a threshold for a wanted share of tokens is a quantile of these numbers (`criteria.threshold_for_share`).
`score_texts` is the loop that reads texts with both models; what it measures is its caller's.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlvr_jax.criteria import MEASURED, criterion_of, criterion_value
from rlvr_jax.decoding.batch import Prompts
from rlvr_jax.decoding.checks import check_count, check_tokens
from rlvr_jax.decoding.selective import make_rule
from rlvr_jax.generation import language_model
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.vocabulary import common_vocabulary
from rlvr_jax.sharding.rules import batch_shards, constrain
from rlvr_jax.typing import Array

Params = Any

PIECE = 256  # tokens of a row that the models read at once: attention scores take [B, heads, piece, length]
_SMALLEST = 32


def criterion_values(
    config_base: QwenConfig,
    params_base: Params,
    config_rl: QwenConfig,
    params_rl: Params,
    prompts: Prompts,
    responses: Prompts,
    criteria: Sequence[str],
    *,
    top_logprobs: int | None = None,
    sample_from: str = "base",
    cache_dtype: str | None = None,
    batch_tokens: int = 16_384,
    chunk: int = 512,
    mesh: Mesh | None = None,
) -> dict[str, list[np.ndarray]]:
    """`criteria.criterion_value` of every response token under both models, without a [B, T, V] array.

    Rows are right-padded to a few lengths and read by both models in pieces, as a prompt is prefilled; the logits of at
    most `chunk` tokens are there at a time. One program is compiled for each of those lengths.

    Args:
      config_base, params_base, config_rl, params_rl: the two models, over the same vocabulary. They compute in the
        config's `compute_dtype`, as in `generate_selective`.
      prompts: token ids before each response, at least one.
      responses: token ids that are scored.
      criteria: some of `criteria.CRITERIA`, or module:name; not random, none or all, which measure nothing.
      top_logprobs, sample_from: as in `criteria.criterion_value`.
      cache_dtype: what keys and values are read back from, as in `generation.language_model`.
      batch_tokens: tokens, padding included, in a batch: both models' caches for so many are held.
      chunk: tokens whose logits (and several arrays of their size) are held at a time.
      mesh: splits the rows over its data and fsdp axes; the parameters stay where they are.

    Returns:
      For each criterion a list with one float32 array [len(response)] a response.

    Raises:
      ValueError: naming the argument, its value and what was expected; nothing was compiled by then.
    """
    if isinstance(criteria, str):
        raise ValueError(f"criteria={criteria!r}: expected a list of names, some of {', '.join(MEASURED)}")
    for criterion in criteria:
        if not criterion_of(criterion).measures:
            raise ValueError(f"criteria has {criterion!r}: expected some of {', '.join(MEASURED)}")
        make_rule(criterion, 0.0, sample_from=sample_from, top_logprobs=top_logprobs)
    rule = ScoreRule(tuple(criteria), top_logprobs, sample_from, chunk)
    found: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.float32)] * len(responses) for name in criteria}
    for row, measured in score_texts(
        *(config_base, params_base, config_rl, params_rl, prompts, responses, rule),
        cache_dtype=cache_dtype,
        batch_tokens=batch_tokens,
        mesh=mesh,
    ):
        for name, value_T in measured.items():
            found[name][row] = value_T
    return found


@runtime_checkable
class Rule(Protocol):
    """What is compiled into the program: hashable, and equal where it measures the same.

    `chunk`: tokens whose logits (and several arrays of their size) are held at a time.
    """

    @property
    def chunk(self) -> int: ...

    def measure(self, logp_base_NV: jax.Array, logp_rl_NV: jax.Array, token_N: jax.Array) -> dict[str, jax.Array]:
        """Arrays [N, ...], each with one entry a token."""
        ...


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """Measures `criterion_value` of each criterion."""

    criteria: tuple[str, ...]
    top_logprobs: int | None
    sample_from: str
    chunk: int

    def measure(self, logp_base_NV: jax.Array, logp_rl_NV: jax.Array, token_N: jax.Array) -> dict[str, jax.Array]:
        """[N] a criterion."""
        options: dict[str, Any] = {"top_logprobs": self.top_logprobs, "sample_from": self.sample_from}
        return {name: criterion_value(name, logp_base_NV, logp_rl_NV, token_N, **options) for name in self.criteria}


def score_texts(
    config_base: QwenConfig,
    params_base: Params,
    config_rl: QwenConfig,
    params_rl: Params,
    prompts: Prompts,
    responses: Prompts,
    rule: Rule,
    *,
    cache_dtype: str | None = None,
    batch_tokens: int = 16_384,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields each response's number and what the rule measures of its tokens, [len(response), ...], longest text first.

    Arguments and errors are those of `criterion_values`. At any time the numbers of one batch are held.
    """
    check_count("batch_tokens", batch_tokens)
    check_count("chunk", rule.chunk)
    texts = _checked_texts(prompts, responses, min(config_base.vocab_size, config_rl.vocab_size))
    config_base, params_base, config_rl, params_rl = common_vocabulary(config_base, params_base, config_rl, params_rl)
    models = tuple(
        language_model(config.with_dtype(params), cache_dtype)
        for config, params in ((config_base, params_base), (config_rl, params_rl))
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        both = tuple(model.prepare(params) for model, params in zip(models, (params_base, params_rl), strict=True))
    batches = _batches([np.concatenate(text) for text in texts], batch_tokens, batch_shards(mesh))
    for rows, tokens_BT in batches:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):  # not while the caller has the word
            measured = {name: np.asarray(x) for name, x in score(models, rule, both, tokens_BT).items()}
        for i, row in enumerate(rows):
            prompt, response = texts[row]
            begin = len(prompt) - 1  # the position that predicts the response's first token
            yield row, {name: x[i, begin : begin + len(response)].copy() for name, x in measured.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(models: tuple, rule: Rule, params: tuple[Params, Params], tokens_BT: Array) -> dict[str, jax.Array]:
    """[B, T, ...] for each array of the rule; at t what is measured of token t + 1 (at the last t: of padding)."""
    B, T = tokens_BT.shape
    piece = min(T, PIECE)
    width = max(1, min(piece, rule.chunk // B))  # positions whose logits are there at a time
    piece -= piece % width
    pieces = -(-T // piece)
    padded_BT = jnp.pad(jnp.asarray(tokens_BT), ((0, 0), (0, pieces * piece + 1 - T)))
    tokens_IBP = jnp.moveaxis(padded_BT[:, :-1].reshape(B, pieces, piece), 1, 0)
    targets_IBP = jnp.moveaxis(padded_BT[:, 1:].reshape(B, pieces, piece), 1, 0)
    tokens_IBP = constrain(tokens_IBP, None, "batch", None)

    def read(caches: tuple, inputs: tuple) -> tuple[tuple, dict[str, jax.Array]]:
        begin, tokens_BP, targets_BP = inputs
        positions_BP = jnp.broadcast_to(begin + jnp.arange(piece, dtype=jnp.int32), tokens_BP.shape)
        hidden, grown = [], []
        for model, p, cache in zip(models, params, caches, strict=True):
            hidden_BPD, cache = model.forward(p, tokens_BP, positions_BP, cache)
            hidden.append(hidden_BPD)
            grown.append(cache)

        def measure(_: None, start: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            logp_NV = []
            for model, p, hidden_BPD in zip(models, params, hidden, strict=True):
                hidden_BCD = jax.lax.dynamic_slice_in_dim(hidden_BPD, start, width, axis=1)
                logits_BCV = model.logits(p, hidden_BCD)
                logp_NV.append(jax.nn.log_softmax(logits_BCV).reshape(B * width, -1))
            token_N = jax.lax.dynamic_slice_in_dim(targets_BP, start, width, axis=1).reshape(-1)
            measured = rule.measure(logp_NV[0], logp_NV[1], token_N)
            return None, {name: x.reshape(B, width, *x.shape[1:]) for name, x in measured.items()}

        _, measured = jax.lax.scan(measure, None, jnp.arange(0, piece, width))
        return tuple(grown), {name: _joined(x) for name, x in measured.items()}

    caches = tuple(model.init_cache(B, pieces * piece) for model in models)
    begins_I = jnp.arange(pieces, dtype=jnp.int32) * piece
    _, values = jax.lax.scan(read, caches, (begins_I, tokens_IBP, targets_IBP))
    out = {name: _joined(x)[:, :T] for name, x in values.items()}
    return {name: jnp.asarray(constrain(x, *[None] * x.ndim)) for name, x in out.items()}


def _joined(parts: jax.Array) -> jax.Array:
    """[I, B, P, ...] to [B, I P, ...]."""
    pieces, B, P, *rest = parts.shape
    return jnp.moveaxis(parts, 0, 1).reshape(B, pieces * P, *rest)


def _batches(texts: list[np.ndarray], batch_tokens: int, shards: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Rows of similar length together, longest first, every batch of a length with the same number of rows."""
    by_length: dict[int, list[int]] = {}
    for row in sorted(range(len(texts)), key=lambda row: -len(texts[row])):
        by_length.setdefault(_padded(len(texts[row])), []).append(row)
    for length, rows in by_length.items():
        size = max(1, min(batch_tokens // length, 1 << (len(rows) - 1).bit_length()))
        size += -size % shards
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            tokens_BT = np.zeros((size, length), np.int32)
            for i, row in enumerate(part):
                tokens_BT[i, : len(texts[row])] = texts[row]
            yield part, tokens_BT


def _padded(length: int) -> int:
    """The least of 32, 48, 64, 96, 128, ... that is not below `length`."""
    size = _SMALLEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _checked_texts(prompts: Prompts, responses: Prompts, vocabulary: int) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: expected one prompt a response")
    texts = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        arrays = check_tokens(f"prompts[{row}]", prompt), check_tokens(f"responses[{row}]", response)
        if arrays[0].size == 0:
            raise ValueError(f"prompts[{row}] is empty: expected at least one token id")
        for name, tokens in zip(("prompts", "responses"), arrays, strict=True):
            if tokens.max(initial=0) >= vocabulary:
                raise ValueError(f"{name}[{row}] has ids outside 0 to {vocabulary - 1}, the models' vocabulary")
        texts.append(arrays)
    return texts
