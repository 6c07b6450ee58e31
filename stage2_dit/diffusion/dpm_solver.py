"""DPM-Solver++ (Lu et al., arXiv 2211.01095), the multistep solver of diffusers, on the planner's schedule.

Deterministic, second order, 10 steps. The noise prediction is clipped through the data estimate as in DDIM before
the solver sees it. A multistep step depends on earlier predictions, so it has no density of its own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stage2_dit.diffusion.ddim import NoisePrediction, clipped_data
from stage2_dit.diffusion.noise_schedule import TRAINING_STEPS, cosine_betas
from stage2_dit.diffusion.process import Exploration, NoDensity, Predict, StepDistribution
from stage2_dit.noise import ChainNoise


class DpmSolver(NoisePrediction):
    """K steps of the multistep solver from t = 99."""

    name = "dpm_solver"
    has_density = False

    def __init__(self, num_steps: int = 10) -> None:
        super().__init__()
        self.times = tuple(self._scheduler(num_steps).timesteps.tolist())

    def step(
        self,
        index: int | Int[Tensor, " R"],
        x: Float[Tensor, "R F 3"],
        prediction: Float[Tensor, "R F 3"],
        exploration: Exploration,
    ) -> StepDistribution:
        raise NoDensity("dpm_solver steps have no density of their own: sample with ddim, ddpm or a flow sde instead")

    def sample(self, predict: Predict, noise: ChainNoise, exploration: Exploration) -> Float[Tensor, "R K1 F 3"]:
        """All states [R,K+1,F,3]; only ``noise.initial`` and ``final_clip`` are used."""
        scheduler = self._scheduler(self.num_steps)
        x = noise.initial.float()
        states = [x]
        for time in scheduler.timesteps.tolist():
            prediction = predict(x, torch.full((len(x),), time, device=x.device)).float()
            bar = self.bar[time]
            x0 = clipped_data(x, prediction, bar)
            clipped_noise = (x - torch.sqrt(bar) * x0) / torch.sqrt(1.0 - bar)
            x = scheduler.step(clipped_noise, time, x).prev_sample
            states.append(x)
        if exploration.final_clip is not None:
            states[-1] = states[-1].clamp(-exploration.final_clip, exploration.final_clip)
        return torch.stack(states, dim=1)

    @staticmethod
    def _scheduler(num_steps: int):
        from diffusers import DPMSolverMultistepScheduler  # slow to import and only needed here

        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=TRAINING_STEPS,
            trained_betas=cosine_betas().tolist(),
            solver_order=2,
            prediction_type="epsilon",
            algorithm_type="dpmsolver++",
            final_sigmas_type="zero",
        )
        scheduler.set_timesteps(num_steps)
        return scheduler
