"""Constant velocity: straight ahead at the present speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from navsim_ext.closed_loop.kinematics import STEP_S, TOKEN_STEPS
from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.traffic.scene import TrafficScene


class ConstantVelocity:
    """p_k = p + v k dt (cos h, sin h), the heading is kept."""

    name = "constant_velocity"

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        """Nothing to prepare."""

    def act(self, state: WorldState) -> Moves:
        times = STEP_S * torch.arange(1, TOKEN_STEPS + 1, device=state.speed.device)
        tokens = torch.zeros(*state.speed.shape, TOKEN_STEPS, 3, device=state.speed.device)
        tokens[..., 0] = state.speed[..., None] * times
        return Moves.tokens(tokens)
