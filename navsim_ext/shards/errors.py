"""What can go wrong with a sharded store, by name."""

from __future__ import annotations

from navsim_ext.errors import CorruptFile, TriviumError


class ShardError(TriviumError):
    """Root of the errors of the sharded store."""


class CorruptShard(ShardError, CorruptFile):
    """Bytes on disk are not the bytes that were stored: cut short, flipped, or another file in their place."""


class DuplicateToken(ShardError):
    """A token is stored twice, or two records of one token differ."""


class WriterLocked(ShardError):
    """Another process holds the writer id or the folder."""


class StorageFull(ShardError, OSError):
    """The disk or the quota is full; everything acknowledged so far is kept."""
