"""Signed distance to the nearest road edge, compiled: negative on the road, positive beside it.

Shapes: ``R`` rollouts, ``E`` scored objects, ``H`` = 80 future steps, ``P`` edge points, ``G`` edge segments.
float32 in the written order of operations, because the end of one segment and the start of the next tie and
rounding then decides. Version matched: waymo-open-dataset 1.6.7, ``map_metric_features``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np

from navsim_ext.realism.errors import RealismError
from navsim_ext.realism.rules import HISTORY_STEPS

NEVER = np.float32(-1e10)
"""Distance (m) of an object that is not valid."""
_HEIGHT_STRETCH = np.float32(3.0)
"""A segment on another level is this many times as far as its height says when the nearest is chosen."""
_CYCLIC_SQUARED_M2 = np.float32(1.0)
_TWO = np.float32(2.0)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_CHUNK = 16
_PRUNING_MARGIN_M = np.float32(0.002)


@dataclass(frozen=True)
class EdgeSegments:
    """Segments a -> b of all road edges with at least two points, in file order.

    ``start``, ``edge`` [G, 3] float32; ``before``, ``after`` [G] index of the neighbour at its ends, -1 where it
    has none; ``boxes`` [ceil(G / 16), 4] bounds (x low, y low, x high, y high) of each run of 16 segments, for
    pruning.
    """

    start: np.ndarray
    edge: np.ndarray
    before: np.ndarray
    after: np.ndarray
    boxes: np.ndarray

    @classmethod
    def from_polylines(cls, points: np.ndarray, offsets: np.ndarray) -> EdgeSegments:
        """``points`` [P, 3] float32 in world coordinates, polyline m = points[offsets[m]:offsets[m + 1]]."""
        polylines = [points[low:high] for low, high in pairwise(offsets) if high - low >= 2]
        if not polylines:
            raise RealismError("the scenario has no road edge with two points: the sim-agents rules need one")
        longest = max(len(line) for line in polylines)
        before, after, first = [], [], 0
        for line in polylines:
            count = len(line) - 1
            previous, following = np.arange(first - 1, first + count - 1), np.arange(first + 1, first + count + 1)
            gap = line[0] - line[-1]
            # Only a polyline as long as the longest one is seen as closed: the original compares after padding.
            cyclic = np.sum(gap * gap, dtype=np.float32) < _CYCLIC_SQUARED_M2 and len(line) == longest
            previous[0], following[-1] = (first + count - 1, first) if cyclic else (-1, -1)
            before.append(previous)
            after.append(following)
            first += count
        start = np.concatenate([line[:-1] for line in polylines])
        end = np.concatenate([line[1:] for line in polylines])
        runs = np.arange(0, len(start), _CHUNK)
        low = np.minimum.reduceat(np.minimum(start, end)[:, :2], runs)
        high = np.maximum.reduceat(np.maximum(start, end)[:, :2], runs)
        boxes = np.concatenate([low, high], axis=1)
        return cls(start, end - start, np.concatenate(before), np.concatenate(after), boxes)


@numba.njit(cache=True)
def _segment(px, py, pz, index, start, edge):
    """tau, squared planar distance and squared selection distance (m^2) of one point to one segment."""
    ax, ay, az = px - start[index, 0], py - start[index, 1], pz - start[index, 2]
    ex, ey, ez = edge[index, 0], edge[index, 1], edge[index, 2]
    square = ex * ex + ey * ey
    tau = (ax * ex + ay * ey) / square if square > _ZERO else _ZERO
    clipped = min(max(tau, _ZERO), _ONE)
    sx, sy, sz = ax - ex * clipped, ay - ey * clipped, az - ez * clipped
    stretched = _HEIGHT_STRETCH * sz
    planar = sx * sx + sy * sy
    return tau, planar, planar + stretched * stretched


@numba.njit(cache=True)
def _side(px, py, index, start, edge):
    """-1 left of the segment (on the road), 1 right of it, 0 on its line."""
    cross = (px - start[index, 0]) * edge[index, 1] - (py - start[index, 1]) * edge[index, 0]
    if cross > _ZERO:
        return _ONE
    return -_ONE if cross < _ZERO else _ZERO


@numba.njit(cache=True)
def _bend(index, following, edge):
    return edge[index, 0] * edge[following, 1] - edge[index, 1] * edge[following, 0]


@numba.njit(cache=True)
def _nearest(px, py, pz, guess, start, edge, boxes):
    """Index of the nearest segment by selection distance, the first on ties; ``guess`` only bounds the search."""
    _, _, square = _segment(px, py, pz, guess, start, edge)
    bound = np.sqrt(square)
    best, best_square, found = np.float32(np.inf), np.float32(np.inf), guess
    for run in range(boxes.shape[0]):
        dx = max(boxes[run, 0] - px, px - boxes[run, 2], _ZERO)
        dy = max(boxes[run, 1] - py, py - boxes[run, 3], _ZERO)
        limit = min(best, bound) + _PRUNING_MARGIN_M
        if dx * dx + dy * dy > limit * limit:
            continue
        for index in range(run * _CHUNK, min((run + 1) * _CHUNK, start.shape[0])):
            _, _, square = _segment(px, py, pz, index, start, edge)
            if square < best_square:
                distance = np.sqrt(square)
                if distance < best:
                    best, best_square, found = distance, square, index
    return found


@numba.njit(cache=True)
def _point_distance(px, py, pz, guess, start, edge, before, after, boxes):
    """Signed planar distance of one point, and the segment that gave it."""
    index = _nearest(px, py, pz, guess, start, edge, boxes)
    tau, planar, _ = _segment(px, py, pz, index, start, edge)
    side = _side(px, py, index, start, edge)
    if tau < _ZERO and before[index] >= 0:
        other = before[index]
        convex = _bend(other, index, edge) > _ZERO
        side = max(_side(px, py, other, start, edge), side) if convex else min(_side(px, py, other, start, edge), side)
    elif tau > _ONE and after[index] >= 0:
        other = after[index]
        convex = _bend(index, other, edge) > _ZERO
        side = max(side, _side(px, py, other, start, edge)) if convex else min(side, _side(px, py, other, start, edge))
    return side * np.sqrt(planar), index


@numba.njit(cache=True)
def _edge_distances(states, valid, size, history, start, edge, before, after, boxes):
    rollouts, scored, steps = valid.shape
    result = np.full((rollouts, scored, steps - history), NEVER, np.float32)
    guess = np.zeros(4, np.int64)
    for rollout in range(rollouts):
        for i in range(scored):
            half_length, half_width = size[i, 0] / _TWO, size[i, 1] / _TWO
            for time in range(history, steps):
                if not valid[rollout, i, time]:
                    continue
                heading = states[rollout, i, time, 3]
                cosine, sine = np.cos(heading), np.sin(heading)
                bottom = states[rollout, i, time, 2] - size[i, 2] / _TWO
                worst = np.float32(-np.inf)
                for corner in range(4):
                    along = half_length if corner == 0 or corner == 3 else -half_length
                    across = half_width if corner < 2 else -half_width
                    px = states[rollout, i, time, 0] + (along * cosine - across * sine)
                    py = states[rollout, i, time, 1] + (along * sine + across * cosine)
                    distance, guess[corner] = _point_distance(
                        px, py, bottom, guess[corner], start, edge, before, after, boxes
                    )
                    worst = max(worst, distance)
                result[rollout, i, time - history] = worst
    return result


def road_edge_distances(
    states: np.ndarray,
    valid: np.ndarray,
    size: np.ndarray,
    edges: EdgeSegments,
    use_height: bool = True,
    *,
    first: int = HISTORY_STEPS,
) -> np.ndarray:
    """Greatest signed distance (m) of each object's four bottom corners to the road edge, [R, E, H]; above 0 is
    off-road.

    ``states`` [R, E, T, 4] (z the box centre), ``valid`` [R, E, T], ``size`` [E, 3]. -1e10 where the object is not
    valid. Without ``use_height`` (a map that has no heights) the term of height is dropped.
    """
    start, edge = edges.start, edges.edge
    if not use_height:
        states, start, edge, size = states.copy(), start.copy(), edge.copy(), size.copy()
        states[..., 2], start[:, 2], edge[:, 2], size[:, 2] = 0.0, 0.0, 0.0, 0.0
    return _edge_distances(states, valid, size, first, start, edge, edges.before, edges.after, edges.boxes)
