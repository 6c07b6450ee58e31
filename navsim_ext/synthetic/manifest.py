"""What a build has finished: one JSON line per log, appended by one process, read back after any crash.

A log is finished when its line is complete: its files were put in place before. A torn last line (kill -9 while
writing) is cut off; its log is made again, to the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from navsim_ext.errors import DataError
from navsim_ext.runtime.checksums import checked_line, checked_lines

FILE_NAME = "manifest.jsonl"


@dataclass(frozen=True)
class LogRecord:
    """A finished log."""

    index: int
    name: str
    part: str
    location: str
    kind: str
    tokens: tuple[str, ...]  # of its windows
    attempts: int
    pictures: int
    size: int  # bytes
    sha256: str  # of the log pickle


class Manifest:
    """The finished logs of a folder; ``add`` makes one durable."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.records: dict[int, LogRecord] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, fields in checked_lines(whole, required=False):
            try:
                record = LogRecord(**{**fields, "tokens": tuple(fields["tokens"])})
            except (TypeError, KeyError) as error:
                raise DataError(
                    f"{self.path}, line {number} is damaged or no record of a log ({error}): remove the line, its log "
                    "will be made again"
                ) from None
            self.records[record.index] = record
        if len(whole) < len(content):
            with open(self.path, "r+b") as stream:
                stream.truncate(len(whole))

    def add(self, record: LogRecord) -> None:
        """Appends and syncs a record."""
        with open(self.path, "a") as stream:
            stream.write(checked_line(asdict(record)))
            stream.flush()
            os.fsync(stream.fileno())
        self.records[record.index] = record

    def ordered(self) -> list[LogRecord]:
        return [self.records[index] for index in sorted(self.records)]
