"""The published stage-3 step, as plainly as its description states it: the first baseline of ``bench_grpo.py``.

What makes it slow and large is kept on purpose: VLM rows are repeated for every sample and, for log-probabilities,
for every denoising step of it; keys and values are projected again at each step; the rollout is drawn with autograd
on, so that a graph of all its steps is built and thrown away.

Legend: S scenes, G samples of each, K denoising steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.twins.published_planner import PublishedPlanner

DISCOUNT, BC_WEIGHT, EPSILON = 0.6, 0.1, 1e-8
CLAMP = (-5.0, 2.0)


def published_step(
    actor: PublishedPlanner, reference: PublishedPlanner, optimizer: torch.optim.Optimizer, scenes: dict[str, Tensor],
    noise: dict[str, Tensor], reward_of, group_size: int,
) -> Tensor:  # fmt: skip
    """One REINFORCE step with a BC anchor; ``reward_of(states) -> [S*G]``. Returns the loss."""
    inputs = (scenes["hidden"], scenes["history"], scenes["status"])
    chain = actor.sample(*inputs, noise["initial"], group_size=group_size, step_noise=noise["steps"]).detach()
    reward = reward_of(chain).reshape(-1, group_size)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + EPSILON)).flatten()
    with torch.no_grad():
        teacher = reference.sample(*inputs, noise["teacher_initial"], step_noise=noise["teacher_steps"])
    logp = actor.log_prob(*inputs, chain, group_size=group_size).clamp(*CLAMP).mean(dim=(2, 3))
    steps = logp.shape[1]
    discount = DISCOUNT ** torch.arange(steps - 1, -1, -1, dtype=torch.float32)
    policy = -(logp * advantage[:, None] * discount).mean()
    cloning = -actor.log_prob(*inputs, teacher).clamp(*CLAMP).mean()
    loss = policy + BC_WEIGHT * cloning
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
