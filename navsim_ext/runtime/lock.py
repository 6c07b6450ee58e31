"""One run per folder: an advisory lock that the operating system drops when its holder dies, kill -9 included."""

from __future__ import annotations

import json
import os
import socket
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from navsim_ext.errors import TriviumError

LOCK_NAME = ".lock"
HOLDER_NAME = ".lock.json"


class FolderBusy(TriviumError):
    """Another process is writing into the folder."""


class FolderLock(AbstractContextManager["FolderLock"]):
    """``with FolderLock(folder):`` creates the folder and holds it; raises FolderBusy naming who has it.

    The lock is flock(2): on network file systems it is as good as their lock service.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __enter__(self) -> FolderLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / LOCK_NAME, timeout=0)
            self._lock.acquire()
        except Timeout:
            holder = self.folder / HOLDER_NAME
            who = holder.read_text().strip() if holder.is_file() else "unknown"
            raise FolderBusy(
                f"{self.folder} is in use by another run ({who}): wait for it, stop it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise TriviumError(
                f"cannot write to {self.folder} ({error.strerror}): choose another output_dir"
            ) from error
        (self.folder / HOLDER_NAME).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
