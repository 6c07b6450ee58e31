"""A path that proposals follow: interpolation by arc length, projection, the corridor ahead (NAVSIM ``PDMPath``)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.ops import substring

MIN_DISTANCE_M = 1e-5  # interpolation never asks for the very first vertex
CORRIDOR_QUAD_SEGMENTS = 16


class ProposalPath:
    """Poses [P,3] with their cumulative chord length ``progress`` [P]; joint vertices may stand twice."""

    def __init__(self, poses: NDArray[np.float64]) -> None:
        self.poses = poses.copy()
        self.poses[:, 2] = np.unwrap(poses[:, 2])
        steps = np.sqrt((np.diff(poses[:, :2], axis=0) ** 2).sum(axis=-1))
        self.progress = np.concatenate([[0.0], np.cumsum(steps)])
        self.line = shapely.LineString(poses[:, :2])

    def offset(self, left_m: float) -> ProposalPath:
        """Parallel path: each vertex moved along its own normal, positive to the left."""
        moved = self.poses.copy()
        moved[:, 0] -= left_m * np.sin(self.poses[:, 2])
        moved[:, 1] += left_m * np.cos(self.poses[:, 2])
        return ProposalPath(moved)

    @cached_property
    def length(self) -> float:
        """Length [m] as GEOS sums it; differs from ``progress[-1]`` in the last bits."""
        return float(self.line.length)

    def project(self, points: NDArray[np.object_] | shapely.Point) -> NDArray[np.float64] | float:
        """Arc length [m] of the nearest point of the path. Zero-length segments make GEOS raise a numpy warning."""
        with np.errstate(invalid="ignore"):
            return shapely.line_locate_point(self.line, points)

    def interpolate(self, distances: NDArray[np.float64]) -> NDArray[np.float64]:
        """[...,3] poses at arc lengths [m], clipped to [1e-5, length]; headings wrapped; NaN becomes 0 as in NAVSIM.

        y = (y1 - y0) / (s1 - s0) (s - s0) + y0 on the segment that ends at the first vertex with s1 >= s.
        """
        s = np.clip(distances, MIN_DISTANCE_M, self.progress[-1])
        high = np.clip(np.searchsorted(self.progress, s), 1, len(self.progress) - 1)
        low = high - 1
        span = self.progress[high] - self.progress[low]
        with np.errstate(invalid="ignore", divide="ignore"):
            slope = (self.poses[high] - self.poses[low]) / span[..., None]
        poses = slope * (s - self.progress[low])[..., None] + self.poses[low]
        poses[..., 2] = np.arctan2(np.sin(poses[..., 2]), np.cos(poses[..., 2]))
        return np.nan_to_num(poses, nan=0.0, posinf=np.inf, neginf=-np.inf)

    def corridor(self, start_m: float, end_m: float, half_width_m: float) -> shapely.Geometry:
        """Polygon around the path between two arc lengths: its vertices there, buffered with square caps."""
        start, end = np.clip([start_m, end_m], 0.0, self.progress[-1])
        inside = (start <= self.progress) & (self.progress <= end)
        if inside.sum() > 1:
            ahead = shapely.LineString(self.poses[inside, :2])
        else:
            ahead = substring(self.line, start, end)
        return ahead.buffer(half_width_m, quad_segs=CORRIDOR_QUAD_SEGMENTS, cap_style="square")
