"""From features to likelihoods and the realism meta-metric of one scenario.

For each scored object the rollouts' values make a histogram, and each logged value has the probability of its bin:

    p_b = (count_b + 0.1) / (n_samples + 0.1 n_bins),    likelihood = exp( sum(mask ln p) / sum(mask) )

pooled over the scored objects and steps of the scenario. Events (collision, off-road, red light) are asked once per
rollout, "at any step that is valid in the log", and have p = (#{rollouts that agree with the log} + 0.001) / (R +
0.002). meta = sum of weight x likelihood. Shapes as in ``features``. Version matched: waymo-open-dataset 1.6.7.
"""

from __future__ import annotations

import numpy as np

from navsim_ext.realism.features import VEHICLE, Features, Scenario
from navsim_ext.realism.kinematics import acceleration_validity, speed_validity
from navsim_ext.realism.rules import BERNOULLI_SMOOTHING, BUCKETS, FEATURES, SMOOTHING, Histogram, Rules

EVENTS = {
    "collision_indication": "collision",
    "offroad_indication": "offroad",
    "traffic_light_violation": "traffic_light_violation",
}
"""Event -> the feature that holds its flag per step."""


def log_likelihood(logged: np.ndarray, simulated: np.ndarray, histogram: Histogram) -> np.ndarray:
    """ln p of each logged value: logged [E, H], simulated [R, E, H] -> [E, H] float64.

    Values are clipped to the histogram's range; NaN (the steps without a difference) falls into the last bin.
    """
    edges, bins = histogram.edges(), histogram.bins

    def bin_of(values: np.ndarray) -> np.ndarray:
        index = np.searchsorted(edges, np.clip(values, edges[0], edges[-1]), side="right") - 1
        return np.where(np.isnan(values), bins - 1, np.minimum(index, bins - 1))

    objects = logged.shape[0]
    samples = bin_of(simulated).transpose(1, 0, 2).reshape(objects, -1)
    offset = np.arange(objects)[:, None] * bins
    counts = np.bincount((samples + offset).ravel(), minlength=objects * bins).reshape(objects, bins)
    probability = (counts + SMOOTHING) / (samples.shape[1] + SMOOTHING * bins)
    return np.log(np.take_along_axis(probability, bin_of(logged), axis=1))


def event_log_likelihood(logged: np.ndarray, simulated: np.ndarray) -> np.ndarray:
    """ln p of whether the event happened in the log: logged [E], simulated [R, E] bool -> [E] float64."""
    agree = (simulated == logged[None]).sum(axis=0)
    return np.log((agree + BERNOULLI_SMOOTHING) / (len(simulated) + 2 * BERNOULLI_SMOOTHING))


def feature_masks(scenario: Scenario) -> dict[str, np.ndarray]:
    """Which logged values count, [E, H] bool per feature with a histogram."""
    valid = scenario.present
    vehicle = (scenario.kind[: scenario.scored] == VEHICLE)[:, None]
    speed, acceleration = speed_validity(valid), acceleration_validity(valid)
    return {
        "linear_speed": speed,
        "angular_speed": speed,
        "linear_acceleration": acceleration,
        "angular_acceleration": acceleration,
        "distance_to_nearest_object": valid,
        "time_to_collision": valid & vehicle,
        "distance_to_road_edge": valid,
    }


def log_likelihoods(scenario: Scenario, log: Features, simulated: Features, rules: Rules) -> dict[str, np.ndarray]:
    """ln p of every feature of ``rules``: [E, H] for histograms, [E] for events."""
    valid = scenario.present
    result = {
        name: log_likelihood(getattr(log, name)[0], getattr(simulated, name), histogram)
        for name, histogram in rules.histograms.items()
    }
    vehicle = scenario.kind[: scenario.scored] == VEHICLE
    for name, flag in EVENTS.items():
        counted = valid & vehicle[:, None] if name == "traffic_light_violation" else valid
        result[name] = event_log_likelihood(
            (getattr(log, flag)[0] & counted).any(axis=-1), (getattr(simulated, flag) & counted[None]).any(axis=-1)
        )
    return result


def scenario_metrics(
    scenario: Scenario, log: Features, simulated: Features, rules: Rules, objects: np.ndarray | None = None
) -> dict[str, float]:
    """The scenario's entries under the challenge's names; a likelihood whose mask is empty is NaN, and so is the
    meta-metric.

    ``objects`` [E] bool restricts the scored objects (None: all); others are still there to be met.
    """
    kept = np.ones(scenario.scored, bool) if objects is None else objects
    masks, values = feature_masks(scenario), log_likelihoods(scenario, log, simulated, rules)
    likelihood = {}
    for name in FEATURES:
        value = values[name][kept]
        counted = masks[name][kept] if name in masks else np.ones(value.shape, bool)
        total = counted.sum()
        likelihood[name] = float(np.exp(value[counted].sum() / total)) if total else float("nan")
    valid = scenario.present[kept]
    displacement = simulated.average_displacement_error[:, kept].astype(np.float64)
    return {
        "metametric": float(sum(float(rules.weight(name)) * likelihood[name] for name in FEATURES)),
        "average_displacement_error": float(displacement.mean()) if kept.any() else float("nan"),
        "min_average_displacement_error": float(displacement.mean(axis=1).min()) if kept.any() else float("nan"),
        **{f"{name}_likelihood": likelihood[name] for name in FEATURES},
        "simulated_collision_rate": _rate(simulated.collision[:, kept], valid),
        "simulated_offroad_rate": _rate(simulated.offroad[:, kept], valid),
        "simulated_traffic_light_violation_rate": _rate(simulated.traffic_light_violation[:, kept], valid),
    }


def _rate(flags: np.ndarray, valid: np.ndarray) -> float:
    """Share of rollouts and objects with the event at any step that is valid in the log."""
    return float((flags & valid[None]).any(axis=-1).mean()) if flags.size else float("nan")


def buckets(metrics: dict[str, float], rules: Rules) -> dict[str, float]:
    """The challenge's summary of a scenario's or a data set's metrics: weighted means of the likelihoods in each
    bucket."""
    summary = {"realism_meta_metric": metrics["metametric"]}
    for bucket, names in BUCKETS.items():
        weights = {name: float(rules.weight(name)) for name in names}
        total = sum(weights.values())
        summary[bucket] = sum(weights[name] * metrics[f"{name}_likelihood"] for name in names) / total
    summary["min_ade"] = metrics["min_average_displacement_error"]
    for rate in ("collision", "offroad", "traffic_light_violation"):
        summary[f"simulated_{rate}_rate"] = metrics[f"simulated_{rate}_rate"]
    return summary
