"""Weightings of sub-scores that a policy can be rewarded by."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from navsim_ext.errors import DataError


@dataclass(frozen=True)
class RewardWeights:
    """A weighting of sub-scores for reinforcement learning: reward = m sum(w x) / sum(w).

    ``version`` chooses the sub-scores ("v1" or "v2") and m with them. ``comfort`` weighs v1's comfort or v2's history
    comfort; ``driving_direction`` counts in v1 only (in v2 it multiplies), ``lane_keeping`` in v2 only. The default is
    PDMS itself.
    """

    version: str = "v1"
    progress: float = 5.0
    ttc: float = 5.0
    comfort: float = 2.0
    driving_direction: float = 0.0
    lane_keeping: float = 0.0

    def __post_init__(self) -> None:
        weights = astuple(self)[1:]
        if self.version not in ("v1", "v2"):
            raise DataError(f"RewardWeights.version is {self.version!r}; 'v1' or 'v2' was expected")
        if min(weights) < 0.0 or not 0.0 < sum(weights) < float("inf"):
            raise DataError(f"reward weights must be >= 0 with a positive finite sum, not {weights}")
        unused = "lane_keeping" if self.version == "v1" else "driving_direction"
        if getattr(self, unused):
            raise DataError(f"RewardWeights.{unused} = {getattr(self, unused)} has no effect in {self.version}: set 0")

    def as_array(self) -> np.ndarray:
        """[6] version (1 or 2) and the five weights, for the kernels."""
        return np.array([1.0 if self.version == "v1" else 2.0, *astuple(self)[1:]])


PUBLISHED_REWARD = RewardWeights(progress=10.0)  # of ReCogDrive's DiffGRPO: it overpays progress
NO_REWARD = np.zeros(6)
