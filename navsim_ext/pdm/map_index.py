"""Point-in-polygon and box-polygon tests on a PolygonTable, through an index of edges by height.

Each polygon's y range is cut into slabs; a slab lists the edges that reach into it. A point looks only at the edges of
its own slab. The slab of a height is a monotone function of it, also in floating point, so no edge can be missed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.geometry import orientation, segment_intersects_box
from navsim_ext.pdm.polygon_table import PolygonTable

EDGES_PER_SLAB = 1
MAX_SLABS = 128


class MapIndex(NamedTuple):
    """Arrays of a PolygonTable and its slabs. Q polygons, V vertices, S slabs, N entries."""

    xy: NDArray[np.float64]  # [V,2]
    ring_offsets: NDArray[np.int64]  # [R+1]
    polygon_rings: NDArray[np.int64]  # [Q+1]
    bounds: NDArray[np.float64]  # [Q,4] min x, min y, max x, max y
    slabs_per_metre: NDArray[np.float64]  # [Q]
    polygon_slabs: NDArray[np.int64]  # [Q+1] first slab of each polygon
    slab_offsets: NDArray[np.int64]  # [S+1] first entry of each slab
    slab_edges: NDArray[np.int32]  # [N] vertex at which the edge starts


def index_map(table: PolygonTable) -> MapIndex:
    """Builds the slabs of a whole table (once per map and process)."""
    xy = np.ascontiguousarray(table.xy, dtype=np.float64)
    rings, polygons = np.array(table.ring_offsets), np.array(table.polygon_rings)
    return MapIndex(xy, rings, polygons, *_build_slabs(xy, rings, polygons))


@kernel
def _build_slabs(xy, ring_offsets, polygon_rings):
    count = len(polygon_rings) - 1
    bounds = np.empty((count, 4))
    slabs_per_metre = np.zeros(count)
    polygon_slabs = np.zeros(count + 1, dtype=np.int64)
    for q in range(count):
        first, last = ring_offsets[polygon_rings[q]], ring_offsets[polygon_rings[q + 1]]
        bounds[q, 0], bounds[q, 1], bounds[q, 2], bounds[q, 3] = math.inf, math.inf, -math.inf, -math.inf
        for i in range(first, last):
            bounds[q, 0], bounds[q, 1] = min(bounds[q, 0], xy[i, 0]), min(bounds[q, 1], xy[i, 1])
            bounds[q, 2], bounds[q, 3] = max(bounds[q, 2], xy[i, 0]), max(bounds[q, 3], xy[i, 1])
        slabs = min(max((last - first) // EDGES_PER_SLAB, 1), MAX_SLABS)
        height = bounds[q, 3] - bounds[q, 1]
        slabs_per_metre[q] = slabs / height if height > 0.0 else 0.0
        polygon_slabs[q + 1] = polygon_slabs[q] + slabs
    filled = np.zeros(polygon_slabs[count] + 1, dtype=np.int64)
    for counting in (True, False):
        if not counting:
            slab_offsets = np.zeros(len(filled), dtype=np.int64)
            slab_offsets[1:] = np.cumsum(filled[:-1])
            slab_edges = np.empty(slab_offsets[-1], dtype=np.int32)
            filled[:] = 0
        for q in range(count):
            slabs = polygon_slabs[q + 1] - polygon_slabs[q]
            for ring in range(polygon_rings[q], polygon_rings[q + 1]):
                for i in range(ring_offsets[ring], ring_offsets[ring + 1] - 1):
                    low, high = min(xy[i, 1], xy[i + 1, 1]), max(xy[i, 1], xy[i + 1, 1])
                    first = _slab(low, bounds[q, 1], slabs_per_metre[q], slabs)
                    last = _slab(high, bounds[q, 1], slabs_per_metre[q], slabs)
                    for slab in range(polygon_slabs[q] + first, polygon_slabs[q] + last + 1):
                        if not counting:
                            slab_edges[slab_offsets[slab] + filled[slab]] = i
                        filled[slab] += 1
    return bounds, slabs_per_metre, polygon_slabs, slab_offsets, slab_edges


@kernel
def _slab(y: float, y_min: float, slabs_per_metre: float, slabs: int) -> int:
    return min(max(int((y - y_min) * slabs_per_metre), 0), slabs - 1)


@kernel
def points_inside(index, q: int, points, wanted: int) -> int:
    """Bits of those ``wanted`` points [K,2] that lie strictly inside polygon q: not on its border, not in a hole.

    Ray crossings, even-odd over all rings. Many points a call, because a call costs more than a point.
    """
    xy, slab_offsets, slab_edges = index.xy, index.slab_offsets, index.slab_edges
    min_x, min_y, max_x, max_y = index.bounds[q, 0], index.bounds[q, 1], index.bounds[q, 2], index.bounds[q, 3]
    base = index.polygon_slabs[q]
    slabs = index.polygon_slabs[q + 1] - base
    per_metre = index.slabs_per_metre[q]
    result = 0
    for k in range(len(points)):
        if not wanted >> k & 1:
            continue
        x, y = points[k, 0], points[k, 1]
        if x < min_x or y < min_y or x > max_x or y > max_y:
            continue
        slab = base + _slab(y, min_y, per_metre, slabs)
        inside = False
        for entry in range(slab_offsets[slab], slab_offsets[slab + 1]):
            i = slab_edges[entry]
            ay, by = xy[i, 1], xy[i + 1, 1]
            if (ay > y) == (by > y):  # does not cross the height of the point, but may touch the point itself
                if by == y:
                    ax, bx = xy[i, 0], xy[i + 1, 0]
                    if bx == x or (ay == y and (ax < x) != (bx < x)):
                        inside = False
                        break
                continue
            ax, bx = xy[i, 0], xy[i + 1, 0]
            if ax < x and bx < x:
                continue
            if ax > x and bx > x:
                inside = not inside
                continue
            side = orientation(ax, ay, bx, by, x, y)
            if side == 0:
                inside = False
                break
            if (side > 0) == (by > ay):
                inside = not inside
        if inside:
            result |= 1 << k
    return result


@kernel
def polygon_contains(index, q: int, x: float, y: float) -> bool:
    """Whether (x, y) lies strictly inside polygon q."""
    point = np.empty((1, 2))
    point[0, 0], point[0, 1] = x, y
    return points_inside(index, q, point, 1) == 1


@kernel
def box_intersects_polygon(index, q: int, box) -> bool:
    """Whether the box [4,2] shares a point with polygon q (holes excluded); touching counts."""
    min_x, max_x = min(box[0, 0], box[1, 0], box[2, 0], box[3, 0]), max(box[0, 0], box[1, 0], box[2, 0], box[3, 0])
    min_y, max_y = min(box[0, 1], box[1, 1], box[2, 1], box[3, 1]), max(box[0, 1], box[1, 1], box[2, 1], box[3, 1])
    bounds = index.bounds
    if max_x < bounds[q, 0] or max_y < bounds[q, 1] or min_x > bounds[q, 2] or min_y > bounds[q, 3]:
        return False
    xy = index.xy
    for ring in range(index.polygon_rings[q], index.polygon_rings[q + 1]):
        for i in range(index.ring_offsets[ring], index.ring_offsets[ring + 1] - 1):
            ax, ay, bx, by = xy[i, 0], xy[i, 1], xy[i + 1, 0], xy[i + 1, 1]
            if max(ax, bx) < min_x or min(ax, bx) > max_x or max(ay, by) < min_y or min(ay, by) > max_y:
                continue
            if segment_intersects_box(ax, ay, bx, by, box):
                return True
    return polygon_contains(index, q, box[0, 0], box[0, 1])  # no edge meets the box: all inside or all outside
