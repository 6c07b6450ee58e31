"""DDPM (Ho et al., arXiv 2006.11239): ancestral steps, predicting the noise.

Spaced (default): the exact posterior q(x_s | x_t, x0) of two visited times s < t; with a = abar_t / abar_s,

    mean = sqrt(abar_s) (1 - a) / (1 - abar_t) x0 + sqrt(a) (1 - abar_s) / (1 - abar_t) x_t
    variance = (1 - abar_s) (1 - a) / (1 - abar_t)

Published one-step variant, by name: it visits the same spaced times but uses the posterior of t - 1 given t, as if
the steps in between had been made. It is kept to reproduce published numbers, not because it is right.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stage2_dit.diffusion.ddim import NoisePrediction, clipped_data
from stage2_dit.diffusion.noise_schedule import published_tables, spaced_times
from stage2_dit.diffusion.process import Exploration, StepDistribution

VARIANCE_FLOOR = 1e-20


class Ddpm(NoisePrediction):
    """K ancestral steps at the times of DDIM. ``published`` selects the one-step variant."""

    bar_t: Tensor
    data_weight: Tensor
    state_weight: Tensor
    std: Tensor

    def __init__(self, num_steps: int = 5, *, published: bool = False) -> None:
        super().__init__()
        self.name = "ddpm_published" if published else "ddpm"
        self.times = tuple(spaced_times(num_steps))
        times = list(self.times)
        bar = self.bar[times]
        if published:
            tables = published_tables(None)
            data_weight, state_weight = tables["ddpm_mu_coef1"][times], tables["ddpm_mu_coef2"][times]
            std = torch.exp(0.5 * tables["ddpm_logvar_clipped"][times])
        else:
            previous = torch.cat([bar[1:], torch.ones(1)])
            ratio = bar / previous
            data_weight = torch.sqrt(previous) * (1 - ratio) / (1 - bar)
            state_weight = torch.sqrt(ratio) * (1 - previous) / (1 - bar)
            std = torch.sqrt(((1 - previous) * (1 - ratio) / (1 - bar)).clamp_min(VARIANCE_FLOOR))
        for name, table in (
            ("bar_t", bar), ("data_weight", data_weight), ("state_weight", state_weight), ("std", std),
        ):  # fmt: skip
            self.register_buffer(name, table, persistent=False)

    def step(
        self,
        index: int | Int[Tensor, " R"],
        x: Float[Tensor, "R F 3"],
        prediction: Float[Tensor, "R F 3"],
        exploration: Exploration,
    ) -> StepDistribution:
        x0 = clipped_data(x, prediction, self.at(self.bar_t, index))
        mean = self.at(self.data_weight, index) * x0 + self.at(self.state_weight, index) * x
        return StepDistribution(mean, self.at(self.std, index))
