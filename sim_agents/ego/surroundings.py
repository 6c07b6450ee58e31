"""What does not change around the ego while the world moves: pieces of the map, the way ahead, the goal.

The **way** is the lane that the ego is on and where it leads, as poses every metre. At a fork it takes the lane nearest
to what was recorded after the present; where nothing was (open loop), the lane on the scene's route; where there is no
route, the straightest one. The **goal** is a place, not a time: by default where the recording of the ego ends, as in
GPUDrive. Once the ego has been within 2 m of it, it is reached, and the ego drives on without one.

Legend: S scenes, M pieces of the map, P poses of the way; the frame of the scenes (``closed_loop.scenes``), metres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.paths import LaneGraph, resample
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.tracks import points_to_frame, to_frame
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import LANES, PieceKind
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.data.pieces import DRAWN, PIECE_POINTS, map_pieces

GOALS = ("log", "scene", "none")
MAP_REACH_M = 90.0  # from the recorded way of the ego
WAY_M = 200.0  # beyond the end of what was recorded
ALONG_M = 10.0  # points that a way is led along lie this far apart
OFF_MAP_M = 15.0  # a goal farther than this from every lane is off the map
SEEN_KINDS = (*LANES, PieceKind.ROAD_EDGE, PieceKind.CROSSWALK, PieceKind.STOP_LINE)


class BadGoal(DataError):
    """A goal that nobody can be driven to: not finite, off the map, or out of reach of what can be driven."""


@dataclass(frozen=True)
class Around:
    """One scene's map and way, before it is padded; made once for any number of batches."""

    pose: NDArray[np.float32]  # [m,3] first points of the pieces
    shape: NDArray[np.float32]  # [m,11,2] in their own frames
    kind: NDArray[np.int64]  # [m] rows of ``sim_agents.data.pieces.DRAWN``
    route: NDArray[np.bool_]  # [m]
    way: NDArray[np.float32]  # [p,3]; empty: no lane runs where the ego stands

    @classmethod
    def of(cls, scene: TrafficScene, frame: NDArray[np.float64]) -> Around:
        """``frame`` is the scene's in :class:`WorldScenes` (given in the scene's own coordinates)."""
        seen = scene.valid[scene.ego]
        recorded = scene.pose[scene.ego, seen, :2].astype(np.float64)
        pieces = map_pieces(scene, frame)
        near = _apart(pieces.pose[:, :2].astype(np.float64), points_to_frame(recorded, frame)) < MAP_REACH_M
        kept = near & np.isin(pieces.kind, [DRAWN.index(kind) for kind in SEEN_KINDS])
        values = (getattr(pieces, name)[kept] for name in ("pose", "shape", "kind", "on_route"))
        return cls(*values, way_of(scene, frame).astype(np.float32))


def way_of(scene: TrafficScene, frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """Poses [p,3] every metre along the ego's lane from where it is at the present step; [0,3] where there is none."""
    graph, ego = LaneGraph(scene, frame), scene.ego
    seen = np.flatnonzero(scene.valid[ego, scene.now :]) + scene.now
    track = to_frame(scene.pose[ego, seen], frame)
    towards, length = np.empty((0, 2)), WAY_M
    if len(track) > 1:
        step = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(track[:, :2], axis=0).T))])
        length += float(step[-1])
        if step[-1] > 1.0:
            towards = np.stack([np.interp(np.arange(0.0, step[-1], 1.0), step, track[:, k]) for k in (0, 1)], axis=-1)
    if not len(towards) and scene.route is not None and scene.route.any():
        lines = [scene.piece(row) for row in np.flatnonzero(scene.route) if scene.piece_kind[row] in LANES]
        if lines:
            towards = points_to_frame(np.concatenate(lines), frame)
    ahead = graph.onward(track[0], length, towards)
    if len(ahead) < 2:
        return np.empty((0, 3))
    along = (ahead[1] - ahead[0]) / max(float(np.hypot(*(ahead[1] - ahead[0]))), 1e-6)
    back = float((ahead[0] - track[0, :2]) @ along)  # the lane's points begin ahead of the ego: it begins beside it
    if back > 0.0:
        ahead = np.concatenate([[ahead[0] - back * along], ahead])
    return resample(ahead, float(track[0, 2]))


def _apart(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] distances of points [n,2] to the nearest of points [m,2], of which some twenty are enough."""
    other = other[:: max(1, len(other) // 20)]
    return np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1).min(axis=1))


@dataclass(frozen=True)
class EgoSurroundings:
    """S scenes side by side."""

    pose: Tensor  # [S,M,3] float32
    shape: Tensor  # [S,M,11,2]
    kind: Tensor  # [S,M] int64
    route: Tensor  # [S,M] bool
    valid: Tensor  # [S,M] bool
    way: Tensor  # [S,P,3] float32
    way_count: Tensor  # [S] int64; 0: no way
    goal: Tensor  # [S,2] float32, NaN: none

    @classmethod
    def stack(cls, parts: Sequence[Around], goal: Tensor) -> EgoSurroundings:
        device = goal.device
        S, M = len(parts), max(1, max(len(part.pose) for part in parts))
        P = max(2, max(len(part.way) for part in parts))
        pose, shape = np.zeros((S, M, 3), np.float32), np.zeros((S, M, PIECE_POINTS, 2), np.float32)
        kind, route, valid = np.zeros((S, M), np.int64), np.zeros((S, M), bool), np.zeros((S, M), bool)
        way = np.zeros((S, P, 3), np.float32)
        for s, part in enumerate(parts):
            m, p = len(part.pose), len(part.way)
            pose[s, :m], shape[s, :m], kind[s, :m] = part.pose, part.shape, part.kind
            route[s, :m], valid[s, :m], way[s, :p] = part.route, True, part.way
        tensor = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
        count = torch.tensor([len(part.way) for part in parts], device=device)
        return cls(*map(tensor, (pose, shape, kind, route, valid, way)), count, goal)

    @classmethod
    def build(cls, scenes: WorldScenes, goal: str = "log") -> EgoSurroundings:
        """For the scenes of a world; ``goal`` as :func:`goals_of`."""
        parts = [Around.of(scene, frame) for scene, frame in zip(scenes.sources, scenes.frame, strict=True)]
        result = cls.stack(parts, goals_of(scenes, goal))
        if goal == "scene":
            _require_on_map(result, scenes)
        return result


def goals_of(scenes: WorldScenes, source: str, horizon_s: float | None = None) -> Tensor:
    """[S,2] goals of the egos. "log": where they were recorded last (within ``horizon_s`` of now); "scene": what the
    scene says, NaN where it says nothing; "none": NaN. Raises BadGoal for one that is infinite."""
    if source not in GOALS:
        raise DataError(f"goal={source}: one of {', '.join(GOALS)} was expected")
    rows = torch.arange(len(scenes), device=scenes.device)
    if source == "none":
        return torch.full((len(scenes), 2), torch.nan, device=scenes.device)
    if source == "scene":
        goal = scenes.goal[rows, scenes.ego]
        infinite = torch.isinf(goal).any(-1)
        if bool(infinite.any()):
            name = scenes.sources[int(infinite.nonzero()[0])].id
            raise BadGoal(f"scene {name}: its goal is {goal[infinite][0].tolist()}; a finite place was expected")
        return goal
    last = scenes.last_seen[rows, scenes.ego]
    if horizon_s is not None:
        last = last.clamp_max(scenes.now + round(horizon_s / STEP_S))
    return scenes.log_pose[rows, scenes.ego, last, :2]


def _require_on_map(around: EgoSurroundings, scenes: WorldScenes) -> None:
    """Raises BadGoal for a goal that lies off every lane of the scene's whole map (scenes without lanes pass)."""
    for s, scene in enumerate(scenes.sources):
        goal = around.goal[s].cpu().numpy().astype(np.float64)
        rows = scene.pieces(*LANES)
        if np.isnan(goal).any() or not len(rows):
            continue
        points = np.concatenate([_dense(points_to_frame(scene.piece(row), scenes.frame[s])) for row in rows])
        apart = float(np.hypot(*(points - goal).T).min())
        if apart > OFF_MAP_M:
            raise BadGoal(
                f"scene {scene.id}: its goal {np.round(goal, 1).tolist()} (frame of the ego) lies {apart:.0f} m from "
                f"the nearest lane, farther than {OFF_MAP_M:g} m: give one on the map, or plan without (goal=none)"
            )


def _dense(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points of a line with further ones between those more than ``ALONG_M`` apart."""
    if len(line) < 2:
        return line
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    at = np.linspace(0.0, along[-1], max(2, int(along[-1] / ALONG_M) + 1))
    return np.concatenate([line, np.stack([np.interp(at, along, line[:, k]) for k in (0, 1)], axis=-1)])
