"""NAVSIM's simulator: an LQR tracker on a kinematic bicycle, from reference poses to simulated states.

Legend: P proposals, 41 steps of 0.1 s, state vector [11] of :mod:`navsim_ext.pdm.ego`.
Source: NAVSIM ``batch_lqr.py`` and ``batch_kinematic_bicycle.py``; identical in v1.1 and v2.2.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import (
    AX,
    HEADING,
    NUM_STEPS,
    STATE_SIZE,
    STEERING,
    STEERING_RATE,
    STEP_S,
    VX,
    WHEEL_BASE,
    YAW_ACCELERATION,
    YAW_RATE,
    X,
    Y,
    principal,
    wrap,
)
from navsim_ext.pdm.profiles import NUM_DISPLACEMENTS, fit_curvature, fit_velocity

HORIZON = 10  # steps that the LQR looks ahead
LONGITUDINAL_GAIN = 10.0 / 11.0  # q N dt / (q (N dt)^2 + r) with q = 10, r = 1, N dt = 1 s
HEADING_WEIGHT = 10.0  # Q = diag(1, 10, 0) on lateral error, heading error, steering
STOPPING_SPEED = 0.2  # m/s
STOPPING_GAIN = 0.5
ACCELERATION_TIME_CONSTANT = 0.2  # s
STEERING_TIME_CONSTANT = 0.05  # s
MAX_STEERING = math.pi / 3.0  # rad


@kernel
def track(reference, state, v_reference, curvatures, step):
    """Commands (acceleration [m/s^2], steering rate [rad/s]) at ``step``.

    Lateral error e = -dx sin h_r + dy cos h_r, heading error h, steering d. Over the horizon, at speed v_i and
    reference curvature k_i, with the steering rate u held: e += dt v_i h; h += dt v_i (d / L - k_i); d += dt u.
    u = -(B^T Q x_N) / (B^T Q B + 1), x_N the end without input and B its derivative with respect to u.
    """
    v = state[VX]
    if v_reference <= STOPPING_SPEED and v <= STOPPING_SPEED:
        return -STOPPING_GAIN * (v - v_reference), 0.0
    acceleration = -LONGITUDINAL_GAIN * (v - v_reference)

    dx, dy = state[X] - reference[X], state[Y] - reference[Y]
    e = -dx * math.sin(reference[HEADING]) + dy * math.cos(reference[HEADING])
    h = wrap(state[HEADING] - reference[HEADING])
    d = state[STEERING]
    b_e, b_h, b_d = 0.0, 0.0, 0.0
    last = min(step + HORIZON, NUM_DISPLACEMENTS - 1)
    for i in range(HORIZON):
        travelled = (v + acceleration * STEP_S * i) * STEP_S
        curvature = curvatures[min(step + i, last)]
        e += travelled * h
        h += travelled * (d / WHEEL_BASE - curvature)
        b_e += travelled * b_h
        b_h += travelled / WHEEL_BASE * b_d
        b_d += STEP_S
    h = wrap(h)
    steering_rate = -(b_e * e + HEADING_WEIGHT * b_h * h) / (b_e * b_e + HEADING_WEIGHT * b_h * b_h + 1.0)
    return acceleration, steering_rate


@kernel
def propagate(state, acceleration_command, steering_rate_command, successor) -> None:
    """One Euler step of the kinematic bicycle with first-order lags on acceleration and steering."""
    dt = STEP_S
    acceleration = dt / (dt + ACCELERATION_TIME_CONSTANT) * (acceleration_command - state[AX]) + state[AX]
    ideal = dt * steering_rate_command + state[STEERING]
    updated = dt / (dt + STEERING_TIME_CONSTANT) * (ideal - state[STEERING]) + state[STEERING]
    steering_rate = (updated - state[STEERING]) / dt

    v, heading = state[VX], state[HEADING]
    successor[X] = state[X] + v * math.cos(heading) * dt
    successor[Y] = state[Y] + v * math.sin(heading) * dt
    successor[HEADING] = principal(heading + v * math.tan(state[STEERING]) / WHEEL_BASE * dt)
    successor[VX] = v + acceleration * dt
    successor[4] = 0.0
    successor[AX] = acceleration
    successor[6] = 0.0
    successor[STEERING] = min(max(state[STEERING] + steering_rate * dt, -MAX_STEERING), MAX_STEERING)
    successor[STEERING_RATE] = steering_rate
    successor[YAW_RATE] = successor[VX] * math.tan(successor[STEERING]) / WHEEL_BASE
    successor[YAW_ACCELERATION] = (successor[YAW_RATE] - state[YAW_RATE]) / dt


@kernel
def simulate_reference(references, ego_state, states) -> None:
    """``references`` [41,3] and the initial state [11] -> ``states`` [41,11]; only the references' poses matter."""
    velocities = np.empty(NUM_DISPLACEMENTS)
    curvatures = np.empty(NUM_DISPLACEMENTS)
    fit_velocity(references, velocities)
    fit_curvature(references, velocities, curvatures)
    for k in range(STATE_SIZE):
        states[0, k] = ego_state[k]
    for step in range(NUM_STEPS - 1):
        v_reference = velocities[min(step + HORIZON, NUM_DISPLACEMENTS - 1)]
        acceleration, steering_rate = track(references[step], states[step], v_reference, curvatures, step)
        propagate(states[step], acceleration, steering_rate, states[step + 1])


@kernel
def _simulate_all(references, ego_state, states) -> None:
    for p in range(len(references)):
        simulate_reference(references[p], ego_state, states[p])


def simulate(references: NDArray[np.float64], ego_state: NDArray[np.float64]) -> Float64[np.ndarray, "P 41 11"]:
    """Simulates proposals: references [P,41,3] (global x, y, heading) from ``ego_state`` [11] -> states [P,41,11].

    Raises DataError when a shape is wrong. Proposals do not influence each other.
    """
    references = np.ascontiguousarray(references, dtype=np.float64)
    ego_state = np.ascontiguousarray(ego_state, dtype=np.float64)
    if references.ndim != 3 or references.shape[1:] != (NUM_STEPS, 3):
        raise DataError(f"references have shape {references.shape}, [P,{NUM_STEPS},3] was expected")
    if ego_state.shape != (STATE_SIZE,):
        raise DataError(f"the ego state has shape {ego_state.shape}, [{STATE_SIZE}] was expected")
    states = np.empty((len(references), NUM_STEPS, STATE_SIZE))
    _simulate_all(references, ego_state, states)
    return states
