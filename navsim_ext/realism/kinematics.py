"""Speed, acceleration and turn rates by central differences, and displacement from the log.

Shapes: ``R`` rollouts (1 for the log), ``E`` objects, ``T`` = 91 steps, ``H`` = 80 future steps. Everything is
float32 in the written order of operations: the 2023 histograms have an edge at exactly 0, so that for a steady
object the sign of the rounding noise picks the bin. Version matched: waymo-open-dataset 1.6.7,
``trajectory_features``.
"""

from __future__ import annotations

import numpy as np

from navsim_ext.realism.rules import HISTORY_STEPS

_STEP = np.float32(0.1)
_STEP_SQUARED = np.float32(0.01)
_PI = np.float32(np.pi)
_TWO_PI = np.float32(2.0 * np.pi)
_TWO = np.float32(2.0)


def central_difference(values: np.ndarray) -> np.ndarray:
    """D(f)[t] = (f[t+1] - f[t-1]) / 2 along the last axis; NaN at both ends."""
    difference = np.full(values.shape, np.nan, np.float32)
    difference[..., 1:-1] = (values[..., 2:] - values[..., :-2]) / _TWO
    return difference


def wrap(angle: np.ndarray) -> np.ndarray:
    """W(u) = ((u + pi) mod 2 pi) - pi, floored modulo, in float32."""
    return np.mod(angle + _PI, _TWO_PI) - _PI


def speed(x: np.ndarray, y: np.ndarray, z: np.ndarray | None = None) -> np.ndarray:
    """v = |D(x), D(y), D(z)| / step in m/s, same shape as ``x``; without ``z`` the planar speed."""
    square = central_difference(x) ** 2 + central_difference(y) ** 2
    if z is not None:
        square = square + central_difference(z) ** 2
    return np.sqrt(square) / _STEP


def kinematic_features(states: np.ndarray) -> dict[str, np.ndarray]:
    """``states`` [R, E, T, 4] float32 (x, y, z, heading) -> the four kinematic features [R, E, H].

    delta = W(2 D(h)) / 2, angular speed = delta / step, angular acceleration = (W(2 D(delta)) / 2) / step^2.
    """
    x, y, z, heading = (states[..., axis] for axis in range(4))
    v = speed(x, y, z)
    delta = wrap(_TWO * central_difference(heading)) / _TWO
    whole = {
        "linear_speed": v,
        "linear_acceleration": central_difference(v) / _STEP,
        "angular_speed": delta / _STEP,
        "angular_acceleration": (wrap(_TWO * central_difference(delta)) / _TWO) / _STEP_SQUARED,
    }
    return {name: value[..., HISTORY_STEPS:] for name, value in whole.items()}


def speed_validity(valid: np.ndarray) -> np.ndarray:
    """``valid`` [E, H] of the future steps -> [E, H]: both neighbours valid (the step itself is not asked)."""
    mask = np.zeros_like(valid)
    mask[:, 1:-1] = valid[:, :-2] & valid[:, 2:]
    return mask


def acceleration_validity(valid: np.ndarray) -> np.ndarray:
    """``valid`` [E, H] -> [E, H]: the step and those two before and two after it are valid."""
    mask = np.zeros_like(valid)
    mask[:, 2:-2] = valid[:, :-4] & valid[:, 2:-2] & valid[:, 4:]
    return mask


def average_displacement(states: np.ndarray, log: np.ndarray, log_valid: np.ndarray) -> np.ndarray:
    """Mean 3D distance to the log over its valid steps: [R, E, T, 4], [E, T, 4], [E, T] -> [R, E] in metres.

    Counted over all 91 steps: the shared history adds zeros to the sum and ones to the count, as in the original.
    """
    offset = states[..., :3] - log[None, ..., :3]
    distance = np.sqrt(offset[..., 0] ** 2 + offset[..., 1] ** 2 + offset[..., 2] ** 2)
    total = np.where(log_valid[None], distance, np.float32(0)).sum(axis=-1, dtype=np.float32)
    return total / log_valid.sum(axis=-1).astype(np.float32)
