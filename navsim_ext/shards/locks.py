"""Advisory file locks of a store: one process per writer id, and no writer while a merge rewrites the folder.

The kernel drops a flock when its process ends, however it ends, so a lock file left by a killed process is free: what
it says of its last holder only serves the message. (On NFS Linux maps flock to a byte-range lock of the server.)
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
from pathlib import Path

from navsim_ext.shards.errors import WriterLocked

LOCK_FOLDER = "locks"


class FolderLock:
    """A lock file ``<folder>/locks/<name>``, held from ``acquire`` to ``release`` or the end of the process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / LOCK_FOLDER / name
        self._descriptor: int | None = None

    def try_acquire(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Takes the lock, shared with other sharers or alone; False when somebody else holds it (and not ``wait``)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        if not shared:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        self._descriptor = descriptor
        return True

    def acquire(self, purpose: str, *, shared: bool = False) -> None:
        """Takes the lock or raises WriterLocked naming the holder."""
        if not self.try_acquire(shared=shared):
            raise WriterLocked(f"{self.path}: {purpose} is not possible now, {self.holder()}; wait until it has ended")

    def holder(self) -> str:
        """Who took the lock alone last, in words."""
        try:
            told = json.loads(self.path.read_text())
            return f"process {told['pid']} on {told['host']} holds it since {told['since']}"
        except (OSError, ValueError, LookupError, TypeError):
            return "another process holds it"

    @property
    def released(self) -> bool:
        return self._descriptor is None

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
