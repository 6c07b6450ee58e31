"""Drivers who leave the recording on purpose: late, slow, hasty, stopping, swerving. They look at nobody.

The ego follows its recorded way at recorded speeds, but on a clock tau of its own and beside it:
  late      keeps its present speed v0 for ``delay_s`` = D, then does what was recorded, D later:
            s(t) = v0 min(t, D) + s_rec(tau(max(t - D, 0)))
  slow      dtau/dt goes from 1 to ``speed_share`` within RAMP_S (a share above 1: hasty)
  stopping  after ``stop_after_s`` dtau/dt goes to 0 within STOP_S
  swerving  d(t) = swerve_m sin(2 pi t / SWERVE_S) (1 - exp(-t)) to the left of the way
Where the recording ends, its last speed goes on.

Legend: B worlds, E steps of the drive, U recorded steps after now.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.paths import build_paths, interpolate
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

RAMP_S, STOP_S, SWERVE_S = 3.0, 4.0, 5.0
SLOWEST = 1e-3  # m of a step below which a swerving ego keeps its way's heading


class Distorted:
    """Drives the ego (mix it in as ``ego=``); its answers for others are that they stay where they are."""

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        speed_share: float = 1.0,
        stop_after_s: float | None = None,
        swerve_m: float = 0.0,
        name: str = "distorted",
    ) -> None:
        if not (delay_s >= 0.0 and speed_share > 0.0 and (stop_after_s is None or stop_after_s >= 0.0)):
            raise DataError(
                f"{name}: delay_s {delay_s} and stop_after_s {stop_after_s} must be at least 0, speed_share "
                f"{speed_share} above 0"
            )
        self.delay_s, self.speed_share, self.stop_after_s = delay_s, speed_share, stop_after_s
        self.swerve_m, self.name = swerve_m, name

    @torch.no_grad()
    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        worlds, ego = state.ego_index()
        poses = build_paths(state.scenes, "log").poses[state.scene, ego]  # [B,P,3]
        time = STEP_S * torch.arange(1, state.steps_left + 1, device=poses.device)
        late = (time - self.delay_s).clamp_min(0.0)
        v0 = state.speed[worlds, ego].clamp_min(0.0)[:, None]
        s = v0 * time.clamp_max(self.delay_s) + self._recorded(state, self._clock(late))
        way = interpolate(poses, s)  # [B,E,3]
        d = self.swerve_m * torch.sin(2.0 * torch.pi * time / SWERVE_S) * (1.0 - torch.exp(-time))
        moved = torch.diff(s, dim=-1, prepend=torch.zeros_like(s[:, :1]))
        slope = torch.diff(d, prepend=torch.zeros_like(d[:1])) / moved.clamp_min(SLOWEST)
        turn = torch.where(moved > SLOWEST, torch.atan(slope).clamp(-0.5, 0.5), 0.0)
        heading = way[..., 2]
        side = torch.stack((-torch.sin(heading), torch.cos(heading)), dim=-1)
        self._way = torch.cat((way[..., :2] + d[:, None] * side, (heading + turn)[..., None]), dim=-1)
        self._begin = state.step

    def act(self, state: WorldState) -> Moves:
        worlds, ego = state.ego_index()
        held = state.pose[..., None, :].expand(*state.pose.shape[:2], TOKEN_STEPS, 3).clone()
        at = state.step - self._begin
        held[worlds, ego] = self._way[:, at : at + TOKEN_STEPS]
        return Moves.poses(held)

    def _clock(self, time: Tensor) -> Tensor:
        """[E] tau of the times [E], by the middle of each step."""
        middle = time - 0.5 * STEP_S
        rate = 1.0 + (self.speed_share - 1.0) * (middle / RAMP_S).clamp(0.0, 1.0)
        if self.stop_after_s is not None:
            rate = rate * (1.0 - (middle - self.stop_after_s) / STOP_S).clamp(0.0, 1.0)
        return (rate * STEP_S * (time > 0.0)).cumsum(0)

    @staticmethod
    def _recorded(state: WorldState, tau: Tensor) -> Tensor:
        """[B,E] metres driven in the recording by tau [E] seconds after now; at its last speed beyond its end."""
        scenes, rows = state.scenes, []
        _, ego = state.ego_index()
        for b, s in enumerate(state.scene.tolist()):
            last = int(scenes.last_seen[s, ego[b]])
            xy = scenes.log_pose[s, ego[b], scenes.now : last + 1, :2]
            step = torch.diff(xy, dim=0).norm(dim=-1)
            gone = torch.cat((torch.zeros_like(step[:1]) if len(step) else xy.new_zeros(1), step.cumsum(0)))
            v = float(step[-1]) / STEP_S if len(step) else float(state.speed[b, ego[b]].clamp_min(0.0))
            at = (tau / STEP_S).clamp_max(len(gone) - 1)
            low = at.floor().long().clamp(0, max(len(gone) - 2, 0))
            share = at - low
            high = (low + 1).clamp_max(len(gone) - 1)
            beyond = (tau - STEP_S * (len(gone) - 1)).clamp_min(0.0)
            rows.append(gone[low] + share * (gone[high] - gone[low]) + v * beyond)
        return torch.stack(rows)
