"""The Intelligent Driver Model on paths: behind leaders, before red lights, slower in bends.

  a = a_max (1 - (v / v0)^4 - (s* / g)^2),   s* = s0 + max(0, v T + v (v - v_lead) / (2 sqrt(a_max b)))
(Treiber, Hennecke, Helbing 2000), g the gap from bumper to bumper along the path. Above v0 (a bend comes) the free term
is -1.2 (v - v0), at most b, as in the synthetic world's law. The leader of a token is the nearest road user whose box
reaches into the corridor of the own path, now or as predicted 1 s ahead; within the token it goes on at its speed.

Legend: B worlds, N road users, Q pairs (follower, other), W path poses looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.paths import SPACING_M, Paths, beside, build_paths, interpolate, project
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

LOOK_M, LOOK_S = 12.0, 4.5  # how far ahead: LOOK_M + LOOK_S v
CLEARANCE_M = 0.3  # to the side of a corridor
ANTICIPATION_S = 1.0
HARDEST_BRAKING = 6.0  # m/s^2
LIGHT_BRAKING = 4.5  # m/s^2; a red light that would need more is too late and is driven through
STOP_SHORT_M = 1.0  # between a stop point and the bumper
STOP_POINT_REACH_M = 2.0
ALIGNED_COSINE = 0.7
MINIMUM_GAP_M = 0.1
RETURN_M = 8.0  # length over which an offset from the path dies out (to 1/e)


@dataclass(frozen=True)
class IdmParameters:
    """One driver. ``desired_speed`` None: the fastest that the road user was recorded at."""

    desired_speed: float | None = None  # v0, m/s
    headway: float = 1.2  # T, s
    standstill: float = 2.0  # s0, m
    acceleration: float = 1.7  # a_max, m/s^2
    braking: float = 2.4  # b, m/s^2

    def __post_init__(self) -> None:
        values = (self.headway, self.standstill, self.acceleration, self.braking, self.desired_speed or 1.0)
        if not all(0.0 < value < float("inf") for value in values):
            raise DataError(f"IDM parameters must be positive and finite: {self}")


def idm_acceleration(
    v: Tensor,
    gap: Tensor,
    lead: Tensor,
    v0: Tensor,
    *,
    headway: float,
    standstill: float,
    acceleration: float,
    braking: float,
) -> Tensor:
    """[...] m/s^2 of the law above, clipped to [-HARDEST_BRAKING, a_max]; ``gap`` inf where nobody leads."""
    free = torch.where(
        v <= v0, acceleration * (1.0 - (v / v0).square().square()), (-1.2 * (v - v0)).clamp_min(-braking)
    )
    wish = standstill + (v * headway + v * (v - lead) / (2.0 * (acceleration * braking) ** 0.5)).clamp_min(0.0)
    follow = acceleration * (1.0 - (wish / gap.clamp_min(MINIMUM_GAP_M)).square())
    return torch.minimum(free, torch.where(gap.isfinite(), follow, free)).clamp(-HARDEST_BRAKING, acceleration)


class Idm:
    """Every road user on its ``path`` ("log" or "lane") by IDM; who stands in the recording keeps standing."""

    def __init__(self, path: str = "log", parameters: IdmParameters | None = None, name: str = "idm") -> None:
        self.path, self.parameters, self.name = path, parameters or IdmParameters(), name

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        self.paths: Paths = build_paths(state.scenes, self.path)
        self.s = torch.zeros_like(state.speed)  # m along the path, of the box centre
        self.stops = stop_points(state, self.paths)

    @torch.no_grad()
    def act(self, state: WorldState) -> Moves:
        scene, size = state.scene, state.scenes.size[state.scene]
        poses = self.paths.poses[scene]
        self.s = torch.where(state.present, project(poses, state.pose, self.s), self.s)
        v = state.speed.clamp_min(0.0)
        front = 0.5 * size[..., 0]
        gap, lead = leaders(state, poses, self.s, v)
        p = self.parameters
        options = {
            "headway": p.headway, "standstill": p.standstill, "acceleration": p.acceleration, "braking": p.braking,
        }  # fmt: skip
        wanted = torch.maximum(self.paths.cruise[scene], torch.full_like(v, 1.0))
        if p.desired_speed is not None:
            wanted = torch.full_like(v, p.desired_speed)
        stands = self.paths.stands[scene]
        lights = self._light_gap(state, v, front)
        lateral, turn = beside(poses, state.pose, self.s)  # errors beside the path, which die out
        start = self.s
        s, token, bends = self.s, [], self.paths.bend_speed[scene]
        for _ in range(TOKEN_STEPS):
            index = (s / SPACING_M).long().clamp(0, bends.shape[-1] - 1)
            v0 = torch.minimum(wanted, bends.gather(-1, index[..., None])[..., 0]).clamp_min(0.1)
            a = idm_acceleration(v, gap, lead, v0, **options)
            a = torch.minimum(a, idm_acceleration(v, lights, torch.zeros_like(v), v0, **options))
            a = torch.where(stands, -HARDEST_BRAKING, a)
            v_next = (v + a * STEP_S).clamp_min(0.0)
            ds = torch.where(v + a * STEP_S < 0.0, v * v / (-2.0 * a).clamp_min(1e-9), 0.5 * (v + v_next) * STEP_S)
            gap, lights = gap - ds + lead * STEP_S, lights - ds
            s, v = s + ds, v_next
            token.append(s)
        self.s = s
        s = torch.stack(token, dim=-1)
        moves = interpolate(poses, s)
        fade = torch.exp(-(s - start[..., None]) / RETURN_M)
        heading = moves[..., 2]
        side = torch.stack((-torch.sin(heading), torch.cos(heading)), dim=-1) * (lateral[..., None] * fade)[..., None]
        moves = torch.cat((moves[..., :2] + side, (heading + turn[..., None] * fade)[..., None]), dim=-1)
        held = state.pose[..., None, :].expand_as(moves)
        return Moves.poses(torch.where((stands & (state.speed.abs() < 0.05))[..., None, None], held, moves))

    def _light_gap(self, state: WorldState, v: Tensor, front: Tensor) -> Tensor:
        """[B,N] m to the stop point of the nearest red light ahead that can still be stopped at; inf if none."""
        red = state.scenes.light_red[:, :, min(state.column, state.scenes.light_red.shape[2] - 1)][state.scene]
        gap = self.stops - (self.s + front)[..., None]  # [B,N,K]
        needed = v.square()[..., None] / (2.0 * gap.clamp_min(0.05))
        holds = red[:, None, :] & (gap > -0.5) & (needed < LIGHT_BRAKING)
        return torch.where(
            holds, (gap - STOP_SHORT_M + self.parameters.standstill).clamp_min(MINIMUM_GAP_M), torch.inf
        ).amin(dim=-1)


def leaders(state: WorldState, poses: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(gap [B,N] m bumper to bumper along the path, inf if nobody; the leader's speed along the path [B,N] m/s)."""
    B, N = v.shape
    size = state.scenes.size[state.scene]
    look = LOOK_M + LOOK_S * v
    W = int(float(torch.where(state.present, look, 0.0).max()) + 8.0)
    centre = state.pose[..., :2]
    d = centre[:, :, None] - centre[:, None]
    close = d.square().sum(-1) < (look + 8.0).square()[..., None]
    close &= state.present[:, :, None] & state.present[:, None, :]
    close &= ~torch.eye(N, dtype=torch.bool, device=v.device)
    world, i, j = close.nonzero(as_tuple=True)
    gap = torch.full((B * N,), torch.inf, device=v.device)
    lead = torch.zeros(B * N, device=v.device)
    if not len(world):
        return gap.view(B, N), lead.view(B, N)
    P = poses.shape[-2]
    index = ((s[world, i] / SPACING_M).floor().long()[:, None] + torch.arange(W, device=v.device)).clamp_max(P - 1)
    window = poses[world[:, None], i[:, None], index]  # [Q,W,3]
    velocity = state.velocity()[world, j]
    front, half_width = 0.5 * size[world, i, 0], 0.5 * size[world, i, 1]
    best_gap = torch.full_like(front, torch.inf)
    best_speed = torch.zeros_like(front)
    for ahead_s in (0.0, ANTICIPATION_S):
        other = centre[world, j] + ahead_s * velocity
        offset = other[:, None] - window[..., :2]
        nearest = offset.square().sum(-1).argmin(dim=-1, keepdim=True)
        pick = lambda values, nearest=nearest: values.gather(-1, nearest)[:, 0]  # noqa: E731
        heading = pick(window[..., 2])
        cos, sin = torch.cos(heading), torch.sin(heading)
        along = pick(index).float() * SPACING_M + cos * pick(offset[..., 0]) + sin * pick(offset[..., 1])
        lateral = -sin * pick(offset[..., 0]) + cos * pick(offset[..., 1])
        turn = state.pose[world, j, 2] - heading
        c, q = torch.cos(turn).abs(), torch.sin(turn).abs()
        half = 0.5 * size[world, j]
        half_along, half_across = c * half[:, 0] + q * half[:, 1], q * half[:, 0] + c * half[:, 1]
        found = along - half_along - s[world, i] - front
        inside = (lateral.abs() < half_width + half_across + CLEARANCE_M) & (along + half_along > s[world, i] + front)
        inside &= found < look[world, i]
        speed = (cos * velocity[:, 0] + sin * velocity[:, 1]).clamp_min(0.0)
        if ahead_s:  # where it will be in the way; it is not there yet, so it counts where it is now
            found = found - speed * ahead_s
            inside &= found > 0.0
        better = inside & (found < best_gap)
        best_gap, best_speed = torch.where(better, found, best_gap), torch.where(better, speed, best_speed)
    row = world * N + i
    gap.scatter_reduce_(0, row, best_gap, "amin")
    leads = (best_gap == gap[row]) & best_gap.isfinite()
    slowest = torch.full_like(gap, torch.inf)
    slowest.scatter_reduce_(0, row[leads], best_speed[leads], "amin")
    lead = torch.where(slowest.isfinite(), slowest, 0.0)
    return gap.clamp_min(MINIMUM_GAP_M).view(B, N), lead.view(B, N)


def stop_points(state: WorldState, paths: Paths) -> Tensor:
    """[B,N,K] position along each path of each light's stop point, inf where the path does not pass it."""
    scenes = state.scenes
    stop, direction = scenes.light_stop, scenes.light_direction
    S, N = scenes.exists.shape
    found = torch.full((S, N, stop.shape[1]), torch.inf, device=scenes.device)
    x, y, heading = paths.poses.unbind(-1)
    cos, sin = torch.cos(heading), torch.sin(heading)
    for k in range(stop.shape[1]):
        at, along = stop[:, k, :, None, None], direction[:, k, :, None, None]
        distance = torch.hypot(x - at[:, 0], y - at[:, 1]).nan_to_num(nan=torch.inf)
        distance = torch.where(cos * along[:, 0] + sin * along[:, 1] > ALIGNED_COSINE, distance, torch.inf)
        best, index = distance.min(dim=-1)
        found[:, :, k] = torch.where(best <= STOP_POINT_REACH_M, index.float() * SPACING_M, torch.inf)
    return found[state.scene]
