"""The intelligent driver model as PDM-Closed uses it (NAVSIM ``BatchIDMPolicy``; Treiber et al. 2000, eq. 1 and 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPEED_FRACTIONS = np.array([0.2, 0.4, 0.6, 0.8, 1.0])  # of the speed limit: the five policies
FALLBACK_SPEED_LIMIT = 15.0  # m/s, where the map has none
MIN_GAP = 1.0  # m, s_0
HEADWAY = 1.5  # s, T
MAX_ACCELERATION = 1.5  # m/s^2, a
MAX_DECELERATION = 3.0  # m/s^2, b
EXPONENT = 10  # delta
STEP_S = 0.1


def target_speeds(speed_limit: float) -> NDArray[np.float64]:
    """[5] target speeds v_t [m/s] of the policies; ``speed_limit`` NaN = unknown."""
    return SPEED_FRACTIONS * (FALLBACK_SPEED_LIMIT if np.isnan(speed_limit) else speed_limit)


def step(
    progress: NDArray[np.float64], speed: NDArray[np.float64], leader: NDArray[np.float64], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One Euler step of 0.1 s: (progress s, speed v) [...] behind ``leader`` [...,3] = (s_lead, v_lead, l_rear).

    s* = s_0 + v T + v (v - v_lead) / (2 sqrt(a b)); g = max(s_lead - s - l_rear, s_0);
    dv/dt = a (1 - (v / v_t)^delta - (s* / g)^2) clipped to [-b, a]; the speed itself is not clipped.
    """
    lead_progress, lead_speed, rear_length = leader[..., 0], leader[..., 1], leader[..., 2]
    desired = (
        MIN_GAP + speed * HEADWAY + (speed * (speed - lead_speed)) / (2 * np.sqrt(MAX_ACCELERATION * MAX_DECELERATION))
    )
    gap = np.maximum(lead_progress - progress - rear_length, MIN_GAP)
    acceleration = MAX_ACCELERATION * (1 - (speed / target) ** EXPONENT - (desired / gap) ** 2)
    acceleration = np.clip(acceleration, -MAX_DECELERATION, MAX_ACCELERATION)
    return progress + STEP_S * speed, speed + STEP_S * acceleration
