"""The protocol of everything that drives a road user, and the mixture of several by mask.

Legend: B worlds, N road users. A policy answers for all road users of all worlds; whose answers count is decided by
the masks of :class:`Mixed`, so replay, rules and learned models drive side by side in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from navsim_ext.closed_loop.moves import Moves, chosen
from navsim_ext.closed_loop.scenes import is_road_user
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.errors import DataError
from navsim_ext.traffic.codes import AgentKind
from navsim_ext.traffic.scene import TrafficScene


@runtime_checkable
class AgentPolicy(Protocol):
    """Anything that drives road users. ``name`` stands in tables."""

    name: str

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        """Called once per batch of worlds, before the first :meth:`act`."""
        ...

    def act(self, state: WorldState) -> Moves:
        """The next 0.5 s of all road users."""
        ...


def who(name: str, state: WorldState) -> Tensor:
    """[B,N] mask of "all", "ego", "others", "vehicles", "cyclists", "pedestrians" (the last four without the ego).

    Raises DataError for a name that does not exist.
    """
    scenes = state.scenes
    rows = torch.arange(scenes.num_agents, device=scenes.device)
    ego = rows == scenes.ego[:, None]
    masks = {
        "all": scenes.exists,
        "ego": ego,
        "others": scenes.exists & ~ego,
        "road_users": is_road_user(scenes) & ~ego,
        "vehicles": (scenes.kind == int(AgentKind.VEHICLE)) & scenes.exists & ~ego,
        "cyclists": (scenes.kind == int(AgentKind.CYCLIST)) & scenes.exists & ~ego,
        "pedestrians": (scenes.kind == int(AgentKind.PEDESTRIAN)) & scenes.exists & ~ego,
    }
    if name not in masks:
        raise DataError(f"there are no road users {name!r}; there are {', '.join(masks)}")
    return masks[name][state.scene]


class Mixed:
    """Several policies in one world: ``drivers`` maps a name of :func:`who` to a policy; later entries win."""

    def __init__(self, drivers: Mapping[str, AgentPolicy]) -> None:
        if not drivers:
            raise DataError("a mixture of 0 policies drives nobody")
        self.drivers = dict(drivers)
        self.name = "+".join(f"{key}:{policy.name}" for key, policy in self.drivers.items())
        self._masks: list[Tensor] = []

    def start(self, state: WorldState, scenes: Sequence[TrafficScene]) -> None:
        self._masks = [who(name, state) for name in self.drivers]
        covered = torch.stack(self._masks).any(dim=0)
        if not bool(covered[who("all", state)].all()):
            raise DataError(f"the mixture {self.name} leaves road users without a driver: begin it with all=...")
        for policy in self.drivers.values():
            policy.start(state, scenes)

    def act(self, state: WorldState) -> Moves:
        return chosen(self._masks, [policy.act(state) for policy in self.drivers.values()], state)
