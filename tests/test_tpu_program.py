"""The decode programs compiled for a TPU chip, from shapes alone and without one: nothing copies the cache."""

import pytest

from benchmarks.compiled_decode import Case, inspect, moved
from rlvr_jax.planning.topology import compiler_library

# Real widths, few layers. A layer's keys are larger than any weight, so that nothing else is taken for them.
CASE = Case(model="qwen3-0.6b", layers=2, slots=32, length=32_768, block=8, topology="v6e:1x1")

needs_compiler = pytest.mark.skipif(
    compiler_library() is None, reason="no TPU compiler here (`make tpu-compiler` fetches it where there is a wheel)"
)


def faults(got):
    """What is wrong with a compiled program, in words; all sizes are bytes a chip."""
    found = [f"makes a cache-sized array: {line}" for line in got["moved"]]
    if got["alias"] < got["cache"]:
        found.append(f"hands back {got['alias']} of the {got['cache']} bytes of its caches in place")
    if got["temporary"] > got["layer_keys"] / 2:  # the logits of a block are 155 MB, and there are a few of them
        found.append(f"keeps {got['temporary']} bytes on the side, a layer's keys are {got['layer_keys']}")
    return found


@needs_compiler
def test_one_model_and_a_cache_that_is_copied():
    got = inspect(CASE, ("single", "stacked"))
    assert got["single"]["cache"] == 2 * 2 * 32 * 8 * 32_768 * 128 * 2
    assert not faults(got["single"])
    # The same program with the layers' caches in one array, which XLA takes apart and puts together again.
    assert got["stacked"]["cache"] == got["single"]["cache"]
    assert got["stacked"]["temporary"] > got["stacked"]["layer_keys"]
    assert got["stacked"]["moved"]


@needs_compiler
def test_two_models_in_verified_blocks():
    got = inspect(Case(**{**vars(CASE), "layers": 1}), ("dual",))["dual"]
    assert got["cache"] == 2 * 2 * 32 * 8 * 32_768 * 128 * 2
    assert not faults(got)


def test_what_counts_as_moved():
    text = """
%fused_computation.1 (param_0: bf16[4,8]) -> bf16[4,8] {
  %inner.1 = bf16[4,8]{1,0:T(8,128)(2,1)} convert(%param_0)
}
%fused_scatter (param_0: bf16[4,8]) -> bf16[4,8] {
  ROOT %inner.2 = bf16[4,8]{1,0} scatter(%param_0, %i, %u), to_apply=%region
}
%body (param: (bf16[4,8], s32[])) -> (bf16[4,8], s32[]) {
  %got.1 = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%param), index=0
  %copy.1 = bf16[4,8]{1,0:T(8,128)(2,1)} copy(%got.1)
  %slice.1 = bf16[4,2]{1,0} dynamic-slice(%got.1, %c), dynamic_slice_sizes={4,2}
  %fusion.1 = (s32[], f32[2,16]{1,0}) fusion(%got.1), kind=kLoop, calls=%fused_computation.1, backend_config={"aliasing_operands":{"lists":[]}}
  %fusion.3 = bf16[4,8]{1,0} fusion(%got.1), kind=kInput, calls=%fused_scatter
  %fusion.2 = bf16[4,8]{1,0} fusion(%got.1), kind=kCustom, calls=%fused_computation.1, backend_config={"aliasing_operands":{"lists":[{"indices":["0","3"]}]}}
}
"""  # noqa: E501
    assert [line.split(" = ")[0] for line in moved(text, 32)] == ["%body %copy.1", "%body %fusion.1"]
    assert len(list(moved(text, 8))) == 3
