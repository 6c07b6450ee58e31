"""zstd around a codec's parts: without loss, smaller on disk, dearer to read.

Two-byte values are split into their low and their high bytes first: the exponents then stand together and compress.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import zstandard

from navsim_ext.errors import DataError

COMPRESSIONS = ("zstd",)
LEVEL = 3
SUFFIX = ".zst"


def check_compression(name: str | None) -> str | None:
    """Raises DataError for a compression that does not exist."""
    if name is not None and name not in COMPRESSIONS:
        raise DataError(f"compression {name!r} does not exist; choose one of {', '.join(COMPRESSIONS)} or null")
    return name


def compress(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``name`` becomes ``name.zst`` (uint8) and ``name.shape`` (int64 of the shape, then bytes per value)."""
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
    stored = {}
    for name, part in parts.items():
        planes = np.ascontiguousarray(part.reshape(-1).view(np.uint8).reshape(-1, part.itemsize).T)
        stored[name + SUFFIX] = np.frombuffer(compressor.compress(planes), np.uint8)
        stored[name + ".shape"] = np.array([*part.shape, part.itemsize], np.int64)
    return stored


def decompress(stored: Mapping[str, np.ndarray], dtypes: Mapping[str, type]) -> dict[str, np.ndarray]:
    """The parts that were compressed; ``dtypes`` by part name."""
    parts = {}
    for name, dtype in dtypes.items():
        *shape, itemsize = stored[name + ".shape"].tolist()
        size = int(np.prod(shape)) * itemsize
        planes = zstandard.ZstdDecompressor().decompress(stored[name + SUFFIX], max_output_size=size)
        values = np.frombuffer(planes, np.uint8).reshape(itemsize, -1)
        whole = values if itemsize == 1 else np.ascontiguousarray(values.T)
        parts[name] = whole.reshape(-1).view(dtype).reshape(shape)
    return parts
