"""Motion quantities of planned trajectories, by finite differences of their poses.

Legend: N trajectories, F poses at 0.5 s (t = 0 is the origin), T = 0.5 s.

    s_j = signed path length of interval j: displacement along the mean heading of its ends [m]
    v_j = s_j / T,  a_j = (v_j - v_{j-1}) / T,  jerk_j = (a_j - a_{j-1}) / T
    w_j = (h_j - h_{j-1}) / T,  alpha_j = (w_j - w_{j-1}) / T
with v_0 = v_x and a_0 = a_x of the recorded ego state now, and w_0 of the recorded history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.frames import POSE_INTERVAL_S, wrap_angle

Array = NDArray[np.float64]
STATUS_VX, STATUS_AX = 4, 6  # of the status vector: command one-hot, vx, vy, ax, ay


@dataclass(frozen=True)
class PlannedMotion:
    """All [N,F], one value per half-second interval."""

    travel: Array  # signed, along the heading [m]
    slip: Array  # sideways displacement of the rear axle over an interval [m]
    speed: Array  # signed [m/s]
    acceleration: Array  # longitudinal [m/s^2]
    jerk: Array  # [m/s^3]
    yaw_rate: Array  # [rad/s]
    yaw_acceleration: Array  # [rad/s^2]

    @property
    def lateral_acceleration(self) -> Array:
        """v w [m/s^2]."""
        return self.speed * self.yaw_rate


def motion(trajectories: Array, history: Array, status: Array) -> PlannedMotion:
    """From trajectories [N,F,3], and of each row's scene: history [N,H,3] (ending at the origin), status [N,8]."""
    poses = np.concatenate([np.zeros_like(trajectories[:, :1]), trajectories], axis=1)
    step = np.diff(poses[..., :2], axis=1)
    turn = wrap_angle(np.diff(poses[..., 2], axis=1))
    middle = poses[:, :-1, 2] + 0.5 * turn
    travel = step[..., 0] * np.cos(middle) + step[..., 1] * np.sin(middle)
    slip = -step[..., 0] * np.sin(middle) + step[..., 1] * np.cos(middle)
    speed, yaw_rate = travel / POSE_INTERVAL_S, turn / POSE_INTERVAL_S
    past_turn = wrap_angle(history[:, -1, 2] - history[:, -2, 2]) / POSE_INTERVAL_S
    acceleration = difference(speed, status[:, STATUS_VX])
    return PlannedMotion(
        travel=travel,
        slip=slip,
        speed=speed,
        acceleration=acceleration,
        jerk=difference(acceleration, status[:, STATUS_AX]),
        yaw_rate=yaw_rate,
        yaw_acceleration=difference(yaw_rate, past_turn),
    )


def difference(values: Array, first: Array) -> Array:
    """(x_j - x_{j-1}) / T with x_0 = first; [N,F]."""
    return np.diff(np.concatenate([first[:, None], values], axis=1), axis=1) / POSE_INTERVAL_S


def reverses(trajectories: Array, tolerance_m: float = 0.05, last: int | None = None) -> NDArray[np.bool_]:
    """[N] whether an interval (of the ``last`` ones) goes backwards by more than the tolerance."""
    zeros = np.zeros((len(trajectories), 2, 3))
    travel = motion(trajectories, zeros, np.zeros((len(trajectories), 8))).travel
    return (travel[:, -last:] if last else travel).min(axis=1) < -tolerance_m


def stands(trajectories: Array, tolerance_m: float = 0.5) -> NDArray[np.bool_]:
    """[N] whether the plan stays within the tolerance of where it starts."""
    return np.linalg.norm(trajectories[..., :2], axis=-1).max(axis=1) < tolerance_m
