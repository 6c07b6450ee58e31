"""Reactive traffic: vehicles that follow their lane by the intelligent driver model (IDM) and see ego and each other.

Source: NAVSIM 2.2's ``NavsimIDMTrafficAgents`` on nuPlan's ``IDMAgentManager``, with its quirks:

* No traffic lights and no successor lanes: each vehicle stays on the baseline of its first lane and brakes for its end.
* The ego's rectangle is centred at its rear axle, 1.461 m too far back.
* What a vehicle claims is its box and the 1.5 v metres of path before it; gaps are measured from there.
* Vehicles move one after the other, and each sees at once where those before it went.

Per step of 0.1 s, with gap s_0 = 1 m, headway T = 1.5 s, a = 1, b = 2 m/s^2, target speed v_t:

    s* = s_0 + v T + v (v - v_lead) / (2 sqrt(a b)),   g = max(x_lead - l, s_0)
    dv/dt = clip(a (1 - (v / v_t)^4 - (s* / g)^2), -b, a);   p += 0.1 v,   v = max(v + 0.1 dv/dt, 0)

Legend: n vehicles, A of them active, in list order; path arrays as in :mod:`navsim_ext.pdm.reactive.rails`.
"""

from __future__ import annotations

import math

import numpy as np

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import (
    HALF_LENGTH,
    HALF_WIDTH,
    HEADING,
    NUM_STEPS,
    STEP_S,
    VX,
    VY,
    X,
    Y,
    box_corners,
    principal,
)
from navsim_ext.pdm.geometry import boxes_intersect
from navsim_ext.pdm.reactive.corridor import buffer_outline
from navsim_ext.pdm.reactive.footprints import (
    Areas,
    area_distance,
    bounds_gap,
    outlines_meet,
    update_bounds,
    winding,
)
from navsim_ext.pdm.reactive.nearest import tree_nearest
from navsim_ext.pdm.reactive.rails import (
    CHUNK,
    IS_ACTIVE,
    LIMIT,
    PROGRESS,
    SNAPPED_HEADING,
    SNAPPED_X,
    SNAPPED_Y,
    SPEED,
    STAYS,
    TARGET,
)

GAP, HEADWAY = 1.0, 1.5  # m, s
ACCELERATION, DECELERATION = 1.0, 2.0  # m/s^2
RADIUS = 100.0  # m around the ego; a vehicle beyond is taken out for good
SURE_INSIDE, SURE_OUTSIDE = 0.98, 1.02  # of the half width: between them the outline itself is asked

DONE, LEFT_ITS_CORRIDOR, TOO_CURLY = 0, 1, 2  # what ``simulate_vehicles`` returns


@kernel
def _first_beyond(vertices, first: int, last: int, p: float) -> int:
    """First vertex of a path [first, last) with progress > p, or ``last``."""
    low, high = first, last
    while low < high:
        middle = (low + high) // 2
        if vertices[middle, 3] > p:
            high = middle
        else:
            low = middle + 1
    return low


@kernel
def _pose(vertices, first: int, last: int, p: float):
    """x, y, heading at progress p within the path; interpolated in scipy's order of operations."""
    low, high = first, last  # first vertex with progress >= p
    while low < high:
        middle = (low + high) // 2
        if vertices[middle, 3] < p:
            low = middle + 1
        else:
            high = middle
    i = min(max(low, first + 1), last - 1)
    a, b = vertices[i - 1], vertices[i]
    span, s = b[3] - a[3], p - a[3]
    return (
        (b[0] - a[0]) / span * s + a[0],
        (b[1] - a[1]) / span * s + a[1],
        principal((b[2] - a[2]) / span * s + a[2]),
    )


@kernel
def _clamped(vertices, first: int, last: int, p: float) -> float:
    return max(vertices[first, 3], min(p, vertices[last - 1, 3]))


@kernel
def _claim(rails, i: int, p: float, v: float, points, areas, k: int) -> bool:
    """Writes box and path piece of vehicle i at progress p into area k; False when the outline does not fit."""
    first, last = rails.path_offsets[rails.path[i]], rails.path_offsets[rails.path[i] + 1]
    vertices = rails.vertices
    half_length, half_width = rails.half_sizes[i, 0], rails.half_sizes[i, 1]
    x, y, heading = _pose(vertices, first, last, _clamped(vertices, first, last, p))
    box_corners(x, y, heading, half_length, half_width, areas.boxes[k])
    begin = _clamped(vertices, first, last, p - half_length)
    end = _clamped(vertices, first, last, p + half_length + v * HEADWAY)
    count = 0
    if begin == vertices[last - 1, 3]:
        count = _copy(vertices, last - 2, last, points, 0)
    elif end == vertices[first, 3]:
        count = _copy(vertices, first, first + 2, points, 0)
    else:
        points[0, 0], points[0, 1], _ = _pose(vertices, first, last, begin)
        low = _first_beyond(vertices, first, last, begin)
        high = low
        while high < last and vertices[high, 3] < end:
            high += 1
        count = _copy(vertices, low, high, points, 1)
        points[count, 0], points[count, 1], _ = _pose(vertices, first, last, end)
        count += 1
    size = buffer_outline(points, count, half_width, areas.rings[k])
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
def _way_to_go(rails, i: int, p: float, points) -> int:
    """Writes the path of vehicle i from progress p (within the path) on into ``points``; returns its length."""
    first, last = rails.path_offsets[rails.path[i]], rails.path_offsets[rails.path[i] + 1]
    ahead = _first_beyond(rails.vertices, first, last, p)
    if ahead == last:
        return _copy(rails.vertices, last - 2, last, points, 0)
    points[0, 0], points[0, 1], _ = _pose(rails.vertices, first, last, p)
    return _copy(rails.vertices, ahead, last, points, 1)


@kernel
def _in_corridor(rails, i: int, p: float, areas, k: int, points, ring) -> int:
    """1 when area k touches the corridor of vehicle i (way to go, its own width), 0 when not, -1: ``ring`` too small.

    Almost always the distance to the way itself tells; close to the border, and at the ends, the outline is asked.
    """
    r = rails.half_sizes[i, 1]
    reach = SURE_OUTSIDE * r
    low_x, low_y = areas.bounds[k, 0] - reach, areas.bounds[k, 1] - reach
    high_x, high_y = areas.bounds[k, 2] + reach, areas.bounds[k, 3] + reach
    number = rails.path[i]
    first, last = rails.path_offsets[number], rails.path_offsets[number + 1]
    vertices = rails.vertices
    ahead = _first_beyond(vertices, first, last, p)
    if ahead == last:
        ahead = last - 1
        px, py = vertices[last - 2, 0], vertices[last - 2, 1]
    else:
        px, py, _ = _pose(vertices, first, last, p)
    start_x, start_y = px, py
    chunks, chunk_0 = rails.chunks, rails.chunk_offsets[number]
    box, outline, size = areas.boxes[k], areas.rings[k], areas.counts[k]
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
        if min(px, qx) <= high_x and max(px, qx) >= low_x and min(py, qy) <= high_y and max(py, qy) >= low_y:
            found = _outline_near_segment(box, 4, px, py, qx, qy, r)
            if found < 2 and size:
                found = max(found, _outline_near_segment(outline, size, px, py, qx, qy, r))
            if found == 2:
                return 1
            unsure |= found == 1
        px, py = qx, qy
        q += 1
    if not unsure:  # the way is clear of all edges: it lies inside of the area or outside as a whole
        if low_x + reach > start_x or start_x > high_x - reach or low_y + reach > start_y or start_y > high_y - reach:
            return 0
        if winding(box, 4, start_x, start_y) != 0:
            return 1
        return 1 if size and winding(outline, size, start_x, start_y) != 0 else 0
    count = buffer_outline(points, _way_to_go(rails, i, p, points), r, ring)
    if count <= 0:
        return count
    if outlines_meet(ring, count, box, 4, areas.bounds[k]):
        return 1
    return 1 if size and outlines_meet(ring, count, outline, size, areas.bounds[k]) else 0


@kernel
def _outline_near_segment(outline, count: int, px: float, py: float, qx: float, qy: float, r: float) -> int:
    """2: an edge comes surely closer than r beside the segment p-q; 1: it may come closer than r; 0: it does not."""
    dx, dy = qx - px, qy - py
    length = math.sqrt(dx * dx + dy * dy)
    if length == 0.0:
        return 0
    dx, dy = dx / length, dy / length
    inside, outside = SURE_INSIDE * r, SURE_OUTSIDE * r
    found = 0
    ex, ey = outline[count - 1, 0] - px, outline[count - 1, 1] - py
    along_0, across_0 = ex * dx + ey * dy, ey * dx - ex * dy
    for j in range(count):
        ex, ey = outline[j, 0] - px, outline[j, 1] - py
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


@kernel
def _leader(areas, own: int, hits, count: int, distances):
    """(area nearest to the area ``own`` of hits[:count], its distance); ties as in NAVSIM's search tree."""
    best, leader, ties = math.inf, -1, 0
    for h in range(count):
        if bounds_gap(areas.bounds[hits[h]], areas.bounds[own]) > best:
            continue
        distance = area_distance(areas, own, hits[h], best)
        if distance < best:
            best, leader, ties = distance, hits[h], 0
        elif distance == best and distance == 0.0:
            ties += 1
    if ties:
        bounds = np.empty((count, 4))
        for h in range(count):
            bounds[h] = areas.bounds[hits[h]]
            distances[h] = area_distance(areas, own, hits[h], 1e9)
        leader = hits[tree_nearest(bounds, distances[:count], areas.bounds[own])]
    return leader, best


@kernel
def simulate_vehicles(rails, ego_states, poses, present) -> int:
    """Moves the vehicles of a scene around an ego [41,11]: fills ``poses`` [41,n,3] and ``present`` [41,n] from step 1.

    Returns DONE, or why NAVSIM (LEFT_ITS_CORRIDOR) or this program (TOO_CURLY) cannot go on.
    """
    n = len(rails.kinds)
    active = np.empty(n, dtype=np.int64)  # vehicle of each area
    agents = 0
    longest = 2
    for i in range(n):
        if rails.kinds[i] & IS_ACTIVE:
            active[agents] = i
            agents += 1
            longest = max(longest, rails.path_offsets[rails.path[i] + 1] - rails.path_offsets[rails.path[i]])
    ego = agents  # the last area
    capacity = 4 * longest + 80
    areas = Areas(
        np.empty((agents + 1, 4, 2)),
        np.empty((agents + 1, capacity, 2)),
        np.zeros(agents + 1, dtype=np.int64),
        np.empty((agents + 1, 4)),
    )
    ring, points = np.empty((capacity, 2)), np.empty((longest + 3, 2))
    p, v, target = np.empty(agents), np.empty(agents), np.empty(agents)
    heading, position = np.empty(agents), np.empty((agents, 2))
    alive = np.ones(agents, dtype=np.bool_)
    for k in range(agents):
        i = active[k]
        start = rails.start[i]
        p[k], v[k], target[k] = start[PROGRESS], start[SPEED], start[TARGET]
        half_length, half_width = rails.half_sizes[i, 0], rails.half_sizes[i, 1]
        box_corners(start[SNAPPED_X], start[SNAPPED_Y], start[SNAPPED_HEADING], half_length, half_width, areas.boxes[k])
        update_bounds(areas, k)
        first, last = rails.path_offsets[rails.path[i]], rails.path_offsets[rails.path[i] + 1]
        progress = _clamped(rails.vertices, first, last, p[k])
        position[k, 0], position[k, 1], heading[k] = _pose(rails.vertices, first, last, progress)
    hits, distances = np.empty(agents + 1, dtype=np.int64), np.empty(agents + 1)
    shown, raw = np.empty((n, 4, 2)), np.empty((4, 2))
    shown_radius, shown_center = np.empty(n), np.empty((n, 2))

    for step in range(1, NUM_STEPS):
        state = ego_states[step - 1]
        box_corners(state[X], state[Y], state[HEADING], HALF_LENGTH, HALF_WIDTH, areas.boxes[ego])
        update_bounds(areas, ego)
        for k in range(agents):
            if alive[k] and math.hypot(position[k, 0] - state[X], position[k, 1] - state[Y]) > RADIUS:
                alive[k] = False
        for k in range(agents):
            if not alive[k]:
                continue
            i = active[k]
            first, last = rails.path_offsets[rails.path[i]], rails.path_offsets[rails.path[i] + 1]
            progress = _clamped(rails.vertices, first, last, p[k])
            count = 0
            for other in range(agents + 1):
                if other < agents and not alive[other]:
                    continue
                if (
                    other == k
                    and p[k] < rails.vertices[last - 1, 3]
                    and winding(areas.boxes[k], 4, position[k, 0], position[k, 1])
                ):
                    continue  # its corridor begins inside its own box
                met = _in_corridor(rails, i, progress, areas, other, points, ring)
                if met < 0:
                    return TOO_CURLY
                if other == k:
                    if not met:
                        return LEFT_ITS_CORRIDOR
                elif met:
                    hits[count] = other
                    count += 1
            if count:
                leader, x_lead = _leader(areas, k, hits, count, distances)
                length = 0.0
                if leader == ego:
                    speed, relative = math.hypot(state[VX], state[VY]), state[HEADING] - heading[k]
                else:
                    speed, relative = v[leader], heading[leader] - heading[k]
                v_lead = speed * math.cos(principal(relative))
            else:
                x_lead, v_lead, length = rails.vertices[last - 1, 3] - p[k], 0.0, rails.half_sizes[i, 0]
            if rails.start[i, LIMIT] > 0.0:
                target[k] = rails.start[i, LIMIT]
            desired = GAP + HEADWAY * v[k] + v[k] * (v[k] - v_lead) / (2.0 * math.sqrt(ACCELERATION * DECELERATION))
            gap = max(x_lead - length, GAP)
            change = ACCELERATION * (1.0 - (v[k] / target[k]) ** 4.0 - (desired / gap) ** 2.0)
            p[k] += STEP_S * v[k]
            v[k] = max(v[k] + STEP_S * min(max(change, -DECELERATION), ACCELERATION), 0.0)
            if not _claim(rails, i, p[k], v[k], points, areas, k):
                return TOO_CURLY
            progress = _clamped(rails.vertices, first, last, p[k])
            position[k, 0], position[k, 1], heading[k] = _pose(rails.vertices, first, last, progress)
        put_out = 0
        for i in range(n):
            present[step, i] = False
        for k in range(agents):
            if alive[k]:
                i = active[k]
                poses[step, i, 0], poses[step, i, 1], poses[step, i, 2] = position[k, 0], position[k, 1], heading[k]
                present[step, i] = True
                shown[put_out] = areas.boxes[k]
                shown_center[put_out] = position[k]
                shown_radius[put_out] = math.hypot(rails.half_sizes[i, 0], rails.half_sizes[i, 1])
                put_out += 1
        for i in range(n):
            if not rails.kinds[i] & STAYS or present[step, i]:
                continue
            x, y = rails.poses[i, 0], rails.poses[i, 1]
            radius = math.hypot(rails.half_sizes[i, 0], rails.half_sizes[i, 1])
            box_corners(x, y, rails.poses[i, 2], rails.half_sizes[i, 0], rails.half_sizes[i, 1], raw)
            free = True
            for j in range(put_out):
                reach = radius + shown_radius[j] + 1e-6
                dx, dy = shown_center[j, 0] - x, shown_center[j, 1] - y
                if dx * dx + dy * dy <= reach * reach and boxes_intersect(raw, shown[j]):
                    free = False
                    break
            if free:
                poses[step, i] = rails.poses[i]
                present[step, i] = True
                shown[put_out], shown_radius[put_out] = raw, radius
                shown_center[put_out, 0], shown_center[put_out, 1] = x, y
                put_out += 1
    return DONE
