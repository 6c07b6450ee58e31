"""What the models see of a scene: poses of road users every half second, pieces of the map, lights; in the ego's frame.

Legend: S scenes, N road users, K + 1 poses half a second apart of which ``now`` is the present, M map pieces, L lights.
Frame: the ego at the present step, x forward, y left; metres, radians; the same frame as ``closed_loop``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_S
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import RED, LightState, Role
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.data.pieces import map_pieces

NUM_LIGHT_STATES = 4
"""Unknown, stop, caution, go."""
_CAUTION = (LightState.ARROW_CAUTION, LightState.CAUTION, LightState.FLASHING_CAUTION)
_GO = (LightState.ARROW_GO, LightState.GO)


@dataclass(frozen=True)
class Bounds:
    """What of a scene is kept: the road users nearest to those that are scored, and the map around them."""

    agents: int = 32
    pieces: int = 256
    lights: int = 16


@dataclass(frozen=True)
class SceneTokens:
    """One scene as arrays, or S of them as tensors with a leading S (:func:`collate`)."""

    pose: Tensor  # [N, K + 1, 3] float32, 0 where not valid
    valid: Tensor  # [N, K + 1] bool
    displacement: Tensor  # [N, K + 1, 2] m over the half second before, by the speed where that was not recorded
    kind: Tensor  # [N] int64 AgentKind
    size: Tensor  # [N, 2] float32 length, width
    ego: Tensor  # [N] bool
    scored: Tensor  # [N] bool: ego, or asked to be predicted
    row: Tensor  # [N] int64 row in the TrafficScene, -1 for padding
    piece_pose: Tensor  # [M, 3] float32
    piece_shape: Tensor  # [M, 11, 2] float32
    piece_kind: Tensor  # [M] int64
    piece_route: Tensor  # [M] bool
    piece_valid: Tensor  # [M] bool
    light_pose: Tensor  # [L, 3] float32 stop point, driving direction
    light_state: Tensor  # [L, K + 1] int64: 0 unknown, 1 stop, 2 caution, 3 go
    light_valid: Tensor  # [L] bool

    def to(self, device: torch.device | str) -> SceneTokens:
        return SceneTokens(*(getattr(self, one.name).to(device) for one in fields(self)))

    @property
    def num_steps(self) -> int:
        return self.valid.shape[-1]


def scene_tokens(scene: TrafficScene, bounds: Bounds, *, now: int | None = None) -> tuple[SceneTokens, int, int]:
    """(the scene, index of the present among its K + 1 poses, road users that the bound left out).

    Poses are those of steps now + k * 0.5 s for every whole k that the recording has. Raises DataError where a half
    second is no whole number of steps, or the ego is not observed at the present.
    """
    stride = round(TOKEN_S / scene.dt)
    if stride < 1 or abs(stride * scene.dt - TOKEN_S) > 1e-6:
        raise DataError(f"scene {scene.id}: steps of {scene.dt:g} s do not divide the {TOKEN_S} s of a token")
    present = scene.now if now is None else now
    if not scene.valid[scene.ego, present]:
        raise DataError(f"scene {scene.id}: the ego is not observed at step {present}")
    steps = np.arange(present % stride, scene.num_steps, stride)
    where = int(present // stride)
    frame = scene.pose[scene.ego, present].astype(np.float64)
    scored = (scene.role & (Role.EGO | Role.PREDICT)) > 0
    rows, dropped = _chosen(scene, present, scored, bounds.agents)
    valid = scene.valid[rows][:, steps]
    pose = np.where(valid[..., None], _to_frame(scene.pose[rows][:, steps].astype(np.float64), frame), 0.0)
    displacement = _displacement(scene, rows, steps, frame, pose, valid)
    pieces = map_pieces(scene, frame).nearest(pose[:, where, :2][valid[:, where]], bounds.pieces)
    light_pose, light_state = _lights(scene, frame, steps, bounds.lights)
    tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array))  # noqa: E731
    tokens = SceneTokens(
        pose=tensor(pose.astype(np.float32)),
        valid=tensor(valid),
        displacement=tensor(displacement.astype(np.float32)),
        kind=tensor(scene.kind[rows].astype(np.int64)),
        size=tensor(scene.size[rows, :2]),
        ego=tensor(rows == scene.ego),
        scored=tensor(scored[rows]),
        row=tensor(rows.astype(np.int64)),
        piece_pose=tensor(pieces.pose),
        piece_shape=tensor(pieces.shape),
        piece_kind=tensor(pieces.kind),
        piece_route=tensor(pieces.on_route),
        piece_valid=torch.ones(len(pieces), dtype=torch.bool),
        light_pose=tensor(light_pose),
        light_state=tensor(light_state),
        light_valid=torch.ones(len(light_pose), dtype=torch.bool),
    )
    return tokens, where, dropped


def collate(scenes: Sequence[SceneTokens]) -> SceneTokens:
    """S scenes side by side, padded to the largest; they must have equally many poses."""
    steps = {scene.num_steps for scene in scenes}
    if len(steps) != 1:
        raise DataError(f"scenes of {sorted(steps)} half-second poses cannot share a batch")
    padding = {"row": -1}
    stacked = []
    for one in fields(SceneTokens):
        values = [getattr(scene, one.name) for scene in scenes]
        longest = max(len(value) for value in values)
        whole = values[0].new_full((len(values), longest, *values[0].shape[1:]), padding.get(one.name, 0))
        for place, value in enumerate(values):
            whole[place, : len(value)] = value
        stacked.append(whole)
    return SceneTokens(*stacked)


def _chosen(scene: TrafficScene, present: int, scored: NDArray, most: int) -> tuple[NDArray[np.int64], int]:
    """Rows that are kept, in the scene's order, and how many were left out: of those seen now, the nearest to a
    scored one."""
    seen = np.flatnonzero(scene.valid.any(axis=1))
    if len(seen) <= most:
        return seen, 0
    centre = scene.pose[scored & scene.valid[:, present], present, :2]
    distance = np.full(len(seen), np.inf)
    here = scene.valid[seen, present]
    for point in centre:
        distance[here] = np.minimum(distance[here], np.hypot(*(scene.pose[seen[here], present, :2] - point).T))
    rank = np.lexsort((distance, ~scored[seen], seen != scene.ego))
    return np.sort(seen[rank[:most]]), len(seen) - most


def _to_frame(pose: NDArray, frame: NDArray) -> NDArray:
    cosine, sine = np.cos(frame[2]), np.sin(frame[2])
    dx, dy = pose[..., 0] - frame[0], pose[..., 1] - frame[1]
    heading = (pose[..., 2] - frame[2] + np.pi) % (2 * np.pi) - np.pi
    return np.stack([cosine * dx + sine * dy, -sine * dx + cosine * dy, heading], axis=-1)


def _displacement(
    scene: TrafficScene, rows: NDArray, steps: NDArray, frame: NDArray, pose: NDArray, valid: NDArray
) -> NDArray:
    """[N, K + 1, 2] m, in the frame."""
    cosine, sine = np.cos(frame[2]), np.sin(frame[2])
    velocity = scene.velocity()[rows][:, steps].astype(np.float64) * TOKEN_S
    x, y = velocity[..., 0], velocity[..., 1]
    moved = np.stack([cosine * x + sine * y, cosine * y - sine * x], axis=-1)
    both = valid[:, 1:] & valid[:, :-1]
    moved[:, 1:] = np.where(both[..., None], np.diff(pose[..., :2], axis=1), moved[:, 1:])
    return np.where(valid[..., None], moved, 0.0)


def _lights(
    scene: TrafficScene, frame: NDArray, steps: NDArray, most: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Poses [L, 3] of the stop points of lanes in the map, and states [L, K + 1]; the nearest to the ego are kept."""
    rows = np.flatnonzero(scene.light_piece >= 0)
    poses = np.empty((len(rows), 3))
    for place, light in enumerate(rows):
        lane = scene.piece(scene.light_piece[light]).astype(np.float64)
        stop = scene.light_stop[light]
        if len(lane) > 1:
            near = min(int(np.argmin(np.hypot(*(lane - stop).T))), len(lane) - 2)
            direction = np.arctan2(*(lane[near + 1] - lane[near])[::-1])
        else:
            direction = frame[2]
        poses[place] = (*stop, direction)
    local = _to_frame(poses, frame).reshape(-1, 3)
    nearest = np.sort(np.argsort(np.hypot(local[:, 0], local[:, 1]), kind="stable")[:most])
    state = scene.light_state[rows[nearest]][:, steps]
    coarse = np.zeros(state.shape, np.int64)
    for number, names in ((1, RED), (2, _CAUTION), (3, _GO)):
        coarse[np.isin(state, [int(name) for name in names])] = number
    return local[nearest].astype(np.float32), coarse
