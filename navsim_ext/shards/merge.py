"""merge: one canonical form of a store, byte-identical however many writers made it and in which order.

Records are sorted by token and cut into parts of ``part_bytes``. All new parts are in place, and written into
``store.json``, before the first old shard goes: a kill at any moment leaves a store that holds every record, some
of them twice with the same bytes, and running ``merge`` again ends it. It needs free space for a second copy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from navsim_ext.errors import MissingError
from navsim_ext.files import atomic_stream, remove_temporaries
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import journal
from navsim_ext.shards.container import HEADER_BYTES, IndexBuilder, pack, read_index
from navsim_ext.shards.errors import CorruptShard, StorageFull
from navsim_ext.shards.identity import STORE_FILE, claim_folder, read_identity, write_identity
from navsim_ext.shards.locks import store_lock, take
from navsim_ext.shards.names import finished_shards, missing_shards, part_name
from navsim_ext.shards.records import Record
from navsim_ext.shards.shard import Shard, require_identical
from navsim_ext.shards.writer import SHARD_BYTES, finish_abandoned

Place = tuple[Shard, int]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; ``parts_written`` is 0 when the store was canonical already."""

    records: int
    data_bytes: int
    identical_duplicates: int
    parts: int
    parts_written: int
    shards_removed: int


@dataclass(frozen=True)
class Part:
    """One shard-to-be of the canonical form."""

    name: str
    places: list[Place]
    header: bytes
    tail: bytes
    num_bytes: int


Parts = Callable[[Iterable[Part]], Iterable[Part]]
"""Wraps the walk over the parts that are written, for a progress bar."""


def merge(
    folder: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]] = (),
    *,
    part_bytes: int = SHARD_BYTES,
    accept_missing: bool = False,
    track: Parts = iter,
) -> MergeReport:
    """Brings a store into its canonical form, taking in the records of other stores (which are left as they are).

    Raises WriterLocked while a writer is at work, CorruptShard when a record that is to be copied fails its checksum,
    DuplicateToken when records of one token differ, FingerprintMismatch for a source of another make, MissingError
    when parts of an earlier merge are gone (unless ``accept_missing``), StorageFull; nothing is removed then.
    """
    folder = Path(folder)
    fingerprint = merged_fingerprint(folder, sources)
    with ExitStack() as stack:
        shards: list[Shard] = []
        for source in dict.fromkeys([folder, *map(Path, sources)]):
            stack.enter_context(take(store_lock(source, "folder"), "merging while writers are at work"))
            own, parts = read_identity(source)
            fingerprint.require_equal(
                own, mine=f"the store in {folder}", theirs=f"that in {source}", remedy="merge only stores of one make"
            )
            finish_abandoned(source, own.digest)
            require_complete(source, missing_shards(source, parts), accept_missing)
            shards += [Shard(path, fingerprint) for path in finished_shards(source)]
        places, duplicates = unique_places(shards)
        plan = plan_parts(places, part_bytes, fingerprint.digest)
        absent = [part for part in plan if not is_written(folder / part.name)]
        require_space(folder, sum(part.num_bytes for part in absent))
        for part in track(absent):
            write_part(folder, part)
        write_identity(folder, parts=[part.name for part in plan])
        kept = {part.name for part in plan}
        old = [path for path in finished_shards(folder) if path.name not in kept]
        journal.sync_folder(folder)
        # the last of each writer first: what is left never has a gap in its numbers, which would look like a loss
        for path in [*reversed(old), *folder.glob("shard-*.journal")]:
            path.unlink()
        remove_temporaries(folder)
        journal.sync_folder(folder)
    total = sum(part.num_bytes for part in plan)
    return MergeReport(len(places), total, duplicates, len(plan), len(absent), len(old))


def merged_fingerprint(folder: Path, sources: Sequence[str | os.PathLike[str]]) -> Fingerprint:
    """The fingerprint of ``folder``; a folder that is no store yet becomes one like the first source."""
    if sources and not (folder / STORE_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        claim_folder(folder, read_identity(Path(sources[0]))[0])
    return read_identity(folder)[0]


def require_complete(folder: Path, missing: list[str], accept_missing: bool) -> None:
    if missing and not accept_missing:
        raise MissingError(
            f"{folder}: {len(missing)} shards are missing: {', '.join(missing[:5])}; restore them, or run the job that "
            "wrote them again, then merge with accept_missing"
        )


def unique_places(shards: Sequence[Shard]) -> tuple[list[Place], int]:
    """One place of each token, sorted by token, and the number of identical further ones."""
    found: dict[str, Place] = {}
    duplicates = 0
    for shard in shards:
        for row, token in enumerate(shard.index.tokens):
            if token in found:
                require_identical(*found[token], shard, row)
                duplicates += 1
            else:
                found[token] = (shard, row)
    return [found[token] for token in sorted(found)], duplicates


def plan_parts(places: Sequence[Place], part_bytes: int, fingerprint_digest: str) -> list[Part]:
    """Cuts the records into parts (each ends with the record that reaches ``part_bytes``); needs no record's bytes."""
    groups: list[tuple[list[Place], IndexBuilder]] = []
    for shard, row in places:
        if not groups or groups[-1][1].data_bytes >= part_bytes:
            groups.append(([], IndexBuilder()))
        members, builder = groups[-1]
        members.append((shard, row))
        builder.add(described(shard, row))
    parts = []
    for number, (members, builder) in enumerate(groups):
        header, tail, digest = pack(builder.build(), fingerprint_digest)
        num_bytes = HEADER_BYTES + builder.data_bytes + len(tail)
        parts.append(Part(part_name(number, len(groups), digest), members, header, tail, num_bytes))
    return parts


def described(shard: Shard, row: int) -> Record:
    """A record without its bytes, from the index."""
    index = shard.index
    start, stop = shard.span(row)
    return Record(
        index.tokens[row],
        index.row_layout(row),
        tuple(index.row_shapes(row)),
        (),
        stop - start,
        int(index.checksums[row]),
    )


def is_written(path: Path) -> bool:
    """Whether a part is there from an earlier, perhaps interrupted merge (a damaged one is written again)."""
    try:
        read_index(path)
    except (FileNotFoundError, CorruptShard):
        return False
    return True


def write_part(folder: Path, part: Part) -> None:
    """Copies the records of a part, each checked, into a new file; the file appears whole or not at all."""
    with atomic_stream(folder / part.name) as stream:
        stream.write(part.header)
        for shard, row in part.places:
            shard.check(row)
            start, stop = shard.span(row)
            stream.write(shard.data[start:stop])
        stream.write(part.tail)


def require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise StorageFull(
            f"{folder}: merging writes {num_bytes:,} bytes before it removes the old shards, {free:,} are free; "
            "free some space, or merge in a folder on a larger disk with this one as source"
        )
