"""The locks of a store: one process per writer id, and no writer while a merge rewrites the folder."""

from __future__ import annotations

from pathlib import Path

from navsim_ext.runtime.lock import FolderLock
from navsim_ext.shards.errors import WriterLocked


def store_lock(folder: Path, name: str) -> FolderLock:
    """The lock ``<folder>/locks/<name>``, not yet taken."""
    return FolderLock(folder, f"locks/{name}")


def take(lock: FolderLock, purpose: str, *, shared: bool = False) -> FolderLock:
    """Takes the lock or raises WriterLocked naming the holder."""
    if not lock.try_acquire(shared=shared):
        raise WriterLocked(f"{lock.path}: {purpose} is not possible now, {lock.holder()}; wait until it has ended")
    return lock
