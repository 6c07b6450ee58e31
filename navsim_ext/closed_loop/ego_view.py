"""What an ego sees of its world as one vector: itself, its way, the nearest road users, the road's edges, the lanes.

In the ego's frame (box centre, x forward, y left), distances / 20 m, speeds / 10 m/s, angles as cosine and sine, all
clipped to [-10, 10], float32; 0 where there is nothing. [SIZE] in this order:

  ego    [3]     speed, least distance of the box to the road's edge (0 where unknown), share of the horizon left
  way    [8,2]   the recorded way 5, 10 ... 40 m ahead
  goal   [2]     where the recording ends
  others [12,7]  the nearest road users: x, y, cosine, sine of the heading, speed, length, width
  edges  [12,2]  at 12 places around (6, 15 and 30 m away; 90, 25 degrees left, 25, 90 right): signed distance to the
                 road's edge, positive on the road, and 1 where that is known
  lanes  [5,4]   at 0, 5, 10, 20, 30 m straight ahead: offset from the nearest lane's centre line (left positive),
                 cosine and sine of its heading, 1 where there is a lane

Legend: B worlds, N road users.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.contact import planes
from navsim_ext.closed_loop.events import edge_distance
from navsim_ext.closed_loop.paths import interpolate
from navsim_ext.closed_loop.state import WorldState

LIMIT = 10.0
DISTANCE_M, SPEED = 20.0, 10.0  # scales
WAY_M = tuple(range(5, 45, 5))
NEAREST, OTHER = 12, 7
EDGE_PLACES = np.array(
    [
        (radius * np.cos(angle), radius * np.sin(angle))
        for radius in (6.0, 15.0, 30.0)
        for angle in np.radians((90.0, 25.0, -25.0, -90.0))
    ]
)  # [12,2] m
LANE_PLACES = np.array([(ahead, 0.0) for ahead in (0.0, 5.0, 10.0, 20.0, 30.0)])  # [5,2] m
SIZE = 3 + 2 * len(WAY_M) + 2 + OTHER * NEAREST + 2 * len(EDGE_PLACES) + 4 * len(LANE_PLACES)


def ego_view(state: WorldState, way: Float[Tensor, "B 1 P 3"], s: Float[Tensor, "B 1"]) -> NDArray[np.float32]:
    """[B,SIZE] of all worlds; ``way`` are the egos' recorded ways, ``s`` [B,1] m where on them they are."""
    worlds, row = state.ego_index()
    mine = state.pose[worlds, row].double().cpu().numpy()  # [B,3]
    B, cos, sin = len(mine), np.cos(mine[:, 2:]), np.sin(mine[:, 2:])

    def local(points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Points [B,M,2] of the scenes as the egos see them."""
        d = points - mine[:, None, :2]
        return np.stack([cos * d[..., 0] + sin * d[..., 1], -sin * d[..., 0] + cos * d[..., 1]], axis=-1) / DISTANCE_M

    def places(seen: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Places [M,2] in the egos' frames as x, y [B,1,M] in the scenes'."""
        x = mine[:, :1] + cos * seen[:, 0] - sin * seen[:, 1]
        y = mine[:, 1:2] + sin * seen[:, 0] + cos * seen[:, 1]
        return tuple(torch.from_numpy(one[:, None].astype(np.float32)).to(s.device) for one in (x, y))

    ahead = interpolate(way, s[..., None] + torch.tensor(WAY_M, dtype=torch.float32, device=s.device))
    scenes, scene = state.scenes, state.scene
    end = scenes.log_pose[scene, row, scenes.last_seen[scene, row], :2]
    distance = scenes.road.at(*places(EDGE_PLACES), scene)[:, 0].double().cpu().numpy()
    edges = np.stack([np.nan_to_num(distance) / DISTANCE_M, ~np.isnan(distance)], axis=-1)
    offset, lane_cos, lane_sin = (
        one[:, 0].double().cpu().numpy() for one in scenes.lanes.nearest(*places(LANE_PLACES), scene)
    )
    there = ~np.isnan(offset) & (np.abs(lane_cos) + np.abs(lane_sin) > 0.5)
    turned = [cos * lane_cos + sin * lane_sin, cos * lane_sin - sin * lane_cos]
    lanes = np.stack([np.nan_to_num(offset) / DISTANCE_M, *turned, np.ones_like(offset)], axis=-1) * there[..., None]
    parts = (
        _own(state, worlds, row),
        local(ahead[:, 0, :, :2].double().cpu().numpy()),
        local(end[:, None].double().cpu().numpy()),
        _others(state, mine, row, local),
        edges,
        lanes,
    )
    seen = np.concatenate([part.reshape(B, -1) for part in parts], axis=1)
    return seen.clip(-LIMIT, LIMIT).astype(np.float32)


def _own(state: WorldState, worlds: Tensor, row: Tensor) -> NDArray[np.float64]:
    """[B,3]"""
    ego = torch.zeros_like(state.present)
    ego[worlds, row] = True
    boxes, size = planes(state.pose[:, :, None]), state.scenes.size[state.scene]
    edge = edge_distance(state, boxes, size, ego[..., None])[worlds, row, 0].double().cpu().numpy()
    speed = state.speed[worlds, row].double().cpu().numpy()
    left = np.full(len(speed), state.steps_left / max(state.steps_left + state.step, 1))
    return np.stack([speed / SPEED, np.nan_to_num(edge) / DISTANCE_M, left], axis=-1)


def _others(state: WorldState, mine: NDArray[np.float64], row: Tensor, local) -> NDArray[np.float64]:
    """[B,NEAREST,OTHER]"""
    pose, speed = state.pose.double().cpu().numpy(), state.speed.double().cpu().numpy()
    size = state.scenes.size[state.scene].double().cpu().numpy()
    there = state.present.cpu().numpy().copy()
    there[np.arange(len(mine)), row.cpu().numpy()] = False
    d = pose[..., :2] - mine[:, None, :2]
    distance = np.where(there, np.hypot(d[..., 0], d[..., 1]), np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEAREST]
    pick = lambda values: np.take_along_axis(values, nearest.reshape(*nearest.shape, *[1] * (values.ndim - 2)), 1)  # noqa: E731
    turn = pick(pose)[..., 2] - mine[:, 2:]
    found = np.concatenate(
        [
            local(pick(pose)[..., :2]),
            np.stack([np.cos(turn), np.sin(turn), pick(speed) / SPEED], axis=-1),
            pick(size) / DISTANCE_M,
        ],
        axis=-1,
    )
    found *= np.isfinite(pick(distance))[..., None]
    padded = np.zeros((len(mine), NEAREST, OTHER))
    padded[:, : found.shape[1]] = found
    return padded
