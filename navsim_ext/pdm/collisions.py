"""No at-fault collision (NC), time to collision (TTC) and traffic lights (TLC).

Source: NAVSIM ``pdm_scorer.py``, ``pdm_scorer_utils.get_collision_type`` and nuPlan's is_agent_ahead / behind.
NAVSIM meets the objects of one query in the order of a search tree. The order cannot matter: what a hit does depends on
the step and on that object alone (it lowers the score, which is a minimum, or puts the object on the ignore list,
which only that object reads), so here objects are met in list order.
"""

from __future__ import annotations

import math

import numpy as np

from navsim_ext.pdm.areas import MULTIPLE_LANES, NON_DRIVABLE, REAR_AXLE_IN_INTERSECTION
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import FRONT_LEFT, FRONT_RIGHT, HALF_LENGTH, HALF_WIDTH, HEADING, NUM_STEPS, VX, VY, X, Y
from navsim_ext.pdm.geometry import boxes_intersect, segment_intersects_box
from navsim_ext.pdm.map_index import box_intersects_polygon
from navsim_ext.pdm.traffic import STOPPED_SPEED, V1, object_box, objects_near

EGO_RADIUS = math.hypot(HALF_LENGTH, HALF_WIDTH)
AHEAD_ANGLE = math.radians(30.0)
BEHIND_ANGLE = math.radians(150.0)
TTC_STOPPED_SPEED = 5e-3  # m/s
TTC_LOOK_AHEAD = (0, 3, 6, 9)  # steps
TTC_STEPS_V1 = NUM_STEPS  # v1's observation lasts 5 s
TTC_STEPS_V2 = NUM_STEPS - 9  # v2's ends at 4.0 s
PENALTY_AGENT, PENALTY_STATIC = 0.0, 0.5
_MARGIN = 1e-6  # m, over rounding of the distance tests that only exclude


@kernel
def relative_angle(x: float, y: float, heading: float, other_x: float, other_y: float) -> float:
    """Angle [rad] between the heading and the direction to the other point; NaN as in nuPlan.

    NaN when both coincide, and when rounding lifts the cosine over 1: "ahead" and "behind" are then both false. For an
    object exactly ahead the last bit decides, so boxes, centroids and this product keep NAVSIM's order of operations.
    """
    dx, dy = other_x - x, other_y - y
    norm = math.sqrt(dx * dx + dy * dy)
    cosine = math.cos(heading) * (dx / norm) + math.sin(heading) * (dy / norm)
    if not -1.0 <= cosine <= 1.0:
        return math.nan
    return math.acos(cosine)


@kernel
def no_at_fault_collision(traffic, version: int, states, corners, centers, areas):
    """(score, step of the first at-fault collision or -1).

    At fault: a stopped object is hit, or one that is not behind is hit with the front edge, or with a side while the
    ego is in several lanes or off the road. Any other contact puts the object on the ignore list. A contact while the
    ego stands is never at fault.
    """
    score, first = 1.0, -1
    bounds = np.array([math.inf, math.inf, -math.inf, -math.inf])
    for t in range(NUM_STEPS):
        bounds[0], bounds[1] = min(bounds[0], centers[t, 0]), min(bounds[1], centers[t, 1])
        bounds[2], bounds[3] = max(bounds[2], centers[t, 0]), max(bounds[3], centers[t, 1])
    bounds[:2] -= EGO_RADIUS + _MARGIN
    bounds[2:] += EGO_RADIUS + _MARGIN
    near = objects_near(traffic, bounds, version)
    ignored = np.zeros(len(near), dtype=np.bool_)
    box = np.empty((4, 2))
    for t in range(NUM_STEPS):
        m = traffic.map_of_step[t]
        for n in range(len(near)):
            j = near[n]
            if ignored[n] or not traffic.presence[m, j] & version:
                continue
            dx, dy = traffic.poses[m, j, 0] - centers[t, 0], traffic.poses[m, j, 1] - centers[t, 1]
            reach = traffic.radii[j] + (EGO_RADIUS + _MARGIN)
            if dx * dx + dy * dy > reach * reach:
                continue
            object_box(traffic, m, j, box)
            if not boxes_intersect(corners[t], box):
                continue
            at_fault = False
            if math.hypot(states[t, VX], states[t, VY]) > STOPPED_SPEED:
                if traffic.is_stopped[j]:
                    at_fault = True
                elif not _behind(states[t], box):
                    front = segment_intersects_box(
                        corners[t, FRONT_LEFT, 0],
                        corners[t, FRONT_LEFT, 1],
                        corners[t, FRONT_RIGHT, 0],
                        corners[t, FRONT_RIGHT, 1],
                        box,
                    )
                    at_fault = front or areas[t] & (MULTIPLE_LANES | NON_DRIVABLE) != 0
            if not at_fault:
                ignored[n] = True
                continue
            if first < 0:
                first = t
            score = min(score, PENALTY_AGENT if traffic.is_agent[j] else PENALTY_STATIC)
            if score == 0.0:
                return score, first
    return score, first


@kernel
def _centroid(box):
    """Centroid of a box [4,2] in the operations of GEOS: area-weighted triangles fanned from the first corner."""
    x0, y0 = box[0, 0], box[0, 1]
    sum_x, sum_y, area = 0.0, 0.0, 0.0
    for i in (1, 2):
        x1, y1, x2, y2 = box[i, 0], box[i, 1], box[i + 1, 0], box[i + 1, 1]
        twice = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        sum_x += twice * (x0 + x1 + x2)
        sum_y += twice * (y0 + y1 + y2)
        area += twice
    return sum_x / 3.0 / area, sum_y / 3.0 / area


@kernel
def _behind(state, box) -> bool:
    x, y = _centroid(box)
    return relative_angle(state[X], state[Y], state[HEADING], x, y) > BEHIND_ANGLE


@kernel
def time_to_collision(traffic, version: int, states, corners, centers, areas):
    """(score, step of the first violation or -1).

    At step t the ego box, moved on along its heading by speed * 0.1 f, is held against the objects of step t + f, for
    f = 0, 3, 6, 9. A contact is a violation when the object is ahead, or when the ego is in several lanes, off the road
    or with its rear axle in an intersection and the object is not behind; otherwise the object is ignored from then on.
    Speed is a magnitude: reversing, the box still moves forwards.
    """
    steps = TTC_STEPS_V1 if version == V1 else TTC_STEPS_V2
    bounds = np.array([math.inf, math.inf, -math.inf, -math.inf])
    for t in range(steps):
        speed = math.hypot(states[t, VX], states[t, VY])
        reach = EGO_RADIUS + _MARGIN + speed
        bounds[0], bounds[1] = min(bounds[0], centers[t, 0] - reach), min(bounds[1], centers[t, 1] - reach)
        bounds[2], bounds[3] = max(bounds[2], centers[t, 0] + reach), max(bounds[3], centers[t, 1] + reach)
    near = objects_near(traffic, bounds, version)
    if len(near) == 0:
        return 1.0, -1
    ignored = np.zeros(len(near), dtype=np.bool_)
    box, moved = np.empty((4, 2)), np.empty((4, 2))
    for t in range(steps):
        speed = math.hypot(states[t, VX], states[t, VY])
        if speed < TTC_STOPPED_SPEED:
            continue
        heading = states[t, HEADING]
        vx, vy = math.cos(heading) * speed, math.sin(heading) * speed
        entangled = areas[t] & (MULTIPLE_LANES | NON_DRIVABLE | REAR_AXLE_IN_INTERSECTION) != 0
        for f in TTC_LOOK_AHEAD:
            m = traffic.map_of_step[t + f]
            shift_x, shift_y = vx * (f * 0.1), vy * (f * 0.1)
            shifted = False
            for n in range(len(near)):
                j = near[n]
                if ignored[n] or not traffic.presence[m, j] & version:
                    continue
                dx = traffic.poses[m, j, 0] - centers[t, 0] - shift_x
                dy = traffic.poses[m, j, 1] - centers[t, 1] - shift_y
                reach = traffic.radii[j] + (EGO_RADIUS + _MARGIN)
                if dx * dx + dy * dy > reach * reach:
                    continue
                if not shifted:
                    for c in range(4):
                        moved[c, 0], moved[c, 1] = corners[t, c, 0] + shift_x, corners[t, c, 1] + shift_y
                    shifted = True
                object_box(traffic, m, j, box)
                if not boxes_intersect(moved, box):
                    continue
                x, y = _centroid(box)
                angle = relative_angle(states[t, X], states[t, Y], heading, x, y)
                if angle < AHEAD_ANGLE or (entangled and not angle > BEHIND_ANGLE):
                    return 0.0, t
                ignored[n] = True
    return 1.0, -1


@kernel
def traffic_light_compliance(index, traffic, version: int, corners) -> float:
    """0 when the ego box touches a red connector at any step, also when it stood in it from the start; else 1."""
    for t in range(NUM_STEPS):
        m = traffic.map_of_step[t]
        for r in range(len(traffic.red_polygons)):
            if traffic.red_presence[m, r] & version and box_intersects_polygon(
                index, traffic.red_polygons[r], corners[t]
            ):
                return 0.0
    return 1.0
