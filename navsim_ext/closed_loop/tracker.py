"""The PDM scorer's tracker and bicycle, made for drives that last longer than one plan.

In scoring (``pdm/simulator.py``) a plan begins where the ego stands and is followed once, for 4 seconds. Asked again
every half second for 15 seconds, the same lines lose the recorded drive by more than a metre: NAVSIM's tracker has no
feedback on the distance driven, and a reference that starts afresh at the ego forgets what it is behind or beside of.
Three things are added, and nothing else is changed:

  - the reference begins where the last plan wanted the ego to be now (the first one, or one farther than RESET_M away:
    where it is), and runs from there to the new plan's poses;
  - GAIN e is added to the reference speed, e the distance that the ego is behind its reference, at most REACH_M;
  - the reference speed is taken LEAD steps later, the lag of the bicycle's acceleration, and raised by what NAVSIM's
    gain of 10/11 takes from its change over the horizon: steady braking is then followed exactly.

Legend: 9 nodes (now and the 8 poses of a plan), 41 references every 0.1 s, state [11] of ``pdm/ego.py``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.frames import to_global
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import HEADING, NUM_POSES, NUM_STEPS, STATE_SIZE, X, Y
from navsim_ext.pdm.profiles import NUM_DISPLACEMENTS, fit_curvature, fit_velocity
from navsim_ext.pdm.references import interpolate_poses
from navsim_ext.pdm.simulator import HORIZON, LONGITUDINAL_GAIN, propagate, track

GAIN = 1.0  # 1/s
LEAD = 2  # steps: ACCELERATION_TIME_CONSTANT is 0.2 s
SHORTFALL = 1.0 / LONGITUDINAL_GAIN - 1.0  # 0.1
TURN_LEAD = 2  # steps by which curvature is seen earlier: measured best, the steering lags by about that
REACH_M = 2.0
RESET_M = 3.0
POSE_INTERVAL_US = 500_000


def fingerprint() -> Fingerprint:
    """What turns a plan into motion; part of what made a planner's drives."""
    fields = {"gain": GAIN, "lead": LEAD, "shortfall": SHORTFALL, "turn_lead": TURN_LEAD, "reach_m": REACH_M,
              "reset_m": RESET_M}  # fmt: skip
    return Fingerprint("closed-loop-tracker", fields)


@kernel
def _follow(nodes, state, references, states) -> None:
    node_times = np.arange(len(nodes)) * POSE_INTERVAL_US
    interpolate_poses(node_times, nodes, 0, references)
    velocities, curvatures = np.empty(NUM_DISPLACEMENTS), np.empty(NUM_DISPLACEMENTS)
    fit_velocity(references, velocities)
    fit_curvature(references, velocities, curvatures)
    states[0] = state
    for step in range(NUM_STEPS - 1):
        reference = references[step]
        behind = math.cos(reference[2]) * (reference[0] - states[step, X]) + math.sin(reference[2]) * (
            reference[1] - states[step, Y]
        )
        later = velocities[min(step + LEAD + HORIZON, NUM_DISPLACEMENTS - 1)]
        v_reference = later + SHORTFALL * (later - velocities[min(step + LEAD, NUM_DISPLACEMENTS - 1)])
        v_reference = max(v_reference + GAIN * min(max(behind, -REACH_M), REACH_M), 0.0)
        acceleration, steering_rate = track(reference, states[step], v_reference, curvatures, step + TURN_LEAD)
        propagate(states[step], acceleration, steering_rate, states[step + 1])


def follow(
    plan: NDArray[np.float64], state: NDArray[np.float64], wanted: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(states [41,11], references [41,3]) of following a plan [8,3] (ego frame of now) from ``state`` [11].

    ``wanted`` [3] is where the last plan's reference is now, None for the first. Raises DataError for wrong shapes.
    """
    if plan.shape != (NUM_POSES, 3) or state.shape != (STATE_SIZE,):
        raise DataError(
            f"plan {plan.shape} and state {state.shape}: {(NUM_POSES, 3)} and {(STATE_SIZE,)} were expected"
        )
    begin = state[: HEADING + 1]
    if wanted is not None and math.hypot(wanted[0] - state[X], wanted[1] - state[Y]) <= RESET_M:
        begin = wanted
    nodes = np.concatenate([begin[None], to_global(plan, state[: HEADING + 1])])
    references, states = np.empty((NUM_STEPS, 3)), np.empty((NUM_STEPS, STATE_SIZE))
    _follow(np.ascontiguousarray(nodes), np.ascontiguousarray(state), references, states)
    return states, references
