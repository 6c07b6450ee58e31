"""The journal of an open shard: one checksummed line per acknowledged record, so that a kill loses none.

A record is acknowledged when its bytes and then its line have been written. Both are in the kernel's page cache by
then, which a kill -9 does not touch; a power cut may lose unsynced bytes, and the checksums tell which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np
import xxhash

from navsim_ext.shards.container import HEADER_BYTES, IndexBuilder, pack
from navsim_ext.shards.names import OpenShard
from navsim_ext.shards.records import Record, checksum


def line(record: Record) -> bytes:
    """The journal line of a record: XXH3 of the JSON, a space, the JSON, a newline."""
    content = [record.token, record.layout, record.shapes, record.num_bytes, record.checksum]
    text = json.dumps(content, separators=(",", ":")).encode()
    return b"%016x %s\n" % (xxhash.xxh3_64_intdigest(text), text)


def parse(content: bytes) -> Iterator[tuple[Record, int]]:
    """(record without its bytes, end of its line) for each intact line, up to the first that is not."""
    position = 0
    while (end := content.find(b"\n", position)) >= 0:
        digest, _, text = content[position:end].partition(b" ")
        if digest != b"%016x" % xxhash.xxh3_64_intdigest(text):
            return
        token, layout, shapes, num_bytes, stored = json.loads(text)
        layout = tuple((name, dtype, ndim) for name, dtype, ndim in layout)
        position = end + 1
        yield Record(token, layout, tuple(shapes), (), num_bytes, stored), position


def acknowledged(shard: OpenShard) -> list[str]:
    """Tokens in the journal of a shard that another process may still be writing."""
    try:
        return [record.token for record, _ in parse(shard.journal.read_bytes())]
    except FileNotFoundError:
        return []


def recover(shard: OpenShard) -> IndexBuilder:
    """The records of an open shard that are whole; cuts off what follows them in both files.

    Only the process that holds the writer's lock may call this.
    """
    builder = IndexBuilder()
    lines = shard.journal.read_bytes() if shard.journal.is_file() else b""
    kept_lines = 0
    size = shard.data.stat().st_size
    if size > HEADER_BYTES:
        data = np.memmap(shard.data, np.uint8, "r")
        for record, line_end in parse(lines):
            start = HEADER_BYTES + builder.data_bytes
            span = data[start : start + record.num_bytes]
            if len(span) != record.num_bytes or checksum(span) != record.checksum:
                break
            builder.add(record)
            kept_lines = line_end
        del data
    os.truncate(shard.data, HEADER_BYTES + builder.data_bytes)
    if lines:
        os.truncate(shard.journal, kept_lines)
    return builder


def finish(shard: OpenShard, builder: IndexBuilder, fingerprint_digest: str) -> None:
    """Writes index and header, syncs, and renames the open shard to its final name: it is complete or not there."""
    if builder.tokens:
        header, tail, _ = pack(builder.build(), fingerprint_digest)
        with open(shard.data, "r+b") as stream:
            stream.seek(HEADER_BYTES + builder.data_bytes)
            stream.write(tail)
            stream.truncate()
            stream.seek(0)
            stream.write(header)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(shard.data, shard.finished)
    else:
        shard.data.unlink()
    shard.journal.unlink(missing_ok=True)
    sync_folder(shard.folder)


def sync_folder(folder: os.PathLike[str]) -> None:
    """Makes renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
