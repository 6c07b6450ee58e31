"""Records and polygon tables in memory, without a folder: for the check of arithmetic, tests and small programs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from navsim_ext.errors import MissingError
from navsim_ext.files import reading
from navsim_ext.pdm.polygon_table import ARRAYS, PolygonTable
from navsim_ext.pdm.record import SceneMetricCache
from navsim_ext.pdm.resident import ResidentScenes


class MemoryMetricCache:
    """Behaves like MetricCache for scoring. ``tables`` are by map location."""

    def __init__(self, records: Mapping[str, SceneMetricCache], tables: Mapping[str, PolygonTable]) -> None:
        self._records = dict(records)
        self._tables = dict(tables)
        self.resident = ResidentScenes(self, max(len(self._records), 1))

    @property
    def tokens(self) -> list[str]:
        return list(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, token: object) -> bool:
        return token in self._records

    def load(self, token: str) -> SceneMetricCache:
        if token not in self._records:
            raise MissingError(self.why_missing(token))
        return self._records[token]

    def why_missing(self, token: str) -> str:
        return f"token {token} is not in the metric cache ({len(self)} scenes)"

    def polygons(self, location: str) -> PolygonTable:
        if location not in self._tables:
            raise MissingError(f"no polygon table of {location}: there are {', '.join(self._tables) or 'none'}")
        return self._tables[location]

    def save(self, path: str | os.PathLike[str], **extra: np.ndarray) -> None:
        """Writes everything, and ``extra`` arrays, into one compressed .npz (no pickles)."""
        arrays = dict(extra)
        for token, record in self._records.items():
            arrays |= {f"record/{token}/{name}": value for name, value in record.to_arrays().items()}
        for location, table in self._tables.items():
            arrays |= {f"table/{location}/{name}": getattr(table, name) for name in ARRAYS}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load_npz(cls, path: str | os.PathLike[str]) -> tuple[MemoryMetricCache, dict[str, np.ndarray]]:
        """The cache and the extra arrays of a file that ``save`` wrote."""
        records: dict[str, dict[str, np.ndarray]] = {}
        tables: dict[str, dict[str, np.ndarray]] = {}
        extra = {}
        with reading(path, "copy it again"), np.load(path, allow_pickle=False) as content:
            for key in content.files:
                kind, _, rest = key.partition("/")
                if kind in ("record", "table"):
                    owner, _, name = rest.rpartition("/")
                    (records if kind == "record" else tables).setdefault(owner, {})[name] = content[key]
                else:
                    extra[key] = content[key]
        return (
            cls(
                {token: SceneMetricCache.from_arrays(token, arrays) for token, arrays in records.items()},
                {location: PolygonTable(**arrays) for location, arrays in tables.items()},
            ),
            extra,
        )
