"""How rollouts of a diffusion planner explore: each family of processes has its own settings.

A sampler of another family than the planner's prediction (noise or velocity), or one without a density, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from navsim_ext.errors import DataError
from stage2_dit import DiffusionPlanner, Exploration, NoDensity, Process, WrongProcess, build_process

FLOW_SAMPLERS = ("flow_sde", "flow_cps", "flow_published_sde", "flow_published_cps")


@dataclass(frozen=True, kw_only=True)
class OwnSampler:
    """The process that the planner was trained with, at its own strength.

    ``num_steps`` None: its own number. ``sampling_std_floor``, ``log_prob_std_floor``: least standard deviation of a
    step when drawing and when scoring. ``noise_clip``: step noise is clipped to +- this; ``final_clip``: the last
    state is (None: not). ``last_step_noise`` False: the last step is its mean.
    """

    num_steps: int | None = None
    sampling_std_floor: float = 0.04
    log_prob_std_floor: float = 0.04
    noise_clip: float | None = 5.0
    final_clip: float | None = 1.0
    last_step_noise: bool = True

    @property
    def process(self) -> str | None:
        """Name of the process; None: the planner's own."""
        return None

    @property
    def strength(self) -> dict[str, float]:
        """What this family alone reads."""
        return {}

    @property
    def exploration(self) -> Exploration:
        return Exploration(
            sampling_std_floor=self.sampling_std_floor, log_prob_std_floor=self.log_prob_std_floor,
            noise_clip=self.noise_clip, final_clip=self.final_clip, last_step_noise=self.last_step_noise,
            **self.strength,
        )  # fmt: skip

    def build(self, planner: DiffusionPlanner) -> Process:
        """The process of rollouts; raises WrongProcess or NoDensity when it cannot serve this planner."""
        if self.process is None and self.num_steps is None:
            process = planner.process
        else:
            process = build_process(self.process or planner.process.name, self.num_steps)
        if process.prediction != planner.process.prediction:
            raise WrongProcess(
                f"rollouts would be sampled with {process.name}, which needs a planner that predicts "
                f"{process.prediction}; this one was trained with {planner.process.name} and predicts "
                f"{planner.process.prediction}: train stage 2 with planner.process={process.name}, or choose another "
                "algorithm or sampler"
            )
        if not process.has_density:
            raise NoDensity(
                f"rollouts would be sampled with {process.name}, whose steps have no density: set sampler=ddim, or "
                "sampler=flow for a flow planner"
            )
        process.require_read(self.exploration)
        return process


@dataclass(frozen=True, kw_only=True)
class DdimSampler(OwnSampler):
    """``eta``: 0 no noise, 1 that of the ancestral sampler."""

    eta: float = 1.0

    @property
    def process(self) -> str | None:
        return "ddim"

    @property
    def strength(self) -> dict[str, float]:
        return {"eta": self.eta}


@dataclass(frozen=True, kw_only=True)
class FlowSampler(OwnSampler):
    """Stochastic sampling of a flow planner: ``kind`` of the steps, ``noise_level`` of their noise."""

    kind: Literal["flow_sde", "flow_cps", "flow_published_sde", "flow_published_cps"] = "flow_sde"
    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if self.kind not in FLOW_SAMPLERS:
            raise DataError(f"sampler kind {self.kind!r} does not exist; one of {', '.join(FLOW_SAMPLERS)}")

    @property
    def process(self) -> str | None:
        return self.kind

    @property
    def strength(self) -> dict[str, float]:
        return {"noise_level": self.noise_level}


@dataclass(frozen=True, kw_only=True)
class AncestralSampler(OwnSampler):
    """The ancestral sampler of a planner that predicts noise; ``published``: as the published code has it."""

    published: bool = False

    @property
    def process(self) -> str | None:
        return "ddpm_published" if self.published else "ddpm"
