"""Scenes as a batch: what does not change while the world moves, as tensors in one local frame per scene.

The frame of a scene is its ego at the present step (x forward, y left), so that float32 resolves fractions of a
millimetre and moving or turning the whole scene changes nothing but rounding.

Legend: S scenes, N road users (padded to a multiple of 16), U recorded steps of 0.1 s (history and future), K lights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.distance_grid import DistanceGrids, Grid
from navsim_ext.closed_loop.lane_grid import LaneGrid, LaneGrids
from navsim_ext.closed_loop.tracks import ABSENT, points_to_frame, steps_per_interval, to_frame, upsample
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import RED, AgentKind, PieceKind
from navsim_ext.traffic.scene import TrafficScene

MAP_REACH_M = 40.0  # of the grids around all that was recorded, in each direction
FARTHEST_M = 250.0  # of the grids from the ego at now
PAD = 16  # road users come in multiples of it: vectorised kernels have no remainder, so no value depends on its place


@dataclass
class WorldScenes:
    """S scenes side by side. Padding has ``exists`` False and is never present."""

    sources: tuple[TrafficScene, ...]
    frame: NDArray[np.float64]  # [S,3] pose of the frame in the scene's own frame
    exists: Tensor  # [S,N] bool
    ego: Tensor  # [S] int64 row of the ego
    size: Tensor  # [S,N,2] float32 length, width
    kind: Tensor  # [S,N] int64 AgentKind
    role: Tensor  # [S,N] int64 bits of Role
    log_pose: Tensor  # [S,N,U,3] float32
    log_state: Tensor  # [S,N,U] uint8 of tracks.ABSENT, INTERPOLATED, OBSERVED
    now: int  # column of the present step in the log
    last: Tensor  # [S] int64 column of the last recorded step
    first_seen: Tensor  # [S,N] int64 column of the first recorded pose, U where there is none
    last_seen: Tensor  # [S,N] int64 column of the last one, -1 where there is none
    last_entry: int  # last column at which the recording shows somebody whom it does not show at now, -1: there is none
    goal: Tensor  # [S,N,2] float32 m; NaN: not known
    light_stop: Tensor  # [S,K,2] float32 stop point; NaN for padding
    light_direction: Tensor  # [S,K,2] float32 driving direction at the stop point (cos, sin)
    light_red: Tensor  # [S,K,U] bool; the state of the last recorded step holds on
    knows_lights: Tensor  # [S] bool
    road: DistanceGrids
    knows_road: Tensor  # [S] bool
    lanes: LaneGrids

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def num_agents(self) -> int:
        return self.exists.shape[1]

    @property
    def device(self) -> torch.device:
        return self.exists.device

    @property
    def future_steps(self) -> int:
        """Steps of 0.1 s after now that the longest recording of the batch has."""
        return int(self.last.max()) - self.now

    @classmethod
    def build(cls, sources: Sequence[TrafficScene], device: torch.device | str = "cpu") -> WorldScenes:
        """Raises DataError for no scene at all, for a scene whose ego is not observed at now, and for a ``dt`` that is
        no multiple of 0.1 s."""
        return cls.of_parts([ScenePart.of(scene) for scene in sources], device)

    @classmethod
    def of_parts(cls, parts: Sequence[ScenePart], device: torch.device | str = "cpu") -> WorldScenes:
        """Parts side by side; each may have its present moved (:meth:`ScenePart.at`)."""
        if not parts:
            raise DataError("0 scenes: the world needs at least one")
        sources, S = [part.scene for part in parts], len(parts)
        N = -(-max(part.pose.shape[0] for part in parts) // PAD) * PAD
        now = max(part.now for part in parts)
        U = now + max(part.pose.shape[1] - part.now for part in parts)
        K = max(1, max(len(part.light_stop) for part in parts))
        pose, state = np.zeros((S, N, U, 3), np.float32), np.zeros((S, N, U), np.uint8)
        size, kind, role = np.zeros((S, N, 2), np.float32), np.full((S, N), 3), np.zeros((S, N), np.int64)
        exists, goal = np.zeros((S, N), bool), np.full((S, N, 2), np.nan, np.float32)
        stop, direction = np.full((S, K, 2), np.nan, np.float32), np.zeros((S, K, 2), np.float32)
        red, last = np.zeros((S, K, U), bool), np.zeros(S, np.int64)
        for s, part in enumerate(parts):
            n, u = part.state.shape
            begin = now - part.now
            span = slice(begin, begin + u)
            pose[s, :n, span], state[s, :n, span] = part.pose, part.state
            size[s, :n], kind[s, :n], role[s, :n] = part.scene.size[:, :2], part.scene.kind, part.scene.role
            exists[s, :n], goal[s, :n], last[s] = True, part.goal, begin + u - 1
            k = len(part.light_stop)
            stop[s, :k], direction[s, :k], red[s, :k, span] = part.light_stop, part.light_direction, part.light_red
            red[s, :k, begin + u :] = part.light_red[:, -1:]
        seen = state != ABSENT
        first = np.where(seen.any(-1), seen.argmax(-1), U)
        final = np.where(seen.any(-1), U - 1 - seen[..., ::-1].argmax(-1), -1)
        tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731
        return cls(
            sources=tuple(sources),
            frame=np.stack([part.frame for part in parts]),
            exists=tensor(exists),
            ego=torch.tensor([scene.ego for scene in sources], device=device),
            size=tensor(size),
            kind=tensor(kind),
            role=tensor(role),
            log_pose=tensor(pose),
            log_state=tensor(state),
            now=now,
            last=tensor(last),
            first_seen=tensor(first),
            last_seen=tensor(final),
            last_entry=int(np.where(seen[:, :, now], -1, final).max()),
            goal=tensor(goal),
            light_stop=tensor(stop),
            light_direction=tensor(direction),
            light_red=tensor(red),
            knows_lights=torch.tensor([scene.has_lights for scene in sources], device=device),
            road=DistanceGrids.stack([part.road for part in parts], device),
            knows_road=torch.tensor([part.knows_road for part in parts], device=device),
            lanes=LaneGrids.stack([part.lanes for part in parts], device),
        )

    def select(self, rows: Sequence[int]) -> WorldScenes:
        """Some of the scenes, which may repeat, with the same padding; the grids are shared, not copied."""
        at = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        picked = {one.name: getattr(self, one.name) for one in fields(self)}
        picked = {name: value[at] for name, value in picked.items() if isinstance(value, Tensor)}
        return replace(
            self,
            **picked,
            sources=tuple(self.sources[row] for row in at.tolist()),
            frame=self.frame[at.cpu().numpy()],
            road=self.road.select(at),
            lanes=self.lanes.select(at),
        )


@dataclass(frozen=True)
class ScenePart:
    """One scene before it is padded: what takes time to make, made once for any number of batches."""

    scene: TrafficScene
    frame: NDArray[np.float64]
    now: int
    pose: NDArray[np.float64]  # [n,u,3]
    state: NDArray[np.uint8]  # [n,u]
    goal: NDArray[np.float64]  # [n,2]
    light_stop: NDArray[np.float64]  # [k,2]
    light_direction: NDArray[np.float64]  # [k,2]
    light_red: NDArray[np.bool_]  # [k,u]
    road: Grid
    knows_road: bool
    lanes: LaneGrid

    @classmethod
    def of(cls, scene: TrafficScene) -> ScenePart:
        ratio = steps_per_interval(scene)
        if not scene.valid[scene.ego, scene.now]:
            raise DataError(f"scene {scene.id}: the ego is not observed at the present step {scene.now}")
        frame = scene.pose[scene.ego, scene.now].astype(np.float64)
        pose, state = upsample(scene)
        pose = np.where(state[..., None] != ABSENT, to_frame(pose, frame), 0.0)
        recorded = pose[state != ABSENT][:, :2]
        line = lambda row: points_to_frame(scene.piece(row), frame)  # noqa: E731
        lanes = {row: line(row) for row in scene.pieces(PieceKind.LANE, PieceKind.BIKE_LANE)}
        edges = scene.pieces(PieceKind.ROAD_EDGE)
        areas = [line(row) for row in scene.pieces(PieceKind.DRIVABLE_AREA)]
        low = np.maximum(recorded.min(axis=0) - MAP_REACH_M, -FARTHEST_M)
        high = np.minimum(recorded.max(axis=0) + MAP_REACH_M, FARTHEST_M)
        road = Grid.build([line(row) for row in edges], scene.piece_closed[edges].tolist(), areas, low, high)
        stop, direction, red = _lights(scene, lanes, frame, ratio)
        goal = np.full((scene.num_agents, 2), np.nan)
        if scene.goal is not None:
            goal = points_to_frame(scene.goal, frame)
        return cls(
            scene=scene,
            frame=frame,
            now=scene.now * ratio,
            pose=pose,
            state=state,
            goal=goal,
            light_stop=stop,
            light_direction=direction,
            light_red=red,
            road=road,
            knows_road=bool(len(edges) or areas),
            lanes=LaneGrid.build([points for points in lanes.values() if len(points) > 1], low, high),
        )

    def at(self, column: int) -> ScenePart:
        """The same scene with its present at another recorded column; the frame stays. Raises DataError where the ego
        is not known there."""
        if not 0 <= column < self.state.shape[1] or self.state[self.scene.ego, column] == ABSENT:
            raise DataError(f"scene {self.scene.id}: the ego is not known at column {column} of {self.state.shape[1]}")
        return replace(self, now=column)


def _lights(
    scene: TrafficScene, lanes: dict[int, NDArray[np.float64]], frame: NDArray[np.float64], ratio: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Stop points, driving directions there, and whether they show red, of the lights whose lane is in the map."""
    known = [k for k, row in enumerate(scene.light_piece) if row in lanes and len(lanes[row]) > 1]
    stops = points_to_frame(scene.light_stop, frame)
    directions = []
    for k in known:
        lane = lanes[int(scene.light_piece[k])]
        nearest = min(int(np.hypot(*(lane - stops[k]).T).argmin()), len(lane) - 2)
        step = lane[nearest + 1] - lane[nearest]
        directions.append(step / max(np.hypot(*step), 1e-9))
    red = np.isin(scene.light_state[known], [int(state) for state in RED])
    red = np.repeat(red, ratio, axis=1)[:, : (scene.num_steps - 1) * ratio + 1]
    return stops[known], np.array(directions).reshape(-1, 2), red


def is_road_user(scenes: WorldScenes) -> Tensor:
    """[S,N] those that keep to lanes: vehicles and cyclists."""
    return scenes.exists & ((scenes.kind == int(AgentKind.VEHICLE)) | (scenes.kind == int(AgentKind.CYCLIST)))
