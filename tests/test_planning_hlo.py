"""Compiled programs as text: trip counts, FLOPs, collectives, against numbers worked out by hand."""

import pytest

from rlvr_jax.planning import hlo
from rlvr_jax.planning.account import Memory, account_text
from rlvr_jax.planning.chips import CHIPS
from rlvr_jax.planning.collectives import device_groups
from rlvr_jax.planning.flops import dot_flops, kernel
from rlvr_jax.sharding.rules import make_mesh

# A loop of 5 trips (1, 3, 5, 7, 9 below 10) around a dot in a fusion, a gather and a reduction; in it a loop of 3.
# Lines are broken where this file needs it: a compiled program does so too, in the attributes of kernels.
TEXT = """HloModule jit_f, is_scheduled=true

%inner_body (p.0: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.0 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.0 = s32[] get-tuple-element(%p.0), index=0
  %x.0 = f32[8,16]{1,0} get-tuple-element(%p.0), index=1
  %one.0 = s32[] constant(1)
  %next.0 = s32[] add(%i.0, %one.0)
  %permuted = f32[8,16]{1,0} collective-permute(%x.0), channel_id=3, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %t.0 = (s32[], f32[8,16]{1,0}) tuple(%next.0, %permuted)
}

%inner_condition (p.1: (s32[], f32[8,16])) -> pred[] {
  %p.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %three = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%i.1, %three), direction=LT
}

%fused (q.0: f32[8,16], q.1: f32[16,4]) -> f32[8,4] {
  %q.0 = f32[8,16]{1,0} parameter(0)
  %q.1 = f32[16,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%q.0, %q.1), lhs_contracting_dims={1},
    rhs_contracting_dims={0}, metadata={op_name="jit(f)/mul"}
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %ab = f32[] add(%a, %b)
}

%body (p.2: (s32[], f32[8,16], f32[16,4])) -> (s32[], f32[8,16], f32[16,4]) {
  %p.2 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)S(1)}, f32[16,4]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %x.2 = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%p.2), index=1
  %w.2 = f32[16,4]{1,0} get-tuple-element(%p.2), index=2
  %two = s32[] constant(2)
  %next.2 = s32[] add(%i.2, %two)
  %fusion = f32[8,4]{1,0} fusion(%x.2, %w.2), kind=kOutput,
    calls=%fused, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %gather-start = (f32[8,4]{1,0}, f32[8,16]{1,0}) all-gather-start(%fusion), channel_id=1,
    replica_groups=[2,4]<=[8], dimensions={1}
  %gather-done = f32[8,16]{1,0} all-gather-done(%gather-start)
  %zero.2 = s32[] constant(0)
  %t.2 = (s32[], f32[8,16]{1,0}) tuple(%zero.2, %gather-done)
  %loop.2 = (s32[], f32[8,16]{1,0}) while(%t.2), condition=%inner_condition, body=%inner_body
  %y.2 = f32[8,16]{1,0} get-tuple-element(%loop.2), index=1
  %reduced = f32[8,16]{1,0} all-reduce(%y.2), channel_id=2,
    replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%sum
  ROOT %r.2 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%next.2, %reduced, %w.2)
}

%condition (p.3: (s32[], f32[8,16], f32[16,4])) -> pred[] {
  %p.3 = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %ten = s32[] constant(10)
  ROOT %less.3 = pred[] compare(%i.3, %ten), direction=LT
}

ENTRY %main (x: f32[8,16], w: f32[16,4]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = f32[16,4]{1,0} parameter(1)
  %start = s32[] constant(1)
  %begin = s32[] copy(%start)
  %t = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) tuple(%begin, %x, %w)
  %loop = (s32[], f32[8,16]{1,0}, f32[16,4]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def one(line, operands=()):
    """The instruction of a line, in a module where its operands have these types."""
    made = [f"  %o{i} = {result} parameter({i})" for i, result in enumerate(operands)]
    module = hlo.parse("\n".join(["ENTRY %main (x: f32[]) -> f32[] {", *made, f"  ROOT %x = {line}", "}"]))
    return module, module.computations["%main"]["%x"]


def test_loops_multiply():
    uses, unknown = hlo.parse(TEXT).uses()
    assert not unknown
    assert uses["%body"].times == 5
    assert uses["%inner_body"].times == 15
    assert uses["%fused"] == hlo.Use(5, True)
    assert "%sum" not in uses  # the operator of a reduction is no part of the program


def test_account_by_hand():
    got = account_text(TEXT, Memory(0, 0, 0, 0, 0), make_mesh(data=2, fsdp=1, tensor=4), CHIPS["v5p"])
    assert got.dot_flops == 5 * 2 * 8 * 16 * 4
    assert got.fusion_s == pytest.approx(5 * 1000 / 1.75e9)
    by_axis = {key: value[:2] for key, value in got.by_axis().items()}
    assert by_axis["all-gather", ("tensor",)] == (5, 5 * 8 * 4 * 4 * 3)  # three times its own 8 x 4 floats
    assert by_axis["all-reduce", ("data",)] == (5, 5 * 8 * 16 * 4)  # 2 (n - 1) / n = 1 times the array
    assert by_axis["collective-permute", ("data",)] == (15, 15 * 8 * 16 * 4)
    assert [x.overlapped for x in got.collectives if x.kind == "all-gather"] == [True]
    assert got.seconds > got.fusion_s


def test_known_and_unknown_trip_counts():
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.parse(known).uses()[0]["%body"].times == 7
    unknown = TEXT.replace("direction=LT", "direction=NE")
    uses, loops = hlo.parse(unknown).uses(unknown_trips=2)
    assert loops == ["%loop", "%loop.2"]
    assert uses["%inner_body"].times == 4


def test_loop_that_may_end_earlier_counts_to_its_end():
    early = TEXT.replace(
        "  ROOT %less.1 = pred[] compare(%i.1, %three), direction=LT",
        "  %less.1 = pred[] compare(%i.1, %three), direction=LT\n"
        "  %go.1 = pred[] custom-call(%p.1)\n"
        "  ROOT %and.1 = pred[] and(%go.1, %less.1)",
    )
    uses, unknown = hlo.parse(early).uses()
    assert not unknown
    assert uses["%inner_body"].times == 15


def test_one_branch_of_a_conditional():
    call = (
        "  %loop.2 = (s32[], f32[8,16]{1,0}) conditional(%i.2, %t.2, %t.2), branch_computations={%small, %inner_body}"
    )
    text = "\n".join(call if line.startswith("  %loop.2 =") else line for line in TEXT.splitlines())
    small = "%small (p.9: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {\n  ROOT %p.9 = (s32[]) parameter(0)\n}\n\n"
    text = text.replace("%sum (a", small + "%sum (a")
    assert "%small" not in hlo.parse(text).uses()[0]
    assert hlo.parse(text).uses()[0]["%inner_body"].times == 5
    smallest = hlo.parse(text).uses(smallest_branch=True)[0]
    assert smallest["%small"].times == 5
    assert "%inner_body" not in smallest


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%f", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[8], to_apply=%f", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%f", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c'}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x=1", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups={}, x=1", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups(attributes, expected):
    _, x = one(f"f32[4] all-reduce(%o0), channel_id=1, {attributes}", ["f32[4]"])
    assert device_groups(x, 8) == expected


@pytest.mark.parametrize(
    ("result", "operands", "attributes", "expected"),
    [
        # A plain product: [4, 128, 1024] by [1024, 2048].
        (
            "f32[4,128,2048]",
            ["bf16[4,128,1024]", "bf16[1024,2048,1]"],
            "window={size=1}, dim_labels=0bf_io0->0bf",
            2 * 4 * 128 * 1024 * 2048,
        ),
        # 4 heads as positions of the window: padding makes all but one position of it fall on nothing.
        (
            "bf16[4,16,4,128]",
            ["bf16[4,1,16,64]", "bf16[128,4,64,1]"],
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=b10f_o1i0->b01f",
            2 * 4 * 16 * 4 * 128 * 64,
        ),
        # A batch of 4 x 4 as a dilated input: each output meets one position of the window.
        (
            "f32[4,4,2,64,64]",
            ["bf16[4,4,2,64,128]", "bf16[4,4,64,128,1]"],
            "window={size=4x4x1 stride=3x3x1 lhs_dilate=4x4x1}, dim_labels=012bf_01oi2->012bf",
            2 * 4 * 4 * 2 * 64 * 64 * 128,
        ),
        # The rows of a batch as the window: a gradient of weights, summed over 4 rows of 128 tokens.
        (
            "f32[1024,2048,1]",
            ["bf16[4,1024,128]", "bf16[4,128,2048]"],
            "window={size=4}, dim_labels=0bf_0io->bf0",
            2 * 1024 * 2048 * 4 * 128,
        ),
    ],
)
def test_convolutions_are_products(result, operands, attributes, expected):
    module, x = one(f"{result} convolution(%o0, %o1), {attributes}", operands)
    assert dot_flops(module, "%main", x) == expected


@pytest.mark.parametrize(
    ("name", "results", "products"),
    [
        ("splash_mha_fwd_segmented_residuals.1", "bf16[2,4,256,128], f32[2,4,256,128]", 2),
        ("splash_mha_dq_segmented_no_residuals", "f32[2,64,128], bf16[2,4,256,128]", 3),
        ("splash_mha_dkv_segmented_no_residuals.3", "bf16[2,4,256,128], bf16[2,4,256,128]", 4),
        ("splash_mha_dkv_no_residuals", "bf16[2,4,4,256,128], bf16[2,4,256,128], bf16[2,4,256,128]", 5),
    ],
)
def test_splash_kernels(name, results, products):
    text = f"""ENTRY %main (x: f32[]) -> f32[] {{
  %map = s8[1,4,4]{{2,1,0}} parameter(0)
  %q = bf16[2,4,256,128]{{3,2,1,0}} parameter(1)
  ROOT %{name} = ({results}) custom-call(%map, %map, %q, %q, %q),
    custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 512}}"
}}}}, metadata={{op_name="jit(f)/splash"}}, backend_config={{"custom_call_config":{{"body":"TUzv"}}}}
}}"""
    module = hlo.parse(text)
    x = module.computations["%main"][f"%{name}"]
    assert x.op_name == "jit(f)/splash"
    got = kernel(module, "%main", x)
    assert got.known
    assert got.flops == products * 2 * 2 * 4 * 128 * 256**2 / 2
