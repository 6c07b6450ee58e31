"""Distance to the nearest object and time to collision, compiled.

Shapes: ``R`` rollouts (1 for the log), ``S`` simulated objects of which the first ``E`` are scored, ``T`` = 91 steps,
``H`` = 80 future steps. Planar; float32 in the written order of operations. Boxes here are not the vehicles' own:
they are shrunk and rounded (factor 0.7), as the original has it; ``navsim_ext.closed_loop`` tests contact of full
boxes. Version matched: waymo-open-dataset 1.6.7, ``interaction_features`` and ``box_utils``.
"""

from __future__ import annotations

import numba
import numpy as np

from navsim_ext.realism.kinematics import speed
from navsim_ext.realism.rules import HISTORY_STEPS

FAR = np.float32(1e10)
"""Distance (m) that stands for "no other object" and "not valid"."""
MAXIMUM_TTC_S = np.float32(5.0)
_ROUNDING = np.float32(0.7)
_HALF = np.float32(0.5)
_TWO = np.float32(2.0)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_SAME_WAY = np.float32(np.deg2rad(75.0))
_ALIGNED = np.float32(np.deg2rad(10.0))
_SIDE_OVERLAP = np.float32(-0.5)
_BROAD_MARGIN_M = np.float32(0.05)
_FIRST = np.array((0, 0, 1, 1, 2, 2, 3, 3))
_SECOND = np.array((0, 1, 1, 2, 2, 3, 3, 0))


def rounded_cores(states: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners [R, S, H, 4, 2] of the boxes' cores, and the radius [S] that rounds them.

    r = min(l, w) * 0.7 / 2; the core has length l - 2r and width w - 2r. Corners run counter-clockwise: front left,
    rear left, rear right, front right.
    """
    length, width = size[:, 0], size[:, 1]
    radius = np.minimum(length, width) * _ROUNDING / _TWO
    half_length = (length - _TWO * radius) / _TWO
    half_width = (width - _TWO * radius) / _TWO
    future = states[:, :, HISTORY_STEPS:]
    cosine, sine = np.cos(future[..., 3]), np.sin(future[..., 3])
    corners = np.empty((*future.shape[:3], 4, 2), np.float32)
    for corner, (along, across) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        x = (np.float32(along) * half_length)[None, :, None]
        y = (np.float32(across) * half_width)[None, :, None]
        corners[..., corner, 0] = future[..., 0] + (x * cosine - y * sine)
        corners[..., corner, 1] = future[..., 1] + (x * sine + y * cosine)
    return corners, radius


@numba.njit(cache=True)
def _lowest(corners):
    """Index of the corner with the least y, the first on ties."""
    best = 0
    for index in range(1, 4):
        if corners[index, 1] < corners[best, 1]:
            best = index
    return best


@numba.njit(cache=True, error_model="numpy")
def signed_distance(corners_i, corners_j, vertices):
    """Signed distance of two convex boxes [4, 2]: that of the origin to the Minkowski sum of i and minus j.

    Outside it is the distance of the boxes, inside minus the depth of their overlap. ``vertices`` [8, 2] is scratch.
    """
    negative = -corners_j
    start_i, start_j = _lowest(corners_i), _lowest(negative)
    next_i, next_j = (start_i + 1) % 4, (start_j + 1) % 4
    edge_i_x, edge_i_y = corners_i[next_i, 0] - corners_i[start_i, 0], corners_i[next_i, 1] - corners_i[start_i, 1]
    edge_j_x, edge_j_y = negative[next_j, 0] - negative[start_j, 0], negative[next_j, 1] - negative[start_j, 1]
    length_i = np.sqrt(edge_i_x * edge_i_x + edge_i_y * edge_i_y)
    length_j = np.sqrt(edge_j_x * edge_j_x + edge_j_y * edge_j_y)
    cross = (edge_i_x / length_i) * (edge_j_y / length_j) - (edge_i_y / length_i) * (edge_j_x / length_j)
    for vertex in range(8):
        if cross >= _ZERO:
            from_i, from_j = (_SECOND[vertex] + start_i) % 4, (_FIRST[vertex] + start_j) % 4
        else:
            from_i, from_j = (_FIRST[vertex] + start_i) % 4, (_SECOND[vertex] + start_j) % 4
        vertices[vertex, 0] = corners_i[from_i, 0] + negative[from_j, 0]
        vertices[vertex, 1] = corners_i[from_i, 1] + negative[from_j, 1]
    inside = True
    nearest = FAR
    for vertex in range(8):
        following = (vertex + 1) % 8
        u_x, u_y = vertices[following, 0] - vertices[vertex, 0], vertices[following, 1] - vertices[vertex, 1]
        length = np.sqrt(u_x * u_x + u_y * u_y)
        q_x, q_y = -vertices[vertex, 0], -vertices[vertex, 1]
        nearest = min(nearest, np.sqrt(q_x * q_x + q_y * q_y))
        if length > _ZERO:
            u_x, u_y = u_x / length, u_y / length
            outward = u_y * q_x - u_x * q_y
            if outward > _ZERO:
                inside = False
            along = (u_x * q_x + u_y * q_y) / length
            if _ZERO <= along <= _ONE:
                nearest = min(nearest, abs(outward))
    return -nearest if inside else nearest


@numba.njit(cache=True, error_model="numpy")
def _nearest_distances(corners, radius, reach, states, valid, scored, history):
    rollouts, objects, steps = corners.shape[0], corners.shape[1], corners.shape[2]
    result = np.full((rollouts, scored, steps), FAR, np.float32)
    vertices = np.empty((8, 2), np.float32)
    for rollout in range(rollouts):
        for i in range(scored):
            for step in range(steps):
                time = step + history
                if not valid[rollout, i, time]:
                    continue
                best = FAR
                for j in range(objects):
                    if j == i or not valid[rollout, j, time]:
                        continue
                    dx = states[rollout, j, time, 0] - states[rollout, i, time, 0]
                    dy = states[rollout, j, time, 1] - states[rollout, i, time, 1]
                    if np.sqrt(dx * dx + dy * dy) - reach[i] - reach[j] - _BROAD_MARGIN_M > best:
                        continue
                    distance = signed_distance(corners[rollout, i, step], corners[rollout, j, step], vertices)
                    best = min(best, distance - radius[i] - radius[j])
                result[rollout, i, step] = best
    return result


def nearest_distances(states: np.ndarray, valid: np.ndarray, size: np.ndarray, scored: int) -> np.ndarray:
    """Signed distance (m) of each scored object's rounded box to the nearest other, [R, E, H]; below 0 is a collision.

    ``states`` [R, S, T, 4], ``valid`` [R, S, T], ``size`` [S, 3]. 1e10 where the object is not valid or has no other.
    """
    corners, radius = rounded_cores(states, size)
    reach = np.hypot(size[:, 0], size[:, 1]) / _TWO
    return _nearest_distances(corners, radius, reach, states, valid, scored, HISTORY_STEPS)


@numba.njit(cache=True)
def _time_to_collision(states, valid, planar_speed, size, scored, history):
    rollouts, objects, steps = states.shape[0], states.shape[1], states.shape[2]
    result = np.full((rollouts, scored, steps - history), MAXIMUM_TTC_S, np.float32)
    for rollout in range(rollouts):
        for i in range(scored):
            for time in range(history, steps):
                heading = states[rollout, i, time, 3]
                cosine, sine = np.cos(heading), np.sin(heading)
                leader, least = -1, np.float32(np.inf)
                for j in range(objects):
                    if not valid[rollout, j, time]:
                        continue
                    turn = abs(states[rollout, j, time, 3] - heading)
                    if turn > _SAME_WAY:
                        continue
                    dx = states[rollout, j, time, 0] - states[rollout, i, time, 0]
                    dy = states[rollout, j, time, 1] - states[rollout, i, time, 1]
                    x, y = cosine * dx + sine * dy, cosine * dy - sine * dx
                    turn_cosine, turn_sine = abs(np.cos(turn)), abs(np.sin(turn))
                    along = _HALF * (size[j, 0] * turn_cosine + size[j, 1] * turn_sine)
                    across = _HALF * (size[j, 0] * turn_sine + size[j, 1] * turn_cosine)
                    gap = x - size[i, 0] / _TWO - along
                    overlap = abs(y) - size[i, 1] / _TWO - across
                    if gap <= _ZERO or overlap >= _ZERO:
                        continue
                    if (overlap < _SIDE_OVERLAP or turn <= _ALIGNED) and gap < least:
                        leader, least = j, gap
                if leader < 0:
                    continue
                closing = planar_speed[rollout, i, time] - planar_speed[rollout, leader, time]
                if closing > _ZERO:
                    result[rollout, i, time - history] = min(least / closing, MAXIMUM_TTC_S)
    return result


def times_to_collision(states: np.ndarray, valid: np.ndarray, size: np.ndarray, scored: int) -> np.ndarray:
    """Seconds until each scored object would reach the object that it follows, [R, E, H], at most 5.

    The difference of headings is taken as the data has it, not wrapped: two aligned cars may differ by 2 pi and then do
    not follow each other. That is the original's rule; headings must therefore arrive as recorded.
    """
    planar = speed(states[..., 0], states[..., 1])
    return _time_to_collision(states, valid, planar, size, scored, HISTORY_STEPS)
