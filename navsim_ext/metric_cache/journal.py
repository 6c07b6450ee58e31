"""What became of each log: a journal per writer that survives kill -9, and the one canonical report at the end."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from navsim_ext.files import write_atomic, write_json_atomic

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
    """The outcome of one log."""

    log_name: str
    cached: tuple[str, ...]
    invalid: tuple[Invalid, ...] = field(default=())

    def to_line(self) -> str:
        return json.dumps(asdict(self), sort_keys=True) + "\n"

    @classmethod
    def from_line(cls, line: str) -> LogResult:
        content = json.loads(line)
        invalid = tuple(Invalid(**entry) for entry in content["invalid"])
        return cls(content["log_name"], tuple(content["cached"]), invalid)


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
    """Logs that an earlier run finished, by name. A torn last line and a log whose records are not all ``stored``
    count as not finished."""
    files = [cache / FINISHED_FILE, *sorted((cache / PROGRESS_FOLDER).glob("*.jsonl"))]
    results: dict[str, LogResult] = {}
    for file in files:
        if not file.is_file():
            continue
        for line in file.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue
            result = LogResult.from_line(line)
            if stored.issuperset(result.cached):
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
    write_json_atomic(cache / REPORT_FILE, content)
    write_atomic(cache / FINISHED_FILE, "".join(result.to_line() for result in ordered))
    for file in (cache / PROGRESS_FOLDER).glob("*.jsonl"):
        file.unlink()
    if (cache / PROGRESS_FOLDER).is_dir():
        (cache / PROGRESS_FOLDER).rmdir()
    return content
