"""Signed distance to the edge of the road: positive on it, negative off it, NaN where the map says nothing.

Sources of the sign:
  road edges: the drivable side lies on the left of the nearest segment; where a vertex is nearest, on the left of the
  mean direction of its two segments (the angle-weighted pseudonormal of Baerentzen and Aanaes 2005 in the plane),
  drivable areas: inside the union of the polygons.

Legend: G segments, n points; metres.
"""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

REACH_M = 8.0  # m; beyond it the distance is that to the nearest sample's segment
SAMPLE_M = 0.5  # m between samples of the edges that stand for their segments in the search


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
    pieces = np.maximum(np.ceil(length / SAMPLE_M).astype(int), 1)
    segment = np.repeat(np.arange(len(starts)), pieces)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    share = (within + 0.5) / pieces[segment]
    samples = starts[segment] + share[:, None] * (ends - starts)[segment]
    tree, result = cKDTree(samples), np.empty(len(points))
    far, nearest = tree.query(points)
    for chosen, k in ((far > REACH_M, 1), (far <= REACH_M, min(6, len(samples)))):
        near = nearest[chosen, None] if k == 1 else tree.query(points[chosen], k=k)[1]
        result[chosen] = _nearest_segment(points[chosen], segment[near], starts, ends, length, before, after)
    return result


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
    polygons = [shapely.make_valid(shapely.Polygon(ring)) for ring in rings if len(ring) >= 3]
    points = np.asarray(points, np.float64)
    if not polygons:
        return np.full(len(points), np.nan)
    union = shapely.union_all(shapely.buffer(polygons, 0.01, join_style="mitre"))  # hairline gaps between neighbours
    inside = shapely.contains_xy(union, points[:, 0], points[:, 1])
    lines = [np.asarray(line.coords) for line in shapely.get_parts(shapely.boundary(union))]
    distance = np.abs(signed_distance_to_edges(points, lines, [False] * len(lines)))
    return np.where(inside, distance, -distance)
