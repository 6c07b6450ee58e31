"""The area along a path: GEOS's buffer of a polyline with flat caps and round joins, as its outline.

NAVSIM asks shapely for these buffers, so their corners decide distances and contacts. This is the outline that GEOS
3.11 (``OffsetCurveBuilder``, ``OffsetSegmentGenerator``) makes before it cleans it: left side forwards, flat cap, right
side backwards, flat cap. Where a tight inner turn makes it cross itself, the crossing pieces lie inside the area, so
distances to it and its winding number are those of the cleaned polygon.

Legend: r half width [m]; points [N,2] of the polyline; ring [M,2], not closed (the first vertex is not repeated).
"""

from __future__ import annotations

import math

import numpy as np

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.geometry import distance_to_segment, orientation

QUADRANT_SEGMENTS = 16
FILLET_ANGLE = math.pi / 2.0 / QUADRANT_SEGMENTS  # rad between the vertices of a round join
SAME_VERTEX = 1e-6  # of r: a vertex this close to the one before is not added
SAME_OFFSET = 1e-3  # of r: offsets of two segments that meet this closely share one vertex
CLOSING_FACTOR = 80.0  # how near to the offset the closing segment of an inner turn stays
SIMPLIFY = 0.01  # of r: shallow concave vertices below it fall out of the polyline


@kernel
def buffer_outline(points, count: int, r: float, ring) -> int:
    """Writes the outline of ``points[:count]`` into ``ring``; returns its number of vertices, 0 for an empty area and
    -1 when ``ring`` is too small. Changes ``points``: repeated ones fall out."""
    n = 1
    for i in range(1, count):
        if points[i, 0] != points[n - 1, 0] or points[i, 1] != points[n - 1, 1]:
            points[n, 0], points[n, 1] = points[i, 0], points[i, 1]
            n += 1
    if n < 2:
        return 0
    dense = False
    for i in range(1, n):
        dense |= math.hypot(points[i, 0] - points[i - 1, 0], points[i, 1] - points[i - 1, 1]) < SIMPLIFY * r
    size = 0
    for side in (1, -1):
        line = points[:n]
        if dense:
            line = _without_shallow_concavities(line, side, SIMPLIFY * r)
        if side < 0:
            line = line[::-1]
        size = _offset_side(line, r, ring, size)
        if size < 0:
            return -1
    if size > 1 and ring[size - 1, 0] == ring[0, 0] and ring[size - 1, 1] == ring[0, 1]:
        size -= 1
    return size


@kernel
def _offset_side(line, r: float, ring, size: int) -> int:
    """Adds the offset of ``line`` to its left, at distance r, and the cap at its end."""
    last = len(line) - 1
    for i in range(1, last):
        x0, y0, x1, y1, x2, y2 = line[i - 1, 0], line[i - 1, 1], line[i, 0], line[i, 1], line[i + 1, 0], line[i + 1, 1]
        turn = orientation(x0, y0, x1, y1, x2, y2)
        if turn == 0 and (x1 - x0) * (x2 - x1) + (y1 - y0) * (y2 - y1) > 0.0:
            continue
        if size + 2 * QUADRANT_SEGMENTS + 6 > len(ring):
            return -1
        ux, uy = _offset(x0, y0, x1, y1, r)
        wx, wy = _offset(x1, y1, x2, y2, r)
        ex, ey, sx, sy = x1 - uy, y1 + ux, x1 - wy, y1 + wx  # end of the first offset, start of the second
        gap = math.sqrt((ex - sx) * (ex - sx) + (ey - sy) * (ey - sy))
        if turn > 0:  # to the left: the inner side of the turn
            crosses, cx, cy = _crossing(x0 - uy, y0 + ux, ex, ey, sx, sy, x2 - wy, y2 + wx)
            if crosses:
                size = _add(ring, size, cx, cy, r)
            elif gap < r * SAME_OFFSET:
                size = _add(ring, size, ex, ey, r)
            else:
                size = _add(ring, size, ex, ey, r)
                f = CLOSING_FACTOR
                size = _add(ring, size, (f * ex + x1) / (f + 1.0), (f * ey + y1) / (f + 1.0), r)
                size = _add(ring, size, (f * sx + x1) / (f + 1.0), (f * sy + y1) / (f + 1.0), r)
                size = _add(ring, size, sx, sy, r)
            continue
        if turn < 0 and gap < r * SAME_OFFSET:
            size = _add(ring, size, ex, ey, r)
            continue
        size = _add(ring, size, ex, ey, r)
        start, end = math.atan2(ey - y1, ex - x1), math.atan2(sy - y1, sx - x1)
        if start <= end:
            start += 2.0 * math.pi
        pieces = int((start - end) / FILLET_ANGLE + 0.5)
        for k in range(pieces):
            angle = start - k * ((start - end) / pieces)
            size = _add(ring, size, x1 + r * math.cos(angle), y1 + r * math.sin(angle), r)
        size = _add(ring, size, sx, sy, r)
    if size + 4 > len(ring):
        return -1
    ux, uy = _offset(line[last - 1, 0], line[last - 1, 1], line[last, 0], line[last, 1], r)
    size = _add(ring, size, line[last, 0] - uy, line[last, 1] + ux, r)
    return _add(ring, size, line[last, 0] + uy, line[last, 1] - ux, r)


@kernel
def _offset(ax: float, ay: float, bx: float, by: float, r: float):
    """r times the direction of a -> b."""
    dx, dy = bx - ax, by - ay
    length = math.sqrt(dx * dx + dy * dy)
    return r * dx / length, r * dy / length


@kernel
def _add(ring, size: int, x: float, y: float, r: float) -> int:
    if size:
        dx, dy = x - ring[size - 1, 0], y - ring[size - 1, 1]
        if math.sqrt(dx * dx + dy * dy) < r * SAME_VERTEX:
            return size
    ring[size, 0], ring[size, 1] = x, y
    return size + 1


@kernel
def _crossing(ax: float, ay: float, bx: float, by: float, cx: float, cy: float, dx: float, dy: float):
    """(whether the segments a-b and c-d share a point, that point)."""
    o1, o2 = orientation(ax, ay, bx, by, cx, cy), orientation(ax, ay, bx, by, dx, dy)
    if o1 * o2 > 0:
        return False, 0.0, 0.0
    o3, o4 = orientation(cx, cy, dx, dy, ax, ay), orientation(cx, cy, dx, dy, bx, by)
    if o3 * o4 > 0 or (o1 == 0 and o2 == 0):
        return False, 0.0, 0.0
    ux, uy, wx, wy = bx - ax, by - ay, dx - cx, dy - cy
    t = ((cx - ax) * wy - (cy - ay) * wx) / (ux * wy - uy * wx)
    return True, ax + t * ux, ay + t * uy


@kernel
def _without_shallow_concavities(points, side: int, tolerance: float):
    """GEOS's ``BufferInputLineSimplifier``: drops vertices that turn to ``side`` (1 left) by less than ``tolerance``
    and lie that close to the vertex before them; never the first two or the last."""
    n = len(points)
    kept = np.ones(n, dtype=np.bool_)
    changed = True
    while changed:
        changed = False
        first = 1
        middle = _next_kept(kept, first)
        last = _next_kept(kept, middle)
        while last < n:
            p, q, s = points[first], points[middle], points[last]
            shallow = orientation(p[0], p[1], q[0], q[1], s[0], s[1]) == side
            shallow = shallow and distance_to_segment(q[0], q[1], p[0], p[1], s[0], s[1]) < tolerance
            step = max((last - first) // 10, 1)
            i = first
            while shallow and i < last:
                shallow = distance_to_segment(q[0], q[1], p[0], p[1], points[i, 0], points[i, 1]) < tolerance
                i += step
            if shallow:
                kept[middle] = False
                changed = True
                first = last
            else:
                first = middle
            middle = _next_kept(kept, first)
            last = _next_kept(kept, middle)
    return points[kept]


@kernel
def _next_kept(kept, i: int) -> int:
    i += 1
    while i < len(kept) and not kept[i]:
        i += 1
    return i
