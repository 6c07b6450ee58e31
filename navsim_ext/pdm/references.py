"""From predicted poses to the 41 reference poses that the tracker follows.

Source: NAVSIM ``evaluate/pdm_score.py`` (transform_trajectory, get_trajectory_as_array) and nuPlan's
InterpolatedTrajectory. Times pass through float seconds and are cut to whole microseconds: at epoch times that moves
a sample by up to 1 us (1e-5 m at 10 m/s), so it is done in the same floating-point steps here.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Float64

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import NUM_STEPS, POSE_INTERVAL_S, STEP_S, principal, unwrap_correction


@kernel
def query_time_us(time_us: int, step: int) -> int:
    """Time [us] of simulation step ``step``: int((step * 0.1 + t0) * 1e6), cut towards zero."""
    return int((step * STEP_S + time_us * 1e-6) * 1e6)


@kernel
def interpolate_poses(node_times, nodes, time_us, references) -> None:
    """Linear interpolation of nodes [N,3] at ``node_times`` [N] us onto ``references`` [41,3].

    Headings are unwrapped along the nodes, interpolated and wrapped to [-pi, pi).
    Equation: y = (y1 - y0) / (t1 - t0) * (t - t0) + y0, in this order of operations.
    """
    count = len(node_times)
    unwrapped = np.empty(count)
    unwrapped[0] = nodes[0, 2]
    correction = 0.0
    for i in range(1, count):
        correction = unwrap_correction(nodes[i - 1, 2], nodes[i, 2], correction)
        unwrapped[i] = nodes[i, 2] + correction
    high = 1
    for step in range(NUM_STEPS):
        time = min(max(query_time_us(time_us, step), node_times[0]), node_times[count - 1])
        while high < count - 1 and node_times[high] < time:
            high += 1
        low = high - 1
        span = float(node_times[high] - node_times[low])
        elapsed = float(time - node_times[low])
        references[step, 0] = (nodes[high, 0] - nodes[low, 0]) / span * elapsed + nodes[low, 0]
        references[step, 1] = (nodes[high, 1] - nodes[low, 1]) / span * elapsed + nodes[low, 1]
        references[step, 2] = principal((unwrapped[high] - unwrapped[low]) / span * elapsed + unwrapped[low])


@kernel
def references_from_poses(poses, interval, ego_state, time_us, references) -> None:
    """Poses [M,3] in the ego frame, ``interval`` seconds apart -> ``references`` [41,3] in the global frame.

    Nodes are the ego pose now and the poses at t0 + interval, t0 + 2 interval ... (0.5 ... 4.0 s as a rule).
    """
    nodes = np.empty((len(poses) + 1, 3))
    node_times = np.empty(len(poses) + 1, dtype=np.int64)
    nodes[0, 0], nodes[0, 1], nodes[0, 2] = ego_state[0], ego_state[1], ego_state[2]
    node_times[0] = time_us
    cos, sin = math.cos(ego_state[2]), math.sin(ego_state[2])
    for i in range(len(poses)):
        x, y, heading = poses[i, 0], poses[i, 1], poses[i, 2]
        pose_cos, pose_sin = math.cos(heading), math.sin(heading)
        nodes[i + 1, 0] = cos * x - sin * y + ego_state[0]
        nodes[i + 1, 1] = sin * x + cos * y + ego_state[1]
        nodes[i + 1, 2] = math.atan2(sin * pose_cos + cos * pose_sin, cos * pose_cos - sin * pose_sin)
        node_times[i + 1] = int((time_us * 1e-6 + (i * interval + interval)) * 1e6)
    interpolate_poses(node_times, nodes, time_us, references)


@kernel
def _references_from_trajectory(trajectory, time_us):
    node_times = np.empty(len(trajectory), dtype=np.int64)
    for i in range(len(trajectory)):
        node_times[i] = time_us + i * 100_000
    references = np.empty((NUM_STEPS, 3))
    interpolate_poses(node_times, trajectory, time_us, references)
    return references


def references_from_trajectory(trajectory: Float64[np.ndarray, "N 3"], time_us: int) -> Float64[np.ndarray, "41 3"]:
    """Global poses [N >= 41,3] exactly 0.1 s apart from now on (a PDM-Closed trajectory) -> references [41,3]."""
    return _references_from_trajectory(np.ascontiguousarray(trajectory, dtype=np.float64), int(time_us))


def references_from_predictions(
    poses: Float[np.ndarray, "G M 3"],
    ego_state: Float64[np.ndarray, " 11"],
    time_us: int,
    interval: float = POSE_INTERVAL_S,
) -> Float64[np.ndarray, "G 41 3"]:
    """Predicted poses [G,M,3] in the ego frame of now, ``interval`` seconds apart -> global references [G,41,3]."""
    poses = np.ascontiguousarray(poses, dtype=np.float64)
    references = np.empty((len(poses), NUM_STEPS, 3))
    for pose, reference in zip(poses, references):
        references_from_poses(pose, interval, np.asarray(ego_state, dtype=np.float64), int(time_us), reference)
    return references
