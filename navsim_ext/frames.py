"""SE(2) poses: angle wrapping, composition, and the change between global and ego frames.

Legend: a pose is (x, y, heading) in metres, metres and radians; heading is counter-clockwise from +x.
The ego frame at time t has its origin at the rear axle, x forward, y left. Global frames are UTM, float64.
Leading dimensions broadcast; the last one has the three pose components.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

POSE_INTERVAL_S = 0.5  # NAVSIM's 2 Hz poses
NUM_HISTORY_POSES = 4  # t = -1.5, -1.0, -0.5, 0 s
NUM_FUTURE_POSES = 8  # t = 0.5 ... 4.0 s


class Pose(IntEnum):
    """Index of a component in the last axis of a pose array."""

    X = 0
    Y = 1
    HEADING = 2


def wrap_angle(angle: ArrayLike) -> NDArray[np.floating]:
    """Wraps angles [rad] to [-pi, pi): ((angle + pi) mod 2 pi) - pi."""
    return (np.asarray(angle) + np.pi) % (2.0 * np.pi) - np.pi


def rotate(vectors: ArrayLike, heading: ArrayLike) -> NDArray[np.floating]:
    """Rotates planar vectors [..., 2] counter-clockwise by heading [...] [rad]."""
    vectors = np.asarray(vectors)
    cos, sin = np.cos(heading), np.sin(heading)
    x, y = vectors[..., 0], vectors[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def to_global(poses: ArrayLike, origin: ArrayLike) -> NDArray[np.floating]:
    """Maps poses [..., 3] given in the frame of ``origin`` [..., 3] into the frame that ``origin`` is given in.

    p_global = R(h_o) p + t_o, h_global = wrap(h + h_o).
    """
    poses, origin = np.asarray(poses), np.asarray(origin)
    xy = rotate(poses[..., :2], origin[..., 2]) + origin[..., :2]
    return np.concatenate([xy, wrap_angle(poses[..., 2] + origin[..., 2])[..., None]], axis=-1)


def to_local(poses: ArrayLike, origin: ArrayLike) -> NDArray[np.floating]:
    """Inverse of :func:`to_global`: p = R(-h_o) (p_global - t_o), h = wrap(h_global - h_o)."""
    poses, origin = np.asarray(poses), np.asarray(origin)
    xy = rotate(poses[..., :2] - origin[..., :2], -origin[..., 2])
    return np.concatenate([xy, wrap_angle(poses[..., 2] - origin[..., 2])[..., None]], axis=-1)


def quaternion_to_heading(quaternion_wxyz: ArrayLike) -> NDArray[np.floating]:
    """Yaw [rad] of unit quaternions [..., 4] in (w, x, y, z) order (intrinsic z-y'-x'' angles)."""
    w, x, y, z = np.moveaxis(np.asarray(quaternion_wxyz, dtype=np.float64), -1, 0)
    return np.arctan2(2.0 * (w * z - x * y), 1.0 - 2.0 * (y * y + z * z))
