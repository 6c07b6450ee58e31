"""PDM-Closed's trajectory for both scorer versions: roll out, simulate, score on the forecast, choose, roll on to 5 s.

The proposals and their simulation do not depend on the version; only their scores do, so the choice may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.pdm.areas import Surroundings
from navsim_ext.pdm.closed.forecast import NUM_MAPS, STEPS_PER_MAP, Forecast
from navsim_ext.pdm.closed.rollout import NUM_PROPOSAL_STEPS, NUM_TRAJECTORY_STEPS, Rollout
from navsim_ext.pdm.scorer import ProposalScores, score_proposals
from navsim_ext.pdm.simulator import simulate
from navsim_ext.pdm.traffic import Traffic, make_traffic

VERSIONS = ("v1", "v2")


@dataclass(frozen=True, eq=False)
class ClosedPlan:
    """What PDM-Closed would do. V = 2 versions in the order v1, v2; P = 15 proposals."""

    trajectories: NDArray[np.float64]  # [V,51,3] poses on the path at 10 Hz; the first one is not the ego pose
    chosen: NDArray[np.int8]  # [V] 5 lateral + longitudinal
    states: NDArray[np.float64]  # [P,41,11] simulated proposals
    scores: tuple[ProposalScores, ...]  # V
    rollout: Rollout


def plan_closed(
    centerline: NDArray[np.float64],
    ego_state: NDArray[np.float64],
    speed_limit: float,
    world: Forecast,
    surroundings: Surroundings,
    red_rows: ArrayLike,
) -> ClosedPlan:
    """Plans from a centreline [C,3], an ego state [11] and the speed limit of the start lane (NaN = unknown).

    ``red_rows``: rows of the map's polygon table of the red connectors in ``world``. Ties go to the first proposal.
    Raises DataError for a speed limit that is not positive.
    """
    rollout = Rollout(centerline, ego_state, speed_limit, world)
    states = simulate(rollout.poses[:, :NUM_PROPOSAL_STEPS], ego_state)
    traffic = forecast_traffic(world, red_rows)
    scores = tuple(score_proposals(states, surroundings, traffic, version) for version in VERSIONS)
    chosen = np.array([int(np.argmax(result.scores)) for result in scores], dtype=np.int8)
    by_proposal = {proposal: rollout.trajectory(proposal) for proposal in set(chosen.tolist())}
    trajectories = np.stack([by_proposal[proposal] for proposal in chosen.tolist()])
    return ClosedPlan(trajectories, chosen, states, scores, rollout)


def forecast_traffic(world: Forecast, red_rows: ArrayLike) -> Traffic:
    """The forecast as the scorer takes it: one map per 0.2 s; objects that touch the ego now are ignored."""
    boxes = world.num_boxes
    seconds = np.arange(0, NUM_MAPS * STEPS_PER_MAP, STEPS_PER_MAP).astype(np.float64) * 0.1
    poses = np.empty((NUM_MAPS, boxes, 3))
    poses[..., :2] = world.centers[None] + seconds[:, None, None] * world.displacement[None, :boxes]
    poses[..., 2] = world.headings[None, :boxes]
    speeds = np.hypot(world.velocities[:boxes, 0], world.velocities[:boxes, 1])
    return make_traffic(
        poses,
        world.sizes,
        world.types[:boxes],
        speeds,
        ignored=np.where(world.collided[:boxes], 3, 0),
        red_polygons=np.asarray(red_rows, dtype=np.int32),
        map_of_step=np.arange(NUM_TRAJECTORY_STEPS) // STEPS_PER_MAP,
    )
