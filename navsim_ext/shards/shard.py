"""One finished shard: its checked index and its memory-mapped records."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import records
from navsim_ext.shards.container import HEADER_BYTES, Index, read_index
from navsim_ext.shards.errors import CorruptShard, DuplicateToken


class Shard:
    """One finished shard: its checked index, and its bytes mapped into memory when the first record is asked for."""

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        self.path = path
        self.index, metadata = read_index(path)
        if metadata["fingerprint"] != fingerprint.digest:
            raise CorruptShard(
                f"{path}: was made under fingerprint {metadata['fingerprint'][:12]}, this folder is "
                f"{fingerprint.digest[:12]}: it belongs to another store; move it out of the folder"
            )
        self.unchecked = np.ones(len(self.index.tokens), bool)
        self._starts = self.index.starts.tolist()
        self._map: mmap.mmap | None = None
        self._bytes = np.empty(0, np.uint8)

    @property
    def data(self) -> np.ndarray:
        """The whole file as uint8; record r is at HEADER_BYTES + starts[r]."""
        if self._map is None:
            with open(self.path, "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(mapped, np.uint8)  # before the map: other threads look at that first
            self._map = mapped
        return self._bytes

    def span(self, row: int) -> tuple[int, int]:
        """File offsets of the record's first byte and of the byte after its last."""
        return HEADER_BYTES + self._starts[row], HEADER_BYTES + self._starts[row + 1]

    def check(self, row: int) -> None:
        """Raises CorruptShard when the record's bytes are not those that were written."""
        start, stop = self.span(row)
        found, stored = records.checksum(self.data[start:stop]), int(self.index.checksums[row])
        if found != stored:
            raise CorruptShard(
                f"{self.path}: record of token {self.index.tokens[row]} at bytes {start}..{stop} has checksum "
                f"{found:016x}, {stored:016x} was written: run verify to see all damage, delete the shards it names "
                "and run the job that wrote them again"
            )
        self.unchecked[row] = False

    def arrays(self, row: int) -> dict[str, np.ndarray]:
        index = self.index
        return records.decode(index.row_layout(row), index.row_shapes(row), self.data, self.span(row)[0])

    def will_need(self, row: int) -> None:
        """Asks the kernel to read the record ahead; returns at once."""
        start, stop = self.span(row)
        if len(self.data) and self._map is not None:
            page_start = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page_start, stop - page_start)


def same_content(a: Index, row_a: int, b: Index, row_b: int) -> bool:
    """Whether two records have the same layout, shapes, length and checksum."""
    return bool(
        a.checksums[row_a] == b.checksums[row_b]
        and a.starts[row_a + 1] - a.starts[row_a] == b.starts[row_b + 1] - b.starts[row_b]
        and a.row_layout(row_a) == b.row_layout(row_b)
        and a.row_shapes(row_a) == b.row_shapes(row_b)
    )


def require_identical(first: Shard, first_row: int, second: Shard, second_row: int) -> None:
    """Raises DuplicateToken when a token's two records differ."""
    if not same_content(first.index, first_row, second.index, second_row):
        raise DuplicateToken(
            f"token {first.index.tokens[first_row]} is in {first.path} (checksum "
            f"{int(first.index.checksums[first_row]):016x}) and in {second.path} (checksum "
            f"{int(second.index.checksums[second_row]):016x}) with different content: delete the wrong shard and run "
            "the job that wrote it again"
        )
