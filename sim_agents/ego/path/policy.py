"""The path planner in the ego's seat, and asked once.

Legend: B worlds, J = 5 poses of 0.1 s, F = 8 waypoints.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from navsim_ext.closed_loop.state import WorldState
from sim_agents.ego.checkpoint import fill, read_planner
from sim_agents.ego.encoder import EncoderSettings
from sim_agents.ego.motion import headings_along, play
from sim_agents.ego.observation import Sight
from sim_agents.ego.path.network import PathNetwork, PathSettings
from sim_agents.ego.policy import EgoPolicy, ego_state

KIND = "path"


class PathPolicy(EgoPolicy):
    """Drives towards the first waypoint; ``sample`` draws the action (with ``generator``) instead of taking the mean.
    ``plan`` gives the waypoints with the headings of the path."""

    def __init__(
        self, network: PathNetwork, *, goal: str = "log", sample: bool = False,
        generator: torch.Generator | None = None, name: str = KIND,
    ) -> None:  # fmt: skip
        super().__init__(name, sight=network.settings.sight, goal=goal)
        self.network, self.sample, self.generator = network.eval(), sample, generator

    def drive(self, state: WorldState) -> tuple[Tensor, Tensor | None]:
        policy = self.network.distribution(self.observe(state))
        action, logp = policy.mean, None
        if self.sample:
            noise = torch.randn(action.shape, generator=self.generator).to(action.device)
            action = action + policy.stddev * noise
            logp = policy.log_prob(action).sum(dim=-1)
        pose, speed, length = ego_state(state)
        return play(pose, speed, length, action)[0], logp

    @torch.no_grad()
    def plan(self, state: WorldState) -> Tensor:
        return headings_along(self.network(self.observe(state)))


def path_settings(values: dict[str, Any]) -> PathSettings:
    """Settings from the JSON of a record."""
    parts = {"sight": Sight, "actor": EncoderSettings, "critic": EncoderSettings}
    return PathSettings(**values | {name: cls(**values[name]) for name, cls in parts.items()})


def load_path_planner(
    checkpoint: str | os.PathLike[str], *, name: str = KIND, goal: str = "log", ema: bool | None = None,
    device: str = "cpu",
) -> PathPolicy:  # fmt: skip
    """The planner of a checkpoint of ``sim_agents.ego.train experiment=path``."""
    record, weights, fingerprint = read_planner(checkpoint, KIND, ema=ema)
    network = PathNetwork(path_settings(record["settings"]))
    fill(network, weights, checkpoint)
    policy = PathPolicy(network.to(device), goal=goal, name=name)
    policy.fingerprint = fingerprint
    return policy
