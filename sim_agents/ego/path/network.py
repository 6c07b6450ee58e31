"""The path planner's network: an observation to waypoints, and the Gaussian policy around them.

Legend: B observations, W waypoints 0.5 s apart, d width.

    waypoints = straight on at the present speed + SCALE_M head(encoder(observation))
    action    ~ N(mean, diag(exp(2 log_std))),  mean = action_towards(first waypoint)

An action is what a token carries out: (acceleration, curvature). Only the first waypoint is driven before the next
question, so only it is part of the action; the others are what the planner intends, and what open-loop scoring reads.
The critic has an encoder of its own: actor and critic may have different sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from navsim_ext.closed_loop.kinematics import TOKEN_S
from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_FUTURE_POSES
from sim_agents.ego.encoder import EgoEncoder, EncoderSettings, mlp
from sim_agents.ego.motion import action_towards
from sim_agents.ego.observation import LENGTH_M, SPEED, EgoObservation, Sight

SCALE_M = 5.0


@dataclass(frozen=True)
class PathSettings:
    """``acceleration_std`` [m/s^2] and ``curvature_std`` [1/m] are the policy's first standard deviations; they are
    learned with it."""

    sight: Sight = field(default_factory=Sight)
    actor: EncoderSettings = field(default_factory=EncoderSettings)
    critic: EncoderSettings = field(default_factory=EncoderSettings)
    acceleration_std: float = 0.7
    curvature_std: float = 0.01

    def __post_init__(self) -> None:
        if not (self.acceleration_std > 0.0 and self.curvature_std > 0.0):
            raise DataError(f"standard deviations {self.acceleration_std}, {self.curvature_std}: above 0 was expected")


class PathNetwork(nn.Module):
    """``forward`` gives waypoints [B,8,2]; ``distribution`` the policy over actions; ``value`` the critic's [B]."""

    def __init__(self, settings: PathSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = EgoEncoder(settings.actor, settings.sight)
        d = settings.actor.width
        self.head = mlp(d, 2 * d, 2 * NUM_FUTURE_POSES)
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)
        stds = [math.log(settings.acceleration_std), math.log(settings.curvature_std)]
        self.log_std = nn.Parameter(torch.tensor(stds))
        self.critic = EgoEncoder(settings.critic, settings.sight)
        self.critic_head = mlp(settings.critic.width, settings.critic.width, 1)

    def forward(self, seen: EgoObservation) -> Tensor:
        ahead = (seen.ego[:, :1] * SPEED).clamp_min(0.0) * TOKEN_S
        times = torch.arange(1, NUM_FUTURE_POSES + 1, device=ahead.device)
        straight = torch.stack([ahead * times, torch.zeros_like(ahead * times)], dim=-1)
        # A waypoint is the sum of the steps up to it: an error early in the path moves all of it.
        steps = self.head(self.encoder(seen)).unflatten(-1, (NUM_FUTURE_POSES, 2)) * SCALE_M / NUM_FUTURE_POSES
        return straight + steps.cumsum(dim=1)

    def distribution(self, seen: EgoObservation, waypoints: Tensor | None = None) -> torch.distributions.Normal:
        """The policy over actions [B,2]; ``waypoints`` where they are known already."""
        waypoints = self(seen) if waypoints is None else waypoints
        speed, length = seen.ego[:, 0] * SPEED, seen.ego[:, 4] * LENGTH_M
        mean = action_towards(waypoints[:, 0], speed, length)
        return torch.distributions.Normal(mean, self.log_std.exp().expand_as(mean), validate_args=False)

    def value(self, seen: EgoObservation) -> Tensor:
        return self.critic_head(self.critic(seen))[:, 0]
