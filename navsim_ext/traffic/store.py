"""TrafficStore: the traffic scenes of a finished build, by id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.shards import ShardStore, ShardWriter, merge
from navsim_ext.shards.store import Check
from navsim_ext.traffic import record
from navsim_ext.traffic.scene import TrafficScene

KIND = "traffic-scenes"


class TrafficStore:
    """Read access by id; usable from DataLoader workers (a pickled store reopens itself).

    Raises MissingError for a folder that is no store, DataError for a store of something else, CorruptShard for a
    damaged one.
    """

    def __init__(self, folder: str | os.PathLike[str], *, check: Check = "first") -> None:
        self.store = ShardStore(folder, check=check)
        self.folder = Path(folder)
        require_kind(self.store.fingerprint, self.folder)

    @property
    def fingerprint(self) -> Fingerprint:
        return self.store.fingerprint

    @property
    def ids(self) -> list[str]:
        """Ids of the scenes, sorted."""
        return self.store.tokens

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, scene_id: object) -> bool:
        return scene_id in self.store

    def __iter__(self) -> Iterator[TrafficScene]:
        return (self.load(scene_id) for scene_id in self.ids)

    def load(self, scene_id: str) -> TrafficScene:
        """The scene of an id; raises MissingError for an unknown one."""
        return record.decode(self.store.get(scene_id), f"{self.folder}, scene {scene_id}")


def require_kind(fingerprint: Fingerprint, folder: Path) -> None:
    """Raises DataError unless a store's fingerprint says that it holds traffic scenes of this version."""
    found = (fingerprint.kind, fingerprint.fields.get("record"))
    if found != (KIND, record.VERSION):
        raise DataError(f"{folder} holds {found[0]} of version {found[1]}; {KIND} of {record.VERSION} was expected")


def write_scenes(folder: str | os.PathLike[str], scenes: Iterator[TrafficScene], fingerprint: Fingerprint) -> int:
    """Stores scenes as a finished store; returns how many. For programs that make scenes; the build command resumes.

    ``fingerprint`` is of kind ``KIND`` (see :func:`fingerprint_of`). Scenes already there by id are left alone.
    """
    require_kind(fingerprint, Path(folder))
    with ShardWriter(folder, fingerprint) as writer:
        for scene in scenes:
            if scene.id not in writer.done:
                writer.put(scene.id, record.encode(scene.validate()))
        count = len(writer.done)
    merge(folder)
    return count


def fingerprint_of(data: dict[str, object]) -> Fingerprint:
    """Fingerprint of a store whose scenes follow from ``data`` (JSON: the identity of their source, or of a run)."""
    return Fingerprint(kind=KIND, fields={"record": record.VERSION, "data": data})
