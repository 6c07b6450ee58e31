"""The rules of each year's sim-agents challenge: histograms, weights, which objects count.

Version matched: waymo-open-dataset 1.6.7 (2025-04-29). As there, a year changes the configuration alone; the
features are today's. Two consequences: "2023" and "2024" here are today's code with that year's file, not what
those years' servers computed; and today's code fails on the 2023 file, which has no red-light entry, so 2023 is
given a Bernoulli with weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navsim_ext.realism.errors import RealismError

HISTORY_STEPS = 11
"""Steps 0 to 10, the last of which is the present; the metric is defined for scenes of 91 steps of 0.1 s."""
FUTURE_STEPS = 80
STEPS = HISTORY_STEPS + FUTURE_STEPS
PRESENT = HISTORY_STEPS - 1
STEP_SECONDS = 0.1
CHALLENGE_ROLLOUTS = 32
SMOOTHING = 0.1
"""Added to the count of every bin of a histogram."""
BERNOULLI_SMOOTHING = 0.001

KINEMATIC = ("linear_speed", "linear_acceleration", "angular_speed", "angular_acceleration")
INTERACTIVE = ("distance_to_nearest_object", "collision_indication", "time_to_collision")
MAP_BASED = ("distance_to_road_edge", "offroad_indication", "traffic_light_violation")
FEATURES = KINEMATIC + INTERACTIVE + MAP_BASED
BUCKETS = {"kinematic_metrics": KINEMATIC, "interactive_metrics": INTERACTIVE, "map_based_metrics": MAP_BASED}


@dataclass(frozen=True)
class Histogram:
    """``bins`` equal bins from ``low`` to ``high`` (units of the feature)."""

    low: float
    high: float
    bins: int

    def edges(self) -> np.ndarray:
        """``[bins + 1]`` float32: low + i * ((high - low) / bins), each operation in float32; the last is ``high``."""
        low, high = np.float32(self.low), np.float32(self.high)
        width = (high - low) / np.float32(self.bins)
        edges = low + np.arange(self.bins + 1, dtype=np.float32) * width
        edges[-1] = high
        return edges


@dataclass(frozen=True)
class Rules:
    """One year's configuration. A feature without a histogram is a Bernoulli: did it happen at any scored step?"""

    year: int
    histograms: dict[str, Histogram]
    weights: dict[str, float]

    def weight(self, feature: str) -> np.float32:
        return np.float32(self.weights[feature])


_PLACE = {
    "distance_to_nearest_object": Histogram(-5.0, 40.0, 10),
    "time_to_collision": Histogram(0.0, 5.0, 10),
    "distance_to_road_edge": Histogram(-20.0, 40.0, 10),
}
_HISTOGRAMS_2023 = {
    "linear_speed": Histogram(0.0, 35.0, 10),
    "linear_acceleration": Histogram(-15.0, 15.0, 10),
    "angular_speed": Histogram(-31.5, 31.5, 10),
    "angular_acceleration": Histogram(-31.5, 31.5, 10),
    **_PLACE,
}
_HISTOGRAMS_2024 = {
    "linear_speed": Histogram(0.0, 25.0, 10),
    "linear_acceleration": Histogram(-12.0, 12.0, 11),
    "angular_speed": Histogram(-0.628, 0.628, 11),
    "angular_acceleration": Histogram(-3.14, 3.14, 11),
    **_PLACE,
}


def _weights(*values: float) -> dict[str, float]:
    return dict(zip(FEATURES, values, strict=True))


RULES = {
    2023: Rules(2023, _HISTOGRAMS_2023, _weights(0.09, 0.09, 0.09, 0.09, 0.09, 0.18, 0.09, 0.09, 0.18, 0.0)),
    2024: Rules(2024, _HISTOGRAMS_2024, _weights(0.05, 0.05, 0.05, 0.05, 0.10, 0.25, 0.10, 0.10, 0.25, 0.0)),
    2025: Rules(2025, _HISTOGRAMS_2024, _weights(0.05, 0.05, 0.05, 0.05, 0.10, 0.25, 0.10, 0.05, 0.25, 0.05)),
}


def rules_of(year: int) -> Rules:
    if year not in RULES:
        raise RealismError(f"there are no sim-agents rules of {year!r}; there are {', '.join(map(str, RULES))}")
    return RULES[year]
