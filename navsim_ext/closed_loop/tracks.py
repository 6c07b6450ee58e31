"""Recorded tracks on the world's clock: one pose every 0.1 s, and for each whether it was observed.

Nothing that was filled in passes for an observation: between two observations up to 0.5 s apart at a step other than
0.1 s (logs at 2 Hz) the path is a cubic Hermite curve on positions and velocities, across longer gaps a straight line,
and both are marked INTERPOLATED. Before the first and after the last observation there is nothing.

Legend: N road users, T steps of ``dt`` s, U steps of 0.1 s. Poses are (x, y, heading), headings unwrapped.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

ABSENT, INTERPOLATED, OBSERVED = 0, 1, 2
HERMITE_GAP_S = 0.5 + 1e-6  # longest gap that a cubic bridges


def steps_per_interval(scene: TrafficScene) -> int:
    """How many steps of 0.1 s lie between two of a scene; raises DataError where that is not a whole number."""
    ratio = scene.dt / STEP_S
    if abs(ratio - round(ratio)) > 1e-3 or round(ratio) < 1:
        raise DataError(
            f"scene {scene.id}: dt is {scene.dt} s; the world moves in steps of {STEP_S} s and takes multiples of it"
        )
    return round(ratio)


def upsample(scene: TrafficScene) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """(poses [N,U,3], state [N,U] of ABSENT, INTERPOLATED, OBSERVED); step 0 is the scene's step 0."""
    ratio = steps_per_interval(scene)
    N, T = scene.valid.shape
    U = (T - 1) * ratio + 1
    poses = np.zeros((N, U, 3))
    state = np.zeros((N, U), np.uint8)
    velocity = scene.velocity().astype(np.float64)
    for n in range(N):
        at = np.flatnonzero(scene.valid[n])
        if not len(at):
            continue
        poses[n, at * ratio] = scene.pose[n, at]
        state[n, at * ratio] = OBSERVED
        for first, last in itertools.pairwise(at):
            steps = (last - first) * ratio
            if steps == 1:
                continue
            u = np.arange(1, steps) / steps
            a, b = scene.pose[n, first].astype(np.float64), scene.pose[n, last].astype(np.float64)
            between = a + u[:, None] * (b - a)
            span = steps * STEP_S
            if ratio > 1 and span <= HERMITE_GAP_S:
                between[:, :2] = _hermite(a[:2], b[:2], span * velocity[n, first], span * velocity[n, last], u[:, None])
            inside = slice(first * ratio + 1, last * ratio)
            poses[n, inside], state[n, inside] = between, INTERPOLATED
    return poses, state


def _hermite(a, b, da, db, u) -> NDArray[np.float64]:
    return (2 * u**3 - 3 * u**2 + 1) * a + (u**3 - 2 * u**2 + u) * da + (-2 * u**3 + 3 * u**2) * b + (u**3 - u**2) * db


def to_frame(poses: NDArray[np.floating], frame: NDArray[np.floating]) -> NDArray[np.float64]:
    """Poses [...,3] in the axes of ``frame`` (x, y, heading); headings are turned, not wrapped."""
    cos, sin = np.cos(frame[2]), np.sin(frame[2])
    d = np.asarray(poses[..., :2], np.float64) - frame[:2]
    x, y = cos * d[..., 0] + sin * d[..., 1], -sin * d[..., 0] + cos * d[..., 1]
    return np.stack([x, y, poses[..., 2] - frame[2]], axis=-1)


def points_to_frame(points: NDArray[np.floating], frame: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points [...,2] in the axes of ``frame``."""
    return to_frame(np.concatenate([points, np.zeros((*points.shape[:-1], 1))], axis=-1), frame)[..., :2]


def from_frame(poses: NDArray[np.floating], frame: NDArray[np.floating]) -> NDArray[np.float64]:
    """Inverse of :func:`to_frame`."""
    cos, sin = np.cos(frame[2]), np.sin(frame[2])
    x, y = np.asarray(poses[..., 0], np.float64), np.asarray(poses[..., 1], np.float64)
    return np.stack(
        [frame[0] + cos * x - sin * y, frame[1] + sin * x + cos * y, np.asarray(poses[..., 2], np.float64) + frame[2]],
        axis=-1,
    )
