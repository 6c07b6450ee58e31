"""The features that the sim-agents metrics compare, for a scenario's log and for its rollouts.

Shapes: ``R`` rollouts, ``S`` simulated objects (valid at the present step) of which the first ``E`` are scored,
``T`` = 91 steps, ``H`` = 80 future steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navsim_ext.realism.interaction import nearest_distances, times_to_collision
from navsim_ext.realism.kinematics import average_displacement, kinematic_features
from navsim_ext.realism.red_light import LaneSegments, RedLights, red_light_violations
from navsim_ext.realism.road_edge import EdgeSegments, road_edge_distances
from navsim_ext.realism.rules import HISTORY_STEPS

VEHICLE = 1
"""Type codes of the challenge: 1 vehicle, 2 pedestrian, 3 cyclist, 4 other."""


@dataclass(frozen=True)
class Scenario:
    """One scenario as the rules see it, in world coordinates.

    ids [S] int64 and kind [S] uint8 (the challenge's type codes), the ``scored`` objects first, by ascending id;
    size [S, 3] float32 (length, width, height in metres at the present step); log [S, T, 4] float32 (x, y, z of the
    box centre, heading as recorded), zero where not valid; log_valid [S, T] bool. ``edges``, ``lanes``,
    ``signals``: see their classes.
    """

    identifier: str
    ids: np.ndarray
    kind: np.ndarray
    scored: int
    size: np.ndarray
    log: np.ndarray
    log_valid: np.ndarray
    edges: EdgeSegments
    lanes: LaneSegments
    signals: RedLights | None
    has_heights: bool

    @property
    def present(self) -> np.ndarray:
        """Validity [E, H] of the scored objects at the future steps of the log."""
        return self.log_valid[: self.scored, HISTORY_STEPS:]


@dataclass(frozen=True)
class Features:
    """Every feature [R, E, H] (float32; the last three bool) and the displacement from the log [R, E] (m)."""

    linear_speed: np.ndarray
    linear_acceleration: np.ndarray
    angular_speed: np.ndarray
    angular_acceleration: np.ndarray
    distance_to_nearest_object: np.ndarray
    time_to_collision: np.ndarray
    distance_to_road_edge: np.ndarray
    collision: np.ndarray
    offroad: np.ndarray
    traffic_light_violation: np.ndarray
    average_displacement_error: np.ndarray


def features_of(scenario: Scenario, states: np.ndarray, valid: np.ndarray) -> Features:
    """Features of ``states`` [R, S, T, 4] float32 with ``valid`` [R, S, T]; objects in the scenario's order."""
    scored = scenario.scored
    own_states, own_valid, own_size = states[:, :scored], valid[:, :scored], scenario.size[:scored]
    nearest = nearest_distances(states, valid, scenario.size, scored)
    edge = road_edge_distances(own_states, own_valid, own_size, scenario.edges, scenario.has_heights)
    return Features(
        **kinematic_features(own_states),
        distance_to_nearest_object=nearest,
        time_to_collision=times_to_collision(states, valid, scenario.size, scored),
        distance_to_road_edge=edge,
        collision=nearest < 0,
        offroad=edge > 0,
        traffic_light_violation=red_light_violations(own_states, own_valid, scenario.lanes, scenario.signals),
        average_displacement_error=average_displacement(own_states, scenario.log[:scored], scenario.log_valid[:scored]),
    )


def log_features(scenario: Scenario) -> Features:
    return features_of(scenario, scenario.log[None], scenario.log_valid[None])


def rollout_features(scenario: Scenario, rollouts: np.ndarray) -> Features:
    """``rollouts`` [R, S, H, 4] float32 in world coordinates: they continue the log's history and are valid
    throughout."""
    count = len(rollouts)
    history = np.broadcast_to(scenario.log[None, :, :HISTORY_STEPS], (count, *scenario.log[:, :HISTORY_STEPS].shape))
    states = np.concatenate([history, rollouts], axis=2)
    valid = np.ones(states.shape[:3], bool)
    valid[:, :, :HISTORY_STEPS] = scenario.log_valid[None, :, :HISTORY_STEPS]
    return features_of(scenario, states, valid)
