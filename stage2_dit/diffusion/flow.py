"""Flow matching (Lipman et al., arXiv 2210.02747): straight paths, t = 0 noise and t = 1 data, predicting velocity.

    x_t = (1 - t) eps + t x_0,   v = x_0 - eps,   eps_t = x_t - t v,   x0_t = x_t + (1 - t) v
    training: b ~ Beta(1.5, 1), t = (0.999 - b) / 0.999;   network time = trunc(1000 t)

Steps from t to t' = t + dt, dt = 1 / K, with noise level a:

    ode            mean = x + v dt                                        no noise, no density
    sde            mean = x + v dt - (std^2 / 2) eps_t / (1 - t)          std^2 = a^2 (1 - t') dt
    cps            mean = t' x0_t + (1 - t') cos(a pi / 2) eps_t          std = (1 - t') sin(a pi / 2)
    published_sde, published_cps: the deviations of sde and cps around the mean of ode

sde is the Euler-Maruyama step of the stochastic equation whose marginals equal those of the ode (Flow-GRPO,
arXiv 2505.05470); cps keeps the coefficients of data and noise on the path (arXiv 2509.05952). The published ones
leave the score correction out, so their marginals drift from the ode's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from navsim_ext.errors import DataError
from stage2_dit.diffusion.process import NOISE_LEVEL, Corrupted, Exploration, Process, StepDistribution

TIME_BUCKETS = 1000
BETA_SHAPE = 1.5  # of Beta(1.5, 1)
TIME_SCALE = 0.999

FlowStep = Literal["ode", "sde", "cps", "published_sde", "published_cps"]
FLOW_STEPS: tuple[FlowStep, ...] = ("ode", "sde", "cps", "published_sde", "published_cps")


class Flow(Process):
    """K equal steps of the chosen kind."""

    prediction = "velocity"
    t: Tensor  # [K]
    remaining: Tensor  # [K] 1 - t'

    def __init__(self, num_steps: int = 5, *, kind: FlowStep = "ode") -> None:
        super().__init__()
        if kind not in FLOW_STEPS:
            raise DataError(f"flow step {kind!r} does not exist; choose one of {', '.join(FLOW_STEPS)}")
        if num_steps < 1:
            raise DataError(f"{num_steps} flow steps are not possible; choose 1 or more")
        self.kind = kind
        self.name = f"flow_{kind}"
        self.has_density = kind != "ode"
        self.explored_by = ("noise_level",) if self.has_density else ()
        self.times = tuple(int(k / num_steps * TIME_BUCKETS) for k in range(num_steps))
        steps = torch.arange(num_steps, dtype=torch.float32)
        self.register_buffer("t", steps / num_steps, persistent=False)
        self.register_buffer("remaining", (num_steps - 1 - steps) / num_steps, persistent=False)

    def draw_times(self, rows: int, generator: torch.Generator | None = None) -> Shaped[Tensor, " R"]:
        """t of b = u^(1 / 1.5), the inverse distribution function of Beta(1.5, 1)."""
        beta = torch.rand(rows, generator=generator) ** (1.0 / BETA_SHAPE)
        return self.time_of_beta(beta)

    @staticmethod
    def time_of_beta(beta: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
        """Training time of a Beta(1.5, 1) draw; can be as low as -0.001."""
        return (TIME_SCALE - beta) / TIME_SCALE

    def corrupt(
        self, x0: Float[Tensor, "R F 3"], noise: Float[Tensor, "R F 3"], time: Shaped[Tensor, " R"]
    ) -> Corrupted:
        t = time.reshape(-1, 1, 1)
        return Corrupted((1 - t) * noise + t * x0, torch.trunc(TIME_BUCKETS * time), x0 - noise)

    def step(
        self,
        index: int | Int[Tensor, " R"],
        x: Float[Tensor, "R F 3"],
        prediction: Float[Tensor, "R F 3"],
        exploration: Exploration,
    ) -> StepDistribution:
        velocity, t, dt = prediction, self.at(self.t, index), 1.0 / self.num_steps
        remaining = self.at(self.remaining, index)
        level = NOISE_LEVEL if exploration.noise_level is None else exploration.noise_level
        level = 0.0 if exploration.deterministic else level
        mean = x + velocity * dt
        if self.kind == "ode":
            return StepDistribution(mean, torch.zeros_like(t))
        if self.kind.endswith("sde"):
            std = level * torch.sqrt(remaining * dt)
            if self.kind == "sde":
                mean = mean - 0.5 * std**2 * (x - t * velocity) / (1.0 - t)
            return StepDistribution(mean, std)
        std = remaining * math.sin(level * math.pi / 2)
        if self.kind == "cps":
            data, noise = x + (1.0 - t) * velocity, x - t * velocity
            mean = (1.0 - remaining) * data + remaining * math.cos(level * math.pi / 2) * noise
        return StepDistribution(mean, std)
