"""The stage-3 step in the arithmetic of the newest published code: the second baseline of ``bench_grpo.py``.

VLM rows are shared among the samples of a scene and the rollout runs without autograd; but keys and values are
projected again in every denoising step of every sampling call and in every call for log-probabilities (old, new, BC).

Legend: S scenes, G samples of each, K denoising steps.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from stage2_dit import Chain, ChainNoise, Conditioning, DiffusionPlanner, Exploration, log_prob

DISCOUNT, BC_WEIGHT, EPSILON, CLIP = 0.6, 0.1, 1e-8, 0.2
CLAMP = (-5.0, 2.0)


def encode(planner: DiffusionPlanner, scenes: dict[str, Tensor]) -> Conditioning:
    """Everything of a call, keys and values included."""
    return planner.condition(scenes["hidden"], None, scenes["history"], scenes["status"])


def sample(planner: DiffusionPlanner, scenes: dict[str, Tensor], noise: ChainNoise, group_size: int) -> Chain:
    """A chain whose every step projects keys and values again from the encoded tokens."""
    conditioning = encode(planner, scenes)
    exploration = Exploration.preset("published")
    calls = 0

    def predict(x: Tensor, time: Tensor) -> Tensor:
        nonlocal conditioning, calls
        if calls:  # the first step uses what encoding has just projected
            layers = planner.model.context(conditioning.tokens, project_values=True)
            conditioning = dataclasses.replace(conditioning, layers=layers)
        calls += 1
        return planner(x, time, conditioning)

    states = planner.process.sample(predict, noise, exploration)
    return Chain(states, planner.process.times, exploration, planner.process.identity(), group_size)


def logp_of(planner: DiffusionPlanner, scenes: dict[str, Tensor], chain: Chain) -> Tensor:
    """[N,K], encoding the scenes anew."""
    return log_prob(planner, encode(planner, scenes), chain).clamp(*CLAMP).mean(dim=(2, 3))


def newest_step(
    actor: DiffusionPlanner, reference: DiffusionPlanner, optimizer: torch.optim.Optimizer, scenes: dict[str, Tensor],
    noise: dict[str, Tensor], reward_of, group_size: int,
) -> Tensor:  # fmt: skip
    """One clipped-ratio step (mu = 1) with a BC anchor; ``reward_of(states) -> [S*G]``. Returns the loss."""
    with torch.no_grad():
        chain = sample(actor, scenes, ChainNoise(noise["initial"], noise["steps"]), group_size)
        old = logp_of(actor, scenes, chain)
        teacher = sample(reference, scenes, ChainNoise(noise["teacher_initial"], noise["teacher_steps"]), 1)
    reward = reward_of(chain.states).reshape(-1, group_size)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + EPSILON)).flatten()
    discount = DISCOUNT ** torch.arange(old.shape[1] - 1, -1, -1, dtype=torch.float32)
    weighted = advantage[:, None] * discount
    ratio = torch.exp(logp_of(actor, scenes, chain) - old)
    policy = -torch.minimum(ratio * weighted, ratio.clamp(1 - CLIP, 1 + CLIP) * weighted).mean()
    loss = policy - BC_WEIGHT * logp_of(actor, scenes, teacher).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
