"""The next-token policy without a memory: every half second it encodes the maps and everybody's whole past again, by
torch alone. What it chooses is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_STEPS
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.traffic.scene import TrafficScene
from sim_agents.model import attention, relations, sampling
from sim_agents.model.network import Agents
from sim_agents.policy import TokenPolicy


class ForgetfulPolicy(TokenPolicy):
    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        self._scenes = scenes
        with by_torch():
            super().start(state, scenes)

    def _look(self, state: WorldState) -> Tensor:
        with by_torch():
            super().start(state, self._scenes)  # the maps again
            columns = range(state.column % TOKEN_STEPS, state.column + 1, TOKEN_STEPS)
            moments = [self._moment(state, column) for column in columns]
            timed = {name: torch.cat([getattr(one, name) for one in moments], dim=2)
                     for name in ("pose", "valid", "motion", "light_state")}  # fmt: skip
            fixed = {one.name: getattr(moments[0], one.name) for one in fields(Agents) if one.name not in timed}
            return self.network.features(self._side, Agents(**timed, **fixed))[:, :, -1]


@contextmanager
def by_torch() -> Iterator[None]:
    """Switches the compiled loops off."""
    kept = [(module, module.compiled) for module in (attention, relations, sampling)]
    for module, _ in kept:
        module.compiled = lambda *tensors: False
    try:
        yield
    finally:
        for module, function in kept:
            module.compiled = function
