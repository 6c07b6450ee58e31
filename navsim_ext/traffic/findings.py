"""What is wrong in a recording itself: road users that overlap, vehicles that stand off the road.

No simulation can be right about these, and a metric that asks for contact or off-road should know them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.frames import rotate
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.geometry import boxes_intersect
from navsim_ext.traffic.codes import AgentKind, PieceKind
from navsim_ext.traffic.road_edges import signed_distance_to_areas, signed_distance_to_edges
from navsim_ext.traffic.scene import TrafficScene

MAP_REACH_M = 30.0
_CORNERS = 0.5 * np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])  # counter-clockwise from front left


@dataclass(frozen=True)
class Overlap:
    """Two road users whose full boxes share a point, while both were observed."""

    first: int  # agent_id
    second: int
    since: int  # first step of it
    steps: int


@dataclass(frozen=True)
class OffRoad:
    """A vehicle with a corner of its full box off the road."""

    agent: int  # agent_id
    since: int
    steps: int
    farthest_m: float  # off the road, of any corner at any step


def box_corners(scene: TrafficScene) -> NDArray[np.float64]:
    """[N,T,4,2] corners of all boxes, m, local; meaningless where not valid."""
    shape = scene.size[:, None, None, :2].astype(np.float64) * _CORNERS  # [N,1,4,2]
    pose = scene.pose.astype(np.float64)
    return rotate(shape, pose[:, :, None, 2]) + pose[:, :, None, :2]


def overlaps(scene: TrafficScene) -> list[Overlap]:
    """All pairs that overlap, by row; heights are not looked at (a bridge over a road counts)."""
    corners = box_corners(scene)
    radius = 0.5 * np.hypot(scene.size[:, 0], scene.size[:, 1]).astype(np.float64)
    count = scene.num_agents
    since, steps = np.full((count, count), -1, np.int64), np.zeros((count, count), np.int64)
    _overlaps(corners, scene.pose[..., :2].astype(np.float64), radius, scene.valid, since, steps)
    return [
        Overlap(int(scene.agent_id[i]), int(scene.agent_id[j]), int(since[i, j]), int(steps[i, j]))
        for i, j in np.argwhere(steps > 0)
    ]


@kernel
def _overlaps(corners, centre, radius, valid, since, steps):
    for t in range(valid.shape[1]):
        for i in range(valid.shape[0]):
            if not valid[i, t]:
                continue
            for j in range(i + 1, valid.shape[0]):
                if not valid[j, t]:
                    continue
                dx, dy = centre[i, t, 0] - centre[j, t, 0], centre[i, t, 1] - centre[j, t, 1]
                reach = radius[i] + radius[j]
                if dx * dx + dy * dy > reach * reach + 1e-6:
                    continue
                if boxes_intersect(corners[i, t], corners[j, t]):
                    if steps[i, j] == 0:
                        since[i, j] = t
                    steps[i, j] += 1


def off_road(scene: TrafficScene) -> list[OffRoad] | None:
    """Vehicles of which a corner is off the road at some step; None where the map tells neither edges nor areas.

    Drivable areas decide where the map has them, else the side of the nearest road edge. Where that is more than
    MAP_REACH_M away, the recording has left the map: nothing is said of that step.
    """
    areas = [scene.piece(row) for row in scene.pieces(PieceKind.DRIVABLE_AREA)]
    rows = scene.pieces(PieceKind.ROAD_EDGE)
    edges, closed = [scene.piece(row) for row in rows], [bool(scene.piece_closed[row]) for row in rows]
    if not areas and not any(len(edge) > 1 for edge in edges):
        return None
    vehicles = np.flatnonzero(scene.kind == AgentKind.VEHICLE)
    valid = scene.valid[vehicles]
    points = box_corners(scene)[vehicles][valid].reshape(-1, 2)
    inside = signed_distance_to_areas(points, areas) if areas else signed_distance_to_edges(points, edges, closed)
    depth = np.full(valid.shape, -np.inf)
    depth[valid] = -inside.reshape(-1, 4).min(axis=1)
    depth[depth > MAP_REACH_M] = -np.inf
    return [
        OffRoad(int(scene.agent_id[row]), int(np.argmax(off > 0.0)), int((off > 0.0).sum()), round(float(off.max()), 3))
        for row, off in zip(vehicles, depth)
        if (off > 0.0).any()
    ]
