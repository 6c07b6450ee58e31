"""Planar predicates on plain numbers, with the answers that GEOS (shapely) gives.

Signs come from a filtered orientation test that falls back to double-double arithmetic, as GEOS's do, so touching
counts as touching also at UTM magnitudes. Boxes are convex quadrilaterals [4,2], counter-clockwise. Two closed convex
sets are apart exactly when some edge of one has all of the other strictly outside; "intersects" is the negation.
"""

from __future__ import annotations

import math

from navsim_ext.pdm.compiled import kernel

_FILTER = 3.3306690738754716e-16  # (3 + 16 eps) eps: Shewchuk's bound for the orientation determinant
_SPLITTER = 134217729.0  # 2^27 + 1


@kernel
def _two_difference(a: float, b: float):
    """a - b as an exact sum of two doubles."""
    x = a - b
    b_virtual = a - x
    return x, (a - (x + b_virtual)) + (b_virtual - b)


@kernel
def _two_product(a: float, b: float):
    """a * b as an exact sum of two doubles (Veltkamp splitting, Dekker's product)."""
    x = a * b
    c = _SPLITTER * a
    a_high = c - (c - a)
    a_low = a - a_high
    c = _SPLITTER * b
    b_high = c - (c - b)
    b_low = b - b_high
    return x, a_low * b_low - (((x - a_high * b_high) - a_low * b_high) - a_high * b_low)


@kernel
def orientation(ax: float, ay: float, bx: float, by: float, cx: float, cy: float) -> int:
    """+1 when c lies left of the line a -> b, -1 right of it, 0 on it."""
    left = (ax - cx) * (by - cy)
    right = (ay - cy) * (bx - cx)
    determinant = left - right
    bound = _FILTER * (abs(left) + abs(right))
    if determinant > bound:
        return 1
    if determinant < -bound:
        return -1
    return _exact_orientation(ax, ay, bx, by, cx, cy)


@kernel
def _exact_orientation(ax: float, ay: float, bx: float, by: float, cx: float, cy: float) -> int:
    acx, acx_low = _two_difference(ax, cx)
    acy, acy_low = _two_difference(ay, cy)
    bcx, bcx_low = _two_difference(bx, cx)
    bcy, bcy_low = _two_difference(by, cy)
    left, left_low = _two_product(acx, bcy)
    left_low += acx * bcy_low + acx_low * bcy
    right, right_low = _two_product(acy, bcx)
    right_low += acy * bcx_low + acy_low * bcx
    difference, low = _two_difference(left, right)
    total = difference + (low + (left_low - right_low))
    return 1 if total > 0.0 else (-1 if total < 0.0 else 0)


@kernel
def boxes_intersect(a, b) -> bool:
    """Whether two boxes [4,2] share a point; touching counts."""
    return not (_box_edge_separates(a, b) or _box_edge_separates(b, a))


@kernel
def _box_edge_separates(a, b) -> bool:
    """Whether some edge of box ``a`` has all corners of box ``b`` strictly outside."""
    for i in range(4):
        j = (i + 1) % 4
        outside = True
        for k in range(4):
            if orientation(a[i, 0], a[i, 1], a[j, 0], a[j, 1], b[k, 0], b[k, 1]) >= 0:
                outside = False
                break
        if outside:
            return True
    return False


@kernel
def segment_intersects_box(px: float, py: float, qx: float, qy: float, box) -> bool:
    """Whether the segment p-q and the box [4,2] share a point; touching and lying inside count."""
    for i in range(4):
        j = (i + 1) % 4
        if (
            orientation(box[i, 0], box[i, 1], box[j, 0], box[j, 1], px, py) < 0
            and orientation(box[i, 0], box[i, 1], box[j, 0], box[j, 1], qx, qy) < 0
        ):
            return False
    if px == qx and py == qy:
        return True
    side = orientation(px, py, qx, qy, box[0, 0], box[0, 1])
    if side == 0:
        return True
    for k in range(1, 4):
        if orientation(px, py, qx, qy, box[k, 0], box[k, 1]) != side:
            return True
    return False


@kernel
def distance_to_segment(px: float, py: float, ax: float, ay: float, bx: float, by: float) -> float:
    """Distance of a point to the segment a-b, in the operations of GEOS (so that ties fall alike)."""
    dx, dy = bx - ax, by - ay
    if dx == 0.0 and dy == 0.0:
        return math.sqrt((px - ax) * (px - ax) + (py - ay) * (py - ay))
    length_2 = dx * dx + dy * dy
    r = ((px - ax) * dx + (py - ay) * dy) / length_2
    if r <= 0.0:
        return math.sqrt((px - ax) * (px - ax) + (py - ay) * (py - ay))
    if r >= 1.0:
        return math.sqrt((px - bx) * (px - bx) + (py - by) * (py - by))
    s = ((ay - py) * dx - (ax - px) * dy) / length_2
    return abs(s) * math.sqrt(length_2)


@kernel
def project_on_line(line, px: float, py: float) -> float:
    """Arc length [m] of the point of ``line`` [C,2] nearest to p (shapely's ``project``); the first of equals wins.

    Zero-length segments (doubled joints of lanes) count as their single point.
    """
    best, measure, start = math.inf, 0.0, 0.0
    for i in range(len(line) - 1):
        ax, ay, bx, by = line[i, 0], line[i, 1], line[i + 1, 0], line[i + 1, 1]
        dx, dy = bx - ax, by - ay
        length_2 = dx * dx + dy * dy
        length = math.sqrt(length_2)
        distance = distance_to_segment(px, py, ax, ay, bx, by)
        if distance < best:
            best = distance
            r = ((px - ax) * dx + (py - ay) * dy) / length_2 if length_2 > 0.0 else 1.0
            measure = start + min(max(r, 0.0), 1.0) * length
        start += length
    return measure
