"""The decode programs compiled for TPUs and GPUs without one: memory a chip, and what they do with the cache.

    make tpu-compiler
    python -m benchmarks.compiled_decode          # Qwen3-8B's width, 4 layers, one v6e chip
    python -m benchmarks.compiled_decode --model qwen2.5-32b --layers 64 --length 22528 \\
        --topology v5p:2x2x4 --data 2 --tensor 8 dual
    make cuda-compiler && python -m benchmarks.compiled_decode --topology cuda:1x1x1   # one H100

The programs are those of `rlvr_jax.decoding.steps`, compiled from shapes alone (`rlvr_jax.planning.topology` has the
compilers). What is printed is the compiler's account, never a measurement. `inspect` is what tests/test_tpu_program.py
asks: whether anything as large as a layer's keys is copied, sliced or kept on the side.
"""

import argparse
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rlvr_jax.decoding.slots import empty_slots
from rlvr_jax.decoding.state import LanguageModel
from rlvr_jax.decoding.steps import Rule, advance
from rlvr_jax.generation import language_model
from rlvr_jax.models.cache import CACHE_AXES
from rlvr_jax.models.decode_weights import prepared_shapes
from rlvr_jax.planning import process
from rlvr_jax.planning.models import PUBLISHED
from rlvr_jax.planning.topology import Topology
from rlvr_jax.sharding.decode_layout import decode_mesh
from rlvr_jax.sharding.rules import DEFAULT_RULES

_MODELS = {
    "qwen3-0.6b": PUBLISHED["Qwen/Qwen3-0.6B"],
    "qwen3-8b": PUBLISHED["Qwen/Qwen3-8B"],
    "qwen2.5-32b": PUBLISHED["Qwen/Qwen2.5-32B"],
}
_PROGRAMS = ("single", "dual", "stacked")
# Instructions that give a cache its next name and move nothing.
_NAMING = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier"}
_IN_PLACE = {"scatter", "dynamic-update-slice"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What to compile. `length` is the cache's capacity in tokens, `block` the tokens drafted at a time."""

    model: str = "qwen3-8b"
    layers: int = 4
    slots: int = 32
    length: int = 4_096
    block: int = 8
    topology: str = "v6e:1x1"
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    cache_dtype: str = "bfloat16"


def inspect(case: Case, programs: tuple[str, ...] = ("single", "dual")) -> dict[str, dict[str, Any]]:
    """Compiles in a process of its own, because a compiler and its settings are for a whole process.

    Args:
      case: what to compile.
      programs: "single" (one model), "dual", "stacked".

    Returns:
      For each program a dict, all sizes in bytes a chip: `argument`, `alias` (arguments whose memory the results take
      over), `temporary`, `peak`; `cache` and `layer_keys`, the largest array of it; `moved`, the instructions
      that make something as large as `layer_keys` without writing in place; `lower_s` and `compile_s`.

    Raises:
      ValueError: no compiler here; it says how to get it.
      RuntimeError: with the compiler's last lines.
    """
    arguments = [f"--{f.name.replace('_', '-')}={getattr(case, f.name)}" for f in dataclasses.fields(case)]
    inner = process.inside(
        Topology.parse(case.topology), "benchmarks.compiled_decode", ["--inside", *arguments, *programs]
    )
    return dict(zip(programs, (message["account"] for message in inner), strict=True))


def _compile(case: Case, program: str) -> dict[str, Any]:
    config = dataclasses.replace(_MODELS[case.model], num_layers=case.layers, dtype="bfloat16")
    mesh = Topology.parse(case.topology).mesh({axis: getattr(case, axis) for axis in ("data", "fsdp", "tensor")})
    mesh = decode_mesh(mesh, [config.num_kv_heads])

    def placed(x: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEFAULT_RULES.sharding(mesh, names, x.shape))

    with jax.set_mesh(mesh):
        model = language_model(config, cache_dtype=case.cache_dtype)
        if program == "stacked":
            model = _stacked(model)
        models = (model,) * (2 if program == "dual" else 1)
        params = prepared_shapes(config, mesh)
        state = jax.eval_shape(lambda: empty_slots(models, case.slots, case.length))
        layer_axes = ("layers",) if program == "stacked" else ()

        def place_cache(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return placed(x, (*layer_axes, *CACHE_AXES)[: x.ndim])

        caches = jax.tree.map(place_cache, state.caches)
        rest = jax.tree.map(lambda x: placed(x, ("batch", *[None] * (x.ndim - 1))), state._replace(caches=()))
        whole = NamedSharding(mesh, PartitionSpec())
        numbers = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole) for shape in ((4,), ())]
        rule = Rule("delta_logp", "base", None) if program == "dual" else None
        steps = (case.block, 4) if rule else (4 * case.block, 1)
        began = time.perf_counter()
        state = rest._replace(caches=caches)
        lowered = advance.lower(models, rule, *steps, (params,) * len(models), *numbers, state)
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
        ended = time.perf_counter()
    leaves = jax.tree.leaves(caches)
    local = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    sizes = [math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(local, leaves, strict=True)]
    per_layer = case.layers if program == "stacked" else 1
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    if folder := os.environ.get("TPU_DECODE_TEXT"):
        Path(folder, f"{program}.txt").write_text(text)
    return {
        "argument": memory.argument_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "cache": sum(sizes),
        "layer_keys": max(sizes) // per_layer,
        "moved": list(moved(text, max(map(math.prod, local)) // per_layer)),
        "lower_s": lowered_at - began,
        "compile_s": ended - lowered_at,
    }


def _stacked(model: LanguageModel) -> LanguageModel:
    """The model with one `[L, ...]` array for the keys of all layers and one for the values: what is not to be done."""

    def stack(cache: Any) -> Any:
        return type(cache)(*((jnp.stack(arrays),) if arrays else () for arrays in cache))

    def forward(params: Any, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple:
        apart = type(cache)(*(tuple(arrays[0]) if arrays else () for arrays in cache))
        hidden, apart = model.forward(params, tokens, positions, apart)
        return hidden, stack(apart)

    return model._replace(forward=forward, init_cache=lambda batch, length: stack(model.init_cache(batch, length)))


def moved(text: str, elements: int) -> Iterator[str]:
    """Instructions of a compiled program whose result has an array of `elements` or more, unless written in place.

    What happens inside a fusion stays in registers, so only its result counts. On GPUs one that ends with a write into
    its operand names no alias; whether it is in place shows in the temporaries, which must not grow with the cache.
    """
    fused = set(re.findall(r"fusion\(.*?calls=(%[\w.-]+)", text))
    inside, writing = "", set()
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?(%[\w.-]+) \(.*\{$", line):
            inside = header[1]
        if re.match(rf"\s+ROOT .* ({'|'.join(_IN_PLACE)})\(", line):
            writing.add(inside)
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?(%[\w.-]+) \(.*\{$", line):
            inside = header[1]
        found = re.match(r"\s+(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\(", line)
        if not found or inside in fused:
            continue
        name, result, opcode = found.groups()
        if opcode == "slice-start":  # a part fetched ahead: what it is fetched from is named first
            result = result.partition("),")[2]
        shapes = re.findall(r"\w+\[([\d,]+)\]", result)
        if not any(math.prod(map(int, shape.split(","))) >= elements for shape in shapes):
            continue
        aliased = re.search(r'"aliasing_operands":\{"lists":\[\{|output_to_operand_aliasing=', line)
        writes = (called := re.search(r"kind=kInput, calls=(%[\w.-]+)", line)) and called[1] in writing
        if opcode not in _NAMING | _IN_PLACE and not aliased and not writes:
            yield f"{inside} {name} = {result} {opcode}"


def main() -> None:
    """Prints a line a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Case):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("programs", nargs="*", metavar="program", help=", ".join(_PROGRAMS))
    options = vars(parser.parse_args())
    inside, programs = options.pop("inside"), tuple(options.pop("programs")) or ("single", "dual")
    case = Case(**options)
    if inside:
        for program in programs:
            process.say(account=_compile(case, program))
        return
    print(f"{case}\nGiB a chip, by the compiler's account")
    for program, got in inspect(case, programs).items():
        sizes = "  ".join(f"{name} {got[name] / 2**30:.3f}" for name in ("argument", "cache", "temporary", "peak"))
        print(f"{program:8s} {sizes}  compiled in {got['compile_s']:.0f} s  moved whole: {len(got['moved'])}")
        for line in got["moved"][:5]:
            print(f"         {line[:160]}")


if __name__ == "__main__":
    main()
