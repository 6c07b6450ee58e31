"""What the vector planners share: the ego's seat in a moving world, and the same planner asked once for 4 seconds.

A planner answers two questions: ``drive`` (the next 0.5 s of the ego, in closed loop) and ``plan`` (8 poses, 0.5 s
apart, open loop). An answer that is not finite makes its world invalid, with its reason in ``failures``; that ego goes
on straight at its speed so that the others are not held up, and its drive must not be scored.

Legend: B worlds, J = 5 poses of 0.1 s, F = 8 poses of 0.5 s.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.ego.motion import play
from sim_agents.ego.observation import EgoObservation, Sight, observe
from sim_agents.ego.surroundings import GOALS, EgoSurroundings


class EgoPolicy(ABC):
    """An AgentPolicy for the ego (mix it in as ``ego=``; the others' moves that it returns stand still).

    ``goal`` says what it drives to: "log" (where the recording ends), "scene" (what the scene says) or "none".
    """

    fingerprint: Fingerprint

    def __init__(self, name: str, *, sight: Sight, goal: str = "log") -> None:
        if goal not in GOALS:
            raise DataError(f"goal={goal}: one of {', '.join(GOALS)} was expected")
        self.name, self.sight, self.goal = name, sight, goal
        self.failures: dict[int, str] = {}
        self.around: EgoSurroundings | None = None

    @abstractmethod
    def drive(self, state: WorldState) -> tuple[Tensor, Tensor | None]:
        """(poses [B,J,3] of the next 0.5 s in the scene's frame, log-probability [B] of the choice or None)."""

    @abstractmethod
    def plan(self, state: WorldState) -> Tensor:
        """[B,F,3] poses of the box centre at 0.5 ... 4.0 s in the ego's present frame."""

    @torch.no_grad()
    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        self.failures = {}
        self.around = EgoSurroundings.build(state.scenes, self.goal)

    @torch.no_grad()
    def act(self, state: WorldState) -> Moves:
        """Raises DataError before :meth:`start`."""
        if self.around is None:
            raise DataError(f"planner {self.name} was asked before it was started")
        worlds, ego = state.ego_index()
        poses, logp = self.drive(state)
        poses = self._finite(state, poses)
        moves = state.pose[:, :, None].expand(-1, -1, TOKEN_STEPS, -1).clone()
        moves[worlds, ego] = poses
        if logp is None:
            return Moves.poses(moves)
        whole = torch.zeros_like(state.speed)
        whole[worlds, ego] = logp.to(whole.dtype)
        return Moves.poses(moves, whole)

    def observe(self, state: WorldState) -> EgoObservation:
        return observe(state, self.around, self.sight)

    def _finite(self, state: WorldState, poses: Tensor) -> Tensor:
        bad = ~torch.isfinite(poses).flatten(1).all(dim=1)
        for b in bad.nonzero().flatten().tolist():
            self.failures.setdefault(b, f"{self.name}: move not finite at {state.step * STEP_S:.1f} s")
        lost = torch.zeros_like(bad)
        lost[list(self.failures)] = True
        if not bool(lost.any()):
            return poses
        worlds, ego = state.ego_index()
        nothing = torch.zeros(len(worlds), 2, device=poses.device)
        straight, _ = play(
            state.pose[worlds, ego], state.speed[worlds, ego], state.scenes.size[state.scene, ego, 0], nothing
        )
        return torch.where(lost[:, None, None], straight, poses)


def ego_state(state: WorldState) -> tuple[Tensor, Tensor, Tensor]:
    """(pose [B,3], speed [B] m/s not below 0, length [B] m) of the egos now."""
    worlds, ego = state.ego_index()
    return state.pose[worlds, ego], state.speed[worlds, ego].clamp_min(0.0), state.scenes.size[state.scene, ego, 0]
