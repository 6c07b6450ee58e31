"""A record: the named arrays of one token, laid out one after another, with one checksum over all their bytes.

Layout of a record: arrays in the order of their names, each in C order and little-endian, each starting at a
multiple of 16 bytes, zero bytes between them; the record is filled up with zeros to a multiple of 64 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from navsim_ext.errors import DataError

ARRAY_ALIGNMENT = 16  # bytes
RECORD_ALIGNMENT = 64  # bytes: a cache line
DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
)  # bfloat16 and float8 travel as the uint16 and uint8 of their bits

Layout = tuple[tuple[str, str, int], ...]
"""(name, dtype, number of dimensions) of each array, sorted by name; all but the shapes."""


@dataclass(frozen=True)
class Record:
    """An encoded record: ``pieces`` are the buffers to write one after another, ``num_bytes`` their sum."""

    token: str
    layout: Layout
    shapes: tuple[int, ...]
    pieces: tuple[memoryview | bytes, ...]
    num_bytes: int
    checksum: int


def encode(token: str, arrays: Mapping[str, np.ndarray]) -> Record:
    """Lays out the arrays of one token without copying those that are already contiguous.

    Raises DataError for an empty token or record, a name that is not text, or a dtype that is not in ``DTYPES``.
    """
    if not isinstance(token, str) or not token or "\n" in token:
        raise DataError(f"token {token!r}: must be a text of at least one character on one line")
    if not arrays:
        raise DataError(f"token {token}: a record needs at least one array")
    layout, shapes, pieces, position = [], [], [], 0
    digest = xxhash.xxh3_64()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        dtype = array.dtype
        if dtype.name not in DTYPES:
            raise DataError(
                f"token {token}, array {name!r}: dtype {dtype} cannot be stored; use one of {', '.join(sorted(DTYPES))}"
                " (text as uint8 of its UTF-8, bfloat16 as uint16, float8 as uint8)"
            )
        array = array.astype(dtype.newbyteorder("<"), copy=False)
        layout.append((name, dtype.name, array.ndim))
        shapes.extend(array.shape)
        last = len(layout) == len(arrays)
        alignment = RECORD_ALIGNMENT if last else ARRAY_ALIGNMENT
        padding = -(position + array.nbytes) % alignment
        for piece in (memoryview(array.reshape(-1)).cast("B") if array.nbytes else b"", bytes(padding)):
            if len(piece):
                digest.update(piece)
                pieces.append(piece)
        position += array.nbytes + padding
    return Record(token, tuple(layout), tuple(shapes), tuple(pieces), position, digest.intdigest())


def decode(layout: Layout, shapes: Sequence[int], buffer: np.ndarray, start: int) -> dict[str, np.ndarray]:
    """Views of the arrays of the record at byte ``start`` of the uint8 ``buffer``; nothing is copied."""
    arrays, used = {}, 0
    for name, dtype, ndim in layout:
        shape = shapes[used : used + ndim]
        used += ndim
        array = np.ndarray(shape, dtype, buffer, start)
        arrays[name] = array
        start += array.nbytes + -array.nbytes % ARRAY_ALIGNMENT
    return arrays


def record_bytes(layout: Layout, shapes: Sequence[int]) -> int:
    """Bytes that a record of this layout and these shapes takes."""
    total = sum(size + -size % ARRAY_ALIGNMENT for _, size in array_bytes(layout, shapes))
    return total + -total % RECORD_ALIGNMENT


def array_bytes(layout: Layout, shapes: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(name, bytes without padding) of each array of a record."""
    used = 0
    for name, dtype, ndim in layout:
        yield name, math.prod(shapes[used : used + ndim]) * np.dtype(dtype).itemsize
        used += ndim


def checksum(buffer: memoryview | np.ndarray | bytes) -> int:
    """The 64-bit XXH3 of the bytes. Not cryptographic: it is there against faults, not against forgery."""
    return xxhash.xxh3_64_intdigest(buffer)
