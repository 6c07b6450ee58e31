"""Surrogates as choices: the loss whose gradient is the policy gradient, and how often a rollout is learned from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from stage3_grpo.algorithm.errors import AlgorithmError
from stage3_grpo.core import Objective
from stage3_grpo.core.objective import Averaging, RatioLevel


class Surrogate(Protocol):
    """``inner_epochs`` passes over a rollout in ``minibatches`` parts each; ``target_kl`` ends the passes early."""

    level: RatioLevel
    inner_epochs: int
    minibatches: int
    target_kl: float | None

    def objective(self, averaging: Averaging) -> Objective: ...


@dataclass(frozen=True)
class Reinforce:
    """- A log p, on-policy: one update per rollout. ``level`` "trajectory": means over a row's decisions take the place
    of its decisions."""

    level: Literal["step", "trajectory"] = "step"
    inner_epochs = 1
    minibatches = 1
    target_kl = None

    def __post_init__(self) -> None:
        _known(self.level)

    def objective(self, averaging: Averaging) -> Objective:
        return Objective("reinforce", self.level, averaging=averaging)


@dataclass(frozen=True)
class ClippedRatio:
    """PPO's clipped ratio; ``clip_high`` > ``clip_low`` is DAPO's clip-higher. ``level``: of the ratio.

    ``inner_epochs`` mu passes over a rollout in ``minibatches`` parts each; a mean log-ratio above ``target_kl`` ends
    the passes.
    """

    clip_low: float
    clip_high: float
    level: Literal["step", "trajectory"] = "step"
    inner_epochs: int = 1
    minibatches: int = 1
    target_kl: float | None = None

    def __post_init__(self) -> None:
        _known(self.level)
        for name in ("inner_epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise AlgorithmError(f"{name} is {getattr(self, name)}; 1 or more was expected")
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise AlgorithmError(f"clip_low {self.clip_low}, clip_high {self.clip_high}: 0 < low < 1 and high > 0")

    def objective(self, averaging: Averaging) -> Objective:
        return Objective("clip", self.level, self.clip_low, self.clip_high, averaging)


def _known(level: str) -> None:
    if level not in ("step", "trajectory"):
        raise AlgorithmError(f"level {level!r} does not exist; one of step, trajectory")
