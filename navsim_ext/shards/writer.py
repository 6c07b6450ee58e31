"""ShardWriter: stores records so that what was acknowledged survives kill -9 at any moment."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from navsim_ext.errors import TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import journal, records
from navsim_ext.shards.container import HEADER_BYTES, IndexBuilder, read_index
from navsim_ext.shards.errors import DuplicateToken, ShardError, StorageFull
from navsim_ext.shards.identity import claim_folder
from navsim_ext.shards.locks import store_lock, take
from navsim_ext.shards.names import OpenShard, check_writer, finished_shards, free_number, open_shards

SHARD_BYTES = 1 << 30  # a shard is finished at the first record that reaches this
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardWriter:
    """Appends records to ``folder``; one process (or thread) per writer id, any number of writer ids at once.

    ``done`` holds all tokens already stored in the folder, by any writer, when this one started, and its own since.
    Shards that ended processes left open are finished first, so a restart with fewer writers loses nothing.

    Raises FingerprintMismatch when the folder holds something else, WriterLocked when the writer id is in use,
    CorruptShard when a finished shard is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Fingerprint,
        *,
        writer: str = "0",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.writer = check_writer(writer)
        self.shard_bytes = shard_bytes
        self.done: set[str] = set()
        self._process = os.getpid()
        self._shard: OpenShard | None = None
        self._builder = IndexBuilder()
        self._data = self._journal = -1
        self._journal_bytes = 0
        self._digest = fingerprint.digest
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sharing = store_lock(self.folder, "folder")
        self._own = store_lock(self.folder, f"writer-{writer}")
        start = store_lock(self.folder, "start")
        start.try_acquire(wait=True)
        try:
            take(self._sharing, "writing while the folder is merged", shared=True)
            take(self._own, f"a second process under writer id {writer!r} (give each process its own)")
            claim_folder(self.folder, fingerprint)
            finish_abandoned(self.folder, self._digest, except_writer=self.writer)
            self._resume()
        except TriviumError:
            self._unlock()
            raise
        finally:
            start.release()

    def put(self, token: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Stores one record; when this returns, a kill -9 does not lose it.

        Raises DuplicateToken for a token in ``done``, DataError for arrays that cannot be stored, StorageFull when
        the disk is full (the record is not stored, all before it are; ``put`` may be called again).
        """
        if self._own.released or os.getpid() != self._process:
            raise ShardError(
                f"{self.folder}: writer {self.writer!r} is closed or was opened by process {self._process}, not by "
                f"{os.getpid()}: open one writer with its own id in each process"
            )
        if token in self.done:
            raise DuplicateToken(f"{self.folder}: token {token} is stored already; skip the tokens in writer.done")
        record = records.encode(token, arrays)
        with self._full_disk_named(record.num_bytes):
            if self._shard is None:
                self._open(OpenShard(self.folder, self.writer, free_number(self.folder, self.writer)))
            line = journal.line(record)
            try:
                write_all(self._data, record.pieces, HEADER_BYTES + self._builder.data_bytes)
                write_all(self._journal, (line,), self._journal_bytes)
            except OSError:
                os.ftruncate(self._journal, self._journal_bytes)
                os.ftruncate(self._data, HEADER_BYTES + self._builder.data_bytes)
                raise
        self._journal_bytes += len(line)
        self._builder.add(record)
        self.done.add(token)
        if self._builder.data_bytes >= self.shard_bytes:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Makes the open shard, if any, a finished one: synced to disk and visible to readers."""
        if self._shard is None:
            return
        with self._full_disk_named(4096 + 256 * len(self._builder.tokens)):
            journal.finish(self._shard, self._builder, self._digest)
        self._close_files()

    def close(self) -> None:
        """Finishes the open shard and frees the writer id; closing twice is harmless."""
        if not self._own.released:
            try:
                self.finish_shard()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Frees the writer id but leaves the open shard as it is, for the next writer or merge to finish."""
        self._close_files()
        self._unlock()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def _resume(self) -> None:
        """Reads what is stored already, and goes on with this writer's own open shard."""
        for path in finished_shards(self.folder):
            self.done.update(read_index(path)[0].tokens)
        for shard in open_shards(self.folder):
            if shard.writer != self.writer:
                self.done.update(journal.acknowledged(shard))
            elif shard.finished.exists() or self._shard is not None:
                raise ShardError(f"{shard.data}: left over beside a finished shard; move it away and start again")
            else:
                with self._full_disk_named(0):
                    self._open(shard)
                self.done.update(self._builder.tokens)

    def _open(self, shard: OpenShard) -> None:
        self._data = os.open(shard.data, os.O_RDWR | os.O_CREAT, 0o666)
        self._journal = os.open(shard.journal, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(self._data).st_size < HEADER_BYTES:
                write_all(self._data, (bytes(HEADER_BYTES),), 0)
            self._builder = journal.recover(shard)
        except OSError:
            self._close_files()
            raise
        self._journal_bytes = os.fstat(self._journal).st_size
        self._shard = shard

    def _close_files(self) -> None:
        for descriptor in (self._data, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._journal = -1
        self._shard = None
        self._builder = IndexBuilder()

    def _unlock(self) -> None:
        self._own.release()
        self._sharing.release()

    @contextmanager
    def _full_disk_named(self, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            free = shutil.disk_usage(self.folder).free
            raise StorageFull(
                f"{self.folder}: no room for {num_bytes:,} bytes ({free:,} free, {error.strerror}); {len(self.done):,} "
                "records are kept: free some space and run the same command again, it goes on from there"
            ) from error


def finish_abandoned(folder: Path, fingerprint_digest: str, *, except_writer: str | None = None) -> list[Path]:
    """Finishes the open shards of writers that have ended, however they ended; returns the new finished shards."""
    finished = []
    for shard in open_shards(folder):
        lock = store_lock(folder, f"writer-{shard.writer}")
        if shard.writer == except_writer or not lock.try_acquire():
            continue
        with lock:
            journal.finish(shard, journal.recover(shard), fingerprint_digest)
            if shard.finished.exists():
                finished.append(shard.finished)
    return finished


def write_all(descriptor: int, pieces: tuple[memoryview | bytes, ...], position: int) -> None:
    """Writes the buffers at a file position, going on after short writes (a full disk shows as one first)."""
    remaining = [memoryview(piece) for piece in pieces if len(piece)]
    while remaining:
        written = os.pwritev(descriptor, remaining[:512], position)
        position += written
        while written:
            if written >= len(remaining[0]):
                written -= len(remaining.pop(0))
            else:
                remaining[0] = remaining[0][written:]
                written = 0
