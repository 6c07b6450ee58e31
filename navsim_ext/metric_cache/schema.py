"""A metric cache on disk: its identity, its folder, and how a finished one is opened.

Records (:class:`navsim_ext.pdm.record.SceneMetricCache`) lie in shards; the polygons of a map lie once beside them, in
``maps/<location>``.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.record import SceneMetricCache
from navsim_ext.pdm.resident import ResidentScenes
from navsim_ext.pdm.version import scorer_fields
from navsim_ext.runtime.checksums import read_checked_json
from navsim_ext.shards import ShardStore

KIND = "metric_cache"  # Fingerprint.kind of a metric cache
SCHEMA_VERSION = 2  # 2: vehicles on their lanes, for reactive traffic
READABLE_SCHEMAS = (1, 2)  # 1 scores with log replay; reactive traffic refuses its scenes and says why
REPORT_FILE = "report.json"  # the builder's: what could not be cached, and why
MAPS_FOLDER = "maps"  # inside the cache folder: one PolygonTable per map location


class MetricCacheMismatch(TriviumError):
    """The cache was made by another schema or scorer version than this program's, or from other maps."""


def cache_fields() -> dict[str, Any]:
    """Fingerprint fields that every metric cache must carry (a builder adds data set, split and options)."""
    return {"schema": SCHEMA_VERSION, "scorer": scorer_fields()}


class MetricCache:
    """A finished metric cache, opened for scoring: ``load`` costs microseconds, maps are opened once per process.

    ``resident`` is how many scenes stay prepared for the scorer between calls (least recently used go first). A pickled
    cache reopens itself, so it may be handed to DataLoader workers.
    Raises MetricCacheMismatch when schema or scorer version differ from this program's.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resident: int = 256) -> None:
        self.folder = Path(folder)
        self.store = ShardStore(self.folder)
        self.fingerprint: Fingerprint = self.store.fingerprint
        require_current(self.fingerprint, str(self.folder))
        self._maps: dict[str, PolygonTable] = {}
        self._lock = threading.Lock()  # guards the maps
        self.resident = ResidentScenes(self, resident)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.folder), self.resident.capacity)

    @property
    def tokens(self) -> Sequence[str]:
        return self.store.tokens

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, token: object) -> bool:
        return token in self.store

    def load(self, token: str) -> SceneMetricCache:
        """The record of a token, as views of the memory map; raises MissingError saying why there is none."""
        if token not in self.store:
            raise MissingError(f"{self.folder}: {self.why_missing(token)}")
        return SceneMetricCache.from_arrays(token, self.store.get(token))

    def why_missing(self, token: str) -> str:
        """Why a token has no record: the builder's reason where it reported one."""
        reason = self._invalid.get(token)
        if reason is not None:
            return f"token {token} could not be cached: {reason}"
        return f"token {token} is not in the metric cache ({len(self)} scenes)"

    def polygons(self, location: str) -> PolygonTable:
        """The polygon table of a map location, opened on first use."""
        with self._lock:
            table = self._maps.get(location)
            if table is None:
                table = self._maps[location] = PolygonTable.load(map_folder(self.folder, location))
        return table

    @functools.cached_property
    def _invalid(self) -> dict[str, str]:
        """token -> reason, from the builder's report."""
        path = self.folder / REPORT_FILE
        if not path.is_file():
            return {}
        remedy = "run the command that built the metric cache again: it keeps the records and writes the report anew"
        entries = read_checked_json(path, remedy)["entries"]
        return {entry["token"]: f"{entry['kind']}: {entry['reason']}" for entry in entries if entry["token"]}


def _reopen(folder: str, resident: int) -> MetricCache:
    return MetricCache(folder, resident=resident)


def map_folder(cache: str | os.PathLike[str], location: str) -> Path:
    """Where a cache folder keeps the polygon table of a location."""
    return Path(cache) / MAPS_FOLDER / quote(location, safe="")


def require_current(fingerprint: Fingerprint, where: str) -> None:
    """Raises MetricCacheMismatch unless kind and scorer of a cache are this program's and its schema is readable."""
    mine = {"kind": KIND, **cache_fields()}
    if fingerprint.fields.get("schema") in READABLE_SCHEMAS:
        mine["schema"] = fingerprint.fields["schema"]
    theirs = {"kind": fingerprint.kind, **{key: fingerprint.fields.get(key) for key in cache_fields()}}
    wrong = [f"{key}: cache {theirs[key]!r}, this program {mine[key]!r}" for key in mine if mine[key] != theirs[key]]
    if wrong:
        raise MetricCacheMismatch(
            f"the metric cache {where} does not fit this scorer:\n  " + "\n  ".join(wrong) + "\nbuild the cache again"
        )
