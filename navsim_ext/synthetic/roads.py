"""Plane curves that roads are made of: resampling, offsets, turns with continuous curvature.

Legend: a line is [n,2] metres in the town's own frame, ordered along the direction of travel; headings and turn
angles in radians, counter-clockwise positive; offsets are positive to the left of the direction of travel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

Line = NDArray[np.float64]

TRANSITION_SHARE = 0.22  # part of a turn's length in which the curvature grows, and again in which it falls
_STRAIGHT_TURN = np.deg2rad(45.0)  # below this a connection is drawn as a quintic, above as a turn


def unit(heading: float) -> NDArray[np.float64]:
    return np.array([np.cos(heading), np.sin(heading)])


def arc_lengths(line: Line) -> NDArray[np.float64]:
    """[n] distance along the line from its start."""
    return np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])


def resample(line: Line, spacing: float) -> Line:
    """The same line with equal steps of about ``spacing`` metres; both ends are kept exactly."""
    distance = arc_lengths(line)
    count = max(int(round(distance[-1] / spacing)), 1) + 1
    at = np.linspace(0.0, distance[-1], count)
    sampled = np.column_stack([np.interp(at, distance, line[:, 0]), np.interp(at, distance, line[:, 1])])
    sampled[0], sampled[-1] = line[0], line[-1]
    return sampled


def headings(line: Line) -> NDArray[np.float64]:
    """[n] unwrapped tangent heading at each vertex (central differences)."""
    step = np.gradient(line, axis=0)
    return np.unwrap(np.arctan2(step[:, 1], step[:, 0]))


def offset(line: Line, distance: float | NDArray[np.float64]) -> Line:
    """The line moved sideways along its own normals, positive to the left."""
    heading = headings(line)
    normal = np.column_stack([-np.sin(heading), np.cos(heading)])
    return line + np.reshape(distance, (-1, 1)) * normal


def strip(line: Line, left: float, right: float) -> Line:
    """Ring [m,2] (open) of the strip between two offsets of a line: left edge forwards, right edge backwards."""
    return np.concatenate([offset(line, left), offset(line, right)[::-1]])


def cut(line: Line, start: float, end: float) -> Line:
    """The piece of a line between two distances from its start."""
    distance = arc_lengths(line)
    inner = (distance > start + 0.3) & (distance < end - 0.3)  # a tiny end piece would have a random direction
    at = np.concatenate([[start], distance[inner], [end]])
    return np.column_stack([np.interp(at, distance, line[:, 0]), np.interp(at, distance, line[:, 1])])


def bezier(points: NDArray[np.float64], spacing: float) -> Line:
    """Cubic Bezier curve of 4 control points [4,2]."""
    u = np.linspace(0.0, 1.0, 200)[:, None]
    curve = (1 - u) ** 3 * points[0] + 3 * (1 - u) ** 2 * u * points[1]
    curve = curve + 3 * (1 - u) * u**2 * points[2] + u**3 * points[3]
    return resample(curve, spacing)


def turn_shape(angle: float) -> Line:
    """A turn of ``angle`` starting at the origin along +x, of unit length, curvature a trapezoid over the length.

    kappa(u) rises linearly over TRANSITION_SHARE, is constant, and falls again, so that steering is continuous.
    """
    u = np.linspace(0.0, 1.0, 401)
    profile = np.minimum(np.minimum(u, 1.0 - u) / TRANSITION_SHARE, 1.0)
    heading = np.concatenate([[0.0], np.cumsum(0.5 * (profile[1:] + profile[:-1]))])
    heading *= angle / heading[-1]
    middle = 0.5 * (heading[1:] + heading[:-1])
    steps = np.column_stack([np.cos(middle), np.sin(middle)]) / 400.0
    return np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])


def connect(start: NDArray, start_heading: float, end: NDArray, end_heading: float, spacing: float) -> Line:
    """Line from one pose to another with continuous curvature that is zero at both ends.

    Nearly straight connections are quintic Hermite curves; turns are straight, transition, arc, transition, straight
    where the corner (intersection of the two tangents) lies ahead of the start and behind the end.
    """
    angle = float((end_heading - start_heading + np.pi) % (2 * np.pi) - np.pi)
    if abs(angle) < _STRAIGHT_TURN:
        length = float(np.hypot(*(end - start)))
        u = np.linspace(0.0, 1.0, 201)[:, None]
        h00 = 1 - 10 * u**3 + 15 * u**4 - 6 * u**5
        h10 = u - 6 * u**3 + 8 * u**4 - 3 * u**5
        h11 = -4 * u**3 + 7 * u**4 - 3 * u**5
        tangents = h10 * unit(start_heading) + h11 * unit(end_heading)
        return resample(h00 * start + (1 - h00) * end + length * tangents, spacing)
    basis = np.column_stack([unit(start_heading), -unit(end_heading)])
    ahead, behind = np.linalg.solve(basis, end - start)  # start + ahead*u0 = end - behind*u1
    behind = -behind if behind < 0 else behind
    tangent = min(ahead, behind)
    shape = turn_shape(angle)
    # Tangent length of the unit turn: it ends at (x, y) with heading `angle`, so its corner lies at x - y/tan(angle).
    unit_tangent = shape[-1, 0] - shape[-1, 1] / np.tan(angle)
    cos, sin = np.cos(start_heading), np.sin(start_heading)
    turn = shape * (tangent / unit_tangent) @ np.array([[cos, sin], [-sin, cos]])
    first = start + (ahead - tangent) * unit(start_heading)
    turn = turn + first
    pieces = [turn]
    if ahead - tangent > 1e-6:
        pieces.insert(0, start[None])
    if behind - tangent > 1e-6:
        pieces.append(end[None])
    line = np.concatenate(pieces)
    line[-1] = end
    return resample(line, spacing)


def spline(waypoints: NDArray, start_heading: float, end_heading: float, spacing: float) -> Line:
    """Cubic spline through waypoints [m,2] with given end headings."""
    distance = arc_lengths(waypoints)
    curve = CubicSpline(distance, waypoints, bc_type=((1, unit(start_heading)), (1, unit(end_heading))))
    return resample(curve(np.linspace(0.0, distance[-1], 400)), spacing)
