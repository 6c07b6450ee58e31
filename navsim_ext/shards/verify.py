"""verify: every byte of a store against what was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from navsim_ext.errors import TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards.errors import CorruptShard, DuplicateToken
from navsim_ext.shards.identity import read_identity
from navsim_ext.shards.names import finished_shards, missing_shards, open_shards
from navsim_ext.shards.records import record_bytes
from navsim_ext.shards.shard import Shard, require_identical

Track = Callable[[Iterable[Path]], Iterable[Path]]
"""Wraps the walk over the shards, for a progress bar."""


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of a verification; ``problems`` is empty for a sound store."""

    folder: Path
    shards: int
    records: int
    data_bytes: int
    identical_duplicates: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def require_ok(self) -> VerifyReport:
        """Raises CorruptShard with all problems, if there are any."""
        if self.problems:
            lines = "\n  ".join(self.problems)
            raise CorruptShard(f"{self.folder}: {len(self.problems)} problems:\n  {lines}")
        return self


def verify(folder: str | os.PathLike[str], *, track: Track = iter) -> VerifyReport:
    """Reads all bytes of a store: identity, headers, indices, checksum of every record, duplicates, missing shards.

    Problems are collected, not raised, so that one run shows all damage. Shards that are not finished (a writer at
    work, or one that was killed) are a problem too: their records are not visible to readers until ``merge``.
    """
    folder = Path(folder)
    problems: list[str] = []
    fingerprint: Fingerprint | None = None
    try:
        fingerprint, parts = read_identity(folder)
        problems += [f"{folder}: shard {name} is missing" for name in missing_shards(folder, parts)]
    except (TriviumError, LookupError) as error:
        problems.append(str(error))
    problems += [f"{shard.data}: is not finished: run merge when no writer is at work" for shard in open_shards(folder)]
    seen: dict[str, tuple[Shard, int]] = {}
    shards = total = duplicates = 0
    for path in track(finished_shards(folder)):
        shards += 1
        if fingerprint is None:
            continue
        try:
            shard = Shard(path, fingerprint)
        except CorruptShard as error:
            problems.append(str(error))
            continue
        for row, token in enumerate(shard.index.tokens):
            try:
                check_record(shard, row)
                if token in seen:
                    require_identical(*seen[token], shard, row)
                    duplicates += 1
            except (CorruptShard, DuplicateToken) as error:
                problems.append(str(error))
            seen.setdefault(token, (shard, row))
        total += shard.index.data_bytes
    return VerifyReport(folder, shards, len(seen), total, duplicates, tuple(problems))


def check_record(shard: Shard, row: int) -> None:
    """Raises CorruptShard when length or bytes of a record are not those of its index."""
    start, stop = shard.span(row)
    expected = record_bytes(shard.index.row_layout(row), shard.index.row_shapes(row))
    if stop - start != expected:
        raise CorruptShard(
            f"{shard.path}: token {shard.index.tokens[row]} takes {stop - start} bytes, its arrays {expected}"
        )
    shard.check(row)
