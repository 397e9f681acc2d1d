"""How many responses are decoded at once: planned from the memory of a device, before anything is loaded."""

from jax.sharding import Mesh

from decode.check.inputs import Inputs
from decode.config import DecodeConfig, Setting
from rlvr_jax.decoding.batch import whole_pieces
from rlvr_jax.decoding.engine import prefill_rows
from rlvr_jax.decoding.memory import GIB, MemoryPlan, device_memory, plan_slots, working_bytes
from rlvr_jax.models.cache import cache_bytes
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.memory import decode_weight_bytes
from rlvr_jax.runs.distributed import cluster
from rlvr_jax.sharding.decode_layout import cache_shards, parts_of
from rlvr_jax.sharding.rules import batch_shards

MOST_SLOTS = 256  # taken unasked: more of them gain little speed and make the last responses of a queue wait longer


def plan(config: DecodeConfig, inputs: Inputs, dtype: str, mesh: Mesh | None, setting: Setting) -> MemoryPlan:
    """Slots of one setting, with the weights of all the run's models in memory.

    Raises:
      ValueError: it does not fit; says what would.
    """
    roles = ("base", "rl") if setting.model == "pair" else (setting.model or "",)
    prompt_length = whole_pieces(max(map(len, inputs.prompts)))
    length = whole_pieces(prompt_length + config.max_new_tokens)
    models = [inputs.models[role] for role in roles]
    step = cache_shards(mesh)
    vocabulary = models[0].vocab_size
    # A slot's logits, of which the devices that share them hold parts.
    logits = working_bytes(vocabulary, len(models), config.block) // parts_of(mesh, "vocab", vocabulary)
    kept_in = dtype if config.cache_dtype == "model" else config.cache_dtype
    rows = len(inputs.problems) * len(config.seeds) * config.n

    def prompts(slots: int) -> int:
        together = prefill_rows(min(slots, len(inputs.problems)), prompt_length)
        return _slot_cache(models, prompt_length, kept_in, mesh) * together // (1 if together % step else step)

    other = None if kept_in == "int8" else ("int8", _slot_cache(models, length, "int8", mesh) // step)
    return plan_slots(
        rows=rows,
        slots=config.slots,
        most=MOST_SLOTS,
        length=length,
        weights=sum(decode_weight_bytes(model, dtype, mesh) for model in inputs.models.values()),
        slot_cache=_slot_cache(models, length, kept_in, mesh) // step,
        slot_working=logits // batch_shards(mesh),
        limit=_least_memory() if config.memory is None else int(config.memory * GIB),
        prompts=prompts,
        step=step,
        other_cache=other,
    )


def _least_memory() -> int:
    """What may be used of a device, where all processes agree on it."""
    return min(map(int, cluster().all_gather("memory", str(device_memory()).encode())))


def _slot_cache(models: list[QwenConfig], length: int, dtype: str, mesh: Mesh | None) -> int:
    """Bytes of the caches of one slot on the devices that share its heads, each."""
    return sum(
        cache_bytes(model, 1, length, dtype) // parts_of(mesh, "kv_heads", model.num_kv_heads) for model in models
    )
