"""Sub-scores of the ego's own path: drivable area (DAC), driving direction (DDC), progress, lane keeping (LK).

Source: NAVSIM ``pdm_scorer.py``, v1.1 and v2.2.
"""

from __future__ import annotations

import math

import numpy as np

from navsim_ext.pdm.areas import CENTER_IN_INTERSECTION, NON_DRIVABLE, ONCOMING
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import NUM_STEPS
from navsim_ext.pdm.geometry import distance_to_segment, project_on_line
from navsim_ext.pdm.traffic import V2

DIRECTION_HORIZON = 10  # steps, 1 s
DIRECTION_COMPLIANCE = 2.0  # m
DIRECTION_VIOLATION = 6.0  # m
LANE_DEVIATION = 0.5  # m
LANE_STEPS = 20  # 2 s


@kernel
def drivable_area_compliance(areas) -> float:
    """0 when a corner is off the road at any of the 41 steps, the first included."""
    for t in range(NUM_STEPS):
        if areas[t] & NON_DRIVABLE:
            return 0.0
    return 1.0


@kernel
def driving_direction_compliance(version: int, centers, areas) -> float:
    """1, 0.5 or 0 by the most distance driven off the route within 1 s (11 steps): < 2 m, < 6 m, more.

    A step counts where its end is off the route; v2 leaves out ends inside an intersection.
    """
    driven = np.zeros(NUM_STEPS)
    worst = 0.0
    for t in range(NUM_STEPS):
        if t > 0 and areas[t] & ONCOMING and not (version == V2 and areas[t] & CENTER_IN_INTERSECTION):
            dx, dy = centers[t, 0] - centers[t - 1, 0], centers[t, 1] - centers[t - 1, 1]
            driven[t] = math.sqrt(dx * dx + dy * dy)
        total = 0.0
        for k in range(max(0, t - DIRECTION_HORIZON), t + 1):
            total += driven[k]
        worst = max(worst, total)
    if worst < DIRECTION_COMPLIANCE:
        return 1.0
    return 0.5 if worst < DIRECTION_VIOLATION else 0.0


@kernel
def raw_progress(centerline, centers) -> float:
    """Metres along the centreline from the box centre at 0 s to that at 4 s, not below 0."""
    start = project_on_line(centerline, centers[0, 0], centers[0, 1])
    end = project_on_line(centerline, centers[NUM_STEPS - 1, 0], centers[NUM_STEPS - 1, 1])
    return max(end - start, 0.0)


@kernel
def lane_keeping(centerline, centers, areas) -> float:
    """0 when the centre is more than 0.5 m off the centreline for 20 steps in a row; steps inside an intersection are
    left out: they neither count nor end a row."""
    row = 0
    for t in range(NUM_STEPS):
        if areas[t] & CENTER_IN_INTERSECTION:
            continue
        row = 0 if _near_line(centerline, centers[t, 0], centers[t, 1]) else row + 1
        if row >= LANE_STEPS:
            return 0.0
    return 1.0


@kernel
def _near_line(line, x: float, y: float) -> bool:
    """Whether a point is at most LANE_DEVIATION from a line [C,2]."""
    for i in range(len(line) - 1):
        ax, ay, bx, by = line[i, 0], line[i, 1], line[i + 1, 0], line[i + 1, 1]
        if x < min(ax, bx) - 1.0 or x > max(ax, bx) + 1.0 or y < min(ay, by) - 1.0 or y > max(ay, by) + 1.0:
            continue
        if not distance_to_segment(x, y, ax, ay, bx, by) > LANE_DEVIATION:
            return True
    return False
