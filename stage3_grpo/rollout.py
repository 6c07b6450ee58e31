"""Rollouts of a diffusion planner: chains, their step distributions, and log-probabilities in the core's form.

Legend: S scenes, G trajectories of each, N = S G (scene-major), K denoising steps, F poses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from navsim_ext.errors import DataError
from stage2_dit import Chain, Conditioning, DiffusionPlanner, NoDensity, Process, WrongProcess
from stage3_grpo.core import gaussian_kl

Reduction = Literal["mean", "sum"]


class Steps(NamedTuple):
    """Distribution of every step of a chain: ``mean`` [N,K,F,3]; ``std`` [N,K,1,1], floored as for scoring."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class LogProb:
    """How elementwise densities become one log-probability per step.

    ``clamp``: bounds (published: (-5, 2); None: none), applied to each ``element`` (published for DDIM) or to the
    reduced log-probability of each ``step`` (published for flow). ``reduction`` over the F x 3 elements: "mean"
    (published; the policy's log-probability is then divided by 24 throughout) or "sum" (the density of the whole
    state).
    """

    clamp: tuple[float, float] | None = (-5.0, 2.0)
    clamp_at: Literal["element", "step"] = "element"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.clamp is not None and not self.clamp[0] < self.clamp[1]:
            raise DataError(f"log-prob clamp {self.clamp} is empty: give (low, high) or null")
        if self.clamp_at not in ("element", "step"):
            raise DataError(f"log-prob clamp_at {self.clamp_at!r} does not exist; choose element or step")
        if self.reduction not in ("mean", "sum"):
            raise DataError(f"log-prob reduction {self.reduction!r} does not exist; choose mean or sum")

    def of(self, chain: Chain, steps: Steps) -> Tensor:
        """[N,K] log-probability of each state given the one before it."""
        density = torch.distributions.Normal(steps.mean, steps.std, validate_args=False).log_prob(
            chain.states[:, 1:].detach()
        )
        if self.clamp is None:
            return self.reduce(density)
        if self.clamp_at == "step":
            return self.reduce(density).clamp(*self.clamp)
        return self.reduce(density.clamp(*self.clamp))

    def kl(self, steps: Steps, reference: Steps) -> Tensor:
        """[N,K] exact KL of the step distributions, reduced like the log-probability (not clamped)."""
        return self.reduce(gaussian_kl(steps.mean, steps.std, reference.mean, reference.std))

    def reduce(self, value: Tensor) -> Tensor:
        return value.mean(dim=(2, 3)) if self.reduction == "mean" else value.sum(dim=(2, 3))


def step_distributions(planner: DiffusionPlanner, conditioning: Conditioning, chain: Chain, process: Process) -> Steps:
    """Mean and deviation of every step of every chain in one network call; gradients flow through the mean.

    ``stage2_dit.log_prob`` gives the elementwise density of the same distributions; here the distributions
    themselves are needed, for exact KL. Raises NoDensity for deterministic chains, WrongProcess for chains of
    another process.
    """
    if not process.has_density or chain.exploration.deterministic:
        raise NoDensity(f"chains of {process.name} (deterministic={chain.exploration.deterministic}) have no density")
    if chain.process != process.identity():
        raise WrongProcess(f"the chain was drawn by {chain.process}, it was to be scored with {process.identity()}")
    states = chain.states.detach()
    rows, count = len(states), process.num_steps
    index = torch.arange(count, device=states.device).repeat(rows)
    times = torch.tensor(process.times, device=states.device).repeat(rows)
    x = states[:, :-1].flatten(0, 1)
    prediction = planner(x, times, conditioning).float()
    mean, std = process.step(index, x, prediction, chain.exploration)
    std = chain.exploration.log_prob_std(std)
    return Steps(mean.unflatten(0, (rows, count)), std.expand(rows * count, 1, 1).unflatten(0, (rows, count)))
