"""ShardStore: records by token, as read-only views of memory-mapped shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from navsim_ext.errors import MissingError
from navsim_ext.shards import records
from navsim_ext.shards.identity import read_identity
from navsim_ext.shards.names import finished_shards, missing_shards, open_shards
from navsim_ext.shards.shard import Shard, require_identical
from navsim_ext.shards.verify import VerifyReport, verify

Check = Literal["first", "always", "never"]


@dataclass(frozen=True)
class StoreStats:
    """What a store holds; sizes in bytes."""

    records: int
    shards: int
    file_bytes: int
    data_bytes: int
    array_bytes: dict[str, int]
    record_bytes_min: int
    record_bytes_mean: float
    record_bytes_max: int
    identical_duplicates: int
    unfinished: tuple[str, ...]


class ShardStore:
    """Read access to the finished shards of a folder; usable from DataLoader workers (a pickled store reopens itself).

    ``check`` says when a record's checksum is compared: at its ``first`` reading in this process (default; 0.13 ms for
    8.5 MB), ``always`` or ``never`` (after a ``verify``).

    Raises MissingError for a folder that is no store or lacks a shard, CorruptShard for a damaged index,
    DuplicateToken when two records of one token differ (identical ones are counted in ``stats``).
    """

    def __init__(self, folder: str | os.PathLike[str], *, check: Check = "first") -> None:
        self.folder = Path(folder)
        self.check: Check = check
        self.fingerprint, parts = read_identity(self.folder)
        missing = missing_shards(self.folder, parts)
        if missing:
            raise MissingError(
                f"{self.folder}: {len(missing)} shards are missing: {', '.join(missing[:5])}; restore them, or run the "
                "job that wrote them again and then merge with accept_missing"
            )
        self.unfinished = tuple(shard.data.name for shard in open_shards(self.folder))
        self.shards = [Shard(path, self.fingerprint) for path in finished_shards(self.folder)]
        self.identical_duplicates = 0
        self._rows = self._locate()

    @property
    def tokens(self) -> list[str]:
        """All tokens, in the order of the shards (sorted after a merge)."""
        return list(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, token: object) -> bool:
        return token in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def get(self, token: str) -> dict[str, np.ndarray]:
        """The arrays of one token: read-only views of the mapped file, valid as long as anything refers to them.

        Raises MissingError for an unknown token, CorruptShard when its bytes fail the check.
        """
        shard, row = self.locate(token)
        if self.check != "never" and (shard.unchecked[row] or self.check == "always"):
            shard.check(row)
        return shard.arrays(row)

    def locate(self, token: str) -> tuple[Shard, int]:
        """The shard that holds the token and its row there."""
        try:
            number, row = self._rows[token]
        except KeyError:
            hint = f"; {len(self.unfinished)} shards are not finished yet: run merge" if self.unfinished else ""
            raise MissingError(f"{self.folder}: no record of token {token!r} among {len(self._rows):,}{hint}") from None
        return self.shards[number], row

    def prefetch(self, tokens: Iterable[str]) -> None:
        """Asks the kernel to read these records ahead; returns at once."""
        for token in tokens:
            shard, row = self.locate(token)
            shard.will_need(row)

    def record_bytes(self, token: str) -> int:
        """Bytes that the record of a token takes in its shard."""
        shard, row = self.locate(token)
        start, stop = shard.span(row)
        return stop - start

    def verify(self) -> VerifyReport:
        """The report of :func:`navsim_ext.shards.verify` on this folder."""
        return verify(self.folder)

    def stats(self) -> StoreStats:
        """Counts and sizes, from the indices alone."""
        arrays: dict[str, int] = {}
        sizes = np.concatenate([np.diff(shard.index.starts) for shard in self.shards] or [np.zeros(0, np.int64)])
        for shard in self.shards:
            for row in range(len(shard.index.tokens)):
                layout, shapes = shard.index.row_layout(row), shard.index.row_shapes(row)
                for name, num_bytes in records.array_bytes(layout, shapes):
                    arrays[name] = arrays.get(name, 0) + num_bytes
        return StoreStats(
            records=len(self),
            shards=len(self.shards),
            file_bytes=sum(shard.path.stat().st_size for shard in self.shards),
            data_bytes=int(sizes.sum()),
            array_bytes=dict(sorted(arrays.items())),
            record_bytes_min=int(sizes.min(initial=np.iinfo(np.int64).max)) if len(sizes) else 0,
            record_bytes_mean=float(sizes.mean()) if len(sizes) else 0.0,
            record_bytes_max=int(sizes.max(initial=0)),
            identical_duplicates=self.identical_duplicates,
            unfinished=self.unfinished,
        )

    def _locate(self) -> dict[str, tuple[int, int]]:
        rows: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self.shards):
            before, tokens = len(rows), shard.index.tokens
            places = dict(zip(tokens, ((number, row) for row in range(len(tokens))), strict=True))
            twice = rows.keys() & places.keys()
            for token in twice:
                first_number, first_row = rows[token]
                require_identical(self.shards[first_number], first_row, shard, places.pop(token)[1])
            rows.update(places)
            self.identical_duplicates += len(tokens) - (len(rows) - before)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "check": self.check}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], check=state["check"])
