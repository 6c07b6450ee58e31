"""An algorithm of stage 3 as data: which advantage, which surrogate, which regularisers, how to explore.

    diffgrpo        group advantage, REINFORCE, denoising discount 0.6, BC 0.1        (published recipe)
    diffgrpo_clip   group advantage, clipped ratio, mu > 1, KL with a schedule        (the seed's form)
    rloo            leave-one-out advantage, REINFORCE: every scene counts by its reward
    reinforce_pp    batch-standardised advantage, REINFORCE
    ppo             GAE over denoising steps with a value head, clipped ratio
    flow_grpo       SDE sampling of a flow planner, clipped ratio, KL

A setting that its algorithm would not read is refused: nobody should tune a knob that is connected to nothing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from navsim_ext.errors import TriviumError
from stage2_dit import Exploration
from stage3_grpo.core import Objective
from stage3_grpo.rollout import LogProb

Advantage = Literal["group", "leave_one_out", "batch", "gae", "constant"]
KlForm = Literal["none", "k1", "k3", "gaussian"]
GROUP_ADVANTAGES = ("group", "leave_one_out", "batch")


class AlgorithmError(TriviumError):
    """A setting that is out of range, contradicts another, or would have no effect."""


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
class Algorithm:
    """All settings of an update.

    ``group_size`` G trajectories per scene. ``advantage``: see :mod:`stage3_grpo.core.advantages`; ``baseline`` of
    "constant"; ``gae_gamma``, ``gae_lambda``, ``value_weight`` of "gae". ``discount``: gamma of the denoising
    discount. ``drop_zero_spread``: groups with std <= ``min_spread`` do not count in any mean.
    ``inner_epochs`` mu passes over a rollout in ``minibatches`` parts each; ``target_kl`` ends the passes early.
    ``kl``, ``kl_weight``: pull to the frozen reference. ``bc_weight``: cloning of the reference's samples.
    ``process``, ``num_steps``: sampler of the rollouts (None: the planner's own).
    """

    name: str
    group_size: int = 8
    advantage: Advantage = "group"
    baseline: float | None = None
    gae_gamma: float | None = None
    gae_lambda: float | None = None
    value_weight: float | None = None
    discount: float = 0.6
    drop_zero_spread: bool = False
    min_spread: float = 0.0
    surrogate: Literal["reinforce", "clip"] = "reinforce"
    ratio_level: Literal["step", "trajectory"] = "step"
    clip_low: float | None = None
    clip_high: float | None = None
    inner_epochs: int = 1
    minibatches: int = 1
    target_kl: float | None = None
    kl: KlForm = "none"
    kl_weight: Schedule | None = None
    bc_weight: Schedule = field(default_factory=lambda: Schedule(0.1))
    log_prob: LogProb = field(default_factory=LogProb)
    exploration: Exploration = field(default_factory=lambda: Exploration.preset("published"))
    process: str | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        self._check_choices()
        self._only_with("gae", self.advantage == "gae", "gae_gamma", "gae_lambda", "value_weight")
        self._only_with("the constant advantage", self.advantage == "constant", "baseline")
        self._only_with("the clip surrogate", self.surrogate == "clip", "clip_low", "clip_high")
        self._only_with("a kl form", self.kl != "none", "kl_weight")
        if self.surrogate == "reinforce" and (self.inner_epochs > 1 or self.minibatches > 1 or self.target_kl):
            raise AlgorithmError(
                f"{self.name}: reinforce is on-policy; inner_epochs {self.inner_epochs}, minibatches "
                f"{self.minibatches}, target_kl {self.target_kl} need surrogate=clip"
            )
        if self.min_spread and not self.drop_zero_spread:
            raise AlgorithmError(f"{self.name}: min_spread {self.min_spread} has no effect without drop_zero_spread")
        if self.drop_zero_spread and self.advantage not in GROUP_ADVANTAGES:
            raise AlgorithmError(f"{self.name}: drop_zero_spread needs a group advantage, not {self.advantage}")
        if self.advantage in GROUP_ADVANTAGES and self.group_size < 2:
            raise AlgorithmError(
                f"{self.name}: advantage {self.advantage!r} compares the members of a group, group_size is "
                f"{self.group_size}: use 2 or more (published: 8), or advantage=gae or constant"
            )
        if self.exploration.deterministic:
            raise AlgorithmError(f"{self.name}: deterministic rollouts have no log-probability: set it to false")

    def _check_choices(self) -> None:
        allowed = {
            "advantage": ("group", "leave_one_out", "batch", "gae", "constant"),
            "surrogate": ("reinforce", "clip"),
            "ratio_level": ("step", "trajectory"),
            "kl": ("none", "k1", "k3", "gaussian"),
        }
        for key, choices in allowed.items():
            if getattr(self, key) not in choices:
                raise AlgorithmError(f"{self.name}: {key} {getattr(self, key)!r} does not exist; one of {choices}")
        for key in ("group_size", "inner_epochs", "minibatches"):
            if getattr(self, key) < 1:
                raise AlgorithmError(f"{self.name}: {key} is {getattr(self, key)}; 1 or more was expected")
        for key in ("discount", "gae_gamma", "gae_lambda"):
            value = getattr(self, key)
            if value is not None and not 0.0 <= value <= 1.0:
                raise AlgorithmError(f"{self.name}: {key} is {value}; a number in [0, 1] was expected")

    def _only_with(self, what: str, present: bool, *keys: str) -> None:
        for key in keys:
            given = getattr(self, key) is not None
            if given != present:
                word = "needs a value" if present else "has no effect: set it to null"
                raise AlgorithmError(f"{self.name}: {key} belongs to {what}; here it {word}")

    @property
    def objective(self) -> Objective:
        return Objective(self.surrogate, self.ratio_level, self.clip_low or 0.0, self.clip_high or 0.0)

    @property
    def needs_value(self) -> bool:
        return self.advantage == "gae"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
