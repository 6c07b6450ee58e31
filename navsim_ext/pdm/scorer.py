"""The scorer: simulated states -> sub-scores, for log replay (predictions) and forecasts (PDM-Closed's proposals).

Legend: G trajectories of one scene, P proposals, states [41,11], columns of :mod:`navsim_ext.pdm.columns`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from navsim_ext.errors import DataError
from navsim_ext.pdm.areas import Surroundings, classify_areas, place_boxes
from navsim_ext.pdm.collisions import no_at_fault_collision, time_to_collision, traffic_light_compliance
from navsim_ext.pdm.columns import (
    NUM_COLUMNS,
    PROGRESS,
    PROGRESS_THRESHOLD,
    V1_COLLISION_S,
    V1_COMFORT,
    V1_DAC,
    V1_DDC,
    V1_NC,
    V1_TTC,
    V1_TTC_S,
    V2_COLLISION_S,
    V2_DAC,
    V2_DDC,
    V2_HC,
    V2_LK,
    V2_NC,
    V2_TLC,
    V2_TTC,
    V2_TTC_S,
    finish_reward,
    finish_v1,
    finish_v2,
)
from navsim_ext.pdm.comfort import ComfortFilters, comfort_filters, comfort_v1, comfort_v2
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.driving import drivable_area_compliance, driving_direction_compliance, lane_keeping, raw_progress
from navsim_ext.pdm.ego import NUM_STEPS, STATE_SIZE, STEP_S
from navsim_ext.pdm.references import references_from_poses
from navsim_ext.pdm.simulator import simulate_reference
from navsim_ext.pdm.traffic import V1, V2, Traffic


@kernel
def _seconds(step: int) -> float:
    return step * STEP_S if step >= 0 else np.inf


@kernel
def sub_scores(states, surroundings, traffic, versions: int, past, filters_v1, filters_v2, row) -> None:
    """Fills raw progress and the sub-scores of the versions (bits V1, V2) in ``row``; the others stay as they are."""
    corners, centers = np.empty((NUM_STEPS, 4, 2)), np.empty((NUM_STEPS, 2))
    areas = np.empty(NUM_STEPS, dtype=np.int64)
    checks = np.empty(6, dtype=np.bool_)
    place_boxes(states, corners, centers)
    classify_areas(surroundings, states, corners, centers, areas)
    row[PROGRESS] = raw_progress(surroundings.centerline, centers)
    drivable = drivable_area_compliance(areas)
    if versions & V1:
        row[V1_NC], step = no_at_fault_collision(traffic, V1, states, corners, centers, areas)
        row[V1_COLLISION_S] = _seconds(step)
        row[V1_DAC] = drivable
        row[V1_TTC], step = time_to_collision(traffic, V1, states, corners, centers, areas)
        row[V1_TTC_S] = _seconds(step)
        row[V1_COMFORT] = comfort_v1(filters_v1, states, checks)
        row[V1_DDC] = driving_direction_compliance(V1, centers, areas)
    if versions & V2:
        row[V2_NC], step = no_at_fault_collision(traffic, V2, states, corners, centers, areas)
        row[V2_COLLISION_S] = _seconds(step)
        row[V2_DAC] = drivable
        row[V2_DDC] = driving_direction_compliance(V2, centers, areas)
        row[V2_TLC] = traffic_light_compliance(surroundings.index, traffic, V2, corners)
        row[V2_TTC], step = time_to_collision(traffic, V2, states, corners, centers, areas)
        row[V2_TTC_S] = _seconds(step)
        row[V2_LK] = lane_keeping(surroundings.centerline, centers, areas)
        row[V2_HC] = comfort_v2(filters_v2, past, states, checks)


@kernel
def score_trajectories(poses, interval: float, scene, versions: int, reward_weights, rows, states) -> None:
    """Simulates and scores poses [G,M,3], ``interval`` seconds apart, in one scene.

    Fills ``rows`` [G,columns] and ``states`` [G,41,11]; v2_ec stays as it is (NaN: no predecessor).
    """
    references = np.empty((NUM_STEPS, 3))
    for g in range(len(poses)):
        references_from_poses(poses[g], interval, scene.ego_state, scene.time_us, references)
        simulate_reference(references, scene.ego_state, states[g])
        sub_scores(
            states[g],
            scene.surroundings,
            scene.traffic,
            versions,
            scene.past,
            scene.filters_v1,
            scene.filters_v2,
            rows[g],
        )
        if versions & V1:
            finish_v1(rows[g], scene.reference_progress[0], scene.reference_multiplier[0])
        if versions & V2:
            finish_v2(rows[g], scene.reference_progress[1], scene.reference_multiplier[1], scene.human)
        finish_reward(rows[g], reward_weights)


@kernel
def _score_states(states, surroundings, traffic, versions, past, filters_v1, filters_v2, rows) -> None:
    for p in range(len(states)):
        sub_scores(states[p], surroundings, traffic, versions, past, filters_v1, filters_v2, rows[p])


@dataclass(frozen=True)
class ProposalScores:
    """Scores of P proposals among each other, as NAVSIM's ``score_proposals`` gives them."""

    multiplicative: Float64[np.ndarray, "P _"]  # v1 [P,2] nc, dac; v2 [P,4] nc, dac, tlc, ddc
    weighted: Float64[np.ndarray, "P 4"]  # v1 ep, ttc, comfort, ddc; v2 ep, ttc, lk, hc
    progress: Float64[np.ndarray, " P"]  # raw progress [m]
    scores: Float64[np.ndarray, " P"]


def score_proposals(
    states: Float[np.ndarray, "*_"],
    surroundings: Surroundings,
    traffic: Traffic,
    version: str,
    past: Float64[np.ndarray, "H 3"] | None = None,
) -> ProposalScores:
    """Scores simulated proposals [P,41,11] by ``version`` "v1" or "v2", progress relative to the best of them.

    Without ``past`` rows v2's history comfort is 1 (as in PDM-Closed and for the human). Raises DataError when the
    shape is wrong or the version unknown.
    """
    states = np.ascontiguousarray(states, dtype=np.float64)
    if states.ndim != 3 or states.shape[1:] != (NUM_STEPS, STATE_SIZE):
        raise DataError(f"states have shape {states.shape}, [P,{NUM_STEPS},{STATE_SIZE}] was expected")
    if version not in ("v1", "v2"):
        raise DataError(f"scorer version {version!r} is unknown: 'v1' or 'v2'")
    past = np.zeros((0, 3)) if past is None else past
    filters_v1, filters_v2 = scoring_filters(len(past))
    rows = np.full((len(states), NUM_COLUMNS), np.nan)
    _score_states(states, surroundings, traffic, V1 if version == "v1" else V2, past, filters_v1, filters_v2, rows)
    progress = rows[:, PROGRESS]
    if version == "v1":
        multiplicative = rows[:, [V1_NC, V1_DAC]]
        others, weights = rows[:, [V1_TTC, V1_COMFORT, V1_DDC]], np.array([5.0, 5.0, 2.0, 0.0])
    else:
        multiplicative = rows[:, [V2_NC, V2_DAC, V2_TLC, V2_DDC]]
        others, weights = rows[:, [V2_TTC, V2_LK, V2_HC]], np.array([5.0, 5.0, 2.0, 2.0])
    m = multiplicative.prod(axis=1)
    most = np.max(progress * m)
    if most > PROGRESS_THRESHOLD:
        relative = progress * m / most if version == "v1" else np.clip(progress / most, 0.0, 1.0)
    else:
        relative = np.where(m == 0.0, 0.0, 1.0) if version == "v1" else np.ones(len(m))
    weighted = np.column_stack([relative, others])
    return ProposalScores(multiplicative, weighted, progress, m * ((weighted * weights).sum(axis=1) / weights.sum()))


def scoring_filters(history: int) -> tuple[ComfortFilters, ComfortFilters]:
    """Comfort filters of v1 and v2 for a number of past rows."""
    return comfort_filters("v1", NUM_STEPS), comfort_filters("v2", NUM_STEPS + history)
