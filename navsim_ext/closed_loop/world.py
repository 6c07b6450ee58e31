"""The world: starts scenes, moves everybody by a token, and says what happened.

Legend: S scenes, R rollouts, B = S R worlds, N road users, K = 5 poses of a token.
Nobody vanishes. A road user that the recording shows at now is in the world from now on; one that it shows later enters
at the first token that begins after its first observation (``enter="log"``) or never does (``enter="never"``). It
stays, is seen and can be hit, until its policy declares it removed, and the step at which that happened is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from navsim_ext.closed_loop import kernels
from navsim_ext.closed_loop.events import EVENTS, Events, find_events
from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves, on_cpu
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.tracks import ABSENT
from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene

ENTER = ("log", "never")


class World:
    """A batch of worlds. ``horizon_s`` is how long they can be driven (None: as long as the longest recording)."""

    def __init__(
        self,
        *,
        rollouts: int = 1,
        horizon_s: float | None = None,
        enter: str = "log",
        events: Sequence[str] = EVENTS,
        device: torch.device | str = "cpu",
    ) -> None:
        if enter not in ENTER:
            raise DataError(f"enter is {enter!r}; one of {', '.join(ENTER)} was expected")
        unknown = sorted(set(events) - set(EVENTS))
        if unknown:
            raise DataError(f"there are no events {', '.join(unknown)}; there are {', '.join(EVENTS)}")
        if rollouts < 1 or (horizon_s is not None and not 0.0 < horizon_s < float("inf")):
            raise DataError(f"rollouts {rollouts} and horizon_s {horizon_s} must be positive")
        self.rollouts, self.horizon_s, self.enter = rollouts, horizon_s, enter
        self.events_wanted, self.device = tuple(events), torch.device(device)

    def reset(self, scenes: Sequence[TrafficScene] | WorldScenes) -> WorldState:
        """All worlds at now, ``rollouts`` of each scene."""
        if not isinstance(scenes, WorldScenes):
            scenes = WorldScenes.build(scenes, self.device)
        S, R, N = len(scenes), self.rollouts, scenes.num_agents
        if self.horizon_s is None:
            steps = max(scenes.future_steps, TOKEN_STEPS)
        else:
            steps = round(self.horizon_s / STEP_S)
        steps = -(-steps // TOKEN_STEPS) * TOKEN_STEPS  # whole tokens
        scene = torch.arange(S, device=scenes.device).repeat_interleave(R)
        columns = scenes.now + 1 + steps
        poses = torch.zeros(S * R, N, columns, 3, device=scenes.device)
        there = torch.zeros(S * R, N, columns, dtype=torch.bool, device=scenes.device)
        known = scenes.now + 1
        poses[:, :, :known] = scenes.log_pose[scene, :, :known]
        there[:, :, :known] = scenes.log_state[scene, :, :known] != ABSENT
        present = there[:, :, scenes.now].clone()
        none = torch.full((S * R, N), -1, dtype=torch.int64, device=scenes.device)
        return WorldState(
            scenes=scenes,
            rollouts=R,
            scene=scene,
            poses=poses,
            there=there,
            step=0,
            present=present,
            speed=_logged_speed(scenes, scenes.now)[scene],
            removed_at=none,
            entered_at=torch.where(present, 0, none),
        )

    @torch.no_grad()
    def step(self, state: WorldState, moves: Moves) -> WorldState:
        """Moves everybody who is present by one token, in place; raises BadMoves (nothing has moved then), DataError
        when the horizon is over."""
        if state.steps_left < TOKEN_STEPS:
            raise DataError(f"the drive is over: its horizon is {state.step * STEP_S:.1f} s; reset with a longer one")
        moves = moves.resolve(state)
        state.speed = advance(state, moves.values) if on_cpu(moves.values) else tensor_advance(state, moves.values)
        state.step += TOKEN_STEPS
        if moves.leaves is not None:
            self._remove(state, moves.leaves)
        if self.enter == "log":
            self._admit(state)
        return state

    def events(self, state: WorldState, first: int | None = None, last: int | None = None) -> Events:
        """What happened in the steps ``first`` + 1 ... ``last`` (default: the last token), see :class:`Events`.

        A rollout whose policy does not look at events is cheaper when it asks once, at its end, for all of it.
        """
        last = state.step if last is None else last
        first = max(last - TOKEN_STEPS, 0) if first is None else first
        if not 0 <= first < last <= state.step:
            raise DataError(f"events of steps {first} ... {last} were asked for; 0 <= first < last <= {state.step}")
        return find_events(state, first, last, self.events_wanted)

    @staticmethod
    def _remove(state: WorldState, leaves: Tensor) -> None:
        rows = torch.arange(leaves.shape[1], device=leaves.device)
        leaves = leaves & state.present & (rows != state.scenes.ego[state.scene][:, None])  # the ego stays
        state.removed_at = torch.where(leaves, state.step, state.removed_at)
        state.present = state.present & ~leaves

    @staticmethod
    def _admit(state: WorldState) -> None:
        scenes, column = state.scenes, state.column
        if column > scenes.last_entry:
            return
        seen = (scenes.log_state[:, :, column] != ABSENT)[state.scene] & (state.entered_at < 0)
        if not bool(seen.any()):
            return
        state.poses[:, :, column] = torch.where(seen[..., None], scenes.log_pose[state.scene, :, column], state.pose)
        state.there[:, :, column] |= seen
        state.speed = torch.where(seen, _logged_speed(scenes, column)[state.scene], state.speed)
        state.entered_at = torch.where(seen, state.step, state.entered_at)
        state.present = state.present | seen


def advance(state: WorldState, values: Tensor) -> Tensor:
    """:func:`tensor_advance` by its compiled twin."""
    speed = torch.empty_like(state.speed)
    given = (one.detach().contiguous().numpy() for one in (values, state.present))
    written = (one.numpy() for one in (state.poses, state.there, speed))
    kernels.advance(*given, state.column + 1, np.float32(STEP_S), *written)
    return speed


def tensor_advance(state: WorldState, values: Tensor) -> Tensor:
    """Writes a token's poses [B,N,K,3] into the state (0 for those who are not present); returns the speed [B,N] m/s
    along the heading over the last step."""
    column, present = state.column, state.present
    span = slice(column + 1, column + 1 + TOKEN_STEPS)
    state.poses[:, :, span] = torch.where(present[..., None, None], values, 0.0)
    state.there[:, :, span] = present[..., None]
    last, before = state.poses[:, :, column + TOKEN_STEPS], state.poses[:, :, column + TOKEN_STEPS - 1]
    heading = last[..., 2].contiguous()
    d = last[..., :2] - before[..., :2]
    return (torch.cos(heading) * d[..., 0] + torch.sin(heading) * d[..., 1]) / STEP_S


def _logged_speed(scenes: WorldScenes, column: int) -> Tensor:
    """[S,N] m/s along the recorded heading: the step before ``column`` where it is known, else the step after."""

    def along(a: int, b: int) -> tuple[Tensor, Tensor]:
        d = scenes.log_pose[:, :, b, :2] - scenes.log_pose[:, :, a, :2]
        heading = scenes.log_pose[:, :, b, 2].contiguous()
        known = (scenes.log_state[:, :, a] != ABSENT) & (scenes.log_state[:, :, b] != ABSENT)
        return (torch.cos(heading) * d[..., 0] + torch.sin(heading) * d[..., 1]) / STEP_S, known

    speed = torch.zeros_like(scenes.log_pose[:, :, 0, 0])
    if column + 1 < scenes.log_pose.shape[2]:
        after, known = along(column, column + 1)
        speed = torch.where(known, after, speed)
    if column > 0:
        before, known = along(column - 1, column)
        speed = torch.where(known, before, speed)
    return speed
