"""The way of a vehicle along its path: poses on it, the area that it claims, and what lies in its corridor.

These kernels run some thousand times a step in dense traffic, so they take plain arrays and positions: a view of an
array, or a tuple of arrays handed on, costs more than the arithmetic.

Legend: a path is ``vertices[first:last]`` (x, y, unwrapped heading, progress); p progress [m]; r half width [m]; an
area k is ``boxes[k]`` [4,2] and the outline ``rings[k, :counts[k]]``, both within ``bounds[k]`` [4].
"""

from __future__ import annotations

import math

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import box_corners, principal
from navsim_ext.pdm.reactive.corridor import buffer_outline
from navsim_ext.pdm.reactive.footprints import outlines_meet, update_bounds, winding
from navsim_ext.pdm.reactive.rails import CHUNK

HEADWAY = 1.5  # s
SURE_INSIDE, SURE_OUTSIDE = 0.98, 1.02  # of the half width: between them the outline itself is asked


@kernel
def first_beyond(vertices, first: int, last: int, p: float) -> int:
    """First vertex of a path with progress > p, or ``last``."""
    low, high = first, last
    while low < high:
        middle = (low + high) // 2
        if vertices[middle, 3] > p:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def path_pose(vertices, first: int, last: int, p: float):
    """x, y, heading at progress p within the path; interpolated in scipy's order of operations."""
    low, high = first, last  # first vertex with progress >= p
    while low < high:
        middle = (low + high) // 2
        if vertices[middle, 3] < p:
            low = middle + 1
        else:
            high = middle
    i = min(max(low, first + 1), last - 1)
    span, s = vertices[i, 3] - vertices[i - 1, 3], p - vertices[i - 1, 3]
    return (
        (vertices[i, 0] - vertices[i - 1, 0]) / span * s + vertices[i - 1, 0],
        (vertices[i, 1] - vertices[i - 1, 1]) / span * s + vertices[i - 1, 1],
        principal((vertices[i, 2] - vertices[i - 1, 2]) / span * s + vertices[i - 1, 2]),
    )


@kernel
def clamped(vertices, first: int, last: int, p: float) -> float:
    """p, moved onto the path."""
    return max(vertices[first, 3], min(p, vertices[last - 1, 3]))


@kernel
def claim(vertices, first: int, last: int, half_length: float, r: float, p: float, v: float, points, areas, k) -> bool:
    """Writes box and path piece of a vehicle at progress p into area k; False when the outline does not fit."""
    x, y, heading = path_pose(vertices, first, last, clamped(vertices, first, last, p))
    box_corners(x, y, heading, half_length, r, areas.boxes[k])
    begin = clamped(vertices, first, last, p - half_length)
    end = clamped(vertices, first, last, p + half_length + v * HEADWAY)
    count = 0
    if begin == vertices[last - 1, 3]:
        count = _copy(vertices, last - 2, last, points, 0)
    elif end == vertices[first, 3]:
        count = _copy(vertices, first, first + 2, points, 0)
    else:
        points[0, 0], points[0, 1], _ = path_pose(vertices, first, last, begin)
        low = first_beyond(vertices, first, last, begin)
        high = low
        while high < last and vertices[high, 3] < end:
            high += 1
        count = _copy(vertices, low, high, points, 1)
        points[count, 0], points[count, 1], _ = path_pose(vertices, first, last, end)
        count += 1
    size = buffer_outline(points, count, r, areas.rings[k])
    areas.counts[k] = max(size, 0)
    update_bounds(areas, k)
    return size >= 0


@kernel
def _copy(vertices, low: int, high: int, points, count: int) -> int:
    for i in range(low, high):
        points[count, 0], points[count, 1] = vertices[i, 0], vertices[i, 1]
        count += 1
    return count


@kernel
def way_begins(vertices, first: int, last: int, p: float):
    """(next vertex, x, y) of the way from progress p on; at the end of the path it is the last segment."""
    ahead = first_beyond(vertices, first, last, p)
    if ahead == last:
        return last - 1, vertices[last - 2, 0], vertices[last - 2, 1]
    x, y, _ = path_pose(vertices, first, last, p)
    return ahead, x, y


@kernel
def touches_way(
    vertices, first: int, last: int, ahead: int, start_x: float, start_y: float, r: float,
    chunks, chunk_0: int, boxes, rings, size: int, bounds, hulls, k: int,
) -> int:  # fmt: skip
    """Whether area k comes closer than r to the way: 1 surely, 0 surely not, -1: its outline must be asked."""
    reach = outside = SURE_OUTSIDE * r
    low_x, low_y, high_x, high_y = (
        bounds[k, 0] - reach,
        bounds[k, 1] - reach,
        bounds[k, 2] + reach,
        bounds[k, 3] + reach,
    )
    px, py = start_x, start_y
    unsure = False
    q = ahead
    while q < last:
        if (q - 1 - first) % CHUNK == 0 and q > ahead:  # a chunk begins at vertex q - 1: step over it when it is far
            c = chunk_0 + (q - 1 - first) // CHUNK
            if chunks[c, 0] > high_x or chunks[c, 2] < low_x or chunks[c, 1] > high_y or chunks[c, 3] < low_y:
                q = min(q + CHUNK, last)
                px, py = vertices[q - 1, 0], vertices[q - 1, 1]
                continue
        qx, qy = vertices[q, 0], vertices[q, 1]
        dx, dy = qx - px, qy - py
        if (
            (dx != 0.0 or dy != 0.0)
            and min(px, qx) <= high_x
            and max(px, qx) >= low_x
            and min(py, qy) <= high_y
            and max(py, qy) >= low_y
        ):
            length = math.sqrt(dx * dx + dy * dy)
            dx, dy = dx / length, dy / length
            ex, ey = hulls[k, 0] - px, hulls[k, 1] - py
            cos, sin = hulls[k, 2] * dx + hulls[k, 3] * dy, hulls[k, 3] * dx - hulls[k, 2] * dy
            along, across = ex * dx + ey * dy, ey * dx - ex * dy
            wide = abs(sin) * hulls[k, 4] + abs(cos) * hulls[k, 5] + outside
            long = abs(cos) * hulls[k, 4] + abs(sin) * hulls[k, 5] + outside
            if abs(across) < wide and along > -long and along < length + long:
                found = _near(boxes, k, 4, px, py, dx, dy, length, r)
                if found < 2 and size:
                    found = max(found, _near(rings, k, size, px, py, dx, dy, length, r))
                if found == 2:
                    return 1
                unsure |= found == 1
        px, py = qx, qy
        q += 1
    if unsure:
        return -1
    # the way is clear of all edges: it lies inside of the area or outside as a whole
    if bounds[k, 0] > start_x or start_x > bounds[k, 2] or bounds[k, 1] > start_y or start_y > bounds[k, 3]:
        return 0
    if winding(boxes[k], 4, start_x, start_y) != 0:
        return 1
    return 1 if size and winding(rings[k], size, start_x, start_y) != 0 else 0


@kernel
def in_outlined_corridor(
    vertices, first: int, last: int, ahead: int, start_x: float, start_y: float, r: float, areas, k: int, points, ring
) -> int:
    """1 when area k touches the outline of the corridor itself, 0 when not, -1: ``ring`` is too small."""
    points[0, 0], points[0, 1] = start_x, start_y
    count = buffer_outline(points, _copy(vertices, ahead, last, points, 1), r, ring)
    if count <= 0:
        return count
    if outlines_meet(ring, count, areas.boxes[k], 4, areas.bounds[k]):
        return 1
    size = areas.counts[k]
    return 1 if size and outlines_meet(ring, count, areas.rings[k], size, areas.bounds[k]) else 0


@kernel
def _near(outlines, k: int, count: int, px: float, py: float, dx: float, dy: float, length: float, r: float) -> int:
    """2: an edge of an outline comes surely closer than r beside a segment (from p in direction d); 1: it may come
    closer than r; 0: it does not."""
    inside, outside = SURE_INSIDE * r, SURE_OUTSIDE * r
    found = 0
    ex, ey = outlines[k, count - 1, 0] - px, outlines[k, count - 1, 1] - py
    along_0, across_0 = ex * dx + ey * dy, ey * dx - ex * dy
    for j in range(count):
        ex, ey = outlines[k, j, 0] - px, outlines[k, j, 1] - py
        along_1, across_1 = ex * dx + ey * dy, ey * dx - ex * dy
        if (
            min(across_0, across_1) < outside
            and max(across_0, across_1) > -outside
            and max(along_0, along_1) > -outside
            and min(along_0, along_1) < length + outside
        ):
            if _least_across(along_0, across_0, along_1, across_1, 0.0, length) < inside:
                return 2
            if found == 0 and _least_across(along_0, across_0, along_1, across_1, -outside, length + outside) < outside:
                found = 1
        along_0, across_0 = along_1, across_1
    return found


@kernel
def _least_across(along_0: float, across_0: float, along_1: float, across_1: float, low: float, high: float) -> float:
    """Least |across| of an edge where ``along`` is between low and high; infinite where it never is."""
    if along_0 > along_1:
        along_0, across_0, along_1, across_1 = along_1, across_1, along_0, across_0
    if along_1 < low or along_0 > high:
        return math.inf
    if along_1 > along_0:
        slope = (across_1 - across_0) / (along_1 - along_0)
        if along_1 > high:
            across_1 = across_0 + slope * (high - along_0)
        if along_0 < low:
            across_0 = across_0 + slope * (low - along_0)
    if across_0 * across_1 <= 0.0:
        return 0.0
    return min(abs(across_0), abs(across_1))
