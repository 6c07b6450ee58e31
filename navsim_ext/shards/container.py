"""The file of one shard: a plain safetensors file whose tensors are the records' bytes and their index.

    bytes 0 ... 4095      safetensors header (8 bytes of length, JSON, spaces), of fixed size: the records can be
                          written before the index is known, and a record's file offset is 4096 + its start
    data            U8    records one after another (see records.py)
    starts          I64   [n+1] start of each record in ``data``, and the end of the last
    checksums       U64   [n] XXH3 of each record's bytes
    layout_ids      I64   [n] which layout
    shapes          I64   shapes of all arrays of all records, one after another
    shape_starts    I64   [n+1] where the shapes of each record start
    token_starts    I64   [n+1] where each token starts in ``tokens``
    tokens          U8    tokens, UTF-8, one after another
    layouts         U8    the layouts as JSON

The index is binary and columnar because a header with one JSON entry per array takes seconds and gigabytes to parse
at 100,000 tokens (benchmarks/bench_shards.py). ``sha256`` in the metadata covers the header (with that field
zeroed) and the index; the checksums cover the records: no byte of the file is outside.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from navsim_ext.shards.errors import CorruptShard
from navsim_ext.shards.records import Layout, Record

FORMAT = "trivium-shard-1"
HEADER_BYTES = 4096
SAFETENSORS_DTYPES = {"uint8": "U8", "int64": "I64", "uint64": "U64"}
INDEX_TENSORS = ("starts", "checksums", "layout_ids", "shapes", "shape_starts", "token_starts", "tokens", "layouts")
INDEX_DTYPES = {name: "int64" for name in INDEX_TENSORS} | {
    "checksums": "uint64",
    "tokens": "uint8",
    "layouts": "uint8",
}


@dataclass(frozen=True)
class Index:
    """Where each record of a shard lies; row i of every column belongs to ``tokens[i]``."""

    tokens: list[str]
    starts: np.ndarray
    checksums: np.ndarray
    layouts: list[Layout]
    layout_ids: np.ndarray
    shapes: np.ndarray
    shape_starts: np.ndarray

    @property
    def data_bytes(self) -> int:
        return int(self.starts[-1])

    def row_layout(self, row: int) -> Layout:
        return self.layouts[self.layout_ids[row]]

    def row_shapes(self, row: int) -> list[int]:
        return self.shapes[self.shape_starts[row] : self.shape_starts[row + 1]].tolist()

    def tensors(self) -> dict[str, np.ndarray]:
        """The index as it is stored, in file order."""
        encoded = [token.encode() for token in self.tokens]
        columns = {
            "starts": self.starts,
            "checksums": self.checksums,
            "layout_ids": self.layout_ids,
            "shapes": self.shapes,
            "shape_starts": self.shape_starts,
            "token_starts": running_sum([len(token) for token in encoded]),
            "tokens": np.frombuffer(b"".join(encoded), np.uint8),
            "layouts": np.frombuffer(json.dumps(self.layouts).encode(), np.uint8),
        }
        return {name: columns[name].astype("<" + np.dtype(INDEX_DTYPES[name]).str[1:]) for name in INDEX_TENSORS}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> Index:
        blob, bounds = tensors["tokens"].tobytes(), tensors["token_starts"].tolist()
        layouts = [
            tuple((name, dtype, ndim) for name, dtype, ndim in one) for one in json.loads(bytes(tensors["layouts"]))
        ]
        return cls(
            tokens=[blob[start:stop].decode() for start, stop in itertools.pairwise(bounds)],
            starts=tensors["starts"],
            checksums=tensors["checksums"],
            layouts=layouts,
            layout_ids=tensors["layout_ids"],
            shapes=tensors["shapes"],
            shape_starts=tensors["shape_starts"],
        )


class IndexBuilder:
    """Collects records in file order and gives the shard's Index; layouts are numbered as they first appear."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.data_bytes = 0
        self._stops: list[int] = []
        self._checksums: list[int] = []
        self._layouts: dict[Layout, int] = {}
        self._layout_ids: list[int] = []
        self._shapes: list[int] = []
        self._shape_counts: list[int] = []

    def add(self, record: Record) -> None:
        self.tokens.append(record.token)
        self.data_bytes += record.num_bytes
        self._stops.append(self.data_bytes)
        self._checksums.append(record.checksum)
        self._layout_ids.append(self._layouts.setdefault(record.layout, len(self._layouts)))
        self._shapes.extend(record.shapes)
        self._shape_counts.append(len(record.shapes))

    def build(self) -> Index:
        return Index(
            tokens=list(self.tokens),
            starts=np.array([0, *self._stops], np.int64),
            checksums=np.array(self._checksums, np.uint64),
            layouts=list(self._layouts),
            layout_ids=np.array(self._layout_ids, np.int64),
            shapes=np.array(self._shapes, np.int64),
            shape_starts=running_sum(self._shape_counts),
        )


def running_sum(counts: list[int]) -> np.ndarray:
    """[0, c0, c0+c1, ...] as int64 [n+1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def pack(index: Index, fingerprint_digest: str) -> tuple[bytes, bytes, str]:
    """(header of HEADER_BYTES, index bytes that follow the records, sha256 of both)."""
    tensors = index.tensors()
    tail = b"".join(tensor.tobytes() for tensor in tensors.values())
    metadata = {"format": FORMAT, "fingerprint": fingerprint_digest, "records": str(len(index.tokens))}
    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    digest = header_digest(index.data_bytes, sizes, metadata, tail)
    return header(index.data_bytes, sizes, metadata | {"sha256": digest}), tail, digest


def header_digest(data_bytes: int, sizes: dict[str, int], metadata: dict[str, str], tail: bytes) -> str:
    """SHA-256 of the header with a zeroed digest, followed by the index bytes."""
    return hashlib.sha256(header(data_bytes, sizes, metadata | {"sha256": "0" * 64}) + tail).hexdigest()


def header(data_bytes: int, sizes: dict[str, int], metadata: dict[str, str]) -> bytes:
    """The canonical header: the same content always gives the same bytes."""
    content: dict[str, Any] = {"__metadata__": metadata, "data": tensor_entry("uint8", data_bytes, 0)}
    position = data_bytes
    for name in INDEX_TENSORS:
        content[name] = tensor_entry(INDEX_DTYPES[name], sizes[name], position)
        position = content[name]["data_offsets"][1]
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()
    return (HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8)


def tensor_entry(dtype: str, size: int, position: int) -> dict[str, Any]:
    stop = position + size * np.dtype(dtype).itemsize
    return {"dtype": SAFETENSORS_DTYPES[dtype], "shape": [size], "data_offsets": [position, stop]}


def read_index(path: Path) -> tuple[Index, dict[str, str]]:
    """Reads and fully checks header and index of a shard, not its records; returns them with the metadata.

    Raises CorruptShard when the file is cut short or any byte of the header or the index is not as written.
    """
    with open(path, "rb") as stream:
        found = stream.read(HEADER_BYTES)
        size = os.fstat(stream.fileno()).st_size
        try:
            content = json.loads(found[8:])
            metadata = content["__metadata__"]
            sizes = {name: int(content[name]["shape"][0]) for name in INDEX_TENSORS}
            data_bytes = int(content["data"]["shape"][0])
            expected = header(data_bytes, sizes, metadata)
            total = HEADER_BYTES + max(
                entry["data_offsets"][1] for name, entry in content.items() if name != "__metadata__"
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CorruptShard(f"{path}: header is damaged ({error}); {REMEDY}") from error
        if found != expected or metadata.get("format") != FORMAT:
            raise CorruptShard(f"{path}: header is damaged or not of format {FORMAT}; {REMEDY}")
        if size != total:
            raise CorruptShard(f"{path}: {size} bytes on disk, {total} by its header; {REMEDY}")
        stream.seek(HEADER_BYTES + data_bytes)
        tail = stream.read()
    stored = str(metadata.get("sha256"))
    computed = header_digest(data_bytes, sizes, {key: metadata[key] for key in metadata if key != "sha256"}, tail)
    if stored != computed:
        raise CorruptShard(f"{path}: index has SHA-256 {computed[:12]}, its header says {stored[:12]}; {REMEDY}")
    tensors, position = {}, 0
    for name in INDEX_TENSORS:
        tensors[name] = np.frombuffer(tail, "<" + np.dtype(INDEX_DTYPES[name]).str[1:], sizes[name], position)
        position += tensors[name].nbytes
    return Index.from_tensors(tensors), metadata


REMEDY = "delete this shard and run the job that wrote it again: it makes only the missing records"
