"""Areas that vehicles claim, and the distances between them.

The area of a vehicle is the union of its box and the outline of the path piece it covers; the ego's is a box. Neither
union is built: the distance to a union is the least of those to its parts.

Legend: a piece is an outline [N,2] (not closed); bounds [4] are min x, min y, max x, max y; a hull [6] is the
rectangle along the vehicle around its area: centre x, y, direction x, y, half length, half width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.geometry import orientation


class Areas(NamedTuple):
    """The areas of K owners."""

    boxes: NDArray[np.float64]  # [K,4,2]
    rings: NDArray[np.float64]  # [K,M,2] outline of the path piece
    counts: NDArray[np.int64]  # [K] its vertices, 0: the box alone
    bounds: NDArray[np.float64]  # [K,4]
    hulls: NDArray[np.float64]  # [K,6]


def empty_areas(count: int, capacity: int) -> Areas:
    """``count`` areas without content, with room for outlines of ``capacity`` vertices."""
    return Areas(
        np.zeros((count, 4, 2)),
        np.zeros((count, capacity, 2)),
        np.zeros(count, dtype=np.int64),
        np.zeros((count, 4)),
        np.zeros((count, 6)),
    )


@kernel
def update_bounds(areas, k: int) -> None:
    """Recomputes the bounds and the hull of area k."""
    boxes, rings, bounds, hulls = areas.boxes, areas.rings, areas.bounds, areas.hulls
    ux, uy = boxes[k, 0, 0] - boxes[k, 1, 0], boxes[k, 0, 1] - boxes[k, 1, 1]
    length = math.sqrt(ux * ux + uy * uy)
    ux, uy = (ux / length, uy / length) if length > 0.0 else (1.0, 0.0)
    x0, y0 = boxes[k, 0, 0], boxes[k, 0, 1]
    low_x, low_y, high_x, high_y = x0, y0, x0, y0
    back = front = right = left = 0.0  # along and across, seen from the first corner
    for i in range(4 + areas.counts[k]):
        x, y = (boxes[k, i, 0], boxes[k, i, 1]) if i < 4 else (rings[k, i - 4, 0], rings[k, i - 4, 1])
        low_x, low_y, high_x, high_y = min(low_x, x), min(low_y, y), max(high_x, x), max(high_y, y)
        along, across = (x - x0) * ux + (y - y0) * uy, (y - y0) * ux - (x - x0) * uy
        back, front, right, left = min(back, along), max(front, along), min(right, across), max(left, across)
    bounds[k, 0], bounds[k, 1], bounds[k, 2], bounds[k, 3] = low_x, low_y, high_x, high_y
    along, across = 0.5 * (back + front), 0.5 * (right + left)
    hulls[k, 0], hulls[k, 1] = x0 + along * ux - across * uy, y0 + along * uy + across * ux
    hulls[k, 2], hulls[k, 3], hulls[k, 4], hulls[k, 5] = ux, uy, 0.5 * (front - back), 0.5 * (left - right)


@kernel
def bounds_gap(a, b) -> float:
    """Distance [m] between two bounds, 0 where they overlap: a lower bound of the distance of what is in them."""
    dx, dy = max(a[0] - b[2], b[0] - a[2]), max(a[1] - b[3], b[1] - a[3])
    if dx <= 0.0:
        return max(dy, 0.0)
    return dx if dy <= 0.0 else math.hypot(dx, dy)


@kernel
def area_distance(areas, i: int, j: int, limit: float) -> float:
    """Distance [m] between the areas i and j, 0 when they touch; anything above ``limit`` when it exceeds that."""
    apart = bounds_gap(areas.bounds[i], areas.bounds[j]) > 0.0
    best = limit * limit
    for part_i in (1, 0):  # the outlines first: they reach forward, so mostly they are the nearest
        if part_i and not areas.counts[i]:
            continue
        a, na = (areas.rings[i], areas.counts[i]) if part_i else (areas.boxes[i], 4)
        for part_j in (1, 0):
            if part_j and not areas.counts[j]:
                continue
            b, nb = (areas.rings[j], areas.counts[j]) if part_j else (areas.boxes[j], 4)
            if not apart and outlines_meet(a, na, b, nb, areas.bounds[j]):
                return 0.0
            best = _least_square(a, na, b, nb, areas.bounds[j], best)
            best = _least_square(b, nb, a, na, areas.bounds[i], best)
    return math.sqrt(best)


@kernel
def _least_square(a, na: int, b, nb: int, bounds, best: float) -> float:
    """Least squared distance of a vertex of a to an edge of b, when it is below ``best``; ``bounds`` hold b."""
    for i in range(na):
        x, y = a[i, 0], a[i, 1]
        dx, dy = max(max(bounds[0] - x, x - bounds[2]), 0.0), max(max(bounds[1] - y, y - bounds[3]), 0.0)
        if dx * dx + dy * dy >= best:
            continue
        px, py = b[nb - 1, 0], b[nb - 1, 1]
        for k in range(nb):
            qx, qy = b[k, 0], b[k, 1]
            best = min(best, point_segment_square(x, y, px, py, qx, qy))
            px, py = qx, qy
    return best


@kernel
def point_segment_square(x: float, y: float, ax: float, ay: float, bx: float, by: float) -> float:
    """Squared distance of a point to the segment a-b."""
    dx, dy, ex, ey = bx - ax, by - ay, x - ax, y - ay
    along, length_2 = ex * dx + ey * dy, dx * dx + dy * dy
    if along <= 0.0:
        return ex * ex + ey * ey
    if along >= length_2:
        return (x - bx) * (x - bx) + (y - by) * (y - by)
    across = ex * dy - ey * dx
    return across * across / length_2


@kernel
def outlines_meet(a, na: int, b, nb: int, bounds) -> bool:
    """Whether the closed areas of two outlines share a point; ``bounds`` hold b."""
    near = False
    px, py = a[na - 1, 0], a[na - 1, 1]
    for i in range(na):
        qx, qy = a[i, 0], a[i, 1]
        if (
            max(px, qx) >= bounds[0]
            and min(px, qx) <= bounds[2]
            and max(py, qy) >= bounds[1]
            and min(py, qy) <= bounds[3]
        ):
            near = True
            sx, sy = b[nb - 1, 0], b[nb - 1, 1]
            for k in range(nb):
                tx, ty = b[k, 0], b[k, 1]
                if segments_meet(px, py, qx, qy, sx, sy, tx, ty):
                    return True
                sx, sy = tx, ty
        px, py = qx, qy
    if near and winding(b, nb, a[0, 0], a[0, 1]) != 0:
        return True
    return winding(a, na, b[0, 0], b[0, 1]) != 0


@kernel
def segments_meet(px: float, py: float, qx: float, qy: float, sx: float, sy: float, tx: float, ty: float) -> bool:
    """Whether the segments p-q and s-t share a point; touching counts."""
    if max(px, qx) < min(sx, tx) or min(px, qx) > max(sx, tx) or max(py, qy) < min(sy, ty) or min(py, qy) > max(sy, ty):
        return False
    o1, o2 = orientation(px, py, qx, qy, sx, sy), orientation(px, py, qx, qy, tx, ty)
    if o1 * o2 > 0:
        return False
    o3, o4 = orientation(sx, sy, tx, ty, px, py), orientation(sx, sy, tx, ty, qx, qy)
    return o3 * o4 <= 0  # on one line: their bounds overlap


@kernel
def winding(ring, count: int, x: float, y: float) -> int:
    """How often a ring runs around the point (counter-clockwise positive)."""
    turns = 0
    ax, ay = ring[count - 1, 0], ring[count - 1, 1]
    for i in range(count):
        bx, by = ring[i, 0], ring[i, 1]
        if (ay <= y) != (by <= y):
            side = orientation(ax, ay, bx, by, x, y)
            if ay <= y and side > 0:
                turns += 1
            elif ay > y and side < 0:
                turns -= 1
        ax, ay = bx, by
    return turns
