"""TFRecord files without TensorFlow: framing with masked CRC-32C, read and written.

A record is: length (uint64, little endian) · masked CRC-32C of these 8 bytes (uint32) · data · masked CRC-32C of the
data (uint32). mask(c) = ((c >> 15) | (c << 17)) + 0xa282ead8 mod 2^32; CRC-32C is Castagnoli's polynomial, bit-reversed
0x82f63b78.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import atomic_stream
from navsim_ext.pdm.compiled import kernel

LENGTH_BYTES, CRC_BYTES = 8, 4
HEADER_BYTES = LENGTH_BYTES + CRC_BYTES
MASK_DELTA = 0xA282EAD8
LARGEST_BYTES = 1 << 30  # of one record: a longer one is a damaged length


class CorruptRecord(DataError):
    """A record of a TFRecord file is cut short or its bytes are not those that were written."""


def _tables() -> NDArray[np.uint32]:
    """[8,256] so that eight bytes are folded at a time."""
    table = np.zeros((8, 256), np.uint32)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table[0, byte] = value
    for row in range(1, 8):
        for byte in range(256):
            before = int(table[row - 1, byte])
            table[row, byte] = (before >> 8) ^ int(table[0, before & 0xFF])
    return table


_TABLES = _tables()


@kernel
def _crc(data, tables):
    crc = np.uint32(0xFFFFFFFF)
    low = np.uint32(0xFF)
    i = 0
    while i + 8 <= len(data):
        first = crc ^ (
            np.uint32(data[i])
            | np.uint32(data[i + 1]) << np.uint32(8)
            | np.uint32(data[i + 2]) << np.uint32(16)
            | np.uint32(data[i + 3]) << np.uint32(24)
        )
        crc = (
            tables[7, first & low]
            ^ tables[6, (first >> np.uint32(8)) & low]
            ^ tables[5, (first >> np.uint32(16)) & low]
            ^ tables[4, first >> np.uint32(24)]
            ^ tables[3, data[i + 4]]
            ^ tables[2, data[i + 5]]
            ^ tables[1, data[i + 6]]
            ^ tables[0, data[i + 7]]
        )
        i += 8
    while i < len(data):
        crc = (crc >> np.uint32(8)) ^ tables[0, (crc ^ np.uint32(data[i])) & low]
        i += 1
    return crc ^ np.uint32(0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of bytes."""
    return int(_crc(np.frombuffer(data, np.uint8), _TABLES))


def masked_crc(data: bytes) -> int:
    """CRC-32C as TFRecord stores it."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + MASK_DELTA) & 0xFFFFFFFF


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes | CorruptRecord]]:
    """(offset in the file, data or what is wrong with it) of every record.

    A record whose data is damaged is yielded as its error and the next one follows; after a damaged length or a file
    that ends early nothing can follow: that error is the last. Raises MissingError for an absent file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"{path} does not exist")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        offset = 0
        while offset < size:
            header = stream.read(HEADER_BYTES)
            wrong = _wrong_header(header)
            length = int.from_bytes(header[:LENGTH_BYTES], "little")
            if wrong is None and offset + HEADER_BYTES + length + CRC_BYTES > size:
                left = size - offset - HEADER_BYTES
                wrong = f"its data needs {length + CRC_BYTES} bytes, {left} are left: the file is cut short"
            if wrong is not None:
                yield offset, CorruptRecord(f"{path}: record at byte {offset}: {wrong}; nothing after it can be read")
                return
            data = stream.read(length)
            (stored,) = struct.unpack("<I", stream.read(CRC_BYTES))
            computed = masked_crc(data)
            if stored == computed:
                yield offset, data
            else:
                yield (
                    offset,
                    CorruptRecord(
                        f"{path}: record at byte {offset}: its {length} bytes of data have the masked CRC-32C "
                        f"{computed:#010x}, {stored:#010x} is stored; fetch the file again"
                    ),
                )
            offset += HEADER_BYTES + length + CRC_BYTES


def _wrong_header(header: bytes) -> str | None:
    if len(header) < HEADER_BYTES:
        return f"its header needs {HEADER_BYTES} bytes, {len(header)} are left: the file is cut short"
    (stored,) = struct.unpack("<I", header[LENGTH_BYTES:])
    computed = masked_crc(header[:LENGTH_BYTES])
    length = int.from_bytes(header[:LENGTH_BYTES], "little")
    if stored != computed:
        return f"the length {length} has the masked CRC-32C {computed:#010x}, {stored:#010x} is stored"
    if length > LARGEST_BYTES:
        return f"a length of {length} bytes; at most {LARGEST_BYTES} were expected"
    return None


def write_records(path: str | os.PathLike[str], records: Iterable[bytes]) -> int:
    """Writes a TFRecord file, whole or not at all; returns the number of records."""
    count = 0
    with atomic_stream(path) as stream:
        for data in records:
            length = len(data).to_bytes(LENGTH_BYTES, "little")
            stream.write(length + struct.pack("<I", masked_crc(length)))
            stream.write(data + struct.pack("<I", masked_crc(data)))
            count += 1
    return count
