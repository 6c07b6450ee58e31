"""V(scene, k, x_k): what reward a chain may expect at denoising step k.

Legend: S scenes, N = S G rows, K steps, F poses, d width of the planner.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stage2_dit import Chain, Conditioning, PlannerConfig

POSE_CHANNELS = 3


class ValueHead(nn.Module):
    """Mlp of [history; mean feature; ego; noisy trajectory; one-hot step] -> one number.

    It reads the planner's conditioning without sending gradients into it: the value error must not reshape the
    features that the policy stands on. The last layer starts at zero, so the first advantages are the rewards.
    """

    def __init__(self, config: PlannerConfig, num_steps: int, hidden: int = 256) -> None:
        super().__init__()
        self.num_steps = num_steps
        inputs = 3 * config.width + config.horizon * POSE_CHANNELS + num_steps
        self.layers = nn.Sequential(
            nn.LayerNorm(inputs), nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, conditioning: Conditioning, chain: Chain) -> Tensor:
        """[N,K] values of the states that each step starts from."""
        rows = len(chain)
        scene = torch.cat([conditioning.history, conditioning.mean, conditioning.ego], dim=-1).detach().float()
        scene = scene.repeat_interleave(chain.group_size, dim=0)[:, None].expand(-1, self.num_steps, -1)
        states = chain.states[:, :-1].detach().flatten(2)
        step = torch.eye(self.num_steps, device=states.device).expand(rows, -1, -1)
        return self.out(self.layers(torch.cat([scene, states, step], dim=-1)))[..., 0]
