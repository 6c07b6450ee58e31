"""The 15 proposals of PDM-Closed: three parallel paths, five IDM policies each (NAVSIM ``PDMGenerator``).

Legend: P = 15 proposals, index 5 lateral + longitudinal; T = 51 steps of 0.1 s (proposals 41, the chosen one 51).
Quirks that decide equality with NAVSIM:

- The leader is searched on even steps only; odd steps copy the step before. Step 1 copies the all-zero record of
  step 0: a leader at s = 0, so every moving proposal brakes at the limit in its first 0.1 s.
- The five proposals of one path share one leader record while they are handled in turn, so fields that a proposal
  does not write are those of the one before: v_lead of an earlier proposal stays when a later one is free or faces a
  red light, and l_rear stays when a later one has a leader.
- Equal distances (two objects that already overlap the box) go to the first in the result order of the search tree.
"""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import wrap_angle
from navsim_ext.pdm.closed import idm
from navsim_ext.pdm.closed.forecast import STEPS_PER_MAP, Forecast, box_corners
from navsim_ext.pdm.closed.path import ProposalPath
from navsim_ext.pdm.ego import HALF_LENGTH, HALF_WIDTH, LENGTH, REAR_AXLE_TO_CENTER

LATERAL_OFFSETS_M = (0.0, -1.0, 1.0)  # + = left
NUM_POLICIES = len(idm.SPEED_FRACTIONS)
NUM_PROPOSALS = len(LATERAL_OFFSETS_M) * NUM_POLICIES
NUM_PROPOSAL_STEPS = 41
NUM_TRAJECTORY_STEPS = 51
LEADER_INTERVAL = 2  # steps
HORIZON_S = 5.0


class Rollout:
    """Unrolls the proposals of one scene.

    ``poses`` [P,T,3] path poses, ``idm`` [P,T,2] progress and speed, ``leaders`` [P,T,3] s_lead, v_lead, l_rear;
    steps that were not unrolled are zero.
    """

    def __init__(
        self, centerline: NDArray[np.float64], ego_state: NDArray[np.float64], speed_limit: float, world: Forecast
    ) -> None:
        if not (np.isnan(speed_limit) or speed_limit > 0.0):
            raise DataError(f"the speed limit of the start lane is {speed_limit} m/s; a positive one or NaN is needed")
        center = ProposalPath(centerline)
        self.paths = [center if offset == 0.0 else center.offset(offset) for offset in LATERAL_OFFSETS_M]
        self.target_speeds = idm.target_speeds(speed_limit)
        self.world = world
        self.poses = np.zeros((NUM_PROPOSALS, NUM_TRAJECTORY_STEPS, 3))
        self.idm = np.zeros((NUM_PROPOSALS, NUM_TRAJECTORY_STEPS, 2))
        self.leaders = np.zeros((NUM_PROPOSALS, NUM_TRAJECTORY_STEPS, 3))
        self._speeds = np.hypot(world.velocities[:, 0], world.velocities[:, 1])
        self._corridors = np.empty(len(self.paths), dtype=object)
        rear_axle = shapely.Point(ego_state[0], ego_state[1])
        reach = abs(self.target_speeds.max()) * HORIZON_S
        for lateral, path in enumerate(self.paths):
            start = float(path.project(rear_axle))
            rows = slice(lateral * NUM_POLICIES, (lateral + 1) * NUM_POLICIES)
            self.idm[rows, 0] = start, ego_state[3]
            self.poses[rows, 0] = path.interpolate(np.array([start]))
            self._corridors[lateral] = path.corridor(start, start + reach, HALF_WIDTH)
        shapely.prepare(self._corridors)
        for time in range(1, NUM_PROPOSAL_STEPS):
            self._advance(np.arange(NUM_PROPOSALS), time)

    def trajectory(self, proposal: int) -> NDArray[np.float64]:
        """[51,3] path poses of one proposal, rolled on from 4 to 5 s."""
        rows = np.array([proposal])
        for time in range(NUM_PROPOSAL_STEPS, NUM_TRAJECTORY_STEPS):
            self._advance(rows, time)
        return self.poses[proposal].copy()

    def _advance(self, rows: NDArray[np.int64], time: int) -> None:
        if time % LEADER_INTERVAL == 0:
            self._find_leaders(rows, time)
        else:
            self.leaders[rows, time] = self.leaders[rows, time - 1]
        progress, speed = idm.step(
            self.idm[rows, time - 1, 0],
            self.idm[rows, time - 1, 1],
            self.leaders[rows, time],
            self.target_speeds[rows % NUM_POLICIES],
        )
        self.idm[rows, time, 0], self.idm[rows, time, 1] = progress, speed
        for lateral in np.unique(rows // NUM_POLICIES):
            mine = rows // NUM_POLICIES == lateral
            self.poses[rows[mine], time] = self.paths[lateral].interpolate(progress[mine])

    def _find_leaders(self, rows: NDArray[np.int64], time: int) -> None:
        laterals = np.unique(rows // NUM_POLICIES)
        number = time // STEPS_PER_MAP
        polygons = self.world.polygons_over_time[number]
        found = self.world.tree(number).query(self._corridors[laterals], predicate="intersects")
        for index, lateral in enumerate(laterals):
            candidates = found[1, found[0] == index]
            candidates = candidates[~self.world.collided[candidates]]
            mine = rows[rows // NUM_POLICIES == lateral]
            self._record_leaders(mine, time, candidates, polygons[candidates], self.paths[lateral])

    def _record_leaders(
        self, rows: NDArray[np.int64], time: int, candidates: NDArray[np.int64], polygons: NDArray, path: ProposalPath
    ) -> None:
        """Writes the leaders of the proposals of one path, in turn, through the record that they share."""
        record = np.zeros(3)
        if len(candidates):
            ahead = path.project(shapely.centroid(polygons))[None, :] > self.idm[rows, time - 1, 0][:, None]
            boxes = shapely.polygons(ego_boxes(self.poses[rows, time - 1]))
            distances = np.where(ahead, shapely.distance(boxes[:, None], polygons[None, :]), np.inf)
        for i, row in enumerate(rows):
            if len(candidates) and ahead[i].any():
                nearest = int(np.argmin(distances[i]))
                leader = int(candidates[nearest])
                record[0] = self.idm[row, time - 1, 0] + distances[i, nearest]
                if not self.world.is_red[leader]:
                    relative = wrap_angle(self.world.headings[leader] - self.poses[row, time - 1, 2])
                    record[1] = np.cos(relative) * self._speeds[leader]
            else:
                record[0] = path.length
                record[2] = LENGTH / 2
            self.leaders[row, time] = record


def ego_centers(rear_axles: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...,3] poses of the box centre at rear-axle poses [...,3]."""
    heading = rear_axles[..., 2]
    forward = np.stack([np.cos(heading), np.sin(heading), np.zeros_like(heading)], axis=-1)
    return rear_axles + REAR_AXLE_TO_CENTER * forward


def ego_boxes(rear_axles: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...,4,2] corners of the ego box at rear-axle poses [...,3]."""
    return box_corners(ego_centers(rear_axles), HALF_LENGTH, HALF_WIDTH)
