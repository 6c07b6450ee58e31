"""The one lock of a folder: advisory, and dropped by the operating system when its holder dies, kill -9 included.

    with FolderLock(folder): ...                       # one run per folder; raises FolderBusy naming who has it
    lock = FolderLock(folder, "locks/merge")           # any number of named locks in a folder
    lock.try_acquire(shared=True)                      # with other sharers

The lock is flock(2), which Linux maps to a byte-range lock of the server on NFS; elsewhere it is as good as the file
system's lock service. What a lock file says of its last holder only serves the message: a file that a killed process
left is free.

Whoever takes the lock of a whole folder alone also removes what killed writers left half written in it and below,
subfolders aside that somebody else has locked.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from navsim_ext.errors import TriviumError
from navsim_ext.files import CannotWrite, cannot_write, remove_temporaries

LOCK_NAME = ".lock"


class FolderBusy(TriviumError):
    """Another process is writing into the folder."""


class FolderLock(AbstractContextManager["FolderLock"]):
    """The lock file ``<folder>/<name>``, held from ``acquire`` (or ``with``) to ``release`` or the end of the process.

    ``with`` creates the folder and takes the lock alone unless it is held already, and releases it.
    """

    def __init__(self, folder: str | os.PathLike[str], name: str = LOCK_NAME) -> None:
        self.folder = Path(folder)
        self.path = self.folder / name
        self._descriptor: int | None = None

    def try_acquire(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Takes the lock, shared with other sharers or alone; False when somebody else holds it (and not ``wait``).

        Raises CannotWrite when the folder takes no file.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(error, self.folder) from error
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

    def acquire(self) -> None:
        """Takes the lock alone; raises FolderBusy naming who has it, CannotWrite when the folder takes no file."""
        if not self.try_acquire():
            raise FolderBusy(
                f"{self.folder} is in use by another run ({self.holder()}): wait for it, stop it, or choose another "
                "output_dir"
            )
        if self.path.name == LOCK_NAME:
            for folder in self._free_folders():
                remove_temporaries(folder)

    def _free_folders(self) -> Iterator[Path]:
        """The folder and all below it without those in which others work."""
        for path, names, _ in os.walk(self.folder):
            names[:] = [name for name in names if not _is_held(Path(path, name))]
            yield Path(path)

    def holder(self) -> str:
        """Who took the lock alone last, in words."""
        try:
            told = json.loads(self.path.read_text())
            return f"process {told['pid']} on {told['host']} holds it since {told['since']}"
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            return "another process holds it"

    @property
    def released(self) -> bool:
        return self._descriptor is None

    def release(self) -> None:
        """Gives the lock back; releasing twice is harmless."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        if self.released:
            self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def in_use(folder: str | os.PathLike[str]) -> bool:
    """Whether a run is at work in a folder.

    Where the process that took the lock last was one of this machine and is gone, nothing is asked of the lock: a look
    at it would keep a run that starts in that very moment from taking it.
    """
    lock = FolderLock(folder)
    try:
        told = json.loads(lock.path.read_text())
        if told["host"] == socket.gethostname():
            os.kill(int(told["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError, RecursionError, LookupError, TypeError):
        pass  # another user's process, or nothing is told
    return _is_held(lock.folder)


def _is_held(folder: Path) -> bool:
    """Whether somebody has a folder's lock."""
    if not (folder / LOCK_NAME).is_file():
        return False
    lock = FolderLock(folder)
    try:
        free = lock.try_acquire(shared=True)
    except CannotWrite:
        return True
    lock.release()
    return not free
