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
from navsim_ext.pdm.ego import HALF_LENGTH, HALF_WIDTH, HEADING, NUM_STEPS, STEP_S, VX, VY, X, Y, box_corners, principal
from navsim_ext.pdm.geometry import boxes_intersect
from navsim_ext.pdm.reactive.footprints import Areas, area_distance, bounds_gap, update_bounds, winding
from navsim_ext.pdm.reactive.nearest import tree_nearest
from navsim_ext.pdm.reactive.rails import CHUNK
from navsim_ext.pdm.reactive.way import (
    HEADWAY,
    SURE_OUTSIDE,
    claim,
    clamped,
    in_outlined_corridor,
    path_pose,
    touches_way,
    way_begins,
)
from navsim_ext.pdm.traffic_agents import (
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

GAP = 1.0  # m
ACCELERATION, DECELERATION = 1.0, 2.0  # m/s^2
RADIUS = 100.0  # m around the ego; a vehicle beyond is taken out for good

DONE, LEFT_ITS_CORRIDOR, TOO_CURLY = 0, 1, 2  # what ``simulate_vehicles`` returns


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
        np.empty((agents + 1, 6)),
    )
    boxes, rings, counts, bounds, hulls = areas.boxes, areas.rings, areas.counts, areas.bounds, areas.hulls
    vertices, chunks, tails = rails.vertices, rails.chunks, rails.tails
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
        progress = clamped(vertices, first, last, p[k])
        position[k, 0], position[k, 1], heading[k] = path_pose(vertices, first, last, progress)
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
            half_length, half_width = rails.half_sizes[i, 0], rails.half_sizes[i, 1]
            ahead, start_x, start_y = way_begins(vertices, first, last, clamped(vertices, first, last, p[k]))
            chunk_0 = rails.chunk_offsets[rails.path[i]]
            rest, reach = chunk_0 + (ahead - 1 - first) // CHUNK, SURE_OUTSIDE * half_width
            low_x, low_y = tails[rest, 0] - reach, tails[rest, 1] - reach
            high_x, high_y = tails[rest, 2] + reach, tails[rest, 3] + reach
            count = 0
            for other in range(agents + 1):
                if other != k and (
                    (other < agents and not alive[other])
                    or bounds[other, 0] > high_x
                    or bounds[other, 1] > high_y
                    or bounds[other, 2] < low_x
                    or bounds[other, 3] < low_y
                ):
                    continue
                if other == k and p[k] < vertices[last - 1, 3] and winding(boxes[k], 4, start_x, start_y):
                    continue  # its corridor begins inside its own box
                met = touches_way(
                    vertices, first, last, ahead, start_x, start_y, half_width,
                    chunks, chunk_0, boxes, rings, counts[other], bounds, hulls, other,
                )  # fmt: skip
                if met < 0:
                    met = in_outlined_corridor(
                        vertices, first, last, ahead, start_x, start_y, half_width, areas, other, points, ring
                    )
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
                x_lead, v_lead, length = vertices[last - 1, 3] - p[k], 0.0, half_length
            if rails.start[i, LIMIT] > 0.0:
                target[k] = rails.start[i, LIMIT]
            desired = GAP + HEADWAY * v[k] + v[k] * (v[k] - v_lead) / (2.0 * math.sqrt(ACCELERATION * DECELERATION))
            gap = max(x_lead - length, GAP)
            change = ACCELERATION * (1.0 - (v[k] / target[k]) ** 4.0 - (desired / gap) ** 2.0)
            p[k] += STEP_S * v[k]
            v[k] = max(v[k] + STEP_S * min(max(change, -DECELERATION), ACCELERATION), 0.0)
            if not claim(vertices, first, last, half_length, half_width, p[k], v[k], points, areas, k):
                return TOO_CURLY
            progress = clamped(vertices, first, last, p[k])
            position[k, 0], position[k, 1], heading[k] = path_pose(vertices, first, last, progress)
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
