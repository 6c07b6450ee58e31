"""What PDM-Closed believes the world will do: constant velocity along the heading (NAVSIM ``PDMObservation.update``).

Legend: n objects in list order (static ones, vehicles, pedestrians, bicycles; each nearest first; then r red
connectors). One occupancy map every 0.2 s, M = 26 maps up to 5.0 s; step t (0.1 s) uses map t // 2.

The input are the annotations of the frame now, not the log replay: objects that the replay shows at every step
because they were seen once in the future are unknown to the planner. NAVSIM's list of collided tracks is never cleared
between the scenes that one process builds; here it is reset for each scene, so that results do not depend on the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.frames import wrap_angle
from navsim_ext.pdm.observation import MOVING_TYPES, ObjectsNow

MAP_RADIUS_M = 100.0
STEPS_PER_MAP = 2
NUM_MAPS = 26
STEP_S = 0.1
MAX_STATIC = 50
MAX_MOVING = {0: 50, 1: 25, 2: 10}  # vehicles, pedestrians, bicycles
STRTREE_NODE_CAPACITY = 10  # decides the order of query results, hence ties between leading objects


@dataclass(frozen=True, eq=False)
class Forecast:
    """Objects in list order and where they will be. ``is_red`` marks the red connectors at the end of the list."""

    tokens: tuple[str, ...]  # n; "red_light_<connector>" for red connectors
    types: NDArray[np.int8]  # [n] -1 for red connectors
    headings: NDArray[np.float64]  # [n]
    velocities: NDArray[np.float64]  # [n,2] m/s as annotated
    displacement: NDArray[np.float64]  # [n,2] m/s along the heading, against it for reversing objects
    centers: NDArray[np.float64]  # [boxes,2] now
    sizes: NDArray[np.float64]  # [boxes,3] length, width, height
    corners: NDArray[np.float64]  # [boxes,4,2] now: front-left, rear-left, rear-right, front-right
    red_polygons: tuple[shapely.Geometry, ...]  # r, of the last entries
    collided: NDArray[np.bool_]  # [n] touches the ego now (a red connector: contains it): ignored by the planner

    @property
    def is_red(self) -> NDArray[np.bool_]:
        return self.types < 0

    @property
    def num_boxes(self) -> int:
        return len(self.tokens) - len(self.red_polygons)

    @cached_property
    def corners_over_time(self) -> NDArray[np.float64]:
        """[M,boxes,4,2] corners at each map: c(t) = c + t d, t = 0.0, 0.2 ... 5.0 s."""
        boxes = self.num_boxes
        seconds = np.arange(0, NUM_MAPS * STEPS_PER_MAP, STEPS_PER_MAP).astype(np.float64) * STEP_S
        moved = seconds[:, None, None] * self.displacement[None, :boxes]
        return self.corners[None] + moved[:, :, None, :]

    @cached_property
    def polygons_over_time(self) -> NDArray[np.object_]:
        """[M,n] shapely polygons of all objects, red connectors included."""
        polygons = np.empty((NUM_MAPS, len(self.tokens)), dtype=object)
        boxes = self.num_boxes
        if boxes:
            rings = np.concatenate([self.corners_over_time, self.corners_over_time[:, :, :1]], axis=2)
            polygons[:, :boxes] = shapely.polygons(rings)
        polygons[:, boxes:] = list(self.red_polygons)
        return polygons

    def tree(self, number: int) -> shapely.STRtree:
        """Search tree over the list at one map, built as NAVSIM builds it."""
        return shapely.STRtree(self.polygons_over_time[number], node_capacity=STRTREE_NODE_CAPACITY)


def box_corners(
    poses: NDArray[np.float64], half_length: NDArray[np.float64] | float, half_width: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """[...,4,2] corners (front-left, rear-left, rear-right, front-right) of boxes with centre poses [...,3].

    c + (+-w (cos(h + pi/2), sin(h + pi/2)) +- l (cos h, sin h)): nuPlan's order of operations, because at UTM
    northings one rounding is 1e-9 m.
    """
    heading = poses[..., 2]
    forward = np.stack([np.cos(heading), np.sin(heading)], axis=-1) * np.asarray(half_length)[..., None]
    side = heading + np.pi / 2.0
    left = np.stack([np.cos(side), np.sin(side)], axis=-1) * np.asarray(half_width)[..., None]
    offsets = np.stack([left + forward, left - forward, -left - forward, -left + forward], axis=-2)
    return poses[..., None, :2] + offsets


def forecast(
    objects: ObjectsNow,
    ego_center: NDArray[np.float64],
    ego_footprint: shapely.Geometry,
    red_connectors: list[tuple[str, shapely.Geometry]],
) -> Forecast:
    """The planner's world from the objects of the frame now.

    ``ego_center`` [3] and ``ego_footprint`` global; ``red_connectors``: (fid, polygon) of the red connectors on the
    corrected route, in the order of the log.
    """
    distance = ((objects.poses[:, :2] - ego_center[:2]) ** 2).sum(axis=-1) ** 0.5
    chosen = _nearest(objects.types, distance)
    poses, types, velocities = objects.poses[chosen], objects.types[chosen], objects.velocities[chosen]
    headings = poses[:, 2]
    speed = np.hypot(velocities[:, 0], velocities[:, 1])
    drives_forward = np.abs(wrap_angle(headings - np.arctan2(velocities[:, 1], velocities[:, 0]))) < np.pi / 2
    along = np.where(drives_forward, headings, wrap_angle(headings + np.pi))
    displacement = np.stack([np.cos(along), np.sin(along)], axis=-1) * speed[:, None]
    displacement[~np.isin(types, list(MOVING_TYPES))] = 0.0
    corners = box_corners(poses, objects.sizes[chosen, 0] / 2.0, objects.sizes[chosen, 1] / 2.0)

    red = len(red_connectors)
    tokens = tuple(objects.tokens[i] for i in chosen) + tuple(f"red_light_{fid}" for fid, _ in red_connectors)
    touched = np.zeros(len(tokens), dtype=bool)
    if len(chosen):
        touched[: len(chosen)] = shapely.intersects(shapely.polygons(corners), ego_footprint)
    for row, (_, polygon) in enumerate(red_connectors):
        touched[len(chosen) + row] = bool(shapely.within(ego_footprint, polygon))
    return Forecast(
        tokens=tokens,
        types=np.concatenate([types, np.full(red, -1, dtype=np.int8)]),
        headings=np.concatenate([headings, np.zeros(red)]),
        velocities=np.concatenate([velocities, np.zeros((red, 2))]),
        displacement=np.concatenate([displacement, np.zeros((red, 2))]),
        centers=poses[:, :2],
        sizes=objects.sizes[chosen],
        corners=corners,
        red_polygons=tuple(polygon for _, polygon in red_connectors),
        collided=touched,
    )


def _nearest(types: NDArray[np.int8], distance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices in list order: static objects, vehicles, pedestrians, bicycles; each nearest first and capped."""
    within = distance <= MAP_RADIUS_M
    groups = [(~np.isin(types, list(MAX_MOVING)), MAX_STATIC)]
    groups += [(types == kind, limit) for kind, limit in MAX_MOVING.items()]
    chosen: list[NDArray[np.int64]] = []
    for member, limit in groups:
        indices = np.flatnonzero(member & within)
        chosen.append(indices[np.argsort(distance[indices])][:limit])
    return np.concatenate(chosen).astype(np.int64)
