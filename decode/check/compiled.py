"""`python -m decode --config configs/x.py --plan v6e:4x4`: the run's programs compiled for a topology, from shapes.

No accelerator, weights or problem file is needed: the compiler of the chip (`make tpu-compiler`, `make cuda-compiler`),
and each model's config.json or a published name. Prompts are taken to be `--max-prompt-tokens` long (1,024 by default),
and as many rows are decoded at once as `--slots` says (by default `n` times the seeds). Prints one table; `--plan-json
FILE` writes it, `--plan-text FOLDER` keeps the compiled programs, `--plan-only decode,score` compiles some of them.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decode.config import DecodeConfig, MeshConfig, Setting
from decode.settings.sweep import resolve
from rlvr_jax import scoring
from rlvr_jax.decoding.batch import whole_pieces
from rlvr_jax.decoding.engine import CHUNK, prefill_rows
from rlvr_jax.decoding.sampling import Sampling
from rlvr_jax.decoding.slots import SlotRows, empty_slots, insert_rows, prefill_prompts
from rlvr_jax.decoding.state import DecodeState, Selection
from rlvr_jax.decoding.steps import Rule, advance
from rlvr_jax.generation import language_model
from rlvr_jax.models.cache import CACHE_AXES
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.decode_weights import prepared_shapes
from rlvr_jax.planning import ideal
from rlvr_jax.planning.command import Options, answer, architecture, ask
from rlvr_jax.planning.programs import ProgramAccount, bytes_a_chip, compile_program, placed
from rlvr_jax.runs.program import config_dict, parse_config
from rlvr_jax.sharding.decode_layout import cache_shards, decode_mesh

PROGRAMS = ("prefill", "insert", "decode", "score")
PROMPT = 1_024
BLOCK = 8  # drafted at a time where the configuration leaves it to the run
SCORE_TOKENS = 16_384


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: the setting that takes most (the pair, where there is one), its models, a topology."""

    config: DecodeConfig
    setting: Setting
    models: dict[str, QwenConfig]
    options: Options

    @property
    def title(self) -> str:
        """What is compiled for what."""
        config = self.config
        models = " and ".join(str(getattr(config, role)) for role in self.models)
        cache = config.dtype if config.cache_dtype == "model" else config.cache_dtype
        return (
            f"{models} on {self.options.topology.text}, {self.slots} rows x {self.length:,} tokens, cache in {cache}, "
            f"blocks of {self.block}"
        )

    @property
    def prompt_length(self) -> int:
        """Tokens that prompts are padded to."""
        return whole_pieces(self.config.max_prompt_tokens or PROMPT)

    @property
    def length(self) -> int:
        """Tokens of a full cache."""
        return whole_pieces(self.prompt_length + self.config.max_new_tokens)

    @property
    def slots(self) -> int:
        """Rows decoded at once."""
        return self.config.slots or self.config.n * len(self.config.seeds)

    @property
    def block(self) -> int:
        """Tokens drafted before the other model scores them."""
        return self.config.block or BLOCK


def read(argv: Sequence[str]) -> Request:
    """From a command line. Raises ValueError for what is wrong with it."""
    options = Options.read(argv, PROGRAMS)
    config = resolve(parse_config(DecodeConfig, options.rest, prog="python -m decode", description=str(__doc__)))
    config = dataclasses.replace(config, dtype=config.dtype or "bfloat16")  # as on every accelerator
    setting = next((setting for setting in config.settings if setting.model == "pair"), config.settings[0])
    roles = ("base", "rl") if setting.model == "pair" else (str(setting.model),)
    models = {role: architecture(role, str(getattr(config, role)), dtype=str(config.dtype)) for role in roles}
    rows = min(model.vocab_size for model in models.values())  # as `decode.check.inputs` cuts them
    models = {role: dataclasses.replace(model, vocab_size=rows) for role, model in models.items()}
    if len(models) < 2:
        options = dataclasses.replace(options, only=tuple(name for name in options.only if name != "score"))
    return Request(config, setting, models, options)


def prepare(argv: Sequence[str]) -> Request:
    """`read`, and the compiler must be there: else NoCompiler, a ValueError."""
    request = read(argv)
    request.options.require_compiler()
    return request


def plan(request: Request) -> None:
    """Compiles in another process, prints the table, writes the JSON. Raises RunError with the compiler's words."""
    ask(
        "decode.check.compiled",
        request.options,
        request.title,
        lambda program: suggestion(request, program),
        config_dict(request.config),
    )


def suggestion(request: Request, program: ProgramAccount) -> str:
    """What to change first, by what takes most of the peak."""
    largest = max(program.kinds, key=lambda kind: program.kinds[kind])
    if largest == "KV cache" and request.config.cache_dtype == "model":
        return "--cache-dtype int8 halves the cache; or fewer --slots"
    if largest == "weights":
        return "a larger --mesh.tensor (weights are whole on each part of data and fsdp), or a larger slice"
    return "fewer --slots, a smaller --block, or a larger slice"


def compile_all(request: Request) -> Iterator[tuple[str, Callable[[], ProgramAccount]]]:
    """(name, compile) of each program that is asked for. Needs the compiler."""
    made = _Run(request)
    for name in PROGRAMS:
        if name in request.options.only:
            yield name, getattr(made, name)


class _Run:
    """Shapes of everything that a run has on its devices, and its programs, compiled one by one."""

    def __init__(self, request: Request):
        self.request, self.configs = request, tuple(request.models.values())
        sizes: MeshConfig = request.config.mesh
        given = request.options.topology.mesh({"data": sizes.data, "fsdp": sizes.fsdp, "tensor": sizes.tensor})
        self.mesh: Mesh = decode_mesh(given, [config.num_kv_heads for config in self.configs])
        cache = None if request.config.cache_dtype == "model" else request.config.cache_dtype
        self.models = tuple(language_model(config, cache) for config in self.configs)
        self.params = tuple(prepared_shapes(config, self.mesh) for config in self.configs)
        self.state = self._state(request.slots, request.length)

    def prefill(self) -> ProgramAccount:
        """Prompts read together, for every slot at once if they are not too many."""
        rows, length = self._prompts
        tokens = placed(self.mesh, (rows, length), jnp.int32, ("batch", None))
        flops = sum(ideal.forward_flops(config, rows, length, logits=False) for config in self.configs)
        return self._compile(
            "prefill",
            lambda: prefill_prompts.lower(self.models, self.params, tokens, self._rows(rows, "batch")),
            holds={"weights": self.params},
            resident={"KV cache": self.state.caches},
            model_flops=flops,
            ideal_flops=flops,
            unknown_trips=-(-length // 256),
        )

    def insert(self) -> ProgramAccount:
        """Prefilled prompts into slots."""
        slots, prompts = self.request.slots, self._state(*self._prompts).caches
        ints, floats = self._rows(slots), self._rows(slots, dtype=jnp.float32)
        seeds: Any = placed(self.mesh, (slots, 2), jnp.uint32, (None, None))
        new = SlotRows(ints, ints, ints, ints, ints, seeds, Sampling(floats, floats, ints), Selection(floats, floats))
        return self._compile(
            "insert",
            lambda: insert_rows.lower(self.models, self.state, prompts, ints, new),
            holds={"KV cache": self.state.caches, "KV cache of prompts": prompts},
            resident={"weights": self.params},
        )

    def decode(self) -> ProgramAccount:
        """A chunk of the compiled loop: one model drafts, and with two the other scores a block and it is redrawn."""
        request, setting = self.request, self.request.setting
        rule, block, blocks = None, CHUNK, 1
        if len(self.models) == 2:
            rule = Rule(str(setting.criterion), setting.sample_from, setting.top_logprobs)
            block, blocks = request.block, max(1, CHUNK // request.block)
        stop, leave = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._whole) for shape in ((4,), ()))
        # Every drafted token is read by the model that drafts it and by the one that scores it.
        flops = block * blocks * sum(ideal.decode_flops(x, request.slots, request.length) for x in self.configs)
        passes = [block * blocks] if rule is None else [blocks, blocks]
        if rule is not None:
            passes[rule.sampled] = block * blocks
        read = [bytes_a_chip((p, c)) for p, c in zip(self.params, self.state.caches, strict=True)]
        return self._compile(
            "decode",
            lambda: advance.lower(self.models, rule, block, blocks, self.params, stop, leave, self.state),
            holds={"weights": self.params, "KV cache": self.state.caches},
            model_flops=flops,
            ideal_flops=flops,
            ideal_bytes=float(sum(times * size for times, size in zip(passes, read, strict=True))),
            unknown_trips=block,
        )

    def score(self) -> ProgramAccount:
        """Responses scored by both models, as the calibration of thresholds does it."""
        length = self.request.length
        rows = max(1, SCORE_TOKENS // length)
        rows += -rows % cache_shards(self.mesh)
        rule = scoring.ScoreRule((str(self.request.setting.criterion),), self.request.setting.top_logprobs, "base", 512)
        flops = sum(ideal.forward_flops(config, rows, length) for config in self.configs)
        tokens = placed(self.mesh, (rows, length), jnp.int32, ("batch", None))
        return self._compile(
            "score",
            lambda: scoring.score.lower(self.models, rule, self.params, tokens),
            holds={"weights": self.params},
            model_flops=flops,
            ideal_flops=flops,
        )

    @property
    def _prompts(self) -> tuple[int, int]:
        return prefill_rows(self.request.slots, self.request.prompt_length), self.request.prompt_length

    @property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _rows(self, rows: int, name: str | None = None, dtype: Any = jnp.int32) -> Any:
        return placed(self.mesh, (rows,), dtype, (name,))

    def _state(self, rows: int, length: int) -> DecodeState:
        """Shapes of a state of so many slots, where the programs leave it."""
        state = jax.eval_shape(lambda: empty_slots(self.models, rows, length))
        beside = jax.tree.map(
            lambda x: placed(self.mesh, x.shape, x.dtype, ("batch", *[None] * (x.ndim - 1))), state._replace(caches=())
        )
        caches = jax.tree.map(lambda x: placed(self.mesh, x.shape, x.dtype, CACHE_AXES[: x.ndim]), state.caches)
        return beside._replace(caches=caches)

    def _compile(self, name: str, lower: Callable[[], Any], **options: Any) -> ProgramAccount:
        return compile_program(
            name, lower, self.mesh, self.request.options.topology.chip, text_to=self.request.options.text, **options
        )


if __name__ == "__main__":  # the compiler's process
    answer(lambda: compile_all(read(sys.argv[1:])))
