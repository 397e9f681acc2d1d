"""Safetensors files, one tensor at a time.

Files are read by the safetensors library, which checks that the tensors cover the file, each byte once. Two checks are
ours: the library reads a header of any length up to 100 MB, which takes 10 s and 1.4 GB, and it passes over an entry
that is written twice. Writing is ours too: the library wants all tensors at once, here each is produced when its turn
comes. Nothing here ever unpickles.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEADER = 1 << 24  # bytes, enough for 100,000 tensors; the largest models in this layout have thousands


class TensorInfo(NamedTuple):
    """One tensor of a file."""

    file: Path
    name: str
    dtype: str  # as in the file, e.g. "BF16"; may be one that `DTYPES` does not know
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name.

    Raises:
      ValueError: not a safetensors file, cut short, tensors that overlap or leave gaps, a name in it twice; naming the
        file.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MOST_HEADER:
            raise ValueError(
                f"{path}: not a safetensors file, its header has {length:,} bytes, expected at most {_MOST_HEADER:,}"
            )
        raw = file.read(length)
    try:
        with safe_open(path, "numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from error

    def unique(pairs: list[tuple[str, Any]]) -> None:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: duplicate tensors in the header: {', '.join(sorted(twice))}")

    json.loads(raw, object_pairs_hook=unique)
    return {name: TensorInfo(path, name, dtype, shape) for name, (dtype, shape) in found.items()}


def read_tensor(info: TensorInfo, rows: int | None = None) -> np.ndarray:
    """The tensor's content in its stored dtype, which must be one of `DTYPES`; of the first `rows` rows if given."""
    try:
        with safe_open(info.file, "numpy") as opened:
            return opened.get_slice(info.name)[: info.shape[0] if rows is None else rows]
    except SafetensorError as error:
        raise ValueError(f"{info.file}: tensor {info.name} cannot be read ({error})") from error


def same_values(a: TensorInfo, b: TensorInfo, rows: int = 4096) -> bool:
    """Whether two arrays hold the same values, as far as the narrower of their dtypes can tell; `rows` at a time."""
    if a.shape != b.shape or not a.shape or not {a.dtype, b.dtype} <= DTYPES.keys():
        return False
    narrow = min(DTYPES[a.dtype], DTYPES[b.dtype], key=lambda dtype: dtype.itemsize)

    def parts(info: TensorInfo) -> Iterator[np.ndarray]:
        with safe_open(info.file, "numpy") as opened:
            tensor = opened.get_slice(info.name)
            for start in range(0, info.shape[0], rows):
                yield tensor[start : min(start + rows, info.shape[0])].astype(narrow)

    return all(x.tobytes() == y.tobytes() for x, y in zip(parts(a), parts(b), strict=True))


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: np.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file, synced to disk.

    Args:
      path: where to.
      tensors: name -> (shape, a function that produces the array); each is called when its turn comes, so one
        tensor is held at a time.
      dtype: of all tensors; must be one of `DTYPES`.
      metadata: strings for the header's `__metadata__`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, _) in tensors.items():
        size = tensor_bytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)  # the format wants the data aligned
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, (shape, produce) in tensors.items():
            array = np.ascontiguousarray(produce(), dtype=dtype)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(shape: Iterable[int], dtype: np.dtype) -> int:
    """Bytes of a tensor."""
    return int(np.prod(tuple(shape), dtype=np.int64)) * dtype.itemsize
