"""A small town for tests of pictures and questions, and annotations to put into it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from navsim_ext.maps.layers import LaneLayer, LineLayer, PolygonLayer
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.rendering.camera import camera_rig
from navsim_ext.scene import Annotations, Scene

SIZE = (480, 270)
EGO = np.array([1000.0, 2000.0, 0.6])  # the map is given in this frame, so that global and ego differ
CAR = (4.6, 1.9, 1.6)


def to_map(points) -> np.ndarray:
    """Points of the frame of EGO in the frame of the map."""
    cos, sin = np.cos(EGO[2]), np.sin(EGO[2])
    return np.asarray(points, float) @ np.array([[cos, sin], [-sin, cos]]) + EGO[:2]


def rectangle(x0, x1, y0, y1) -> np.ndarray:
    return to_map([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def make_town() -> VectorMap:
    """Two lanes ahead (y = 0 and 3.5), a junction from x = 60 to 80, connectors, a crosswalk at x = 40 ... 44."""
    lanes = [(-30, 60, 0.0), (-30, 60, 3.5), (80, 160, 0.0), (80, 160, 3.5)]
    ways = [(60, 80, 0.0), (60, 80, 3.5)]
    borders = [-1.75, 1.75, 5.25]
    return VectorMap(
        location="sg-one-north",
        label="nuplan",
        lanes=LaneLayer.from_arrays(
            ["1", "2", "3", "4"],
            [[rectangle(a, b, y - 1.75, y + 1.75)] for a, b, y in lanes],
            [to_map([(a, y), (b, y)]) for a, b, y in lanes],
            [0, 0, 1, 1],
            left_boundary=[1, 2, -1, -1],
            right_boundary=[0, 1, -1, -1],
        ),
        lane_connectors=LaneLayer.from_arrays(
            ["11", "12"],
            [[rectangle(a, b, y - 1.75, y + 1.75)] for a, b, y in ways],
            [to_map([(a, y), (b, y)]) for a, b, y in ways],
            [0, 0],
        ),
        roadblocks=PolygonLayer.from_rings(
            ["21", "22"], [[rectangle(-30, 60, -1.75, 5.25)], [rectangle(80, 160, -1.75, 5.25)]]
        ),
        roadblock_connectors=PolygonLayer.from_rings(["31"], [[rectangle(60, 80, -1.75, 5.25)]]),
        lane_edges=np.array([(0, 4), (1, 5), (4, 2), (5, 3)]),
        block_edges=np.array([(0, 2), (2, 1)]),
        crosswalks=PolygonLayer.from_rings(["41"], [[rectangle(40, 44, -1.75, 5.25)]]),
        stop_polygons=PolygonLayer.from_rings(["51"], [[rectangle(59, 61, -1.75, 5.25)]]),
        stop_polygon_types=np.array([2]),
        boundaries=LineLayer.from_lines(["61", "62", "63"], [to_map([(-30, y), (60, y)]) for y in borders]),
        boundary_types=np.zeros(3, np.int64),
    ).validate()  # fmt: skip


def objects(*entries) -> Annotations:
    """Annotations of (name, x, y, yaw, (l, w, h))."""
    boxes = np.array([(x, y, 0.5 * s[2], *s, yaw) for _, x, y, yaw, s in entries], float).reshape(-1, 7)
    tokens = tuple(f"t{k}" for k in range(len(entries)))
    return Annotations(boxes, np.zeros((len(entries), 3)), tuple(entry[0] for entry in entries), tokens)


def front(size=SIZE):
    """NAVSIM's front camera for pictures of ``size``."""
    return camera_rig(size)["CAM_F0"]


def make_scene(things: Annotations, *, x=0.0, speed=8.0, end_speed=None, shift=0.0, turn=0.0, lights=(), command=1,
               earlier: Annotations | None = None, token="0123456789abcdef") -> Scene:  # fmt: skip
    """A window of 4 + 8 frames in the town: now at (x, 0); the end differs by speed, shift [m] and turn [rad]."""
    end_speed = speed if end_speed is None else end_speed
    time = np.arange(-3, 9) * 0.5
    future = np.clip(time / 4.0, 0.0, 1.0)
    driven = x + speed * time + 0.5 * (end_speed - speed) / 4.0 * np.maximum(time, 0.0) ** 2
    local = np.column_stack([driven, shift * future**2 * (3 - 2 * future), turn * future])
    ego = np.column_stack([to_map(local[:, :2]), local[:, 2] + EGO[2]])
    return Scene(
        token=token,
        log_name="log",
        map_location="sg-one-north",
        num_history=4,
        frame_tokens=tuple(f"{k:016x}" for k in range(12)),
        timestamps_us=np.arange(12) * 500_000,
        ego_global=ego,
        ego_dynamics=np.tile(np.array([speed, 0, 0, 0], np.float32), (12, 1)),
        commands=np.tile(np.eye(4, dtype=np.float32)[command], (12, 1)),
        roadblock_ids=("21", "31", "22"),
        annotations=tuple((earlier or things) if k < 3 else things for k in range(12)),
        traffic_lights=(tuple(lights),) * 12,
        cameras={"CAM_F0": replace(front(), path="log/CAM_F0/now.jpg")},
    ).validate()
