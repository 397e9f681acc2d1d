"""The safetensors file format, one tensor at a time.

The layout: eight bytes with the length of a JSON header, the header, the raw little-endian tensors. Files are read with
ordinary reads rather than mapped, so that what a load needs of host memory is what it holds, and written from arrays
that are produced one by one. Nothing here ever unpickles.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


class TensorInfo(NamedTuple):
    """Where one tensor lies."""

    file: Path
    dtype: str  # as in the file, e.g. "BF16"; may be one that `DTYPES` does not know
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name.

    Raises:
      ValueError: not a safetensors file, cut short, or a name in it twice; naming the file and the tensor.
    """
    file_size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or length > min(_MAX_HEADER, file_size - 8):
            raise ValueError(f"{path}: not a safetensors file, or cut short ({file_size} bytes, header of {length})")
        raw = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: duplicate tensors in the header: {', '.join(sorted(twice))}")
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a safetensors file, its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file, its header is not a JSON object")
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: header entry of {name} is malformed: {entry!r}") from error
        if not 0 <= begin <= end <= file_size - 8 - length:
            raise ValueError(f"{path}: tensor {name} ends at byte {end} of the data, the file is cut short")
        if dtype in DTYPES and end - begin != int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize:
            raise ValueError(f"{path}: tensor {name} has {end - begin} bytes, which is not {dtype} {list(shape)}")
        infos[name] = TensorInfo(path, dtype, shape, 8 + length + begin, end - begin)
    return infos


def read_tensor(info: TensorInfo) -> np.ndarray:
    """The tensor's content in its stored dtype, which must be one of `DTYPES`."""
    array = np.empty(info.shape, DTYPES[info.dtype])
    view = array.reshape(-1).view(np.uint8).data
    with open(info.file, "rb", buffering=0) as file:
        file.seek(info.start)
        done = 0
        while done < info.size:
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{info.file}: ended {info.size - done} bytes early")
            done += count
    return array


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
