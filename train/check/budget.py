"""What a run will take, by arithmetic alone: its three counters, its tokens, and the bytes on each device."""

import dataclasses
from typing import NamedTuple

from jax.sharding import AbstractMesh

from rlvr_jax.decoding.batch import whole_pieces
from rlvr_jax.decoding.engine import prefill_rows
from rlvr_jax.decoding.memory import working_bytes
from rlvr_jax.models.cache import cache_bytes
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.memory import decode_weight_bytes, kept_bytes, layer_bytes, weight_bytes
from rlvr_jax.sharding.decode_layout import decode_mesh, parts_of
from rlvr_jax.sharding.rules import batch_shards
from train.check.prepare import micro_rows
from train.config import Config


class Bounds(NamedTuple):
    """The fewest and the most; one number where they are equal."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least:,}" if self.least == self.most else f"{self.least:,} to {self.most:,}"


class Counters(NamedTuple):
    """How often a run that comes to its end makes each kind of step."""

    generation_batches: Bounds
    trainer_steps: Bounds
    optimizer_steps: Bounds


def counters(config: Config, problems: int) -> Counters:
    """The three counters for so many training problems; updates that a non-finite gradient skips are counted.

    Without dynamic sampling they are exact. With it they depend on how many groups vary: the most trainer steps if all
    do; the fewest if every step takes all its `max_generation_batches`, and those after the last full one give none.
    """
    algorithm = config.algorithm
    drawable = -(-config.epochs * problems // config.rollout.generation_batch)
    batches, steps, updates = _all_kept(config, drawable)
    if not algorithm.dynamic_sampling:
        return Counters(Bounds(batches, batches), Bounds(steps, steps), Bounds(updates, updates))
    slowest = algorithm.max_generation_batches
    fewest, drawn = (drawable - 1) // slowest, drawable
    if config.steps is not None:
        fewest, drawn = min(fewest, config.steps), min(drawable, config.steps * slowest)
    each = algorithm.train_batch // algorithm.mini_batch if algorithm.when_short == "error" else 1
    return Counters(Bounds(batches, drawn), Bounds(fewest, steps), Bounds(fewest * each, updates))


def _all_kept(config: Config, drawable: int) -> tuple[int, int, int]:
    """(generation batches, trainer steps, optimizer steps) of a run in which every group is trained on."""
    algorithm = config.algorithm
    drawn = carried = steps = updates = 0
    while config.steps is None or steps < config.steps:
        kept, batches = carried, 0
        while kept < algorithm.train_batch and drawn < drawable and batches < algorithm.max_generation_batches:
            drawn, batches, kept = drawn + 1, batches + 1, kept + config.rollout.generation_batch
        if not kept:
            break
        trained = min(kept, algorithm.train_batch)
        carried = kept - trained if algorithm.surplus == "carry" else 0
        steps, updates = steps + 1, updates - (-trained // algorithm.mini_batch)
    return drawn, steps, updates


def tokens(config: Config, prompt_length: int) -> dict[str, int]:
    """Rollouts and tokens of the parts of a run, at most, for prompts of up to `prompt_length` tokens."""
    algorithm, rollout = config.algorithm, config.rollout
    made, trained = rollout.generation_batch * rollout.n, algorithm.train_batch * rollout.n
    row = algorithm.row_length or prompt_length + rollout.max_response
    batches = algorithm.max_generation_batches
    return {
        "rollouts a generation batch": made,
        "prompt tokens read a generation batch (each prompt once)": rollout.generation_batch * prompt_length,
        "response tokens a generation batch": made * rollout.max_response,
        f"response tokens a trainer step ({batches} generation batches)": batches * made * rollout.max_response,
        "rollouts trained on a trainer step": trained,
        "prompt tokens trained on a trainer step": trained * prompt_length,
        "response tokens trained on a trainer step": trained * rollout.max_response,
        "tokens an optimizer step": algorithm.mini_batch * rollout.n * (prompt_length + rollout.max_response),
        "tokens that pass through the model at once": micro_rows(config) * row,
    }


class Part(NamedTuple):
    """Some bytes on each device. `phase`: "rollout", "update", or "both"."""

    phase: str
    name: str
    size: int


NOT_COUNTED = (
    "weights gathered from other devices, collectives' buffers, part of the compiler's temporaries, and the programs "
    "themselves, which on a CPU share its memory"
)


def memory(
    config: Config, model: QwenConfig, dtype: str, mesh: AbstractMesh, prompt_length: int, eval_rows: int = 0
) -> list[Part]:
    """Bytes on each device of `mesh`, from shapes.

    Args:
      config: the run.
      model: the architecture.
      dtype: the compute dtype.
      mesh: its sizes; no device is needed.
      prompt_length: tokens of the longest prompt.
      eval_rows: responses that an evaluation decodes together.
    """
    rollout, shards, tensor = config.rollout, batch_shards(mesh), mesh.shape["tensor"]
    master, reference = weight_bytes(model, "float32", mesh), weight_bytes(model, dtype, mesh)
    parts = [Part("both", "master weights, float32", master), Part("both", "Adam's two moments, float32", 2 * master)]
    if config.algorithm.needs_reference:
        parts.append(Part("both", f"reference model, {dtype}", reference))

    at_once = min(rollout.prompts_at_once or rollout.generation_batch, rollout.generation_batch)
    decode = decode_mesh(mesh, [model.num_kv_heads], rollout.tensor)
    kv_ways = parts_of(decode, "kv_heads", model.num_kv_heads)

    def each(rows: int, name: str) -> int:
        """Rows of each device; those that do not divide are on all of them."""
        return rows // parts_of(decode, name, rows)

    rows = max(at_once * rollout.n, eval_rows)
    cached = each(rows, "cache_rows")
    padded = whole_pieces(prompt_length)
    length = whole_pieces(padded + rollout.max_response)
    together = each(prefill_rows(at_once, padded), "cache_rows")
    parts += [
        Part(
            "rollout",
            f"copy of the weights for decoding, {dtype}",
            decode_weight_bytes(model, dtype, decode),
        ),
        Part(
            "rollout",
            f"KV cache, {cached:,} rows x {length:,} tokens, {dtype}",
            cached * (cache_bytes(model, 1, length, dtype) // kv_ways),
        ),
        Part(
            "rollout",
            f"KV cache of prompts read together, {together:,} x {padded:,}",
            together * (cache_bytes(model, 1, padded, dtype) // kv_ways),
        ),
        Part(
            "rollout",
            "next-token distributions, float32",
            each(rows, "batch")
            * (working_bytes(model.vocab_size, 1, 1) // parts_of(decode, "vocab", model.vocab_size)),
        ),
    ]

    width = config.algorithm.row_length or prompt_length + rollout.max_response
    rows = micro_rows(config) // shards
    scored = min(config.model.logprob_chunk, micro_rows(config) * width) // shards
    # Within a layer, between two and in the logits, what the batch leaves is split over the other axes.
    ways = tensor * mesh.shape.get("sequence", 1)
    model = dataclasses.replace(model, remat=config.model.remat, attention=config.model.attention, dtype=dtype)
    sums = 0 if config.algorithm.micro_batches == 1 else 1
    parts += [
        Part("update", f"gradients{', and their sum over micro-batches' * sums}, float32", (1 + sums) * master),
        Part(
            "update",
            f"kept for the backward pass, {rows:,} rows x {width:,} tokens, {dtype}, remat {model.remat}",
            kept_bytes(model, rows, width) // ways,
        ),
        Part("update", "backward pass of one layer, an estimate", layer_bytes(model, rows, width) // ways),
        Part(
            "update",
            f"logits of {scored:,} tokens: 3 arrays, float32 (model.logprob_chunk)",
            3 * 4 * scored * model.vocab_size // ways,
        ),
    ]
    if dtype != "float32":
        parts.append(Part("update", f"weights in {dtype}", weight_bytes(model, dtype, mesh)))
    return parts


def totals(parts: list[Part]) -> dict[str, int]:
    """Bytes a device in either phase: what is there in both, and its own."""
    return {phase: sum(part.size for part in parts if part.phase in (phase, "both")) for phase in ("rollout", "update")}
