"""What is on the road while a proposal is scored: boxes and red connectors at each step, as flat arrays.

One structure serves log replay (a map per 0.1 s step) and PDM-Closed's forecast (a map per 0.2 s, two steps each), and
both scorer versions at once: presence is a bit per version.

Legend: M occupancy maps, n objects, r red connectors, T steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import box_corners

V1, V2 = 1, 2  # bits of ``presence`` and ``ignored``
STOPPED_SPEED = 0.05  # m/s, an object at or below it counts as stopped
AGENT_TYPES = (0, 1, 2)  # vehicle, pedestrian, bicycle: numbers are positions in navsim_ext.scene.OBJECT_TYPES


class Traffic(NamedTuple):
    """Objects (always boxes) and red connectors over time. Coordinates are global metres."""

    poses: NDArray[np.float64]  # [M,n,3] box centre x, y, heading; NaN where absent in all versions
    half_sizes: NDArray[np.float64]  # [n,2] half length, half width [m]
    radii: NDArray[np.float64]  # [n] half diagonal [m]
    swept: NDArray[np.float64]  # [n,4] min x, min y, max x, max y of all its boxes
    presence: NDArray[np.uint8]  # [M,n] bits V1, V2: in the occupancy map
    ignored: NDArray[np.uint8]  # [n] bits V1, V2: known to overlap the ego already, never counted
    is_agent: NDArray[np.bool_]  # [n] vehicle, pedestrian or bicycle: a collision costs 1, else 0.5
    is_stopped: NDArray[np.bool_]  # [n] static type, or slow at first appearance
    red_polygons: NDArray[np.int32]  # [r] rows of the map's PolygonTable
    red_presence: NDArray[np.uint8]  # [M,r] bits V1, V2: red at that time
    map_of_step: NDArray[np.int64]  # [T] occupancy map of each 0.1 s step
    unwrapped: bool  # headings are still to be wrapped, by atan2(sin, cos) as in NAVSIM's interpolation


def make_traffic(
    poses: NDArray[np.float64],
    sizes: NDArray[np.float64],
    types: NDArray[np.integer],
    speeds: NDArray[np.float64],
    *,
    presence: NDArray[np.uint8] | None = None,
    ignored: NDArray[np.uint8] | None = None,
    red_polygons: NDArray[np.integer] | None = None,
    red_presence: NDArray[np.uint8] | None = None,
    map_of_step: NDArray[np.integer] | None = None,
) -> Traffic:
    """Completes a Traffic from poses [M,n,3], sizes [n,>=2] (length, width), types [n] and first speeds [n] [m/s].

    Defaults: present in both versions wherever the pose is finite, nothing ignored, no red connectors, one map a step.
    """
    poses = np.ascontiguousarray(poses, dtype=np.float64)
    maps, count = poses.shape[:2]
    half_sizes = np.ascontiguousarray(np.asarray(sizes, dtype=np.float64)[:, :2] / 2.0).reshape(count, 2)
    if presence is None:
        presence = np.where(np.isfinite(poses).all(axis=-1), V1 | V2, 0)
    is_agent = np.isin(types, AGENT_TYPES)
    red = np.zeros(0, dtype=np.int32) if red_polygons is None else np.asarray(red_polygons, dtype=np.int32)
    radii = np.hypot(half_sizes[:, 0], half_sizes[:, 1])
    presence = np.ascontiguousarray(presence, dtype=np.uint8)
    return Traffic(
        poses=poses,
        half_sizes=half_sizes,
        radii=radii,
        swept=swept_bounds(poses, presence, radii),
        presence=presence,
        ignored=np.zeros(count, dtype=np.uint8) if ignored is None else np.asarray(ignored, dtype=np.uint8),
        is_agent=is_agent,
        is_stopped=~is_agent | (np.asarray(speeds) <= STOPPED_SPEED),
        red_polygons=red,
        red_presence=np.full((maps, len(red)), V1 | V2, dtype=np.uint8)
        if red_presence is None
        else np.ascontiguousarray(red_presence, dtype=np.uint8),
        map_of_step=np.arange(maps) if map_of_step is None else np.asarray(map_of_step, dtype=np.int64),
        unwrapped=False,
    )


@kernel
def swept_bounds(poses, presence, radii):
    """Bounds [n,4] of each object over all maps that it is present in; empty (inf, -inf) when in none."""
    maps, count = presence.shape
    swept = np.empty((count, 4))
    for j in range(count):
        swept[j, 0], swept[j, 1], swept[j, 2], swept[j, 3] = math.inf, math.inf, -math.inf, -math.inf
    for m in range(maps):
        for j in range(count):
            if presence[m, j]:
                x, y, r = poses[m, j, 0], poses[m, j, 1], radii[j]
                swept[j, 0], swept[j, 1] = min(swept[j, 0], x - r), min(swept[j, 1], y - r)
                swept[j, 2], swept[j, 3] = max(swept[j, 2], x + r), max(swept[j, 3], y + r)
    return swept


@kernel
def object_box(traffic, m: int, j: int, corners) -> None:
    """Writes the corners [4,2] of object j in map m."""
    heading = traffic.poses[m, j, 2]
    if traffic.unwrapped:  # wrapped here, for the few boxes that come near, and not for all
        heading = math.atan2(math.sin(heading), math.cos(heading))
    box_corners(
        traffic.poses[m, j, 0],
        traffic.poses[m, j, 1],
        heading,
        traffic.half_sizes[j, 0],
        traffic.half_sizes[j, 1],
        corners,
    )


@kernel
def objects_near(traffic, bounds, version: int):
    """Indices of objects that come into ``bounds`` [4] at some time and are not ignored."""
    count = len(traffic.radii)
    near = np.empty(count, dtype=np.int64)
    found = 0
    for j in range(count):
        swept = traffic.swept
        if (
            not traffic.ignored[j] & version
            and swept[j, 0] <= bounds[2]
            and swept[j, 1] <= bounds[3]
            and swept[j, 2] >= bounds[0]
            and swept[j, 3] >= bounds[1]
        ):
            near[found] = j
            found += 1
    return near[:found]
