"""`python -m train --config configs/x.py --plan v5p:4x4x4`: the run's programs compiled for a topology, from shapes.

No accelerator, no weights and no data are needed: the compiler of the chip, and the model's config.json or a published
model's name. What is compiled is what the trainer runs (`train.step.programs`, `rlvr_jax.decoding`), for rows of
`algorithm.row_length` tokens, or `data.max_prompt` + `rollout.max_response`. Prints one table; `--plan-json FILE`
writes it, `--plan-text FOLDER` keeps the compiled programs, `--plan-only update,score` compiles some of them.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlvr_jax.decoding.batch import whole_pieces
from rlvr_jax.decoding.engine import prefill_rows
from rlvr_jax.decoding.slots import empty_slots, prefill_prompts
from rlvr_jax.decoding.steps import advance
from rlvr_jax.generation import language_model
from rlvr_jax.models import decode_weights, qwen
from rlvr_jax.models.config import QwenConfig
from rlvr_jax.models.kernels.attention import resolved_attention
from rlvr_jax.planning import ideal
from rlvr_jax.planning.chips import H100
from rlvr_jax.planning.command import Options, answer, architecture, ask
from rlvr_jax.planning.programs import ProgramAccount, bytes_a_chip, compile_program, placed
from rlvr_jax.planning.topology import fill
from rlvr_jax.runs.program import config_dict
from rlvr_jax.sharding.decode_layout import decode_mesh
from rlvr_jax.sharding.rules import MESH_AXES, TPU_OPTIONS, batch_shards
from train.check.prepare import MICRO_ROWS, check_shards, configuration, micro_rows, value_faults
from train.config import Config
from train.step.objective import loss_dtypes, scalars
from train.step.programs import make_optimizer, make_programs, placed_like_params, row_length

PROGRAMS = ("update", "optimizer", "score", "weights", "prefill", "rollout")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for: a checked configuration, its model, the plan's own options."""

    config: Config
    model: QwenConfig
    options: Options

    @property
    def title(self) -> str:
        """What is compiled for what."""
        config, topology = self.config, self.options.topology
        sizes = fill({axis: getattr(config.mesh, axis) for axis in MESH_AXES}, topology.size, topology.text)
        mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        rows = f"{micro_rows(config)} rows x {row_length(config, config.data.max_prompt):,} tokens"
        return f"{config.model.path} on {topology.text} ({mesh or 'one chip'}), {rows}, remat {self.model.remat}"


def read(argv: Sequence[str]) -> Request:
    """From a command line. Raises ValueError for what is wrong with it."""
    options = Options.read(argv, PROGRAMS)
    config = configuration(options.rest)
    for fault in value_faults(config):
        if fault.key != "data.train":  # which a plan does not read
            raise ValueError(fault.sentence)
    topology = options.topology
    sizes = fill({axis: getattr(config.mesh, axis) for axis in MESH_AXES}, topology.size, topology.text)
    check_shards(sizes["data"] * sizes["fsdp"], micro_rows(config), MICRO_ROWS)
    choices: dict[str, Any] = {"remat": config.model.remat, "dtype": config.model.compute_dtype}
    if choices["dtype"] == "auto":  # as on every accelerator
        choices["dtype"] = "bfloat16"
    if config.model.max_position_embeddings is not None:
        choices["max_position_embeddings"] = config.model.max_position_embeddings
    model = architecture("model.path", config.model.path, **choices)
    attention = resolved_attention(
        config.model.attention,
        "gpu" if topology.kind == "cuda" else "tpu",
        tokens=row_length(config, config.data.max_prompt),
        head_dim=model.head_dim,
        dtype=model.dtype,
    )
    return Request(config, dataclasses.replace(model, attention=attention), options)


def prepare(argv: Sequence[str]) -> Request:
    """`read`, and the compiler must be there: else NoCompiler, a ValueError."""
    request = read(argv)
    request.options.require_compiler()
    return request


def plan(request: Request) -> None:
    """Compiles in another process, prints the table, writes the JSON. Raises RunError with the compiler's words."""
    ask(
        "train.check.plan",
        request.options,
        request.title,
        lambda program: suggestion(request, program),
        config_dict(request.config),
    )


def suggestion(request: Request, program: ProgramAccount) -> str:
    """What to change first, by what takes most of the peak."""
    config = request.config
    largest = max(program.kinds, key=lambda kind: program.kinds[kind]) if program.kinds else "temporaries"
    if largest == "KV cache":
        return "fewer --rollout.prompts-at-once, or more chips along the batch (mesh.data, mesh.fsdp)"
    if largest != "temporaries":
        return f"{largest} take the most: split them over more chips (--mesh.fsdp or --mesh.tensor), on a larger slice"
    shards = config.mesh.data * config.mesh.fsdp
    if program.name in ("update", "score") and abs(shards) < micro_rows(config):
        return f"more --algorithm.micro-batches: {micro_rows(config)} rows pass through at once, {abs(shards)} would do"
    if config.model.remat != "full":
        return "--model.remat full"
    if config.model.logprob_chunk > 1024 * request.options.topology.size:
        return f"--model.logprob-chunk {1024 * request.options.topology.size}"
    return "a larger --mesh.tensor (fewer heads and less of a layer on each chip), or a larger slice"


def compile_all(request: Request) -> Iterator[tuple[str, Callable[[], ProgramAccount]]]:
    """(name, compile) of each program that is asked for, in the order of a trainer step. Needs the compiler."""
    mesh = request.options.topology.mesh({axis: getattr(request.config.mesh, axis) for axis in MESH_AXES})
    made = _Run(request, mesh)
    for name in PROGRAMS:
        if name in request.options.only and (name != "optimizer" or not made.whole_update):
            yield name, getattr(made, name)


class _Run:
    """Shapes of everything that a run has on its devices, and its programs, compiled one by one."""

    def __init__(self, request: Request, mesh: Mesh):
        config, model = request.config, request.model
        self.config, self.model, self.mesh, self.chip = config, model, mesh, request.options.topology.chip
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.params = jax.tree.map(
            lambda spec: placed(mesh, spec.shape, jnp.float32, spec.axes),
            qwen.param_specs(model),
            is_leaf=lambda x: isinstance(x, qwen.ParamSpec),
        )
        optimizer = make_optimizer(config.optim)
        self.state = placed_like_params(optimizer, self.params, self.whole)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self.programs = make_programs(config, model, optimizer, shardings)
        self.whole_update = config.algorithm.micro_batches == 1
        self.rows, self.length = micro_rows(config), row_length(config, config.data.max_prompt)
        self.reference = {}
        if config.algorithm.needs_reference:
            self.reference = {"reference model": jax.tree.map(self._as(model.dtype), self.params)}
        self.language, self.text = language_model(model), request.options.text
        self.decode_mesh = decode_mesh(mesh, [model.num_kv_heads], config.rollout.tensor)
        self.decode_params = decode_weights.prepared_shapes(model, self.decode_mesh)

    def update(self) -> ProgramAccount:
        """A micro-batch: forward, loss, backward, added to the sums; a single one with clip and AdamW."""
        batch, step = self._batch(), self.programs.step
        holds, resident = {"params": self.params, "batch": batch}, {"optimizer": self.state.opt_state}
        if self.whole_update:
            lower = functools.partial(step.whole.lower, self.state, batch)
            holds, resident = holds | resident, {}
        else:
            holds["gradients"] = sums = self._sums(batch)
            lower = functools.partial(step.add.lower, self.params, sums, batch)
        flops = ideal.training_flops(self.model, self.rows, self.length)
        shape = dict(self.mesh.shape)
        return self._compile(
            "update",
            lower,
            holds=holds,
            resident=resident | self.reference,
            model_flops=flops[0],
            ideal_flops=flops[1],
            ideal_collectives=ideal.training_collectives(
                self.model,
                self.rows,
                self.length,
                batch=batch_shards(self.mesh),
                fsdp=shape["fsdp"],
                tensor=shape["tensor"],
                sequence=shape["sequence"],
            ),
        )

    def optimizer(self) -> ProgramAccount:
        """Clip, AdamW, the new weights."""
        sums = self._sums(self._batch())
        once = bytes_a_chip(self.params)
        return self._compile(
            "optimizer",
            lambda: self.programs.step.finish.lower(self.state, sums),
            holds={"params": self.params, "optimizer": self.state.opt_state, "gradients": sums},
            resident=self.reference,
            ideal_bytes=7.0 * once,  # weights, gradient and two moments read; weights and moments written
        )

    def score(self) -> ProgramAccount:
        """Old log-probs and entropies of a micro-batch."""
        batch = self._batch()
        temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=self.whole)
        flops = ideal.forward_flops(self.model, self.rows, self.length)
        tokens, segments = batch["tokens_BT"], batch["segment_BT"]
        return self._compile(
            "score",
            lambda: self.programs.score.lower(self.params, tokens, segments, temperature),
            holds={"params": self.params},
            resident={"optimizer": self.state.opt_state, **self.reference},
            model_flops=flops,
            ideal_flops=flops,
        )

    def weights(self) -> ProgramAccount:
        """The policy's weights as decoding reads them."""
        given = decode_weights.sources(self.model, self.params)
        return self._compile(
            "weights",
            lambda: decode_weights.layout.lower(self.model, given, self.params),
            mesh=self.decode_mesh,
            holds={"params": self.params},
            resident={"optimizer": self.state.opt_state, **self.reference},
            ideal_bytes=1.5 * bytes_a_chip(self.params),  # read in 4 bytes, written in 2
        )

    def prefill(self) -> ProgramAccount:
        """Prompts read together."""
        length = whole_pieces(self.config.data.max_prompt)
        rows = prefill_rows(self._at_once, length)
        tokens = placed(self.decode_mesh, (rows, length), jnp.int32, ("batch", None))
        lengths = placed(self.decode_mesh, (rows,), jnp.int32, ("batch",))
        flops = ideal.forward_flops(self.model, rows, length, logits=False)
        return self._compile(
            "prefill",
            lambda: prefill_prompts.lower((self.language,), (self.decode_params,), tokens, lengths),
            mesh=self.decode_mesh,
            holds={"weights for decoding": self.decode_params},
            resident=self._training_state(),
            model_flops=flops,
            ideal_flops=flops,
            unknown_trips=-(-length // 256),
        )

    def rollout(self) -> ProgramAccount:
        """A chunk of decode steps with caches at their longest."""
        rollout, steps = self.config.rollout, self.config.rollout.chunk
        rows = self._at_once * rollout.n
        length = whole_pieces(whole_pieces(self.config.data.max_prompt) + rollout.max_response)
        mesh, params = self.decode_mesh, self.decode_params
        with jax.set_mesh(mesh):
            state = self._laid_out(jax.jit(empty_slots, static_argnums=(0, 1, 2)).lower((self.language,), rows, length))
        stop, leave = (
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
            for shape in ((4,), ())
        )
        flops = steps * ideal.decode_flops(self.model, rows, length)
        return self._compile(
            "rollout",
            lambda: advance.lower((self.language,), None, steps, 1, (params,), stop, leave, state),
            mesh=mesh,
            holds={"weights for decoding": params, "KV cache": state.caches},
            resident=self._training_state(),
            model_flops=flops,
            ideal_flops=flops,
            ideal_bytes=float(steps * (bytes_a_chip(params) + bytes_a_chip(state.caches))),
            smallest_branch=rollout.top_p == 1 and rollout.top_k == 0,  # which has nothing to filter
        )

    @property
    def _at_once(self) -> int:
        rollout = self.config.rollout
        return min(rollout.prompts_at_once or rollout.generation_batch, rollout.generation_batch)

    def _training_state(self) -> dict[str, Any]:
        return {"params": self.params, "optimizer": self.state.opt_state, **self.reference}

    def _laid_out(self, lowered: Any) -> Any:
        """Shapes of a program's results, where the compiled program leaves them."""
        compiled = lowered.compile()
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            lowered.out_info,
            compiled.output_shardings,
        )

    def _batch(self) -> dict[str, Any]:
        dtypes = {"tokens_BT": jnp.int32, "segment_BT": jnp.int32} | loss_dtypes(self.config.algorithm)
        shape = (self.rows, self.length)
        batch = {name: placed(self.mesh, shape, dtype, ("batch", "time")) for name, dtype in dtypes.items()}
        values = scalars(self.config.algorithm, self.config.rollout.temperature)
        return batch | {name: jax.ShapeDtypeStruct((), x.dtype, sharding=self.whole) for name, x in values.items()}

    def _sums(self, batch: dict[str, Any]) -> Any:
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(self.programs.step.begin, self.params, batch)
        beside = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.whole), shapes)
        grads = jax.tree.map(
            lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), shapes.grads, self.params
        )
        return beside._replace(grads=grads)

    def _as(self, dtype: Any) -> Callable[[Any], Any]:
        return lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)

    def _compile(self, name: str, lower: Callable[[], Any], mesh: Mesh | None = None, **options: Any) -> ProgramAccount:
        if name in ("score", "update", "optimizer") and self.chip.name != H100.name:
            options["compiler_options"] = TPU_OPTIONS
        return compile_program(name, lower, mesh or self.mesh, self.chip, text_to=self.text, **options)


if __name__ == "__main__":  # the compiler's process
    answer(lambda: compile_all(read(sys.argv[1:])))
