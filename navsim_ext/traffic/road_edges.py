"""Signed distance to the edge of the road: positive on it, negative off it, NaN where the map says nothing.

Sources of the sign:
  road edges: the drivable side lies on the left of the nearest segment; where a vertex is nearest, on the left of the
  mean direction of its two segments (the angle-weighted pseudonormal of Baerentzen and Aanaes 2005 in the plane),
  drivable areas: inside the union of the polygons.

A grid of nodes is filled by :func:`edge_grid`, many times faster than asking point by point: every segment is compared
with the nodes near it, and farther nodes learn their nearest segment from their neighbours.

Legend: G segments, n points, (H, W) nodes of a grid; metres.
"""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from navsim_ext.pdm.compiled import kernel

CLOSED_GAP_M = 1.0
"""WOMD's tools take a line whose ends are nearer than this for closed; a closed one whose ends are farther apart lacks
its last segment."""
REACH_M = 8.0  # m; within it distances are exact, beyond it they are those to a segment that is very nearly the nearest
SAMPLE_M = 0.5  # m between samples of the edges that stand for their segments in the search
STAMP_M = 4.0  # m; longer segments are compared with their nodes piece by piece


def edge_segments(
    lines: list[NDArray[np.floating]], closed: list[bool]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """(starts [G,2], ends [G,2], previous [G], next [G]) of polylines; -1 where a line ends. Points that repeat are
    left out, a line of one point has no segment."""
    starts, ends, before, after = [], [], [], []
    at = 0
    for line, ring in zip(lines, closed):
        line = np.asarray(line, np.float64)
        if ring and len(line) > 1:
            line = np.concatenate([line, line[:1]])
        if len(line) > 1:
            line = line[np.concatenate([[True], np.hypot(*np.diff(line, axis=0).T) > 1e-6])]
        count = len(line) - 1
        if count < 1:
            continue
        index = at + np.arange(count)
        starts.append(line[:-1])
        ends.append(line[1:])
        joined = ring or np.hypot(*(line[0] - line[-1])) < 1e-3
        before.append(np.concatenate([[index[-1] if joined else -1], index[:-1]]))
        after.append(np.concatenate([index[1:], [index[0] if joined else -1]]))
        at += count
    if not starts:
        return np.empty((0, 2)), np.empty((0, 2)), np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(starts), np.concatenate(ends), np.concatenate(before), np.concatenate(after)


def signed_distance_to_edges(
    points: NDArray[np.floating], lines: list[NDArray[np.floating]], closed: list[bool]
) -> NDArray[np.float64]:
    """[n] metres to the nearest road edge, positive on the left of it; NaN everywhere when there is no edge.

    Candidates are the segments of the 6 nearest samples (every 0.5 m), so the distance is exact; beyond REACH_M the
    nearest sample alone is asked, and the distance is up to 0.25 m^2 / (2 REACH_M) = 2 cm too large.
    """
    starts, ends, before, after = edge_segments(lines, closed)
    points = np.asarray(points, np.float64)
    if not len(starts):
        return np.full(len(points), np.nan)
    length = np.hypot(*(ends - starts).T)
    samples, segment = _samples(starts, ends, length)
    tree, result = cKDTree(samples), np.empty(len(points))
    far, nearest = tree.query(points)
    for chosen, k in ((far > REACH_M, 1), (far <= REACH_M, min(6, len(samples)))):
        near = nearest[chosen, None] if k == 1 else tree.query(points[chosen], k=k)[1]
        result[chosen] = _nearest_segment(points[chosen], segment[near], starts, ends, length, before, after)
    return result


def _samples(starts, ends, length) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(points every SAMPLE_M of all segments [m,2], the segment of each [m])."""
    pieces = np.maximum(np.ceil(length / SAMPLE_M).astype(int), 1)
    segment = np.repeat(np.arange(len(starts)), pieces)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    share = (within + 0.5) / pieces[segment]
    return starts[segment] + share[:, None] * (ends - starts)[segment], segment


def edge_grid(
    lines: list[NDArray[np.floating]],
    closed: list[bool],
    origin: NDArray[np.floating],
    cell: float,
    shape: tuple[int, int],
) -> NDArray[np.float64]:
    """[H,W] what :func:`signed_distance_to_edges` says at the nodes ``origin`` + (column, row) cell, all at once.

    Within REACH_M of an edge the distance is exact: every segment is compared with all nodes so near to it. The nodes
    of the border ask the tree; the others take the nearest segment of any neighbour, in sweeps forth and back
    (Danielsson 1980, with exact distances to segments), which is the nearest one but for rare centimetres.
    """
    H, W = shape
    starts, ends, before, after = edge_segments(lines, closed)
    if not len(starts):
        return np.full(shape, np.nan)
    low = np.asarray(origin, np.float64)
    length = np.hypot(*(ends - starts).T)
    nearest = np.full((H, W), -1, np.int64)
    squared = np.full((H, W), np.inf)
    _stamp(starts, ends, length, low, cell, nearest, squared)
    ring = np.ones((H, W), bool)
    ring[1:-1, 1:-1] = False
    rows, columns = np.nonzero(ring & ~(squared <= REACH_M**2))
    if len(rows):
        samples, segment = _samples(starts, ends, length)
        border = low + cell * np.stack([columns, rows], axis=1)
        nearest[rows, columns] = segment[cKDTree(samples).query(border)[1]]
    result = np.empty((H, W))
    _spread(starts, ends, low, cell, nearest, squared)
    _signed(starts, ends, length, before, after, low, cell, nearest, result)
    return result


@kernel
def _squared_distance(x, y, starts, ends, g):
    ax, ay = starts[g, 0], starts[g, 1]
    dx, dy = ends[g, 0] - ax, ends[g, 1] - ay
    t = ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)
    t = min(max(t, 0.0), 1.0)
    ox, oy = x - (ax + t * dx), y - (ay + t * dy)
    return ox * ox + oy * oy


@kernel
def _stamp(starts, ends, length, low, cell, nearest, squared):
    """Compares every segment with the nodes within REACH_M of it."""
    H, W = nearest.shape
    for g in range(len(starts)):
        pieces = int(np.ceil(length[g] / STAMP_M))
        for piece in range(pieces):
            f0, f1 = piece / pieces, (piece + 1) / pieces
            x0 = starts[g, 0] + f0 * (ends[g, 0] - starts[g, 0])
            x1 = starts[g, 0] + f1 * (ends[g, 0] - starts[g, 0])
            y0 = starts[g, 1] + f0 * (ends[g, 1] - starts[g, 1])
            y1 = starts[g, 1] + f1 * (ends[g, 1] - starts[g, 1])
            c0 = max(int(np.ceil((min(x0, x1) - REACH_M - low[0]) / cell)), 0)
            c1 = min(int(np.floor((max(x0, x1) + REACH_M - low[0]) / cell)), W - 1)
            r0 = max(int(np.ceil((min(y0, y1) - REACH_M - low[1]) / cell)), 0)
            r1 = min(int(np.floor((max(y0, y1) + REACH_M - low[1]) / cell)), H - 1)
            for r in range(r0, r1 + 1):
                y = low[1] + cell * r
                for c in range(c0, c1 + 1):
                    d = _squared_distance(low[0] + cell * c, y, starts, ends, g)
                    if d < squared[r, c]:
                        squared[r, c] = d
                        nearest[r, c] = g


@kernel
def _spread(starts, ends, low, cell, nearest, squared):
    """Nodes farther than REACH_M learn their nearest segment from their neighbours: a sweep forth, where every row
    learns from the row before it and from its own left and right, and one back."""
    H, W = nearest.shape
    far = REACH_M * REACH_M
    for r in range(H):
        for c in range(W):
            if nearest[r, c] >= 0:
                squared[r, c] = _squared_distance(low[0] + cell * c, low[1] + cell * r, starts, ends, nearest[r, c])
    for way in (1, -1):
        for k in range(H):
            r = k if way > 0 else H - 1 - k
            y = low[1] + cell * r
            for side in (1, -1):
                for j in range(W):
                    c = j if side > 0 else W - 1 - j
                    if squared[r, c] <= far:
                        continue
                    x = low[0] + cell * c
                    asked = nearest[r, c]
                    for neighbour in range(4):
                        rn, cn = (r, c - side) if neighbour == 3 else (r - way, c + neighbour - 1)
                        if not (0 <= rn < H and 0 <= cn < W):
                            continue
                        g = nearest[rn, cn]
                        if g < 0 or g == asked:
                            continue
                        asked = g
                        if g == nearest[r, c]:
                            continue
                        d = _squared_distance(x, y, starts, ends, g)
                        if d < squared[r, c]:
                            squared[r, c] = d
                            nearest[r, c] = g


@kernel
def _signed(starts, ends, length, before, after, low, cell, nearest, result):
    """The sign as in :func:`_nearest_segment`."""
    H, W = nearest.shape
    for r in range(H):
        for c in range(W):
            g = nearest[r, c]
            x, y = low[0] + cell * c, low[1] + cell * r
            dx, dy = ends[g, 0] - starts[g, 0], ends[g, 1] - starts[g, 1]
            t = ((x - starts[g, 0]) * dx + (y - starts[g, 1]) * dy) / (dx * dx + dy * dy)
            clipped = min(max(t, 0.0), 1.0)
            ox, oy = x - (starts[g, 0] + clipped * dx), y - (starts[g, 1] + clipped * dy)
            tx, ty = dx / length[g], dy / length[g]
            neighbour = before[g] if t <= 0.0 else (after[g] if t >= 1.0 else -1)
            if neighbour >= 0:
                tx += (ends[neighbour, 0] - starts[neighbour, 0]) / length[neighbour]
                ty += (ends[neighbour, 1] - starts[neighbour, 1]) / length[neighbour]
            distance = np.sqrt(ox * ox + oy * oy)
            result[r, c] = distance if tx * oy - ty * ox >= 0.0 else -distance


def _nearest_segment(points, candidates, starts, ends, length, before, after) -> NDArray[np.float64]:
    """[n] signed distances of ``points`` [n,2] to the nearest of their ``candidates`` [n,k] (rows of segments)."""
    a, d = starts[candidates], (ends - starts)[candidates]
    along = ((points[:, None] - a) * d).sum(-1) / (d * d).sum(-1)
    t = np.clip(along, 0.0, 1.0)
    offset = points[:, None] - (a + t[..., None] * d)
    distance = np.hypot(offset[..., 0], offset[..., 1])
    best = distance.argmin(axis=1)
    row = np.arange(len(points))
    chosen, t, offset, distance = candidates[row, best], t[row, best], offset[row, best], distance[row, best]
    direction = (ends - starts) / length[:, None]
    tangent = direction[chosen].copy()
    for end, neighbour in ((t <= 0.0, before[chosen]), (t >= 1.0, after[chosen])):
        mean = end & (neighbour >= 0)
        tangent[mean] += direction[neighbour[mean]]
    left = tangent[:, 0] * offset[:, 1] - tangent[:, 1] * offset[:, 0]
    return np.where(left >= 0.0, distance, -distance)


def signed_distance_to_areas(points: NDArray[np.floating], rings: list[NDArray[np.floating]]) -> NDArray[np.float64]:
    """[n] metres to the border of the union of the polygons, positive inside; NaN everywhere when there is none."""
    points = np.asarray(points, np.float64)
    union, lines = _union(rings)
    if union is None:
        return np.full(len(points), np.nan)
    inside = shapely.contains_xy(union, points[:, 0], points[:, 1])
    distance = np.abs(signed_distance_to_edges(points, lines, [False] * len(lines)))
    return np.where(inside, distance, -distance)


def area_grid(
    rings: list[NDArray[np.floating]], origin: NDArray[np.floating], cell: float, shape: tuple[int, int]
) -> NDArray[np.float64]:
    """[H,W] what :func:`signed_distance_to_areas` says at the nodes ``origin`` + (column, row) cell."""
    H, W = shape
    union, lines = _union(rings)
    if union is None:
        return np.full(shape, np.nan)
    columns, rows = np.meshgrid(origin[0] + cell * np.arange(W), origin[1] + cell * np.arange(H))
    inside = shapely.contains_xy(union, columns, rows)
    distance = np.abs(edge_grid(lines, [False] * len(lines), origin, cell, shape))
    return np.where(inside, distance, -distance)


def _union(rings: list[NDArray[np.floating]]) -> tuple[shapely.Geometry | None, list[NDArray[np.float64]]]:
    """(union of the polygons, None where there is none; the lines of its border)."""
    polygons = [shapely.make_valid(shapely.Polygon(ring)) for ring in rings if len(ring) >= 3]
    if not polygons:
        return None, []
    union = shapely.union_all(shapely.buffer(polygons, 0.01, join_style="mitre"))  # hairline gaps between neighbours
    return union, [np.asarray(line.coords) for line in shapely.get_parts(shapely.boundary(union))]
