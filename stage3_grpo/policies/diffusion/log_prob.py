"""Log-probabilities of a rollout's denoising steps, in the core's form.

Legend: S scenes, G trajectories of each, N = S G (scene-major), K denoising steps, F poses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from navsim_ext.errors import DataError
from stage2_dit import Chain, Steps
from stage3_grpo.core import gaussian_kl

Reduction = Literal["mean", "sum"]


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
