"""Terms that a reward is a weighted sum of. Each gives [N] values in [0, 1]; penalties have negative weights.

Legend: N trajectories (rows), motion quantities of :mod:`stage3_grpo.rewards.kinematics`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.pdm.reward import RewardWeights
from stage3_grpo.rewards.kinematics import PlannedMotion

Array = NDArray[np.float64]


class MotionTerm(Protocol):
    """A term that needs the trajectory alone."""

    weight: float

    def value(self, motion: PlannedMotion) -> Array:
        """[N] in [0, 1]."""
        ...


@dataclass(frozen=True)
class PdmTerm:
    """The PDM score in a weighting: version v1 (5, 5, 2: PDMS; published reward 10, 5, 2) or v2.

    For v2 without its own weighting set ``standard``: the score itself, EPDMS without extended comfort and filter.
    """

    weight: float = 1.0
    version: str = RewardWeights.version
    standard: bool = False
    progress: float = RewardWeights.progress
    ttc: float = RewardWeights.ttc
    comfort: float = RewardWeights.comfort
    driving_direction: float = RewardWeights.driving_direction
    lane_keeping: float = RewardWeights.lane_keeping

    def __post_init__(self) -> None:
        if self.version not in ("v1", "v2"):
            raise DataError(f"PdmTerm.version {self.version!r} does not exist; choose v1 or v2")
        own = (self.progress, self.ttc, self.comfort, self.driving_direction, self.lane_keeping)
        if self.standard and own != astuple(RewardWeights())[1:]:
            raise DataError(f"PdmTerm.standard takes the score as it is; the weights {own} would have no effect")

    @property
    def weights(self) -> RewardWeights | None:
        """The weighting that the scorer computes; None where the term takes the score as it is."""
        if self.standard:
            return None
        return RewardWeights(
            self.version, self.progress, self.ttc, self.comfort, self.driving_direction, self.lane_keeping
        )

    @property
    def column(self) -> str:
        """Column of a PdmResult that this term reads."""
        if not self.standard:
            return "reward"
        return "pdms_v1" if self.version == "v1" else "epdms_v2_no_ec_nofilter"

    @property
    def judge(self) -> str:
        """The score that is never trained on (scenes stand alone: EPDMS is without extended comfort)."""
        return "epdms_v2_no_ec_nofilter" if self.version == "v1" else "pdms_v1"


@dataclass(frozen=True)
class ReverseMotion:
    """min(sum_j max(0, -s_j - tolerance) / full, 1): metres driven backwards. Give it a negative weight."""

    weight: float = -1.0
    tolerance_m: float = 0.05
    full_m: float = 1.0

    def value(self, motion: PlannedMotion) -> Array:
        backwards = np.maximum(0.0, -motion.travel - self.tolerance_m).sum(axis=1)
        return np.minimum(backwards / self.full_m, 1.0)


@dataclass(frozen=True)
class Feasibility:
    """Share of intervals that a car could not drive; negative weight.

    Limits: lateral |v w| and longitudinal |a| [m/s^2], curvature |w / v| [1/m] (above 1 m/s), sideways slip [m].
    """

    weight: float = -1.0
    lateral_mps2: float = 4.89  # NAVSIM's comfort bound
    longitudinal_mps2: float = 6.0
    curvature_1pm: float = 0.2  # of a car with 3.1 m wheelbase at 32 degrees of steering
    slip_m: float = 0.5

    def value(self, motion: PlannedMotion) -> Array:
        moving = np.abs(motion.speed) > 1.0
        curvature = np.divide(
            np.abs(motion.yaw_rate), np.abs(motion.speed), out=np.zeros_like(motion.speed), where=moving
        )
        violated = (
            (np.abs(motion.lateral_acceleration) > self.lateral_mps2)
            | (np.abs(motion.acceleration) > self.longitudinal_mps2)
            | (curvature > self.curvature_1pm)
            | (np.abs(motion.slip) > self.slip_m)
        )
        return violated.mean(axis=1)


@dataclass(frozen=True)
class ExtendedComfortProxy:
    """How consistent a plan is with what came before and with itself, as NAVSIM's two-frame comfort asks.

    EC compares the plans of consecutive frames by the RMS difference of acceleration, jerk, yaw rate and yaw
    acceleration. A sampled trajectory has no predecessor; the recorded motion that led to now stands in for it, and
    consecutive intervals for consecutive frames: r_x = RMS_j(x_j - x_{j-1}) of the four quantities,

        value = mean_x clip(2 - r_x / threshold_x, 0, 1)

    1 within all thresholds, 0 beyond twice each. Thresholds are wider than EC's (0.7, 0.5, 0.1, 0.1): those hold at
    10 Hz after simulation, these for differences over half seconds. A proxy; the real EC is in the judge's report.
    """

    weight: float = 1.0
    acceleration_mps2: float = 1.4
    jerk_mps3: float = 3.0
    yaw_rate_radps: float = 0.2
    yaw_acceleration_radps2: float = 0.4

    def value(self, motion: PlannedMotion) -> Array:
        parts = (
            (motion.jerk * 0.5, self.acceleration_mps2),  # a_j - a_{j-1}, the first one against the recorded a_0
            (np.diff(motion.jerk, axis=1), self.jerk_mps3),
            (motion.yaw_acceleration * 0.5, self.yaw_rate_radps),
            (np.diff(motion.yaw_acceleration, axis=1), self.yaw_acceleration_radps2),
        )
        values = [np.clip(2.0 - np.sqrt((change**2).mean(axis=1)) / limit, 0.0, 1.0) for change, limit in parts]
        return np.mean(values, axis=0)
