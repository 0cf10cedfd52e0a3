"""PNG encoding for pictures that are written once and rarely read."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from torch import Tensor

__all__ = ["encode_png"]

_UP = 2  # a row holds the differences from the row above
_LEVEL = 2


def encode_png(image: Tensor) -> bytes:
    r"""Encode a picture as PNG.

    All rows have the same filter: libpng's choice among five for each row takes as long as the compression, for files
    that are about a tenth smaller. Other threads run meanwhile, as zlib and NumPy release the interpreter lock.

    Args:
        image: (H, W, 3) uint8 on the CPU, H and W at least 1.

    Returns:
        The bytes of a PNG file; decoding gives the same pixels.

    Example:
        >>> import torch
        >>> encode_png(torch.zeros(2, 3, 3, dtype=torch.uint8))[:4]
        b'\x89PNG'
    """
    height, width, _ = image.shape
    rows = image.numpy().reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.data, _LEVEL)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
