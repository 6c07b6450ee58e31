"""Which vehicles of a scene react, on which lane, from where: all that the map says to the reactive traffic.

Source: NAVSIM ``navsim_idm_agents_builder.py`` and nuPlan's ``get_starting_segment``, ``create_path_from_se2``.

Legend: n vehicles of the annotation now, in list order; p distinct paths with v vertices together.
* Start segment of a centre: the lanes that strictly contain it; where none does and an intersection does, the lane
  connectors whose polygon contains it. Of several the one with the least |h_path - h| (the difference is not wrapped).
* h_path: from the nearest point at arc length s of the baseline to the point at s + 0.5 m.
* A vehicle reacts ("active") when its box, snapped onto the baseline, is at most 3 m away and touches neither the ego
  nor the box of an earlier one.
"""

from __future__ import annotations

import math

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.maps.layers import LaneLayer
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.pdm.ego import HALF_LENGTH, HALF_WIDTH, REAR_AXLE_TO_CENTER, box_corners
from navsim_ext.pdm.geometry import boxes_intersect
from navsim_ext.pdm.traffic_agents import IS_ACTIVE, START_COLUMNS, STAYS, TrafficAgents

SNAP_THRESHOLD = 3.0  # m
HEADING_STEP = 0.5  # m along the baseline
TARGET_SPEED = 10.0  # m/s, where no lane says another
STANDING_SPEED = 0.1  # m/s
REPEATED = 1e-8  # m: a vertex this close to the next one is dropped


def traffic_agents(
    vector_map: VectorMap,
    ego_pose: NDArray[np.float64],
    rows: NDArray[np.integer],
    poses: NDArray[np.float64],
    sizes: NDArray[np.float64],
    velocities: NDArray[np.float64],
) -> TrafficAgents:
    """``ego_pose`` [3] rear axle now; the vehicles now: ``rows`` [n], ``poses`` [n,3], ``sizes`` [n,>=2] and
    ``velocities`` [n,2], in list order."""
    boxes = [_box(ego_pose[:2] + REAR_AXLE_TO_CENTER * _direction(ego_pose[2]), ego_pose[2], HALF_LENGTH, HALF_WIDTH)]
    count = len(rows)
    kinds, path = np.zeros(count, dtype=np.uint8), np.full(count, -1, dtype=np.int32)
    start = np.zeros((count, len(START_COLUMNS)))
    numbers: dict[tuple[int, int], int] = {}
    paths: list[NDArray[np.float64]] = []
    target = TARGET_SPEED
    for i in range(count):
        point = shapely.Point(poses[i, 0], poses[i, 1])
        speed = math.hypot(velocities[i, 0], velocities[i, 1])
        lanes = _containing(vector_map.lanes, point)
        in_lane, layer = len(lanes) > 0, vector_map.lanes
        if not in_lane and len(_containing(vector_map.intersections, point)):
            in_lane, layer = True, vector_map.lane_connectors
            lanes = _containing(layer, point)
        if speed < STANDING_SPEED and not in_lane:
            kinds[i] |= STAYS
        if not len(lanes):
            continue
        snapped = [snap(layer.baseline_of(lane)[:, :2], point) for lane in lanes]
        best = int(np.argmin([abs(heading - poses[i, 2]) for _, _, heading in snapped]))
        progress, (x, y), heading = snapped[best]
        if math.hypot(x - poses[i, 0], y - poses[i, 1]) > SNAP_THRESHOLD:
            kinds[i] |= STAYS
            continue
        box = _box(np.array([x, y]), heading, sizes[i, 0] / 2.0, sizes[i, 1] / 2.0)
        if any(boxes_intersect(box, other) for other in boxes):
            continue
        boxes.append(box)
        limit = float(layer.speed_limit[lanes[best]])
        limit = 0.0 if math.isnan(limit) else limit
        target = limit or target  # without a limit NAVSIM goes on with the one of the vehicle before
        kinds[i] |= IS_ACTIVE
        start[i] = progress, speed, target, limit, x, y, heading
        key = (id(layer), int(lanes[best]))
        if key not in numbers:
            numbers[key] = len(paths)
            paths.append(path_of(layer.baseline_of(lanes[best])))
        path[i] = numbers[key]
    return TrafficAgents(
        np.asarray(rows, dtype=np.int32),
        kinds,
        path,
        start,
        np.concatenate([[0], np.cumsum([len(vertices) for vertices in paths])]).astype(np.int64),
        np.concatenate(paths) if paths else np.zeros((0, 4)),
    )


def path_of(baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Baseline [P,3] -> path [<= P-1,4] (x, y, unwrapped heading, progress): repeated vertices and always the last one
    fall out, as NAVSIM drops them."""
    steps = np.diff(baseline[:, :2], axis=0)
    lengths = np.linalg.norm(steps.T, axis=0)
    progress = np.concatenate([[0.0], np.cumsum(lengths)])
    kept = np.flatnonzero(~(np.diff(progress) <= REPEATED))
    return np.column_stack([baseline[kept, :2], np.unwrap(baseline[kept, 2]), progress[kept]])


def snap(baseline: NDArray[np.float64], point: shapely.Point) -> tuple[float, tuple[float, float], float]:
    """(arc length s [m], point at s, heading there) of a baseline [P,2] next to a point, as nuPlan computes them."""
    line = shapely.LineString(baseline)
    progress = line.project(point)
    here, ahead = line.interpolate(progress), line.interpolate(progress + HEADING_STEP)
    first, last = (here, ahead) if here != ahead else (line.interpolate(progress - HEADING_STEP), here)
    return progress, (here.x, here.y), math.atan2(last.y - first.y, last.x - first.x)


def _containing(layer: LaneLayer, point: shapely.Point) -> NDArray[np.int64]:
    """Positions, in layer order, of the polygons that strictly contain the point."""
    near = np.sort(layer.query(point))
    return np.array([i for i in near.tolist() if layer.polygons[i].contains(point)], dtype=np.int64)


def _direction(heading: float) -> NDArray[np.float64]:
    return np.array([math.cos(heading), math.sin(heading)])


def _box(center: NDArray[np.float64], heading: float, half_length: float, half_width: float) -> NDArray[np.float64]:
    corners = np.empty((4, 2))
    box_corners(center[0], center[1], heading, half_length, half_width, corners)
    return corners
