"""The vehicles of a scene as reactive traffic starts with them: the part of the record that says on which path each is.

Legend: n vehicles of the annotation now, in list order; p distinct paths with v vertices together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

START_COLUMNS = ("progress", "speed", "target_speed", "speed_limit", "x", "y", "heading")
PROGRESS, SPEED, TARGET, LIMIT, SNAPPED_X, SNAPPED_Y, SNAPPED_HEADING = range(len(START_COLUMNS))
IS_ACTIVE, STAYS = 1, 2  # bits of ``kinds``


class TrafficAgents(NamedTuple):
    """The vehicles of a scene as the reactive traffic starts with them."""

    rows: NDArray[np.int32]  # [n] row of the vehicle among the scene's tracks
    kinds: NDArray[np.uint8]  # [n] IS_ACTIVE: reacts; STAYS: shown where it is while it does not react
    path: NDArray[np.int32]  # [n] number of its path, -1: none
    start: NDArray[np.float64]  # [n,7] START_COLUMNS: progress [m], speeds [m/s] (limit 0: none), snapped pose
    path_offsets: NDArray[np.int64]  # [p+1]
    path_vertices: NDArray[np.float64]  # [v,4] x, y, heading (unwrapped), progress [m]
