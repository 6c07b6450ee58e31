"""Comfort: v1's on the simulated states, v2's on past and simulated states, and the two-frame comparison.

Legend: N samples 0.1 s apart. Source: NAVSIM ``pdm_comfort_metrics.py``; filters are scipy's ``savgol_filter`` (mode
"interp"), as linear operators computed once. Filtered values are rounded to 8 decimals as there.

| signal                     | filter v1 (N = 41)          | filter v2 (N = 55 or 56)     | bound                 |
|----------------------------|-----------------------------|------------------------------|-----------------------|
| longitudinal acceleration  | window 41                   | window 8, at the box centre  | -4.05 ... 2.40 m/s^2  |
| lateral acceleration       | window 41                   | window 8                     | +-4.89 m/s^2          |
| jerk of hypot(ax, ay)      | window 8, derivative 41     | window 8, derivative 15      | +-8.37 m/s^3          |
| jerk of ax                 | window 8, derivative 41     | window 8, derivative 15      | +-4.13 m/s^3          |
| yaw acceleration           | 2nd derivative 5, cubic     | the same                     | +-1.93 rad/s^2        |
| yaw rate                   | 1st derivative 5, quadratic | the same                     | +-0.95 rad/s          |
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.signal import savgol_filter

from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import AX, AY, HEADING, NUM_STEPS, REAR_AXLE_TO_CENTER, STEP_S, YAW_ACCELERATION, YAW_RATE

MIN_LON_ACCELERATION, MAX_LON_ACCELERATION = -4.05, 2.40  # m/s^2
MAX_LAT_ACCELERATION = 4.89  # m/s^2
MAX_JERK, MAX_LON_JERK = 8.37, 4.13  # m/s^3
MAX_YAW_ACCELERATION = 1.93  # rad/s^2
MAX_YAW_RATE = 0.95  # rad/s

# two-frame comfort: bounds on root mean squares of differences
RMS_ACCELERATION, RMS_JERK, RMS_YAW_RATE, RMS_YAW_ACCELERATION = 0.7, 0.5, 0.1, 0.1


class Filter(NamedTuple):
    """y_i = sum_k weights[i,k] x[start_i + k]: a Savitzky-Golay filter on N samples."""

    start: NDArray[np.int64]  # [N]
    weights: NDArray[np.float64]  # [N,W]


class ComfortFilters(NamedTuple):
    """The filters of one signal length and version."""

    acceleration: Filter
    jerk_input: Filter
    jerk: Filter
    yaw_rate: Filter
    yaw_acceleration: Filter


def savgol(samples: int, window: int, order: int, derivative: int) -> Filter:
    """scipy's filter as an operator, windows of all its rows aligned to a common width."""
    times = np.arange(samples).astype(np.float64) * STEP_S
    delta = np.diff(times).mean()
    matrix = savgol_filter(np.eye(samples), min(window, samples), order, deriv=derivative, delta=delta, axis=0)
    used = [np.flatnonzero(row) for row in matrix]
    width = max(int(row[-1] - row[0]) + 1 for row in used)
    start = np.array([min(int(row[0]), samples - width) for row in used], dtype=np.int64)
    return Filter(start, np.stack([row[first : first + width] for row, first in zip(matrix, start)]))


@functools.cache
def comfort_filters(version: str, samples: int) -> ComfortFilters:
    """Filters of ``version`` "v1", "v2" or "two_frame" for a number of samples."""
    long = samples if version == "v1" else 15
    return ComfortFilters(
        acceleration=savgol(samples, samples if version == "v1" else 8, 2, 0),
        jerk_input=savgol(samples, 8, 2, 0),
        jerk=savgol(samples, long, 2, 1),
        yaw_rate=savgol(samples, 5, 2, 1),
        yaw_acceleration=savgol(samples, 5, 2 if version == "two_frame" else 3, 2),
    )


@kernel
def _apply(operator, values, result) -> None:
    """Filters ``values`` [N] into ``result`` [N], rounded to 8 decimals."""
    width = operator.weights.shape[1]
    for i in range(len(operator.start)):
        first = operator.start[i]
        total = 0.0
        for k in range(width):
            total += operator.weights[i, k] * values[first + k]
        result[i] = np.rint(total * 1e8) / 1e8


@kernel
def _within(values, low: float, high: float) -> bool:
    for value in values:
        if not low < value < high:
            return False
    return True


@kernel
def _unwrap(headings, unwrapped) -> None:
    """Adds multiples of 2 pi so that neighbours differ by at most pi."""
    turns = 0.0
    unwrapped[0] = headings[0]
    for i in range(1, len(headings)):
        turns += np.rint((headings[i] - headings[i - 1]) / (2.0 * math.pi))
        unwrapped[i] = headings[i] - 2.0 * math.pi * turns


@kernel
def is_comfortable(filters, headings, ax, ay, lon_acceleration, checks) -> bool:
    """All six bounds over headings, rear-axle ax, ay and the longitudinal acceleration to be bounded, [N] each.

    ``checks`` [6] receives lon acceleration, lat acceleration, jerk, lon jerk, yaw acceleration, yaw rate.
    """
    count = len(headings)
    raw, filtered, result = np.empty(count), np.empty(count), np.empty(count)
    _apply(filters.acceleration, lon_acceleration, result)
    checks[0] = _within(result, MIN_LON_ACCELERATION, MAX_LON_ACCELERATION)
    _apply(filters.acceleration, ay, result)
    checks[1] = _within(result, -MAX_LAT_ACCELERATION, MAX_LAT_ACCELERATION)
    for i in range(count):
        raw[i] = math.hypot(ax[i], ay[i])
    _apply(filters.jerk_input, raw, filtered)
    _apply(filters.jerk, filtered, result)
    checks[2] = _within(result, -MAX_JERK, MAX_JERK)
    _apply(filters.jerk_input, lon_acceleration, filtered)
    _apply(filters.jerk, filtered, result)
    checks[3] = _within(result, -MAX_LON_JERK, MAX_LON_JERK)
    _unwrap(headings, raw)
    _apply(filters.yaw_acceleration, raw, result)
    checks[4] = _within(result, -MAX_YAW_ACCELERATION, MAX_YAW_ACCELERATION)
    _apply(filters.yaw_rate, raw, result)
    checks[5] = _within(result, -MAX_YAW_RATE, MAX_YAW_RATE)
    return checks[0] and checks[1] and checks[2] and checks[3] and checks[4] and checks[5]


@kernel
def comfort_v1(filters, states, checks) -> float:
    """1 when the 41 simulated states [41,11] are comfortable, else 0."""
    headings, ax, ay = states[:, HEADING].copy(), states[:, AX].copy(), states[:, AY].copy()
    return 1.0 if is_comfortable(filters, headings, ax, ay, ax, checks) else 0.0


@kernel
def comfort_v2(filters, past, states, checks) -> float:
    """1 when past rows [H,3] (heading, ax, ay) and simulated states [41,11] together are comfortable, else 0.

    Without past rows NAVSIM does not look: 1. The longitudinal acceleration is that of the box centre,
    ax + l (w^2 + w'), l the lever from rear axle to centre (nuPlan's formula; yaw rates of the past are 0).
    """
    history = len(past)
    if history == 0:
        checks[:] = True
        return 1.0
    count = history + NUM_STEPS
    headings, ax, ay, at_center = np.empty(count), np.empty(count), np.empty(count), np.empty(count)
    for i in range(history):
        headings[i], ax[i], ay[i], at_center[i] = past[i, 0], past[i, 1], past[i, 2], past[i, 1]
    for t in range(NUM_STEPS):
        i = history + t
        headings[i], ax[i], ay[i] = states[t, HEADING], states[t, AX], states[t, AY]
        rate = states[t, YAW_RATE]
        at_center[i] = ax[i] + REAR_AXLE_TO_CENTER * (rate * rate) + REAR_AXLE_TO_CENTER * states[t, YAW_ACCELERATION]
    return 1.0 if is_comfortable(filters, headings, ax, ay, at_center, checks) else 0.0


@kernel
def _difference_rms(operator, ours, theirs) -> float:
    """Root mean square of the difference of two filtered signals [N]."""
    count = len(ours)
    a, b = np.empty(count), np.empty(count)
    _apply(operator, ours, a)
    _apply(operator, theirs, b)
    total = 0.0
    for i in range(count):
        total += (a[i] - b[i]) * (a[i] - b[i])
    return math.sqrt(total / count)


@kernel
def two_frame_comfort(filters, states, previous) -> float:
    """1 when two overlapping stretches of simulated states [N,11] agree in acceleration, jerk and yaw, else 0."""
    count = len(states)
    ours, theirs = np.empty(count), np.empty(count)
    for i in range(count):
        ours[i] = math.hypot(states[i, AX], states[i, AY])
        theirs[i] = math.hypot(previous[i, AX], previous[i, AY])
    smooth_ours, smooth_theirs = np.empty(count), np.empty(count)
    _apply(filters.acceleration, ours, smooth_ours)
    _apply(filters.acceleration, theirs, smooth_theirs)
    total = 0.0
    for i in range(count):
        total += (smooth_ours[i] - smooth_theirs[i]) * (smooth_ours[i] - smooth_theirs[i])
    good = math.sqrt(total / count) <= RMS_ACCELERATION
    good = good and _difference_rms(filters.jerk, smooth_ours, smooth_theirs) <= RMS_JERK
    _unwrap(states[:, HEADING], ours)
    _unwrap(previous[:, HEADING], theirs)
    good = good and _difference_rms(filters.yaw_rate, ours, theirs) <= RMS_YAW_RATE
    good = good and _difference_rms(filters.yaw_acceleration, ours, theirs) <= RMS_YAW_ACCELERATION
    return 1.0 if good else 0.0
