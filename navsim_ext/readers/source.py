"""What every reader offers (SceneSource), and the record of what a reader had to skip (SkipReport)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.files import write_json_atomic
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.scene import Scene

if TYPE_CHECKING:
    from navsim_ext.maps.vector_map import VectorMap

logger = logging.getLogger(__name__)


class NothingSelected(DataError):
    """The filter, or skipping what was bad, left no scene: 0 samples is never success."""


@runtime_checkable
class SceneSource(Protocol):
    """A set of scenes on disk. Scenes come by token (random access) or by log (each log is opened once)."""

    sensor_root: Path  # camera paths of the scenes are relative to this folder
    scene_filter: SceneFilter
    required_cameras: tuple[str, ...]  # their picture of the frame now exists for every scene
    report: SkipReport

    def __len__(self) -> int: ...

    @property
    def tokens(self) -> list[str]:
        """Tokens of all selected windows, by log name and then by time."""
        ...

    @property
    def log_names(self) -> list[str]:
        """Logs that the filter admits, in alphabetical order."""
        ...

    def scenes_of(self, log_name: str) -> list[Scene]:
        """Selected scenes of one log, by time. The unit of work of anything that can be resumed."""
        ...

    def scene(self, token: str) -> Scene: ...

    def map_for(self, scene: Scene) -> VectorMap: ...

    def require_listed(self, found: Collection[str]) -> None:
        """Raises MissingError when the filter lists a token that is not among ``found`` (unless bad is skipped)."""
        ...

    def logs(self) -> Iterator[tuple[str, list[Scene]]]:
        """(log name, its selected scenes), logs in alphabetical order, one log in memory at a time."""
        ...


@dataclass
class SkipReport:
    """Bad input that was left out because the user asked for it (``skip_bad``); without that, it is raised."""

    skip_bad: bool = False
    path: Path | None = None
    entries: list[dict[str, str | int | None]] = field(default_factory=list)
    _seen: set[tuple[str, int | None, str]] = field(default_factory=set)

    def add(self, error: TriviumError, *, log_name: str, token: str | None = None, frame: int | None = None) -> None:
        """Records ``error``, or raises it when bad input is not to be skipped. The same fault counts once."""
        if not self.skip_bad:
            raise error
        key = (log_name, frame, str(error))
        if key in self._seen:
            return
        self._seen.add(key)
        self.entries.append(
            {"log": log_name, "frame": frame, "token": token, "kind": type(error).__name__, "error": str(error)}
        )
        logger.warning("skipped: %s", error)

    @property
    def counts(self) -> dict[str, int]:
        """Number of entries by kind of error."""
        counts: dict[str, int] = {}
        for entry in self.entries:
            counts[str(entry["kind"])] = counts.get(str(entry["kind"]), 0) + 1
        return counts

    def write(self) -> None:
        """Writes the list to ``path`` (JSON), if one was given. Raises DataError if the folder is unwritable."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.path, {"skipped": len(self.entries), "counts": self.counts, "entries": self.entries})
        except OSError as error:
            raise DataError(f"report {self.path} cannot be written ({error}): choose another folder") from error

    def require_some(self, count: int, what: str) -> None:
        """Raises NothingSelected when ``count`` is 0, naming what was asked and how much was skipped."""
        if count == 0:
            skipped = f"; {len(self.entries)} bad entries were skipped {self.counts}" if self.entries else ""
            listed = f", listed in {self.path}" if self.entries and self.path else ""
            raise NothingSelected(f"{what}: 0 scenes were selected{skipped}{listed}. Check split, filter and data")
