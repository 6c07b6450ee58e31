"""The worlds of NAVSIM 2's traffic policies in which a prediction, PDM-Closed and the human are scored.

Source: NAVSIM 2.2 ``traffic_agents_policies``. Under "reactive" and "constant_velocity" the world is, at step 0, the
annotation as it is (no box over the ego is dropped, nothing is interpolated), and at each later step the simulated
vehicles followed by all other objects of the replay. Vehicles that appear later never exist. Collision typing uses the
annotated velocity throughout.

Reactive traffic answers to the trajectory that is scored, and PDM-Closed is scored in that same world, so its
multiplier, and with it the progress score, depends on the prediction. The human's sub-scores come from a world of its
own.

Legend: n vehicles, o objects in all (vehicles first), 41 steps of 0.1 s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.areas import Surroundings, classify_areas, place_boxes
from navsim_ext.pdm.collisions import no_at_fault_collision
from navsim_ext.pdm.columns import (
    HUMAN_COLUMNS,
    NUM_COLUMNS,
    V2_DAC,
    V2_DDC,
    V2_HC,
    V2_NC,
    V2_TLC,
    finish_reward,
    finish_v2,
)
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import HEADING, NUM_STEPS, STATE_SIZE, STEP_S
from navsim_ext.pdm.log_replay import replay, replayed_tracks
from navsim_ext.pdm.reactive.idm import DONE, LEFT_ITS_CORRIDOR, simulate_vehicles
from navsim_ext.pdm.reactive.rails import Rails, make_rails
from navsim_ext.pdm.record import SceneMetricCache, UnscorableScene
from navsim_ext.pdm.references import references_from_poses, references_from_predictions, references_from_trajectory
from navsim_ext.pdm.scorer import scoring_filters, sub_scores
from navsim_ext.pdm.simulator import simulate, simulate_reference
from navsim_ext.pdm.traffic import V2, Traffic, make_traffic, swept_bounds
from navsim_ext.pdm.traffic_agents import IS_ACTIVE
from navsim_ext.pdm.version import VERSIONS

CANNOT_GO_ON = {
    LEFT_ITS_CORRIDOR: "a vehicle of the reactive traffic is off the rest of its lane, where NAVSIM ends the scene",
    2: "a lane of the reactive traffic turns more sharply than this program draws",
}


class ReactiveWorld(NamedTuple):
    """What answers to a trajectory."""

    rails: Rails
    traffic: Traffic  # vehicles first; their poses after step 0 are filled for each trajectory
    closed_states: NDArray[np.float64]  # [41,11] PDM-Closed simulated
    closed_rest: float  # its drivable area, direction and lights: what no traffic changes


def open_world(scene: SceneMetricCache) -> Traffic:
    """Step 0 as annotated, later steps the replay of everything but vehicles; vehicles first, absent after step 0.

    Needs v2's horizon only. Red lights stay as they are cached.
    """
    replayed = replay(scene)
    source = replayed_tracks(scene)
    types = np.array(scene.track_types)
    now = np.isfinite(scene.track_poses[:, 0]).all(axis=-1)
    vehicles = np.flatnonzero((types == 0) & now)
    others = np.flatnonzero(types[source] != 0)
    count = len(vehicles) + len(others)
    poses = np.full((NUM_STEPS, count, 3), np.nan)
    presence = np.zeros((NUM_STEPS, count), dtype=np.uint8)
    poses[0, : len(vehicles)], presence[0, : len(vehicles)] = scene.track_poses[vehicles, 0], V2
    poses[:, len(vehicles) :] = replayed.poses[:NUM_STEPS, others]
    heading = poses[:, len(vehicles) :, 2]
    poses[:, len(vehicles) :, 2] = np.arctan2(np.sin(heading), np.cos(heading))
    presence[:, len(vehicles) :] = replayed.presence[:NUM_STEPS, others] & V2
    for column, row in enumerate(source[others], start=len(vehicles)):
        if now[row] and presence[0, column]:
            poses[0, column] = scene.track_poses[row, 0]
        else:  # seen once, later: it stands there from step 1 on, but is not in the annotation
            presence[0, column] = 0
    rows = np.concatenate([vehicles, source[others]]).astype(np.int64)
    velocities = np.array(scene.track_velocities)[rows].reshape(-1, 2)
    return make_traffic(
        poses,
        np.array(scene.track_sizes)[rows].reshape(-1, 3),
        types[rows],
        np.hypot(velocities[:, 0], velocities[:, 1]),
        presence=presence,
        red_polygons=replayed.red_polygons,
        red_presence=replayed.red_presence[:NUM_STEPS],
    )


def constant_velocity_traffic(scene: SceneMetricCache) -> Traffic:
    """Vehicles of the annotation go on straight at their velocity: p + v t, heading kept."""
    traffic = open_world(scene)
    vehicles = np.flatnonzero((np.array(scene.track_types) == 0) & np.isfinite(scene.track_poses[:, 0]).all(axis=-1))
    count = len(vehicles)
    seconds = np.arange(NUM_STEPS)[:, None, None] * STEP_S
    traffic.poses[:, :count] = traffic.poses[0, :count]
    traffic.poses[:, :count, :2] += seconds * np.array(scene.track_velocities)[vehicles]
    traffic.presence[:, :count] = V2
    return traffic._replace(swept=swept_bounds(traffic.poses, traffic.presence, traffic.radii))


def reactive_world(scene: SceneMetricCache, surroundings: Surroundings) -> ReactiveWorld:
    """Raises UnscorableScene, with the remedy, where vehicles cannot be put on their lanes."""
    agents = scene.traffic_agents
    if agents is None:
        raise UnscorableScene(
            "the metric cache does not say on which lanes the vehicles drive (imported from NAVSIM's, or built before "
            "schema 2): build it again for reactive traffic"
        )
    lengths = np.diff(agents.path_offsets)
    for row, kind, path in zip(agents.rows, agents.kinds, agents.path):
        if kind & IS_ACTIVE and lengths[path] < 2:
            raise UnscorableScene(
                f"vehicle {scene.track_tokens[row]} is on a lane of {lengths[path] + 1} vertices, on which NAVSIM's "
                "reactive traffic fails"
            )
    traffic = open_world(scene)
    rows = np.array(agents.rows)
    rails = make_rails(agents, np.array(scene.track_poses)[rows, 0], np.array(scene.track_sizes)[rows])
    states = closed_states(scene)
    row = score_in(states, surroundings, traffic)
    return ReactiveWorld(rails, traffic, states, float(row[V2_DAC] * row[V2_DDC] * row[V2_TLC]))


def closed_states(scene: SceneMetricCache) -> NDArray[np.float64]:
    """PDM-Closed's v2 trajectory simulated, [41,11]."""
    reference = references_from_trajectory(scene.pdm_closed[VERSIONS.index("v2")], scene.time_us)
    return simulate(reference[None], np.array(scene.ego_state))[0]


def score_in(states: NDArray[np.float64], surroundings: Surroundings, traffic: Traffic) -> NDArray[np.float64]:
    """A row [columns] with v2's sub-scores of simulated states in a fixed world, without history comfort."""
    past = np.zeros((0, 3))
    row = np.full(NUM_COLUMNS, np.nan)
    sub_scores(states, surroundings, traffic, V2, past, *scoring_filters(0), row)
    return row


def closed_multiplier(scene: SceneMetricCache, surroundings: Surroundings, traffic: Traffic) -> float:
    """Multiplicative product of PDM-Closed in a fixed world."""
    row = score_in(closed_states(scene), surroundings, traffic)
    return float(row[V2_NC] * row[V2_DAC] * row[V2_DDC] * row[V2_TLC])


def human_in(
    scene: SceneMetricCache, surroundings: Surroundings, traffic: Traffic, world: ReactiveWorld | None
) -> NDArray[np.float64]:
    """The human's own sub-scores [8] in a fixed world, or in the one that reacts to it; NaN: the future is unknown.

    Raises UnscorableScene where the reactive traffic cannot go on.
    """
    if not np.isfinite(scene.human_poses).all():
        return np.full(len(HUMAN_COLUMNS), np.nan)
    references = references_from_predictions(np.array(scene.human_poses)[None], scene.ego_state, scene.time_us)
    states = simulate(references, np.array(scene.ego_state))[0]
    if world is not None:
        traffic = copy_traffic(world.traffic)
        code = react(world.rails, states, traffic)
        if code != DONE:
            raise UnscorableScene(f"{CANNOT_GO_ON[code]} (around the human's own drive)")
    row = score_in(states, surroundings, traffic)
    finish_v2(row, 0.0, 0.0, np.full(len(HUMAN_COLUMNS), np.nan))
    return row[V2_NC : V2_HC + 1].copy()


@kernel
def copy_traffic(traffic):
    """The same traffic with poses, presence and bounds of its own."""
    return Traffic(
        traffic.poses.copy(),
        traffic.half_sizes,
        traffic.radii,
        traffic.swept.copy(),
        traffic.presence.copy(),
        traffic.ignored,
        traffic.is_agent,
        traffic.is_stopped,
        traffic.red_polygons,
        traffic.red_presence,
        traffic.map_of_step,
        traffic.unwrapped,
    )


@kernel
def react(rails, states, traffic) -> int:
    """Moves the vehicles of ``traffic`` (its first columns) around an ego [41,11]; returns what became of it."""
    count = len(rails.kinds)
    present = np.zeros((NUM_STEPS, count), dtype=np.bool_)
    code = simulate_vehicles(rails, states, traffic.poses, present)
    for step in range(1, NUM_STEPS):
        for i in range(count):
            traffic.presence[step, i] = V2 if present[step, i] else 0
    for i in range(count):
        low_x, low_y, high_x, high_y = math.inf, math.inf, -math.inf, -math.inf
        for step in range(NUM_STEPS):
            if traffic.presence[step, i]:
                x, y, r = traffic.poses[step, i, 0], traffic.poses[step, i, 1], traffic.radii[i]
                low_x, low_y, high_x, high_y = (
                    min(low_x, x - r),
                    min(low_y, y - r),
                    max(high_x, x + r),
                    max(high_y, y + r),
                )
        traffic.swept[i, 0], traffic.swept[i, 1], traffic.swept[i, 2], traffic.swept[i, 3] = (
            low_x,
            low_y,
            high_x,
            high_y,
        )
    return code


@kernel
def score_reactive(poses, interval: float, scene, world, reward_weights, rows, states, codes) -> None:
    """As ``scorer.score_trajectories`` for v2, in the world that answers to each trajectory [G,M,3].

    ``codes`` [G] receives what became of the traffic; where it is not DONE the row stays as it is.
    """
    references = np.empty((NUM_STEPS, 3))
    traffic = copy_traffic(world.traffic)
    closed_corners, closed_centers = np.empty((NUM_STEPS, 4, 2)), np.empty((NUM_STEPS, 2))
    closed_areas = np.empty(NUM_STEPS, dtype=np.int64)
    place_boxes(world.closed_states, closed_corners, closed_centers)
    classify_areas(scene.surroundings, world.closed_states, closed_corners, closed_centers, closed_areas)
    for g in range(len(poses)):
        references_from_poses(poses[g], interval, scene.ego_state, scene.time_us, references)
        simulate_reference(references, scene.ego_state, states[g])
        if (
            not np.isfinite(states[g, NUM_STEPS - 1, HEADING])
            or not np.isfinite(states[g, NUM_STEPS - 1, :STATE_SIZE]).all()
        ):
            continue
        codes[g] = react(world.rails, states[g], traffic)
        if codes[g] != DONE:
            continue
        sub_scores(states[g], scene.surroundings, traffic, V2, scene.past, scene.filters_v1, scene.filters_v2, rows[g])
        closed_nc, _ = no_at_fault_collision(
            traffic, V2, world.closed_states, closed_corners, closed_centers, closed_areas
        )
        finish_v2(rows[g], scene.reference_progress[1], closed_nc * world.closed_rest, scene.human)
        finish_reward(rows[g], reward_weights)
