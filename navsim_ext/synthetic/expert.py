"""Was the ego's drive an expert's? Checks of a simulated log before it is written; what fails is drawn again.

The bounds are those by which NAVSIM judges: no contact with anybody, time to collision above 0.9 s, no red light,
comfort. They are checked on the 10 Hz states of the simulation, so they are a little stricter than the 2 Hz log.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from navsim_ext.synthetic.cast import Cast
from navsim_ext.synthetic.traffic import STEP_S, Motion, is_green

MAX_BRAKING = 3.6  # m/s^2; NAVSIM's bound is 4.05
MAX_ACCELERATION = 2.3  # m/s^2; NAVSIM's bound is 2.40
LOOK_AHEAD_S = (0.0, 0.3, 0.6, 0.9)
_AHEAD = np.deg2rad(150.0)  # an object behind the ego by more than this does not count


def fault(cast: Cast, motion: Motion, first: int) -> str | None:
    """Name of the first rule that the ego breaks at or after step ``first``; None for a clean drive."""
    acceleration = motion.acceleration[first:, 0]
    if acceleration.min() < -MAX_BRAKING:
        return "braking"
    if acceleration.max() > MAX_ACCELERATION:
        return "acceleration"
    if _ran_red(cast, motion, first):
        return "red light"
    return _contact(cast, motion, first)


def _ran_red(cast: Cast, motion: Motion, first: int) -> bool:
    """Whether any part of the ego was on a connector whose light showed red."""
    size, axle = cast.rows[0]["size"][0], cast.rows[0]["axle"]
    s = motion.s[first:, 0]
    times = (first + np.arange(len(s))) * STEP_S
    for crossing in cast.paths[0].crossings:
        connector = cast.town.connectors[crossing.connector]
        if connector.phase < 0:
            continue
        on = (s + axle + size / 2 > crossing.start) & (s + axle - size / 2 < crossing.end)
        for t in times[on]:
            if not is_green(t, connector.node, connector.phase, cast.signals.offset, cast.signals.green):
                return True
    return False


def _contact(cast: Cast, motion: Motion, first: int) -> str | None:
    """ "collision" or "time to collision" against anybody, looking LOOK_AHEAD_S ahead at unchanged speed."""
    pose, speed = motion.pose[first:], motion.speed[first:, 0]
    size = np.array([row["size"][:2] for row in cast.rows])
    steps = len(pose)
    for ahead in LOOK_AHEAD_S:
        shift = int(round(ahead / STEP_S))
        ego = pose[: steps - shift, 0].copy()
        ego[:, 0] += speed[: steps - shift] * ahead * np.cos(ego[:, 2])
        ego[:, 1] += speed[: steps - shift] * ahead * np.sin(ego[:, 2])
        others = pose[shift:, 1:]
        near = np.hypot(others[..., 0] - ego[:, None, 0], others[..., 1] - ego[:, None, 1])
        reach = 0.5 * (np.hypot(*size[0]) + np.hypot(*size[1:].T))
        when, who = np.nonzero(near < reach)
        if ahead > 0.0:  # standing still, or somebody behind: not the ego's doing
            rear = pose[when, 0, :2]
            towards = others[when, who, :2] - rear
            angle = np.abs((np.arctan2(towards[:, 1], towards[:, 0]) - ego[when, 2] + np.pi) % (2 * np.pi) - np.pi)
            keep = (angle < _AHEAD) & (speed[when] > 0.05)
            when, who = when[keep], who[keep]
        if len(when) and overlap(ego[when], size[0] + 0.1, others[when, who], size[1:][who]).any():
            return "collision" if ahead == 0.0 else "time to collision"
    return None


def overlap(a: NDArray, size_a: NDArray, b: NDArray, size_b: NDArray) -> NDArray[np.bool_]:
    """[n] whether boxes with centre poses a, b [n,3] and sizes [.., 2] (length, width) touch (separating axes)."""
    separated = np.zeros(len(a), dtype=bool)
    size_a, size_b = np.broadcast_to(size_a, (len(a), 2)), np.broadcast_to(size_b, (len(b), 2))
    delta = b[:, :2] - a[:, :2]
    for pose, extra in ((a, 0.0), (a, np.pi / 2), (b, 0.0), (b, np.pi / 2)):
        axis = pose[:, 2] + extra
        distance = np.abs(delta[:, 0] * np.cos(axis) + delta[:, 1] * np.sin(axis))
        reach = np.zeros(len(a))
        for box, size in ((a, size_a), (b, size_b)):
            difference = box[:, 2] - axis
            reach += 0.5 * (size[:, 0] * np.abs(np.cos(difference)) + size[:, 1] * np.abs(np.sin(difference)))
        separated |= distance > reach
    return ~separated
