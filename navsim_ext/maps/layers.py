"""Layers of a vector map as plain ragged arrays: polygons with holes, polylines, and lanes that have both.

Legend: N features of a layer, R rings, V vertices, P baseline poses. Coordinates are global metres (float64),
headings radians, speeds m/s. Feature ids ("fids") are strings, unique within a layer; the order of a layer is
the order of its fids in the source, and it decides ties in several places, so it is kept as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError, MissingError

NONE = -1  # index of something that is not there


def string_array(values: Sequence[str]) -> NDArray[np.str_]:
    """Unicode array of ids; never of object dtype, so that it can be stored without pickles."""
    return np.array([str(value) for value in values], dtype=np.str_) if len(values) else np.empty(0, dtype="<U1")


def offsets_of(counts: ArrayLike) -> NDArray[np.int64]:
    """[n+1] start offsets of ragged rows with the given lengths [n]."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))]).astype(np.int64)


def polyline_headings(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """[P] heading of each vertex of a polyline [P,2]: atan2 of the segment that starts there, the last one repeated."""
    if len(xy) < 2:
        raise DataError(f"a polyline of {len(xy)} vertices has no direction; two or more are needed")
    step = np.diff(xy, axis=0)
    heading = np.arctan2(step[:, 1], step[:, 0])
    return np.append(heading, heading[-1])


@dataclass(frozen=True)
class FeatureLayer:
    """What every layer has: ids in source order."""

    fids: NDArray[np.str_]  # [N]

    def __len__(self) -> int:
        return len(self.fids)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position in the layer by fid."""
        return {fid: position for position, fid in enumerate(self.fids.tolist())}

    def index_of(self, fid: str) -> int:
        """Position of a feature; raises MissingError for an unknown fid."""
        try:
            return self.index[fid]
        except KeyError:
            raise MissingError(
                f"{type(self).__name__} of {len(self)} features has no fid {fid!r}: do log and map belong together?"
            ) from None


@dataclass(frozen=True)
class PolygonLayer(FeatureLayer):
    """Polygons with holes (and parts). Feature i owns rings ``polygon_offsets[i]:polygon_offsets[i+1]``.

    Each part is an exterior ring followed by its holes. Rings are closed (last vertex = first).
    """

    xy: NDArray[np.float64]  # [V,2]
    ring_offsets: NDArray[np.int64]  # [R+1] into xy
    ring_is_hole: NDArray[np.bool_]  # [R]
    polygon_offsets: NDArray[np.int64]  # [N+1] into rings

    @classmethod
    def from_rings(cls, fids: Sequence[str], polygons: Sequence[Sequence[ArrayLike]], **extra) -> PolygonLayer:
        """``polygons[i]`` = [exterior, hole, hole, ...], each ring [n,2] (closed here if it is not)."""
        rings = [[np.asarray(ring, dtype=np.float64).reshape(-1, 2) for ring in polygon] for polygon in polygons]
        closed = [
            ring if np.array_equal(ring[0], ring[-1]) else np.concatenate([ring, ring[:1]])
            for polygon in rings
            for ring in polygon
        ]
        return cls(
            fids=string_array(fids),
            xy=np.concatenate(closed) if closed else np.empty((0, 2)),
            ring_offsets=offsets_of([len(ring) for ring in closed]),
            ring_is_hole=np.array([k > 0 for polygon in rings for k in range(len(polygon))], dtype=bool),
            polygon_offsets=offsets_of([len(polygon) for polygon in rings]),
            **extra,
        ).validate()

    @classmethod
    def from_shapely(cls, fids: Sequence[str], geometries: Sequence[shapely.Geometry], **extra) -> PolygonLayer:
        """Polygons and MultiPolygons; raises DataError for any other or an empty geometry, naming its fid."""
        rings: list[NDArray[np.float64]] = []
        hole: list[bool] = []
        counts: list[int] = []
        for fid, geometry in zip(fids, geometries, strict=True):
            if geometry is None or geometry.is_empty or geometry.geom_type not in ("Polygon", "MultiPolygon"):
                kind = "nothing" if geometry is None or geometry.is_empty else geometry.geom_type
                raise DataError(f"map feature {fid} is {kind}; a polygon was expected")
            before = len(rings)
            for part in shapely.get_parts(geometry):
                rings.append(shapely.get_coordinates(part.exterior))
                hole.append(False)
                for interior in part.interiors:
                    rings.append(shapely.get_coordinates(interior))
                    hole.append(True)
            counts.append(len(rings) - before)
        return cls(
            fids=string_array(fids),
            xy=np.concatenate(rings) if rings else np.empty((0, 2)),
            ring_offsets=offsets_of([len(ring) for ring in rings]),
            ring_is_hole=np.array(hole, dtype=bool),
            polygon_offsets=offsets_of(counts),
            **extra,
        ).validate()

    @classmethod
    def empty(cls) -> PolygonLayer:
        return cls.from_rings([], [])

    def rings_of(self, position: int) -> list[tuple[NDArray[np.float64], bool]]:
        """[(vertices [n,2], is_hole), ...] of one feature."""
        span = range(self.polygon_offsets[position], self.polygon_offsets[position + 1])
        return [(self.xy[self.ring_offsets[r] : self.ring_offsets[r + 1]], bool(self.ring_is_hole[r])) for r in span]

    @cached_property
    def polygons(self) -> NDArray[np.object_]:
        """[N] shapely polygons (MultiPolygon for features of several parts)."""
        if not len(self):
            return np.empty(0, dtype=object)
        ring_count = len(self.ring_is_hole)
        rings = shapely.linearrings(self.xy, indices=np.repeat(np.arange(ring_count), np.diff(self.ring_offsets)))
        part_of_ring = np.cumsum(~self.ring_is_hole) - 1
        parts = shapely.polygons(rings, indices=part_of_ring)
        feature_of_ring = np.repeat(np.arange(len(self)), np.diff(self.polygon_offsets))
        feature_of_part = feature_of_ring[~self.ring_is_hole]
        first = np.searchsorted(feature_of_part, np.arange(len(self)))
        built = parts[first]
        for position in np.flatnonzero(np.bincount(feature_of_part, minlength=len(self)) > 1):
            built[position] = shapely.MultiPolygon(list(parts[feature_of_part == position]))
        return built

    @cached_property
    def tree(self) -> shapely.STRtree:
        return shapely.STRtree(self.polygons)

    def query(self, geometry: shapely.Geometry, predicate: str = "intersects") -> NDArray[np.int64]:
        """Positions of the features for which ``predicate(geometry, feature)`` holds, in layer order."""
        return np.sort(self.tree.query(geometry, predicate=predicate)).astype(np.int64)

    def validate(self) -> PolygonLayer:
        """Returns self; raises DataError for an open or too short ring, bad offsets or a vertex that is not finite."""
        rings = len(self.ring_offsets) - 1
        if not (
            len(self.polygon_offsets) == len(self) + 1
            and self.polygon_offsets[-1] == rings == len(self.ring_is_hole)
            and self.ring_offsets[-1] == len(self.xy)
        ):
            raise DataError(
                f"ragged offsets do not fit: {len(self)} fids, {rings} rings, {len(self.xy)} vertices, "
                f"offsets end at {self.polygon_offsets[-1]} rings and {self.ring_offsets[-1]} vertices"
            )
        if not np.isfinite(self.xy).all():
            raise DataError(f"map feature {self._owner(~np.isfinite(self.xy).all(axis=1))} has a vertex not finite")
        if rings:
            if (np.diff(self.ring_offsets) < 4).any():
                ring = int(np.argmax(np.diff(self.ring_offsets) < 4))
                fid = self.fids[np.searchsorted(self.polygon_offsets, ring, side="right") - 1]
                raise DataError(f"map feature {fid} has a ring of fewer than 3 different vertices")
            open_ring = (self.xy[self.ring_offsets[:-1]] != self.xy[self.ring_offsets[1:] - 1]).any(axis=1)
            if open_ring.any():
                ring = int(np.argmax(open_ring))
                fid = self.fids[np.searchsorted(self.polygon_offsets, ring, side="right") - 1]
                raise DataError(f"map feature {fid} has an open ring: its last vertex must repeat the first")
            if self.ring_is_hole[self.polygon_offsets[:-1][np.diff(self.polygon_offsets) > 0]].any():
                raise DataError("a polygon begins with a hole; the exterior ring comes first")
        return self

    def _owner(self, bad_vertex: NDArray[np.bool_]) -> str:
        ring = int(np.searchsorted(self.ring_offsets, int(np.argmax(bad_vertex)), side="right") - 1)
        return str(self.fids[np.searchsorted(self.polygon_offsets, ring, side="right") - 1])


@dataclass(frozen=True)
class LineLayer(FeatureLayer):
    """Polylines: line i = ``xy[offsets[i]:offsets[i+1]]``."""

    xy: NDArray[np.float64]  # [V,2]
    offsets: NDArray[np.int64]  # [N+1]

    @classmethod
    def from_lines(cls, fids: Sequence[str], lines: Sequence[ArrayLike]) -> LineLayer:
        """``lines[i]`` is [n,2]."""
        arrays = [np.asarray(line, dtype=np.float64).reshape(-1, 2) for line in lines]
        xy = np.concatenate(arrays) if arrays else np.empty((0, 2))
        return cls(string_array(fids), xy, offsets_of([len(line) for line in arrays]))

    def line(self, position: int) -> NDArray[np.float64]:
        """[n,2] vertices of one line."""
        return self.xy[self.offsets[position] : self.offsets[position + 1]]


@dataclass(frozen=True)
class LaneLayer(PolygonLayer):
    """Lanes, or lane connectors: a polygon, a baseline, the roadblock it belongs to, and what is known about it."""

    baseline: NDArray[np.float64]  # [P,3] x, y, heading along the direction of travel
    baseline_offsets: NDArray[np.int64]  # [N+1]
    roadblock: NDArray[np.int64]  # [N] position in roadblocks (lanes) or roadblock_connectors (connectors), -1 = none
    speed_limit: NDArray[np.float64]  # [N] m/s, NaN = unknown
    left_boundary: NDArray[np.int64]  # [N] position in boundaries, -1 = unknown
    right_boundary: NDArray[np.int64]  # [N]

    @classmethod
    def from_arrays(
        cls,
        fids: Sequence[str],
        polygons: Sequence[Sequence[ArrayLike]],
        baselines: Sequence[ArrayLike],
        roadblock: ArrayLike,
        speed_limit: ArrayLike | None = None,
        left_boundary: ArrayLike | None = None,
        right_boundary: ArrayLike | None = None,
    ) -> LaneLayer:
        """``polygons`` as in :meth:`PolygonLayer.from_rings`, ``baselines[i]`` [n,2]; headings are computed here."""
        count = len(fids)
        none = np.full(count, NONE)
        return cls.from_rings(
            fids,
            polygons,
            **baseline_arrays(baselines),
            roadblock=np.asarray(roadblock, dtype=np.int64),
            speed_limit=np.asarray(np.full(count, np.nan) if speed_limit is None else speed_limit, dtype=np.float64),
            left_boundary=np.asarray(none if left_boundary is None else left_boundary, dtype=np.int64),
            right_boundary=np.asarray(none if right_boundary is None else right_boundary, dtype=np.int64),
        )

    @classmethod
    def empty(cls) -> LaneLayer:
        return cls.from_arrays([], [], [], [])

    def baseline_of(self, position: int) -> NDArray[np.float64]:
        """[n,3] poses of one baseline."""
        return self.baseline[self.baseline_offsets[position] : self.baseline_offsets[position + 1]]

    @cached_property
    def lengths(self) -> NDArray[np.float64]:
        """[N] baseline lengths [m], as GEOS sums them."""
        lines = [shapely.LineString(self.baseline_of(i)[:, :2]) for i in range(len(self))]
        return shapely.length(np.array(lines, dtype=object)) if lines else np.empty(0)

    def validate(self) -> LaneLayer:
        super().validate()
        count = len(self)
        sizes = {
            "baseline_offsets": len(self.baseline_offsets) - 1,
            "roadblock": len(self.roadblock),
            "speed_limit": len(self.speed_limit),
            "left_boundary": len(self.left_boundary),
            "right_boundary": len(self.right_boundary),
        }
        for name, size in sizes.items():
            if size != count:
                raise DataError(f"lane layer has {count} fids and {size} entries of {name}")
        short = np.flatnonzero(np.diff(self.baseline_offsets) < 2)
        if len(short):
            raise DataError(f"lane {self.fids[short[0]]} has a baseline of fewer than 2 vertices")
        if not np.isfinite(self.baseline).all():
            raise DataError("a lane has a baseline vertex that is not finite")
        return self


def baseline_arrays(baselines: Sequence[ArrayLike]) -> dict[str, NDArray]:
    """``baseline`` [P,3] and ``baseline_offsets`` [N+1] of polylines [n,2]."""
    lines = [np.asarray(line, dtype=np.float64).reshape(-1, 2) for line in baselines]
    poses = [np.column_stack([line, polyline_headings(line)]) for line in lines]
    return {
        "baseline": np.concatenate(poses) if poses else np.empty((0, 3)),
        "baseline_offsets": offsets_of([len(line) for line in lines]),
    }
