"""Paths that road users follow: the recorded one, or the lane, as poses every metre with a comfortable speed at each.

Legend: S scenes, N road users, P poses of a path (1 m apart, path position s in metres), in the frame of the scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.tracks import ABSENT, points_to_frame
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import AgentKind, PieceKind
from navsim_ext.traffic.scene import TrafficScene

SPACING_M = 1.0
EXTENSION_M = 160.0  # beyond the end of the record, along the lane or straight on
LANE_REACH_M = 3.0  # from a pose to the centre line of the lane that it is on
ALIGNED = np.cos(np.radians(45.0))
MERGE_M = 15.0  # over which a road user comes from its own place onto its lane
STANDING_M = 1.0  # a record shorter than this is somebody who stands
LATERAL_ACCELERATION = 2.5  # m/s^2 in bends
COMFORT_BRAKING = 1.5  # m/s^2 before bends
SOURCES = ("log", "lane")


@dataclass
class Paths:
    """Paths of all road users of S scenes."""

    poses: Tensor  # [S,N,P,3] float32, headings unwrapped; SPACING_M apart
    bend_speed: Tensor  # [S,N,P] m/s that bends allow, with comfortable braking before them
    stands: Tensor  # [S,N] bool: parked or standing, it does not move
    cruise: Tensor  # [S,N] m/s, the fastest that was recorded (at least the speed at now)

    def at(self, scene: Tensor, s: Tensor) -> Tensor:
        """[B,N,K,3] poses at positions ``s`` [B,N,K], straight on beyond both ends."""
        return interpolate(self.poses[scene], s)


def interpolate(poses: Tensor, s: Tensor) -> Tensor:
    """[...,K,3] poses of paths [...,P,3] at positions [...,K] m."""
    P = poses.shape[-2]
    position = s / SPACING_M
    index = position.floor().clamp(0, P - 2)
    f = (position - index)[..., None]
    low = index.long()[..., None].expand(*s.shape, 3)
    a, b = poses.gather(-2, low), poses.gather(-2, low + 1)
    xy = a[..., :2] + f * (b[..., :2] - a[..., :2])
    heading = a[..., 2:] + f.clamp(0.0, 1.0) * (b[..., 2:] - a[..., 2:])
    return torch.cat((xy, heading), dim=-1)


def project(poses: Tensor, pose: Tensor, near: Tensor, reach: int = 8) -> Tensor:
    """[B,N] path positions of the poses [B,N,3], searched within ``reach`` metres of ``near`` [B,N]."""
    P = poses.shape[-2]
    around = torch.arange(-reach, reach + 1, device=pose.device)
    index = ((near / SPACING_M).round().long()[..., None] + around).clamp(0, P - 1)
    window = poses.gather(-2, index[..., None].expand(*index.shape, 3))
    d = pose[..., None, :2] - window[..., :2]
    best = d.square().sum(-1).argmin(dim=-1, keepdim=True)
    pick = lambda values: values.gather(-1, best)[..., 0]  # noqa: E731
    heading = pick(window[..., 2])
    along = torch.cos(heading) * pick(d[..., 0]) + torch.sin(heading) * pick(d[..., 1])
    return pick(index).float() * SPACING_M + along


def beside(poses: Tensor, pose: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(lateral error [B,N] m, heading error [B,N] rad) of poses beside their paths."""
    on = interpolate(poses, s[..., None])[..., 0, :]
    heading = on[..., 2].contiguous()
    d = pose[..., :2] - on[..., :2]
    lateral = -torch.sin(heading) * d[..., 0] + torch.cos(heading) * d[..., 1]
    turn = torch.remainder(pose[..., 2] - heading + torch.pi, 2 * torch.pi) - torch.pi
    return lateral, turn


def build_paths(scenes: WorldScenes, source: str = "log", only_egos: bool = False) -> Paths:
    """Paths of all road users, or of the egos alone (the others' rows are then 0).

    "log": the recorded positions after now, then along the lane from there; "lane": onto the nearest lane that runs the
    same way and along its successors (at a fork the one nearest to the recorded future)."""
    if source not in SOURCES:
        raise DataError(f"paths follow {source!r}; one of {', '.join(SOURCES)} was expected")
    S, N = scenes.exists.shape
    lines: dict[tuple[int, int], NDArray[np.float64]] = {}
    stands, cruise = np.ones((S, N), bool), np.zeros((S, N), np.float32)
    log_pose, log_state = scenes.log_pose.cpu().numpy().astype(np.float64), scenes.log_state.cpu().numpy()
    for s, scene in enumerate(scenes.sources):
        graph = LaneGraph(scene, scenes.frame[s])
        for n in [scene.ego] if only_egos else range(scene.num_agents):
            known = np.flatnonzero(log_state[s, n] != ABSENT)
            known = known[known >= min(scenes.now, known[-1])] if len(known) else known
            if not len(known):
                continue
            track = log_pose[s, n, known]
            step = (
                np.hypot(*np.diff(track[:, :2], axis=0).T) / np.maximum(np.diff(known), 1) if len(known) > 1 else [0.0]
            )
            cruise[s, n] = 10.0 * float(np.max(step))
            reached = float(np.hypot(*(track[:, :2] - track[0, :2]).T).max())
            stands[s, n] = reached < STANDING_M and cruise[s, n] < 1.0
            drives = scene.kind[n] in (AgentKind.VEHICLE, AgentKind.CYCLIST)
            lines[s, n] = graph.path(track, source if drives else "log", follow=drives)
    P = int(max((len(line) for line in lines.values()), default=2))
    poses = np.zeros((S, N, P, 3), np.float32)
    bend = np.zeros((S, N, P), np.float32)
    for (s, n), line in lines.items():
        count = len(line)
        poses[s, n, :count], bend[s, n, :count] = line, bend_speed(line)
        if count < P:  # straight on
            ahead = SPACING_M * np.arange(1, P - count + 1)
            heading = line[-1, 2]
            poses[s, n, count:, 0] = line[-1, 0] + ahead * np.cos(heading)
            poses[s, n, count:, 1] = line[-1, 1] + ahead * np.sin(heading)
            poses[s, n, count:, 2], bend[s, n, count:] = heading, bend[s, n, count - 1]
    tensor = lambda array: torch.from_numpy(array).to(scenes.device)  # noqa: E731
    return Paths(tensor(poses), tensor(bend), tensor(stands), tensor(cruise))


def bend_speed(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """[P] v(s) = sqrt(a_lat / |k|), lowered so that COMFORT_BRAKING reaches every bend."""
    curvature = np.abs(np.gradient(line[:, 2], SPACING_M)) if len(line) > 1 else np.zeros(len(line))
    allowed = np.sqrt(LATERAL_ACCELERATION / np.maximum(curvature, 1e-3))
    ramp = 2.0 * COMFORT_BRAKING * SPACING_M * np.arange(len(line))
    return np.sqrt(np.minimum.accumulate((allowed**2 + ramp)[::-1])[::-1] - ramp)


def resample(xy: NDArray[np.float64], start_heading: float) -> NDArray[np.float64]:
    """Poses [P,3] every SPACING_M along points [n,2]; headings unwrapped from ``start_heading``."""
    keep = np.concatenate([[True], np.hypot(*np.diff(xy, axis=0).T) > 1e-3]) if len(xy) > 1 else np.ones(len(xy), bool)
    xy = xy[keep]
    if len(xy) < 2:
        xy = np.stack([xy[0], xy[0] + 2.0 * SPACING_M * np.array([np.cos(start_heading), np.sin(start_heading)])])
    distance = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(xy, axis=0).T))])
    at = np.arange(0.0, max(distance[-1], 2.0 * SPACING_M), SPACING_M)
    points = np.stack([np.interp(at, distance, xy[:, k]) for k in (0, 1)], axis=1)
    # Headings over 3 m, so that centimetres of noise in a record do not become bends.
    ahead = np.minimum(np.arange(len(points)) + 2, len(points) - 1)
    behind = np.maximum(np.arange(len(points)) - 1, 0)
    chord = points[ahead] - points[behind]
    heading = np.unwrap(np.concatenate([[start_heading], np.arctan2(chord[:, 1], chord[:, 0])]))[1:]
    short = np.hypot(*chord.T) < 1e-6
    heading[short] = start_heading
    return np.column_stack([points, heading])


class LaneGraph:
    """The lanes of a scene in its frame: where a pose stands on them, and where they lead."""

    def __init__(self, scene: TrafficScene, frame: NDArray[np.float64]) -> None:
        rows = [r for r in scene.pieces(PieceKind.LANE, PieceKind.BIKE_LANE) if len(scene.piece(r)) > 1]
        self.lines = {int(row): points_to_frame(scene.piece(row), frame) for row in rows}
        self.successors = {row: [int(r) for r in scene.successors(row) if int(r) in self.lines] for row in self.lines}
        self._rows = (
            np.repeat(list(self.lines), [len(line) for line in self.lines.values()]) if rows else np.empty(0, int)
        )
        self._points = np.concatenate(list(self.lines.values())) if rows else np.empty((0, 2))
        step = [np.diff(line, axis=0, append=2 * line[-1:] - line[-2:-1]) for line in self.lines.values()]
        self._directions = np.concatenate(step) if rows else np.empty((0, 2))
        self._directions = self._directions / np.maximum(np.hypot(*self._directions.T), 1e-9)[:, None]
        self._index = (
            np.concatenate([np.arange(len(line)) for line in self.lines.values()]) if rows else np.empty(0, int)
        )

    def nearest(self, pose: NDArray[np.float64]) -> tuple[int, int] | None:
        """(lane, index of its point) nearest to a pose among lanes that run the same way within reach."""
        if not len(self._points):
            return None
        d = self._points - pose[:2]
        u = self._directions
        across = np.abs(u[:, 0] * d[:, 1] - u[:, 1] * d[:, 0])
        aligned = u @ np.array([np.cos(pose[2]), np.sin(pose[2])]) > ALIGNED
        cost = np.where(aligned & (across < LANE_REACH_M), np.hypot(*d.T), np.inf)
        best = int(cost.argmin())
        if cost[best] > 15.0:  # points of a straight lane may lie far apart
            return None
        return int(self._rows[best]), int(self._index[best])

    def onward(self, pose: NDArray[np.float64], length: float, towards: NDArray[np.float64]) -> NDArray[np.float64]:
        """[n,2] points of the lane ahead of a pose for ``length`` metres; empty where no lane is near. At a fork the
        successor that comes nearest to the points ``towards`` [m,2], else the straightest one."""
        found = self.nearest(pose)
        if found is None:
            return np.empty((0, 2))
        row, index = found
        parts, total, seen = [self.lines[row][index:]], 0.0, {row}
        while True:
            last = parts[-1]
            total += float(np.hypot(*np.diff(last, axis=0).T).sum()) if len(last) > 1 else 0.0
            options = [r for r in self.successors[row] if r not in seen]
            if total >= length or not options:
                break
            row = min(options, key=lambda r: self._cost(r, parts, towards))
            seen.add(row)
            parts.append(self.lines[row])
        line = np.concatenate(parts)
        ahead = (line - pose[:2]) @ np.array([np.cos(pose[2]), np.sin(pose[2])])
        first = int(np.argmax(ahead > 0.5)) if (ahead > 0.5).any() else len(line)
        return line[first:]

    def _cost(self, row: int, parts: list[NDArray[np.float64]], towards: NDArray[np.float64]) -> float:
        line = self.lines[row]
        turn = 0.0
        if len(parts[-1]) > 1:
            a, b = parts[-1][-1] - parts[-1][-2], line[-1] - line[0]
            turn = abs(np.angle(complex(*b) / (complex(*a) or 1.0)))
        if not len(towards):
            return turn
        return float(np.hypot(*(line[:, None] - towards[None]).transpose(2, 0, 1)).min(axis=1).mean()) + 0.1 * turn

    def path(self, track: NDArray[np.float64], source: str, follow: bool) -> NDArray[np.float64]:
        """Poses [P,3] of one road user from its recorded poses [n,3], the first of which is where it is."""
        pose = track[0]
        spaced = [0]
        for k in range(1, len(track)):
            if np.hypot(*(track[k, :2] - track[spaced[-1], :2])) >= 0.5:
                spaced.append(k)
        recorded = track[spaced]
        if source == "lane":
            ahead = self.onward(pose, EXTENSION_M + _length(recorded), recorded[1:, :2])
            if len(ahead) > 1:
                return self._merged(pose, ahead)
        end = np.array([*recorded[-1, :2], track[-1, 2]])
        ahead = self.onward(end, EXTENSION_M, np.empty((0, 2))) if follow else np.empty((0, 2))
        if len(ahead) > 1 and follow:
            beyond = self._merged(end, ahead)[1:, :2]
        else:
            beyond = end[:2] + np.arange(1, 21)[:, None] * np.array([np.cos(end[2]), np.sin(end[2])])
        return resample(np.concatenate([recorded[:, :2], beyond]), float(pose[2]))

    @staticmethod
    def _merged(pose: NDArray[np.float64], ahead: NDArray[np.float64]) -> NDArray[np.float64]:
        """Poses along ``ahead`` whose lateral offset from it at ``pose`` dies out over MERGE_M:
        y(u) = y0 (1 - 10 u^3 + 15 u^4 - 6 u^5)."""
        line = resample(ahead, float(pose[2]))
        normal = np.column_stack([-np.sin(line[:, 2]), np.cos(line[:, 2])])
        offset = float((pose[:2] - line[0, :2]) @ normal[0])
        gap = float(np.hypot(*(line[0, :2] - pose[:2])))
        u = np.clip((gap + SPACING_M * np.arange(len(line))) / MERGE_M, 0.0, 1.0)
        shift = offset * (1.0 - 10 * u**3 + 15 * u**4 - 6 * u**5)
        return resample(np.concatenate([pose[None, :2], line[:, :2] + shift[:, None] * normal]), float(pose[2]))


def _length(track: NDArray[np.float64]) -> float:
    return float(np.hypot(*np.diff(track[:, :2], axis=0).T).sum()) if len(track) > 1 else 0.0
