"""Byte offsets of the good lines of a JSONL file, token lengths beside them, bad lines listed with their reason.
A file that is one JSON array is read too; its elements are counted as lines.

The file is read once; the index is stored (atomically) under a key of everything that it depends on: file size and
time, picture folder, tokeniser and picture settings, the length limit. Later runs map it.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.files import atomic_stream
from navsim_ext.fingerprint import digest_json
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.runtime.checksums import CheckedFiles, file_checksums, read_checked_json, write_checked_json
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import map_items
from stage1_vlm.data.mixture import DatasetEntry
from stage1_vlm.data.records import (
    SkipLine,
    elements,
    first_value,
    is_array,
    lines,
    parse_record,
    picture_paths,
    picture_sizes,
)
from stage1_vlm.processor import ChatProcessor, turns_from_conversation

_log = logging.getLogger(__name__)

CHUNK_LINES = 2048
INDEX_VERSION = 4  # 1 had no checksums, 2 no JSON arrays and no pictures without a placeholder, 3 no picture tokens
REMEDY = "the index of the lines is made again"


@dataclass(frozen=True)
class SkippedLine:
    """A line left out: 1-based line number, reason (a word to count by) and detail."""

    dataset: str
    line: int
    reason: str
    detail: str


@dataclass(frozen=True)
class LineIndex:
    """``offsets`` [N] byte positions, ``lengths`` [N] tokens with pictures, ``pictures`` [N] those of the pictures
    alone, of the good lines in file order."""

    entry: DatasetEntry
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    pictures: NDArray[np.int32]
    num_lines: int
    skipped: tuple[SkippedLine, ...]
    array: bool = False  # the file is one JSON array

    def __len__(self) -> int:
        return len(self.offsets)

    def record(self, item: int) -> dict[str, Any]:
        """The item's record; raises DataError when the file is no longer the one that was indexed."""
        with open(self.entry.annotation, "rb") as stream:
            stream.seek(int(self.offsets[item]))
            content = first_value(stream) if self.array else stream.readline()
        try:
            return parse_record(content)
        except SkipLine as skip:
            raise DataError(
                f"{self.entry.annotation}, byte {self.offsets[item]}: {skip}: the file was changed after it was indexed"
            ) from skip

    def reasons(self) -> dict[str, int]:
        return dict(Counter(line.reason for line in self.skipped))


def write_skipped(indices: Sequence[LineIndex], path: Path) -> None:
    """Every line that was left out: one JSON object with dataset, line, reason and detail each."""
    lines = [json.dumps(vars(line)) for index in indices for line in index.skipped]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    if lines:
        _log.warning("%d lines were skipped: %s", len(lines), path)


@dataclass(frozen=True)
class LineRules:
    """What makes a line usable."""

    max_sequence_length: int
    verify_pictures: bool = False


def examine(line: bytes, root: Path, processor: ChatProcessor, rules: LineRules) -> tuple[int, int]:
    """(tokens of the conversation on a line, those of its pictures alone); raises SkipLine when it cannot be used."""
    record = parse_record(line)
    paths = picture_paths(record)
    try:
        turns = turns_from_conversation(record["conversations"])
    except DataError as error:
        raise SkipLine("empty answer" if "empty answer" in str(error) else "malformed record", str(error)) from error
    wanted = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if wanted != len(paths):
        raise SkipLine("picture count", f"{wanted} {IMAGE_PLACEHOLDER} in the text, {len(paths)} pictures")
    sizes = picture_sizes(record, paths, root, rules.verify_pictures)
    try:
        counts = [processor.image_tokens(*size, pictures=len(sizes)) for size in sizes]
    except DataError as error:
        raise SkipLine("picture size", str(error)) from error
    if sum(counts) >= rules.max_sequence_length:
        raise SkipLine("too many image tokens", f"{sum(counts)} of at most {rules.max_sequence_length}")
    try:
        ids, _ = processor.tokenize(turns, counts)
    except DataError as error:
        raise SkipLine("malformed record", str(error)) from error
    if len(ids) > rules.max_sequence_length:
        raise SkipLine("too long", f"{len(ids)} tokens of at most {rules.max_sequence_length}")
    return len(ids), sum(counts)


Chunk = tuple[int, list[tuple[int, bytes]]]


def _chunks(path: Path) -> Iterator[Chunk]:
    """(number of the first, [(byte offset, line)]) of consecutive pieces of a file: of its lines, or of the elements of
    the JSON array that it is."""
    number, chunk = 1, []
    for entry in elements(path) if is_array(path) else lines(path):
        chunk.append(entry)
        if len(chunk) == CHUNK_LINES:
            yield number, chunk
            number, chunk = number + len(chunk), []
    if chunk:
        yield number, chunk


def _examine_chunk(
    chunk: Chunk, name: str, root: Path, processor: ChatProcessor, rules: LineRules
) -> tuple[list[int], list[tuple[int, int]], list[SkippedLine], int]:
    number, entries = chunk
    offsets, lengths, skipped, used = [], [], [], 0
    for offset, line in entries:
        if line.strip():
            used += 1
            try:
                lengths.append(examine(line, root, processor, rules))
                offsets.append(offset)
            except SkipLine as skip:
                skipped.append(SkippedLine(name, number, skip.reason, skip.detail))
        number += 1
    return offsets, lengths, skipped, used


def build_index(
    entry: DatasetEntry,
    processor: ChatProcessor,
    rules: LineRules,
    *,
    cache: Path | None = None,
    workers: int = 0,
    max_skipped_share: float = 0.05,
) -> LineIndex:
    """Reads or builds the index of a data set.

    Raises MissingError when the file is absent; DataError when no line can be used, when more than
    ``max_skipped_share`` of the lines cannot, or when the number of lines is not the mixture's ``length``.
    """
    if not entry.annotation.is_file():
        raise MissingError(f"data set {entry.name!r}: {entry.annotation} does not exist")
    status = entry.annotation.stat()
    key = {
        "version": INDEX_VERSION, "path": str(entry.annotation), "size": status.st_size, "time_ns": status.st_mtime_ns,
        "root": str(entry.root), "processor": processor.fingerprint_fields(), "system": processor.default_system,
        "rules": vars(rules),
    }  # fmt: skip
    plain = re.sub(r"[^\w.-]+", "_", entry.name)[:60]  # the name is of the user's choice, and not of a path
    stored = None if cache is None else cache / f"{plain}-{digest_json(key)[:16]}"
    index = None if stored is None else _load(entry, stored)
    if index is None:
        index = _scan(entry, processor, rules, workers)
        if stored is not None:
            try:
                _store(index, stored, key)
            except OSError as error:
                _log.warning(
                    "the index of %s is not kept, every start reads the file again (%s); set index_folder",
                    entry.name,
                    error,
                )
    if entry.length is not None and entry.length != index.num_lines:
        raise DataError(
            f"data set {entry.name!r}: {entry.annotation} has {index.num_lines} lines, the mixture says length "
            f"{entry.length}: complete the file or correct `length`"
        )
    share = len(index.skipped) / max(1, index.num_lines)
    if not len(index) or share > max_skipped_share:
        first = "; ".join(f"line {s.line}: {s.reason}, {s.detail}" for s in index.skipped[:3])
        raise DataError(
            f"data set {entry.name!r}: {len(index.skipped)} of {index.num_lines} lines cannot be used "
            f"({index.reasons()}); at most {max_skipped_share:.1%} may be skipped. {first}. Repair the data or raise "
            "data.max_skipped_share"
        )
    return index


def _scan(entry: DatasetEntry, processor: ChatProcessor, rules: LineRules, workers: int) -> LineIndex:
    offsets: list[int] = []
    lengths: list[tuple[int, int]] = []
    skipped: list[SkippedLine] = []
    num_lines = 0
    task = partial(_examine_chunk, name=entry.name, root=entry.root, processor=processor, rules=rules)
    kind = "processes" if workers else "sequential"
    results = map_items(task, _chunks(entry.annotation), kind=kind, num_workers=max(workers, 1))
    for some_offsets, some_lengths, some_skipped, used in track(results, f"index {entry.name}"):
        offsets.extend(some_offsets)
        lengths.extend(some_lengths)
        skipped.extend(some_skipped)
        num_lines += used
    whole, pictures = np.asarray(lengths, dtype=np.int32).reshape(-1, 2).T.copy()
    starts = np.asarray(offsets, dtype=np.int64)
    return LineIndex(entry, starts, whole, pictures, num_lines, tuple(skipped), is_array(entry.annotation))


def _table(stored: Path) -> Path:
    """Beside the arrays. Not ``with_suffix``: in "nuscenes-v1.0" that would take the end of the name away."""
    return stored.with_name(f"{stored.name}.json")


def _store(index: LineIndex, stored: Path, key: dict[str, Any]) -> None:
    for name, array in zip(_arrays(stored), (index.offsets, index.lengths, index.pictures), strict=True):
        with atomic_stream(stored.with_name(name)) as stream:
            np.save(stream, array, allow_pickle=False)
    content = {"key": key, "lines": index.num_lines, "skipped": [vars(line) for line in index.skipped]}
    files = file_checksums(stored.parent, _arrays(stored))
    write_checked_json(_table(stored), content | {"files": files})


def _load(entry: DatasetEntry, stored: Path) -> LineIndex | None:
    """The stored index; None where there is none, or a damaged one, or one of an earlier version: it is made again."""
    path = _table(stored)
    if not path.is_file():
        return None
    try:
        content = read_checked_json(path, REMEDY)
        files = CheckedFiles(stored.parent, content["files"], REMEDY)
        arrays = [np.load(files.check(name), mmap_mode="r", allow_pickle=False) for name in _arrays(stored)]
    except (CorruptFile, MissingError) as error:
        _log.warning("%s", error)
        return None
    skipped = tuple(SkippedLine(**line) for line in content["skipped"])
    return LineIndex(entry, *arrays, content["lines"], skipped, is_array(entry.annotation))


def _arrays(stored: Path) -> list[str]:
    """File names of offsets, lengths and picture tokens."""
    return [f"{stored.name}.{name}.npy" for name in ("offsets", "lengths", "pictures")]
