"""The polygons of one map, stored once and shared by all scenes on it.

Legend: V vertices, R rings, Q polygons. Polygon q has the rings polygon_rings[q] ... polygon_rings[q+1]-1, the first
one is its exterior, the others are holes; ring k has the vertices ring_offsets[k] ... ring_offsets[k+1]-1, closed
(the last vertex repeats the first). Coordinates are global UTM metres, float64.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.files import atomic_stream
from navsim_ext.runtime.checksums import CheckedFiles, seal_folder

# NAVSIM's SemanticMapLayer numbers
LANE, INTERSECTION, LANE_CONNECTOR, CARPARK_AREA, ROADBLOCK = 0, 1, 11, 15, 17


@dataclass(frozen=True, eq=False)
class PolygonTable:
    """Ragged polygons with holes as flat arrays."""

    xy: NDArray[np.float64]  # [V,2]
    ring_offsets: NDArray[np.int64]  # [R+1]
    polygon_rings: NDArray[np.int64]  # [Q+1]
    types: NDArray[np.int8]  # [Q] LANE, INTERSECTION, ...
    ids: NDArray[np.str_]  # [Q] fid of the map layer

    def __len__(self) -> int:
        return len(self.types)

    def rings(self, row: int) -> list[NDArray[np.float64]]:
        """Closed rings of one polygon, exterior first."""
        first, last = self.polygon_rings[row], self.polygon_rings[row + 1]
        return [self.xy[self.ring_offsets[ring] : self.ring_offsets[ring + 1]] for ring in range(first, last)]

    @classmethod
    def from_rings(
        cls, polygons: Sequence[Sequence[NDArray[np.float64]]], types: Sequence[int], ids: Sequence[str]
    ) -> PolygonTable:
        """Builds a table from rings (exterior first); closes open rings.

        Raises DataError naming the polygon when a ring has fewer than three distinct vertices or is not finite.
        """
        rings, counts = [], []
        for polygon, name in zip(polygons, ids):
            counts.append(len(polygon))
            for ring in polygon:
                ring = np.asarray(ring, dtype=np.float64)
                if len(ring) and not np.array_equal(ring[0], ring[-1]):
                    ring = np.concatenate([ring, ring[:1]])
                if len(ring) < 4 or not np.isfinite(ring).all():
                    raise DataError(
                        f"map polygon {name} is degenerate: a ring with {max(len(ring) - 1, 0)} vertices, at least 3 "
                        "finite ones are needed; repair the map"
                    )
                rings.append(ring)
        return cls(
            xy=np.concatenate(rings) if rings else np.zeros((0, 2)),
            ring_offsets=np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]).astype(np.int64),
            polygon_rings=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            types=np.asarray(types, dtype=np.int8),
            ids=np.asarray(ids, dtype=np.str_),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes one .npy per array, each atomically, then their checksums; the same table gives the same bytes."""
        folder = Path(folder)
        for name in ARRAYS:
            with atomic_stream(folder / f"{name}.npy") as stream:
                np.save(stream, getattr(self, name), allow_pickle=False)
        seal_folder(folder, FILES)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PolygonTable:
        """Opens a table as memory maps, after comparing every byte; raises CorruptFile or MissingError.

        The kernels follow the offsets of a table without looking, so nothing unchecked may come this far.
        """
        files = CheckedFiles.sealed(folder, REMEDY)
        paths = {name: files.check(f"{name}.npy") for name in ARRAYS}
        return cls(**{name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()})

    @classmethod
    def is_intact(cls, folder: str | os.PathLike[str]) -> bool:
        """Whether a finished, undamaged table is there."""
        try:
            CheckedFiles.sealed(folder, REMEDY).check_all()
        except TriviumError:
            return False
        return True


ARRAYS = ("xy", "ring_offsets", "polygon_rings", "types", "ids")
FILES = tuple(f"{name}.npy" for name in ARRAYS)
REMEDY = (
    "run the command that built the metric cache again: it keeps the records and writes the maps that are missing or "
    "damaged"
)
