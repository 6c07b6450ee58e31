"""Figures of the ego's drives on held-out scenes, beside those of the planner that training started from.

Legend: B drives, one of each scene, by the most probable choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.runtime.collectives import gather_rows
from navsim_ext.traffic.scene import TrafficScene

if TYPE_CHECKING:
    from stage3_grpo.policies.ego.policy import EgoDrives, EgoDriving

COLUMNS = ("reward", "failed", "jerk", "invalid", "reached", "has_goal")


def jerk(state: WorldState) -> Tensor:
    """[B] mean absolute jerk of the egos' drives (m/s^3), from positions, of speeds half a second apart: differences
    over single steps would be rounding."""
    worlds, ego = state.ego_index()
    track = state.poses[worlds, ego, state.scenes.now : state.column + 1, :2].double()
    speed = (track[:, 1:] - track[:, :-1]).norm(dim=-1) / STEP_S
    mean = speed.unfold(1, 5, 5).mean(dim=-1)  # of each half second
    if mean.shape[1] < 3:
        return torch.zeros(len(mean), device=mean.device)
    return (mean.diff(n=2, dim=1) / 0.25).abs().mean(dim=1).float()


def figures(drives: EgoDrives) -> Tensor:
    """[B,6] of :data:`COLUMNS`; an invalid drive counts as invalid alone."""
    invalid = torch.zeros(len(drives.mask))
    invalid[list(drives.invalid)] = 1.0
    whole = (drives.reward * drives.mask).sum(dim=1).cpu()
    reached = (drives.reached & drives.has_goal).float().cpu()
    columns = [whole, drives.failed.float().cpu(), jerk(drives.state).cpu(), invalid, reached,
               drives.has_goal.float().cpu()]  # fmt: skip
    return torch.stack(columns, dim=1)


class EgoHeldOut:
    """``score`` is the mean reward of a drive; ``goal_reached`` the share of drives with a goal that reached it."""

    def __init__(self, policy: EgoDriving) -> None:
        self.policy = policy
        self.first: dict[str, float] = {}  # of the planner before its first update
        self._rows: list[Tensor] = []

    def start(self) -> None:
        self._rows = []

    def add(self, batch: Sequence[TrafficScene]) -> None:
        self._rows.append(figures(self.policy.drive(list(batch), 1, 0, best=True)))

    def finish(self, trainer: pl.Trainer) -> dict[str, float]:
        rows = gather_rows(torch.cat(self._rows))
        valid = rows[rows[:, 3] == 0]
        mean = lambda column: float(valid[:, column].mean()) if len(valid) else math.nan  # noqa: E731
        goals = valid[valid[:, 5] == 1]
        told = {
            "score": mean(0), "failed": mean(1), "jerk": mean(2), "invalid": float(rows[:, 3].mean()),
            "goal_reached": float(goals[:, 4].mean()) if len(goals) else math.nan,
        }  # fmt: skip
        if not trainer.sanity_checking:
            self.first = self.first or told
        return told | {"gain": told["score"] - (self.first or told)["score"]}

    def state_dict(self) -> dict[str, Any]:
        return {"first": dict(self.first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = dict(state.get("first", {}))
