"""The names of the files in a store's folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from navsim_ext.errors import DataError

WRITER_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
SHARD_PATTERN = re.compile(r"shard-(?P<writer>[A-Za-z0-9_.-]{1,64})-(?P<number>\d{6})\.safetensors")
PART_PATTERN = re.compile(r"part-(?P<number>\d{6})-of-(?P<count>\d{6})-(?P<digest>[0-9a-f]{12})\.safetensors")
OPEN_PATTERN = re.compile(r"shard-(?P<writer>[A-Za-z0-9_.-]{1,64})-(?P<number>\d{6})\.open")


@dataclass(frozen=True)
class OpenShard:
    """A shard that is being written, or was when its process ended: records in ``data``, their index in ``journal``."""

    folder: Path
    writer: str
    number: int

    @property
    def data(self) -> Path:
        return self.folder / f"shard-{self.writer}-{self.number:06d}.open"

    @property
    def journal(self) -> Path:
        return self.folder / f"shard-{self.writer}-{self.number:06d}.journal"

    @property
    def finished(self) -> Path:
        return self.folder / f"shard-{self.writer}-{self.number:06d}.safetensors"


def check_writer(writer: str) -> str:
    if not WRITER_PATTERN.fullmatch(writer):
        raise DataError(f"writer id {writer!r}: use 1 to 64 letters, digits, '_', '.' or '-'")
    return writer


def finished_shards(folder: Path) -> list[Path]:
    """All finished shards of a folder, in the order of their names."""
    names = (path.name for path in folder.glob("*.safetensors"))
    return [folder / name for name in sorted(names) if SHARD_PATTERN.fullmatch(name) or PART_PATTERN.fullmatch(name)]


def open_shards(folder: Path) -> list[OpenShard]:
    """All shards that are being written or were left by a process that ended."""
    found = (OPEN_PATTERN.fullmatch(path.name) for path in sorted(folder.glob("*.open")))
    return [OpenShard(folder, match["writer"], int(match["number"])) for match in found if match]


def free_number(folder: Path, writer: str) -> int:
    """The lowest number that this writer has no finished shard of: a damaged shard that was deleted is made again."""
    numbers = (SHARD_PATTERN.fullmatch(path.name) for path in finished_shards(folder))
    used = {int(match["number"]) for match in numbers if match and match["writer"] == writer}
    return next(number for number in range(len(used) + 1) if number not in used)


def part_name(number: int, count: int, digest: str) -> str:
    """Name of a part of a merged store; it holds the digest, so a part never takes the place of another content."""
    return f"part-{number:06d}-of-{count:06d}-{digest[:12]}.safetensors"


def missing_shards(folder: Path, parts: list[str]) -> list[str]:
    """Names of shards that should be there: parts of the last merge, and gaps in a writer's numbers."""
    present = {path.name for path in finished_shards(folder)}
    numbers: dict[str, set[int]] = {}
    for name in present:
        if match := SHARD_PATTERN.fullmatch(name):
            numbers.setdefault(match["writer"], set()).add(int(match["number"]))
    gaps = [
        f"shard-{writer}-{number:06d}.safetensors"
        for writer, seen in sorted(numbers.items())
        for number in sorted(set(range(max(seen))) - seen)
    ]
    return [name for name in parts if name not in present] + gaps
