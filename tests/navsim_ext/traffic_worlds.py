"""Small traffic scenes for tests: a street of two lanes with a light, a few road users, all fields filled."""

from __future__ import annotations

from typing import Any

import numpy as np

from navsim_ext.traffic.codes import AgentKind, EdgeKind, LaneType, LightState, LineType, PieceKind, Role
from navsim_ext.traffic.scene import TrafficScene


def street_values(steps: int = 31, now: int = 10, dt: float = 0.1) -> dict[str, Any]:
    """Keyword arguments of ``TrafficScene.make``: ego, oncoming car seen in parts, pedestrian, parked car."""
    t = np.arange(steps) * dt
    xy = np.zeros((4, steps, 2))
    xy[0] = np.column_stack([-20.0 + 8.0 * t, np.full(steps, -1.75)])
    xy[1] = np.column_stack([30.0 - 5.0 * t - 0.4 * t**2, np.full(steps, 1.75)])
    xy[2] = np.column_stack([np.full(steps, 12.0), -6.0 + 1.25 * t])
    xy[3] = [5.0, -5.0]
    heading = np.zeros((4, steps))
    heading[1] = np.pi - 1e-3 * np.where(np.arange(steps) % 2, 1.0, -1.0)  # jumps between the ends of [-pi, pi)
    heading[1] = (heading[1] + np.pi) % (2 * np.pi) - np.pi
    heading[2] = np.pi / 2
    valid = np.ones((4, steps), bool)
    valid[1, 5:8] = valid[1, 15] = False
    valid[2, : now + 2] = False
    xs = np.arange(-40.0, 41.0, 2.0)
    lane = lambda y, flip: np.column_stack([xs, np.full(len(xs), y)])[:: -1 if flip else 1]  # noqa: E731
    right, left = lane(-1.75, False), lane(1.75, True)
    after = np.column_stack([np.arange(40.0, 61.0, 2.0), np.full(11, -1.75)])
    crosswalk = np.array([[10.0, -3.5], [14.0, -3.5], [14.0, 3.5], [10.0, 3.5]])
    pieces = [right, left, after, lane(-3.5, False), lane(3.5, True), lane(0.0, False), crosswalk, [[8.0, -4.0]]]
    kinds = [PieceKind.LANE] * 3 + [PieceKind.ROAD_EDGE] * 2
    kinds += [PieceKind.LINE_BROKEN, PieceKind.CROSSWALK, PieceKind.STOP_SIGN]
    state = np.full((2, steps), LightState.STOP, np.uint8)
    state[0, 15:] = LightState.GO
    state[1, ::2] = LightState.NOT_REPORTED
    return {
        "id": "street",
        "source": "test",
        "licence": "ours",
        "dt": dt,
        "now": now,
        "origin": np.array([1234.5, -876.25, 12.0]),
        "xy": xy,
        "heading": heading,
        "valid": valid,
        "z": np.full((4, steps), 0.75),
        "size": np.array([[5.176, 2.297, 1.777], [4.5, 1.9, 1.5], [0.6, 0.7, 1.8], [4.2, 1.8, 1.4]], np.float32),
        "kind": np.array([AgentKind.VEHICLE, AgentKind.VEHICLE, AgentKind.PEDESTRIAN, AgentKind.VEHICLE], np.uint8),
        "role": np.array([Role.EGO, Role.PREDICT | Role.INTEREST, 0, Role.STATIC], np.uint8),
        "agent_id": np.array([7, 3, 21, 4], np.int64),
        "points": np.concatenate(pieces).astype(np.float32),
        "point_z": np.linspace(0.0, 1.0, sum(map(len, pieces))).astype(np.float32),
        "piece_start": np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int32),
        "piece_kind": np.array(kinds, np.uint8),
        "piece_subtype": np.array(
            [LaneType.SURFACE_STREET, LaneType.SURFACE_STREET, LaneType.FREEWAY, 1, 2, LineType.BROKEN_YELLOW, 0, 0],
            np.uint8,
        ),
        "piece_closed": np.array([False] * 6 + [True, False]),
        "piece_id": np.array([100, 101, 102, 200, 201, 300, 400, 500], np.int64),
        "speed_limit": np.array([13.4, 13.4, 30.0] + [np.nan] * 5, np.float32),
        "edges": np.array([[0, 2], [2, 0], [7, 0]], np.int32),
        "edge_kind": np.array([EdgeKind.SUCCESSOR, EdgeKind.PREDECESSOR, EdgeKind.STOPS], np.uint8),
        "has_lights": True,
        "light_piece": np.array([0, -1], np.int32),
        "light_stop": np.array([[38.5, -1.75], [39.0, 1.75]]),
        "light_state": state,
    }


def street(**changes: Any) -> TrafficScene:
    """The street scene, with some arguments of ``TrafficScene.make`` replaced."""
    return TrafficScene.make(**street_values() | changes)
