"""The one sharded store for arrays by token: checksummed, memory-mapped, atomic, resumable. See README.md."""

from navsim_ext.shards.errors import CorruptShard, DuplicateToken, ShardError, StorageFull, WriterLocked
from navsim_ext.shards.merge import MergeReport, merge
from navsim_ext.shards.store import ShardStore, StoreStats
from navsim_ext.shards.verify import VerifyReport, verify
from navsim_ext.shards.writer import ShardWriter

__all__ = [
    "CorruptShard",
    "DuplicateToken",
    "MergeReport",
    "ShardError",
    "ShardStore",
    "ShardWriter",
    "StorageFull",
    "StoreStats",
    "VerifyReport",
    "WriterLocked",
    "merge",
    "verify",
]
