"""What became of each log: a journal per writer that survives kill -9, and the one canonical report at the end."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from navsim_ext.files import write_atomic
from navsim_ext.metric_cache.schema import map_folder
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.runtime.checksums import checked_line, checked_lines, write_checked_json

logger = logging.getLogger(__name__)

PROGRESS_FOLDER = "progress"
FINISHED_FILE = "logs.jsonl"
REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Invalid:
    """A scene that could not be cached, or a log that could not be read (token None)."""

    token: str | None
    kind: str  # class of the error
    reason: str


@dataclass(frozen=True)
class LogResult:
    """The outcome of one log; ``maps`` are the names of the polygon tables that its records refer to."""

    log_name: str
    cached: tuple[str, ...]
    invalid: tuple[Invalid, ...] = field(default=())
    maps: tuple[str, ...] = field(default=())

    def to_line(self) -> str:
        return checked_line(asdict(self))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LogResult:
        """From a line of the journal; raises KeyError or TypeError for what an earlier version wrote."""
        invalid = tuple(Invalid(**entry) for entry in content["invalid"])
        return cls(content["log_name"], tuple(content["cached"]), invalid, tuple(content["maps"]))


def append(cache: Path, writer: str, result: LogResult) -> None:
    """Adds a finished log to the writer's journal; when this returns, a kill does not lose it."""
    folder = cache / PROGRESS_FOLDER
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder / f"{writer}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, result.to_line().encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finished_logs(cache: Path, stored: set[str]) -> dict[str, LogResult]:
    """Logs that an earlier run finished, by name.

    A log counts as not finished, and is looked at again, when its line is damaged or cut short, when its records are
    not all ``stored``, or when a map that they refer to is missing or damaged.
    """
    results: dict[str, LogResult] = {}
    intact: dict[str, bool] = {}
    for file in (cache / FINISHED_FILE, *sorted((cache / PROGRESS_FOLDER).glob("*.jsonl"))):
        if not file.is_file():
            continue
        for number, content in checked_lines(file.read_bytes()):
            try:
                result = LogResult.from_json(content or {})
            except (KeyError, TypeError):
                logger.warning("%s, line %d is damaged or of an earlier version: its log is done again", file, number)
                continue
            for name in result.maps:
                if name not in intact:
                    intact[name] = PolygonTable.is_intact(map_folder(cache, name))
            if stored.issuperset(result.cached) and all(intact[name] for name in result.maps):
                results[result.log_name] = result
    return results


def write_report(cache: Path, results: Iterable[LogResult]) -> dict[str, object]:
    """Replaces the journals by their canonical form (sorted by log) and writes ``report.json``; returns its content."""
    ordered = sorted(results, key=lambda result: result.log_name)
    entries = [
        {"log": result.log_name, **asdict(entry)}
        for result in ordered
        for entry in sorted(result.invalid, key=lambda entry: (entry.token or "", entry.kind, entry.reason))
    ]
    content: dict[str, object] = {
        "cached": sum(len(result.cached) for result in ordered),
        "invalid": len(entries),
        "counts": dict(sorted(Counter(str(entry["kind"]) for entry in entries).items())),
        "entries": entries,
    }
    write_checked_json(cache / REPORT_FILE, content)
    write_atomic(cache / FINISHED_FILE, "".join(result.to_line() for result in ordered))
    for file in (cache / PROGRESS_FOLDER).glob("*.jsonl"):
        file.unlink()
    if (cache / PROGRESS_FOLDER).is_dir():
        (cache / PROGRESS_FOLDER).rmdir()
    return content
