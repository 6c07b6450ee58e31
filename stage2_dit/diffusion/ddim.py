"""DDIM (Song et al., arXiv 2010.02502) on the cosine schedule, predicting the noise.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
x0 = clip((x - sqrt(1 - abar) eps) / sqrt(abar), -1, 1)
eps' = (x - sqrt(abar) x0) / sqrt(1 - abar)                 recomputed from the clipped x0
sigma = eta sqrt((1 - abar_prev) / (1 - abar) (1 - abar / abar_prev))
mean = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps'
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from stage2_dit.diffusion.noise_schedule import TRAINING_STEPS, cosine_betas, spaced_times
from stage2_dit.diffusion.process import ETA, Corrupted, Exploration, Process, StepDistribution

SIGMA_FLOOR = 1e-10  # keeps the logarithm of the published variance finite


class NoisePrediction(Process):
    """What DDIM, DDPM and the DPM solver share: the training pair and the clipped estimate of the data."""

    prediction = "noise"
    bar: Tensor  # [T] abar

    def __init__(self) -> None:
        super().__init__()
        betas = cosine_betas()
        self.register_buffer("bar", torch.cumprod(1.0 - betas, dim=0), persistent=False)

    def draw_times(self, rows: int, generator: torch.Generator | None = None) -> Shaped[Tensor, " R"]:
        """t ~ U{0 ... T - 1}."""
        return torch.randint(0, TRAINING_STEPS, (rows,), generator=generator)

    def corrupt(
        self, x0: Float[Tensor, "R F 3"], noise: Float[Tensor, "R F 3"], time: Shaped[Tensor, " R"]
    ) -> Corrupted:
        bar = self.at(self.bar, time)
        return Corrupted(torch.sqrt(bar) * x0 + torch.sqrt(1.0 - bar) * noise, time, noise)


def clipped_data(
    x: Float[Tensor, "R F 3"], noise: Float[Tensor, "R F 3"], bar: Float[Tensor, "*broadcast"]
) -> Float[Tensor, "R F 3"]:
    """x0 estimate in the box; the gradient is that of the clip (zero outside)."""
    return ((x - torch.sqrt(1.0 - bar) * noise) / torch.sqrt(bar)).clamp(-1.0, 1.0)


class Ddim(NoisePrediction):
    """K steps with spacing T // K; 5 steps visit 80, 60, 40, 20, 0 as the published planner does."""

    name = "ddim"
    explored_by = ("eta",)
    step_bar: Tensor
    step_previous: Tensor

    def __init__(self, num_steps: int = 5) -> None:
        super().__init__()
        self.times = tuple(spaced_times(num_steps))
        step_bar = self.bar[list(self.times)]
        self.register_buffer("step_bar", step_bar, persistent=False)
        self.register_buffer("step_previous", torch.cat([step_bar[1:], torch.ones(1)]), persistent=False)

    def step(
        self,
        index: int | Int[Tensor, " R"],
        x: Float[Tensor, "R F 3"],
        prediction: Float[Tensor, "R F 3"],
        exploration: Exploration,
    ) -> StepDistribution:
        bar, previous = self.at(self.step_bar, index), self.at(self.step_previous, index)
        eta = 0.0 if exploration.deterministic else ETA if exploration.eta is None else exploration.eta
        x0 = clipped_data(x, prediction, bar)
        noise = (x - torch.sqrt(bar) * x0) / torch.sqrt(1.0 - bar)
        sigma = (eta * torch.sqrt((1.0 - previous) / (1.0 - bar) * (1.0 - bar / previous))).clamp_min(SIGMA_FLOOR)
        mean = torch.sqrt(previous) * x0 + torch.sqrt((1.0 - previous - sigma**2).clamp_min(0.0)) * noise
        return StepDistribution(mean, sigma)
