"""The synthetic law run from the arrays that a traffic scene carries, and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from navsim_ext.synthetic import traffic

FIELDS = (
    "kind start speed size axle_to_centre eagerness headway acceleration braking standstill jerk depart kerb event pose"
).split()


def rerun(law: dict[str, NDArray], steps: int) -> NDArray[np.float64]:
    """[N,steps,3] centre poses: the law from its own beginning, cut to the scene's steps."""
    first = round(float(law["clock"][0]) / traffic.STEP_S)
    users = [np.array(law[f"user_{name}"]) for name in FIELDS]
    names = ("path_pose", "path_speed", "path_start", "crossings", "crossing_connector", "connector_node")
    more = ("connector_phase", "signal_offset", "signal_green", "conflict_start", "conflict_other", "conflict_zone")
    tables = [np.array(law[name]) for name in (*names, *more, "conflict_gives_way")]
    pose, *_ = traffic._run(first + steps - 1, *tables, *users)
    return pose[first:].transpose(1, 0, 2)
