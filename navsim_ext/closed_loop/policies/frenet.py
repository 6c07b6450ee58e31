"""A sampling planner in the Frenet frame of its path, for the ego: the second family of the graded panel.

At every token it draws end states on a grid (speed v_e, lateral offset d_e), joins them to the present state by
polynomials (Werling et al. 2010), and executes the first 0.5 s of the cheapest:
  s(t): quartic with s, s', s'' given now and s' = v_e, s'' = 0 at T,
  d(t): quintic with d, d', d'' given now and (d_e, 0, 0) at T,
  J = w_jerk mean(s'''^2 + d'''^2) + w_v mean((s' - v0)^2) + w_d mean(d^2) + w_c 1[contact] (T - t_contact)/T
      + w_r max(0, s_front(T) - stop point of a red light).
Others are predicted at constant velocity; contact is that of full boxes grown by ``margin``.

Legend: B worlds, Q candidates, T times, N road users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_ext.closed_loop.contact import boxes_touch
from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.paths import SPACING_M, beside, build_paths, interpolate, project
from navsim_ext.closed_loop.policies.idm import stop_points
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

SPEED_LEVELS = 9
LATERAL_LEVELS = (-1.5, -0.75, 0.0, 0.75, 1.5)  # m
HARDEST_BRAKING = 5.0  # m/s^2 of the lowest end speed
STRONGEST_ACCELERATION = 2.0
CHECK_S = 0.25  # between the times at which contact is checked


@dataclass(frozen=True)
class FrenetParameters:
    """One planner of the panel."""

    desired_speed: float | None = None  # m/s; None: the fastest that the ego was recorded at
    horizon_s: float = 3.0  # T
    lateral_weight: float = 20.0  # w_d
    speed_weight: float = 1.0  # w_v
    jerk_weight: float = 0.1  # w_jerk
    collision_weight: float = 1000.0  # w_c; 0 drives into what is there
    light_weight: float = 100.0  # w_r
    margin: float = 0.4  # m around the ego's box

    def __post_init__(self) -> None:
        if not 0.5 <= self.horizon_s <= 10.0:
            raise DataError(f"a Frenet planner needs a horizon of 0.5 to 10 s, not {self.horizon_s}")


class Frenet:
    """Plans for the ego; its answers for others are that they stay where they are (mix it in as ``ego=``)."""

    def __init__(self, path: str = "log", parameters: FrenetParameters | None = None, name: str = "frenet") -> None:
        self.path, self.parameters, self.name = path, parameters or FrenetParameters(), name

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        paths = build_paths(state.scenes, self.path)
        worlds, ego = state.ego_index()
        self.poses = paths.poses[state.scene, ego]  # [B,P,3]
        self.bend = paths.bend_speed[state.scene, ego]
        self.cruise = paths.cruise[state.scene, ego].clamp_min(1.0)
        self.stops = stop_points(state, paths)[worlds, ego]  # [B,K]
        self.s = torch.zeros_like(self.cruise)
        self.motion = torch.zeros(len(worlds), 3, device=self.s.device)  # s'', d', d''

    @torch.no_grad()
    def act(self, state: WorldState) -> Moves:
        worlds, ego = state.ego_index()
        p = self.parameters
        pose, v = state.pose[worlds, ego], state.speed[worlds, ego].clamp_min(0.0)
        self.s = project(self.poses[:, None], pose[:, None], self.s[:, None])[:, 0]
        d = beside(self.poses[:, None], pose[:, None], self.s[:, None])[0][:, 0]
        a, d1, d2 = self.motion.unbind(-1)
        T = p.horizon_s
        times = torch.arange(1, round(T / STEP_S) + 1, device=v.device) * STEP_S
        index = (self.s / SPACING_M).long().clamp(0, self.bend.shape[-1] - 1)
        wanted = torch.full_like(v, p.desired_speed) if p.desired_speed is not None else self.cruise
        v0 = torch.minimum(wanted, self.bend.gather(-1, index[:, None])[:, 0])
        low, high = (
            (v - HARDEST_BRAKING * T).clamp_min(0.0),
            torch.minimum(v + STRONGEST_ACCELERATION * T, v0.clamp_min(0.1)),
        )
        share = torch.linspace(0.0, 1.0, SPEED_LEVELS, device=v.device)
        speeds = torch.minimum(low, high)[:, None] + share * (high - low).clamp_min(0.0)[:, None]
        sideways = torch.tensor(LATERAL_LEVELS, device=v.device)
        ve = speeds[:, :, None].expand(-1, -1, len(sideways)).flatten(1)  # [B,Q]
        de = sideways.expand(len(v), SPEED_LEVELS, -1).flatten(1)
        s, s1, s3 = quartic(v[:, None], a[:, None], ve, T, times)
        lateral, l3 = quintic(d[:, None], d1[:, None], d2[:, None], de, T, times)
        standing = s1 < 0.0
        s = torch.where(standing, s.cummax(dim=-1).values, s).clamp_min(0.0)
        on = interpolate(self.poses[:, None].expand(-1, ve.shape[1], -1, -1), self.s[:, None, None] + s)
        heading = on[..., 2]
        side = torch.stack((-torch.sin(heading), torch.cos(heading)), dim=-1)
        slope = torch.diff(lateral, dim=-1, prepend=d[:, None, None].expand(-1, lateral.shape[1], 1))
        moved = torch.diff(s, dim=-1, prepend=torch.zeros_like(s[..., :1])).clamp_min(0.05)
        turned = heading + torch.atan2(slope, moved).clamp(-0.5, 0.5)
        plan = torch.cat((on[..., :2] + lateral[..., None] * side, turned[..., None]), dim=-1)  # [B,Q,T,3]
        cost = p.jerk_weight * (s3.square() + l3.square()).mean(-1)
        cost = (
            cost
            + p.speed_weight * (s1 - v0[:, None, None]).square().mean(-1)
            + p.lateral_weight * lateral.square().mean(-1)
        )
        if p.collision_weight > 0.0:
            cost = cost + p.collision_weight * self._contact(state, plan, times, worlds, ego)
        if p.light_weight > 0.0:
            cost = cost + p.light_weight * self._red(state, self.s[:, None] + s[..., -1], v, worlds, ego)
        best = cost.argmin(dim=-1)
        row = torch.arange(len(best), device=best.device)
        token = plan[row, best, :TOKEN_STEPS]
        self._remember(v, a, d, d1, d2, ve[row, best], de[row, best], T)
        held = state.pose[..., None, :].expand(*state.pose.shape[:2], TOKEN_STEPS, 3).clone()
        held[worlds, ego] = token
        return Moves.poses(held)

    def _remember(self, v, a, d, d1, d2, ve, de, T) -> None:
        """Acceleration, lateral speed and acceleration at the end of the token, where the next plan begins."""
        h = STEP_S
        times = torch.tensor([TOKEN_STEPS * h - h, TOKEN_STEPS * h, TOKEN_STEPS * h + h], device=v.device)
        _, s1, _ = quartic(v[:, None], a[:, None], ve[:, None], T, times)
        lateral, _ = quintic(d[:, None], d1[:, None], d2[:, None], de[:, None], T, times)
        s1, lateral = s1[:, 0], lateral[:, 0]
        self.motion = torch.stack(
            (
                (s1[:, 2] - s1[:, 0]) / (2 * h),
                (lateral[:, 2] - lateral[:, 0]) / (2 * h),
                (lateral[:, 2] - 2 * lateral[:, 1] + lateral[:, 0]) / h**2,
            ),
            dim=-1,
        )
        self.motion = torch.where((s1[:, 1] < 0.05)[:, None], torch.zeros_like(self.motion), self.motion)

    def _contact(self, state: WorldState, plan: Tensor, times: Tensor, worlds: Tensor, ego: Tensor) -> Tensor:
        """[B,Q] share of the horizon that a candidate is in contact before its end: (T - t_contact) / T, 0 if never."""
        every = max(1, round(CHECK_S / STEP_S))
        chosen, at = plan[:, :, every - 1 :: every], times[every - 1 :: every]
        size = state.scenes.size[state.scene]
        velocity = state.velocity()
        others = state.pose[:, None, :, :].expand(-1, len(at), -1, -1).clone()
        others[..., :2] += at[None, :, None, None] * velocity[:, None]
        mine = size[worlds, ego] + 2.0 * self.parameters.margin
        active = state.present.clone()
        active[worlds, ego] = False
        near = (state.pose[..., :2] - state.pose[worlds, ego][:, None, :2]).norm(dim=-1)
        active &= near < 80.0
        count = int(active.sum(dim=1).max())
        worst = torch.zeros(plan.shape[:2], device=plan.device)
        if count == 0:
            return worst
        rows = active.float().topk(count, dim=1).indices  # those who matter, packed

        def pick(values):
            return values.gather(
                1, rows.view(*rows.shape, *([1] * (values.dim() - 2))).expand(*rows.shape, *values.shape[2:])
            )

        boxes, there = pick(size), pick(active)
        placed = others.gather(2, rows[:, None, :, None].expand(-1, len(at), -1, 3))
        touch = boxes_touch(
            chosen[:, :, :, None], mine[:, None, None, None], placed[:, None], boxes[:, None, None]
        )  # [B,Q,T',n]
        hit = (touch & there[:, None, None]).any(dim=-1)
        weight = 1.0 - at / at[-1] + 1.0 / len(at)
        return (hit * weight).amax(dim=-1)

    def _red(self, state: WorldState, reach: Tensor, v: Tensor, worlds: Tensor, ego: Tensor) -> Tensor:
        """[B,Q] metres by which a candidate's front passes the nearest red stop point that can still be stopped at."""
        scenes = state.scenes
        red = scenes.light_red[:, :, min(state.column, scenes.light_red.shape[2] - 1)][state.scene]
        front = 0.5 * scenes.size[state.scene][worlds, ego, 0]
        gap = self.stops - (self.s + front)[:, None]
        holds = red & (gap > 0.0) & (v.square()[:, None] / (2.0 * gap.clamp_min(0.05)) < HARDEST_BRAKING)
        line = torch.where(holds, self.stops, torch.inf).amin(dim=-1)
        passed = reach + front[:, None] - (line[:, None] - 0.5)
        return torch.where(line.isfinite()[:, None], passed.clamp_min(0.0), torch.zeros_like(passed))


def quartic(v: Tensor, a: Tensor, ve: Tensor, T: float, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(s, s', s''') [...,T] with s(0) = 0, s'(0) = v, s''(0) = a, s'(T) = ve, s''(T) = 0."""
    c3 = (3.0 * (ve - v) - 2.0 * a * T) / (3.0 * T**2)
    c4 = (2.0 * (v - ve) + a * T) / (4.0 * T**3)
    v, a, c3, c4 = (value[..., None] for value in torch.broadcast_tensors(v, a, c3, c4))
    s = v * t + 0.5 * a * t**2 + c3 * t**3 + c4 * t**4
    return s, v + a * t + 3 * c3 * t**2 + 4 * c4 * t**3, 6 * c3 + 24 * c4 * t


def quintic(d: Tensor, d1: Tensor, d2: Tensor, de: Tensor, T: float, t: Tensor) -> tuple[Tensor, Tensor]:
    """(d, d''') [...,T] with d, d', d'' given at 0 and (de, 0, 0) at T."""
    e0, e1, e2 = de - (d + d1 * T + 0.5 * d2 * T**2), -(d1 + d2 * T), -d2
    c3 = (10 * e0 - 4 * e1 * T + 0.5 * e2 * T**2) / T**3
    c4 = (-15 * e0 + 7 * e1 * T - e2 * T**2) / T**4
    c5 = (6 * e0 - 3 * e1 * T + 0.5 * e2 * T**2) / T**5
    d, d1, d2, c3, c4, c5 = (value[..., None] for value in torch.broadcast_tensors(d, d1, d2, c3, c4, c5))
    return d + d1 * t + 0.5 * d2 * t**2 + c3 * t**3 + c4 * t**4 + c5 * t**5, 6 * c3 + 24 * c4 * t + 60 * c5 * t**2
