"""Byte offsets of the good lines of a JSONL file, token lengths beside them, bad lines listed with their reason.

The file is read once; the index is stored (atomically) under a key of everything that it depends on: file size and
time, picture folder, tokeniser and picture settings, the length limit. Later runs map it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.files import atomic_stream
from navsim_ext.fingerprint import digest_json
from navsim_ext.prompts import IMAGE_PLACEHOLDER
from navsim_ext.runtime.checksums import CheckedFiles, file_checksums, read_checked_json, write_checked_json
from navsim_ext.runtime.progress import track
from navsim_ext.runtime.workers import map_items
from stage1_vlm.data.mixture import DatasetEntry
from stage1_vlm.processor import ChatProcessor, turns_from_conversation

_log = logging.getLogger(__name__)

CHUNK_LINES = 2048
INDEX_VERSION = 2  # 1 had no checksums
REMEDY = "the index of the lines is made again"


class SkipLine(Exception):
    """One line cannot be used; ``reason`` is a short class of failure, ``detail`` says what exactly."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class SkippedLine:
    """A line left out: 1-based line number, reason (a word to count by) and detail."""

    dataset: str
    line: int
    reason: str
    detail: str


@dataclass(frozen=True)
class LineIndex:
    """``offsets`` [N] byte positions, ``lengths`` [N] tokens with pictures, of the good lines in file order."""

    entry: DatasetEntry
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int32]
    num_lines: int
    skipped: tuple[SkippedLine, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def record(self, item: int) -> dict[str, Any]:
        with open(self.entry.annotation, "rb") as stream:
            stream.seek(int(self.offsets[item]))
            return json.loads(stream.readline())

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


def picture_paths(record: dict[str, Any]) -> list[str]:
    """``image`` is absent, a path, or a list of paths."""
    image = record.get("image")
    if image is None or image == "":
        return []
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise SkipLine("malformed record", f"image is {image!r}")
    return paths


def picture_sizes(record: dict[str, Any], paths: list[str], root: Path, verify: bool) -> list[tuple[int, int]]:
    """(width, height) of each picture, from ``image_size`` where it is given, else from the file's header."""
    stated = record.get("image_size")
    sizes = [stated] if len(paths) == 1 and stated and isinstance(stated[0], int) else stated
    if sizes is not None and (len(sizes) != len(paths) or any(len(size) != 2 or min(size) < 1 for size in sizes)):
        raise SkipLine("malformed record", f"image_size {stated!r} for {len(paths)} pictures")
    found = []
    for position, path in enumerate(paths):
        if not (root / path).is_file():
            raise SkipLine("missing picture", str(root / path))
        if sizes is not None and not verify:
            found.append(tuple(sizes[position]))
            continue
        try:
            with Image.open(root / path) as picture:
                found.append(picture.size)
                if verify:
                    picture.load()
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise SkipLine("unreadable picture", f"{root / path}: {error}") from error
        if sizes is not None and tuple(sizes[position]) != found[-1]:
            raise SkipLine("wrong image_size", f"{root / path} is {found[-1]}, the line says {sizes[position]}")
    return found


def examine(line: bytes, root: Path, processor: ChatProcessor, rules: LineRules) -> int:
    """Tokens of the conversation on a line; raises SkipLine when it cannot be used."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SkipLine("broken line", str(error)) from error
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise SkipLine("malformed record", "an object with a list `conversations` was expected")
    paths = picture_paths(record)
    try:
        turns = turns_from_conversation(record["conversations"])
    except DataError as error:
        raise SkipLine("empty answer" if "empty answer" in str(error) else "malformed record", str(error)) from error
    wanted = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if wanted != len(paths):
        raise SkipLine("picture count", f"{wanted} {IMAGE_PLACEHOLDER} in the text, {len(paths)} pictures")
    sizes = picture_sizes(record, paths, root, rules.verify_pictures)
    counts = [processor.image_tokens(*size, pictures=len(sizes)) for size in sizes]
    if sum(counts) >= rules.max_sequence_length:
        raise SkipLine("too many image tokens", f"{sum(counts)} of at most {rules.max_sequence_length}")
    try:
        ids, _ = processor.tokenize(turns, counts)
    except DataError as error:
        raise SkipLine("malformed record", str(error)) from error
    if len(ids) > rules.max_sequence_length:
        raise SkipLine("too long", f"{len(ids)} tokens of at most {rules.max_sequence_length}")
    return len(ids)


def _chunks(path: Path) -> Iterator[tuple[int, int, list[bytes]]]:
    """(first line number, byte offset, lines) of consecutive pieces of a file."""
    with open(path, "rb") as stream:
        number, offset, lines, size = 1, 0, [], 0
        for line in stream:
            lines.append(line)
            size += len(line)
            if len(lines) == CHUNK_LINES:
                yield number, offset, lines
                number, offset, lines, size = number + len(lines), offset + size, [], 0
        if lines:
            yield number, offset, lines


def _examine_chunk(
    chunk: tuple[int, int, list[bytes]], name: str, root: Path, processor: ChatProcessor, rules: LineRules
) -> tuple[list[int], list[int], list[SkippedLine], int]:
    number, offset, lines = chunk
    offsets, lengths, skipped, used = [], [], [], 0
    for line in lines:
        if line.strip():
            used += 1
            try:
                lengths.append(examine(line, root, processor, rules))
                offsets.append(offset)
            except SkipLine as skip:
                skipped.append(SkippedLine(name, number, skip.reason, skip.detail))
        number += 1
        offset += len(line)
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
    stored = None if cache is None else cache / f"{entry.name}-{digest_json(key)[:16]}"
    index = None if stored is None else _load(entry, stored)
    if index is None:
        index = _scan(entry, processor, rules, workers)
        if stored is not None:
            _store(index, stored, key)
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
    lengths: list[int] = []
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
    arrays = np.asarray(offsets, dtype=np.int64), np.asarray(lengths, dtype=np.int32)
    return LineIndex(entry, *arrays, num_lines, tuple(skipped))


def _store(index: LineIndex, stored: Path, key: dict[str, Any]) -> None:
    for name, array in zip(_arrays(stored), (index.offsets, index.lengths), strict=True):
        with atomic_stream(stored.with_name(name)) as stream:
            np.save(stream, array, allow_pickle=False)
    content = {"key": key, "lines": index.num_lines, "skipped": [vars(line) for line in index.skipped]}
    files = file_checksums(stored.parent, _arrays(stored))
    write_checked_json(stored.with_suffix(".json"), content | {"files": files})


def _load(entry: DatasetEntry, stored: Path) -> LineIndex | None:
    """The stored index; None where there is none, or a damaged one, or one of an earlier version: it is made again."""
    path = stored.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        content = read_checked_json(path, REMEDY)
        files = CheckedFiles(stored.parent, content["files"], REMEDY)
        arrays = [np.load(files.check(name), mmap_mode="r", allow_pickle=False) for name in _arrays(stored)]
    except (CorruptFile, MissingError) as error:
        _log.warning("%s", error)
        return None
    return LineIndex(entry, *arrays, content["lines"], tuple(SkippedLine(**line) for line in content["skipped"]))


def _arrays(stored: Path) -> list[str]:
    """File names of offsets and lengths."""
    return [f"{stored.name}.{name}.npy" for name in ("offsets", "lengths")]
