"""The ego vehicle, its state vector and the time grid of the simulation: the constants that every kernel shares.

Source: nuPlan's Pacifica parameters and NAVSIM's ``pdm_enums`` (state order) and proposal sampling.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.pdm.compiled import kernel

WIDTH = 2.297  # m
FRONT_LENGTH = 4.049  # m, rear axle to front bumper
REAR_LENGTH = 1.127  # m, rear axle to rear bumper
WHEEL_BASE = 3.089  # m
LENGTH = FRONT_LENGTH + REAR_LENGTH  # 5.176 m
HALF_LENGTH = LENGTH / 2.0
HALF_WIDTH = WIDTH / 2.0
REAR_AXLE_TO_CENTER = HALF_LENGTH - REAR_LENGTH  # 1.461 m

STEP_S = 0.1  # s, simulation and scoring interval
NUM_STEPS = 41  # states at 0.0, 0.1 ... 4.0 s
NUM_POSES = 8  # predicted poses at 0.5, 1.0 ... 4.0 s
POSE_INTERVAL_S = 0.5

# state vector: rear axle, global pose; velocity and acceleration in the vehicle frame
X, Y, HEADING, VX, VY, AX, AY, STEERING, STEERING_RATE, YAW_RATE, YAW_ACCELERATION = range(11)
STATE_SIZE = 11

FRONT_LEFT, REAR_LEFT, REAR_RIGHT, FRONT_RIGHT = range(4)  # order of box corners


@kernel
def wrap(angle: float) -> float:
    """Angle [rad] in [-pi, pi); the identity, bit by bit, where nothing is to be wrapped."""
    if -math.pi <= angle < math.pi:
        return angle
    return (angle + math.pi) % (2.0 * math.pi) - math.pi


@kernel
def principal(angle: float) -> float:
    """Angle [rad] in [-pi, pi) as nuPlan's principal_value computes it, rounding included."""
    return (angle + math.pi) % (2.0 * math.pi) - math.pi


@kernel
def unwrap_correction(previous: float, current: float, correction: float) -> float:
    """numpy's ``unwrap``, one step: what is to be added to ``current``, given what was added to ``previous``."""
    difference = current - previous
    if abs(difference) < math.pi:
        return correction
    wrapped = (difference + math.pi) % (2.0 * math.pi) - math.pi
    if wrapped == -math.pi and difference > 0.0:
        wrapped = math.pi
    return correction + (wrapped - difference)


@kernel
def box_corners(x: float, y: float, heading: float, half_length: float, half_width: float, corners) -> None:
    """Writes the corners [4,2] (front-left, rear-left, rear-right, front-right) of a box with centre (x, y).

    c + (+-w (cos(h + pi/2), sin(h + pi/2)) +- l (cos h, sin h)), in nuPlan's order of operations: at UTM northings one
    rounding is 1e-9 m, and an object straight ahead is told by less (see ``collisions.relative_angle``).
    """
    lx, ly = half_length * math.cos(heading), half_length * math.sin(heading)
    side = heading + math.pi / 2.0
    wx, wy = half_width * math.cos(side), half_width * math.sin(side)
    corners[0, 0], corners[0, 1] = x + (wx + lx), y + (wy + ly)
    corners[1, 0], corners[1, 1] = x + (wx - lx), y + (wy - ly)
    corners[2, 0], corners[2, 1] = x + (-wx - lx), y + (-wy - ly)
    corners[3, 0], corners[3, 1] = x + (-wx + lx), y + (-wy + ly)


def state_from_pose(pose: ArrayLike, dynamics: ArrayLike) -> NDArray[np.float64]:
    """Ego state [11] from a rear-axle pose (x, y, heading) and vx, vy, ax, ay; steering and yaw rates are zero.

    The rear axle goes through the box centre and back, as nuPlan's EgoState does (rounding of the UTM numbers).
    """
    x, y, heading = (float(value) for value in np.asarray(pose, dtype=np.float64))
    cos, sin = math.cos(heading), math.sin(heading)
    center_x, center_y = x + REAR_AXLE_TO_CENTER * cos, y + REAR_AXLE_TO_CENTER * sin
    state = np.zeros(STATE_SIZE)
    state[:3] = center_x - REAR_AXLE_TO_CENTER * cos, center_y - REAR_AXLE_TO_CENTER * sin, heading
    state[VX : AY + 1] = np.asarray(dynamics, dtype=np.float64)
    return state
