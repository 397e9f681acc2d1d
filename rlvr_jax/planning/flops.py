"""FLOPs of the instructions that multiply matrices: dots, convolutions, and the attention kernels by their shapes.

One multiplication with its addition is 2 FLOPs. Convention for causal attention, here and in `ideal`: half of the
square of scores, T^2 / 2, is computed, whatever blocks a kernel really visits and whatever sequences share a row.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from rlvr_jax.planning.hlo import Instruction, Module, Shape

# Matrix products of T x T x H a head: scores and output forward; backward the scores again and four gradients (five
# products), which two kernels apart do in three and four.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}
_CUDNN = {"__cudnn$fmhaSoftmaxBackward": 5, "__cudnn$fmhaSoftmax": 2}
_FLOATS = ("bf16", "f16", "f32", "f8")
# Custom calls that compute nothing: they name, place or reserve.
_NOTHING = (
    *("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "annotate_device_placement", "MoveToHost"),
    *("MoveToDevice", "LayoutConstraint", "SPMDFullToShardShape", "SPMDShardToFullShape", "ConcatBitcast"),
    *("ZeroCrop", "GatherScatterIndicesBitpacked"),
)


class Kernel(NamedTuple):
    """What a custom call does in one execution: FLOPs, and the bytes of its operands and results.

    `known` is False for a kernel that is not counted; `name` is the kernel's.
    """

    name: str
    flops: float
    size: int
    known: bool


def dot_flops(module: Module, computation: str, x: Instruction) -> float:
    """FLOPs of one execution of a `dot` or a `convolution`; 0 for anything else."""
    if x.opcode == "dot":
        left = module.operand_shapes(computation, x)[0][0]
        return 2.0 * x.shapes[0].elements * math.prod(left.dims[i] for i in _dims(x, "lhs_contracting_dims"))
    if x.opcode == "convolution":
        left, right = (shapes[0] for shapes in module.operand_shapes(computation, x)[:2])
        return _convolution_flops(x, left, right)
    return 0.0


def kernel(module: Module, computation: str, x: Instruction) -> Kernel | None:
    """What a custom call does; None for what is no kernel."""
    found = re.search(r'custom_call_target="([^"]*)"', x.rest)
    target = found[1] if found else ""
    if x.opcode != "custom-call" or target in _NOTHING:
        return None
    operands = [shape for shapes in module.operand_shapes(computation, x) for shape in shapes]
    size = sum(shape.size for shape in (*operands, *x.shapes))
    name = target if target != "tpu_custom_call" else re.sub(r"[.\d]+$", "", x.name[1:])
    flops = _kernel_flops(name, x, operands)
    return Kernel(name, flops or 0.0, size, flops is not None)


def _kernel_flops(name: str, x: Instruction, operands: list[Shape]) -> float | None:
    arrays = [shape for shape in operands if shape.dtype.startswith(_FLOATS)]
    if name in _CUDNN:
        found = re.search(r'"intermediate_tensor_shape":\{[^}]*"dimensions":\[([^\]]*)\]', x.rest)
        if not found:
            return None
        batch, heads, queries, keys = (int(size) for size in re.findall(r"\d+", found[1]))
        head_dim = arrays[0].elements // (batch * heads * queries)
        causal = 0.5 if re.search(r'"mask_type":"[A-Z_]*CAUSAL', x.rest) else 1.0
        return causal * _CUDNN[name] * 2.0 * batch * heads * queries * keys * head_dim
    if name.startswith(("splash_mha", "splash_mqa")):
        q, k = arrays[0], arrays[1]
        part = name.split("_")[2]
        fused = part == "dkv" and any(len(shape.dims) == len(q.dims) + 1 for shape in x.shapes)  # dq by key block
        causal = 0.5 if q.dims[-2] == k.dims[-2] else 1.0
        return causal * _SPLASH["fused" if fused else part] * 2.0 * q.elements * k.dims[-2]
    if name.startswith("cached_attention"):  # q [B, K, rows, H], k and v [B, K, S, H]: as if the cache were full
        whole = [shape for shape in operands if len(shape.dims) == 4]
        return 4.0 * whole[0].elements * whole[1].dims[2]
    if name.startswith("__cublas"):
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.rest)
        if not found:
            return None
        contracted = math.prod(operands[0].dims[int(i)] for i in re.findall(r"\d+", found[1]))
        return 2.0 * x.shapes[0].elements * contracted
    return None


def _dims(x: Instruction, name: str) -> list[int]:
    found = re.search(name + r"=\{([\d,]*)\}", x.attributes)
    return [int(i) for i in found[1].split(",") if i] if found else []


def _convolution_flops(x: Instruction, left: Shape, right: Shape) -> float:
    """As XLA counts: only positions of the window that lie on an element of the input, not on padding or holes.

    TPU programs have no dots: every matrix product is a convolution, whose batch dimensions may be spatial ones with
    padding or dilation that make all but the right pairs fall on nothing.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    if labels is None:
        raise ValueError(f"{x.name}: a convolution without dim_labels")
    window = _window(x)
    lhs, rhs, out = labels.groups()
    result = x.shapes[0].dims
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * right.dims[rhs.index("i")]
    groups = re.search(r"batch_group_count=(\d+)", x.attributes)
    total /= int(groups[1]) if groups else 1
    for i in range(sum(label.isdigit() for label in lhs)):
        sizes = (left.dims[lhs.index(str(i))], right.dims[rhs.index(str(i))], result[out.index(str(i))])
        spread = {name: window[name][i] for name in ("stride", "lhs_dilate", "rhs_dilate", "pad") if name in window}
        total *= _valid_pairs(*sizes, **spread)
    return total


def _window(x: Instruction) -> dict[str, list[int]]:
    found = re.search(r"window=\{([^}]*)\}", x.attributes)
    fields = dict(field.split("=", 1) for field in found[1].split()) if found else {}
    return {name: [int(size.split("_")[0]) for size in value.split("x")] for name, value in fields.items()}


def _valid_pairs(
    size: int, kernel: int, out: int, *, stride: int = 1, lhs_dilate: int = 1, rhs_dilate: int = 1, pad: int = 0
) -> int:
    """Pairs of an output position o and a window position k with an element at o * stride - pad + k * rhs_dilate."""
    if stride == lhs_dilate == 1 and kernel == 1 and pad == 0:
        return out
    at_k = np.arange(kernel, dtype=np.int64) * rhs_dilate - pad
    if lhs_dilate == 1:  # count the o with 0 <= o * stride + at < size
        first, last = np.maximum(0, -(at_k // stride)), np.minimum(out - 1, (size - 1 - at_k) // stride)
        return int(np.maximum(0, last - first + 1).sum())
    total = 0
    for part in np.array_split(at_k, max(1, kernel * out // 4_000_000)):
        index = np.arange(out, dtype=np.int64)[:, None] * stride + part[None]
        total += int(((index >= 0) & (index % lhs_dilate == 0) & (index // lhs_dilate < size)).sum())
    return total
