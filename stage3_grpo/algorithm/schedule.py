"""Weights that change while a run goes on: by the clock, or so that the KL stays near a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stage3_grpo.algorithm.errors import AlgorithmError


@dataclass(frozen=True)
class Schedule:
    """A weight that changes with the rollout step t of T = ``steps``, from ``start`` to ``end``; constant after T.

    linear: start + (end - start) t / T;  exponential: start (end / start)^(t / T);  cosine: half a cosine.
    """

    start: float
    end: float | None = None
    steps: int = 0
    shape: Literal["constant", "linear", "exponential", "cosine"] = "constant"

    def __post_init__(self) -> None:
        if self.start < 0 or (self.end is not None and self.end < 0):
            raise AlgorithmError(f"a weight cannot be negative: {self}")
        if self.shape == "constant":
            if self.end is not None or self.steps:
                raise AlgorithmError(f"a constant schedule reads neither end nor steps: {self}")
        elif self.shape not in ("linear", "exponential", "cosine"):
            raise AlgorithmError(f"schedule shape {self.shape!r} does not exist; constant, linear, exponential, cosine")
        elif self.end is None or self.steps < 1:
            raise AlgorithmError(f"a {self.shape} schedule needs end and steps >= 1: {self}")
        elif self.shape == "exponential" and not (self.start > 0 and self.end > 0):
            raise AlgorithmError(f"an exponential schedule needs start and end > 0: {self}")

    def __call__(self, step: int) -> float:
        if self.shape == "constant" or self.end is None:
            return self.start
        share = min(step / self.steps, 1.0)
        if self.shape == "linear":
            return self.start + (self.end - self.start) * share
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** share
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class AdaptiveWeight:
    """A KL weight that follows the measured KL to a target (Ziegler et al., arXiv 1909.08593):

    e = clip(KL / target - 1, -0.2, 0.2),   beta <- clip(beta (1 + e / horizon), low, high)

    once per rollout; RLFTSim: start 0.01, target 0.01 nats, horizon 5, between 1e-3 and 1e3.
    """

    start: float
    target: float
    horizon: float = 5.0
    low: float = 1e-3
    high: float = 1e3

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.start <= self.high and self.target > 0 and self.horizon >= 1):
            raise AlgorithmError(f"0 < low <= start <= high, target > 0 and horizon >= 1 were expected: {self}")

    def following(self, weight: float, measured: float) -> float:
        """The next weight after a rollout whose KL to the reference was ``measured`` (NaN: unknown, no change)."""
        if math.isnan(measured):
            return weight
        error = min(max(measured / self.target - 1.0, -0.2), 0.2)
        return min(max(weight * (1.0 + error / self.horizon), self.low), self.high)
