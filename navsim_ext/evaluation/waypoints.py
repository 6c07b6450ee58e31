"""A plan as WOD-E2E judges it: 20 points at 4 Hz, up to 5 s.

Legend: F poses p_f at f dt, p_0 = 0 the ego at now; t_j = 0.25 j s the wanted points.

    within the plan   a cubic spline through p_0 ... p_F (not-a-knot: exact for constant jerk, and at every pose)
    beyond it         the last step again and again: p_F+1 = p_F o (p_F-1^-1 o p_F), speed and turning rate as they were

A plan of 4 s so gets a fifth second that its planner never planned; whoever scores it says so.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from navsim_ext.errors import DataError
from navsim_ext.evaluation.rater_feedback import FREQUENCY_HZ, POINTS
from navsim_ext.frames import to_global, to_local

LAST_S = POINTS / FREQUENCY_HZ
LEAST_S = 3.0  # the first time that is judged: it must have been planned
ROUNDING_S = 1e-6


def waypoints(poses: NDArray[np.floating], interval: float) -> NDArray[np.float64]:
    """[20,2] points of a plan [F,3] whose poses are ``interval`` s apart, in the ego frame of now.

    Raises DataError for a plan that ends before 3 s, or with a pose or interval that is not finite.
    """
    poses = np.asarray(poses, np.float64)
    if poses.ndim != 2 or poses.shape[1] != 3 or not np.isfinite(poses).all():
        raise DataError(f"a plan of shape {poses.shape}; finite poses [., 3] were expected")
    if (
        not (math.isfinite(interval) and interval > 0.0)
        or len(poses) < 2
        or len(poses) * interval < LEAST_S - ROUNDING_S
    ):
        raise DataError(
            f"a plan of {len(poses)} poses every {interval:g} s; at least {LEAST_S:g} s were expected, which are judged"
        )
    path = [np.zeros(3), *poses]
    step = to_local(path[-1], path[-2])
    while (len(path) - 1) * interval < LAST_S - ROUNDING_S:
        path.append(to_global(step, path[-1]))
    times = interval * np.arange(len(path))
    return CubicSpline(times, np.stack(path)[:, :2])(np.arange(1, POINTS + 1) / FREQUENCY_HZ)


def extended_s(count: int, interval: float) -> float:
    """Seconds of the 5 that a plan of ``count`` poses does not reach."""
    return max(LAST_S - count * interval, 0.0)
