"""Token ids inside a JSON object: some 3 bytes per token, since a list of numbers would take 6."""

import base64
import binascii
import zlib

import numpy as np
from numpy.typing import ArrayLike

_WIDTH = np.dtype("<i4")


def pack_ids(tokens: ArrayLike) -> str:
    """Token ids as base64 of the zlib-compressed little-endian int32 numbers."""
    numbers = np.asarray(tokens, _WIDTH)
    return base64.b64encode(zlib.compress(numbers.tobytes(), 1)).decode("ascii")


def unpack_ids(packed: str) -> list[int]:
    """What `pack_ids` was given.

    Raises:
      ValueError: a text that `pack_ids` does not make.
    """
    try:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(packed, validate=True)), _WIDTH)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"{packed[:40]!r}: not packed token ids ({error})") from error
    return numbers.tolist()
