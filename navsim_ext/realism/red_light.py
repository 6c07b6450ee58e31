"""Red-light violations, compiled, with the original's rule: it depends on absolute coordinates.

Shapes: ``R`` rollouts, ``E`` scored objects, ``T`` = 91 steps, ``H`` = 80 future steps, ``L`` surface-street lanes,
``K`` signals. Three faults of the original decide equality and are reproduced: the distance to a lane segment adds
the offset along the segment where it should subtract it; a lane shorter than the longest one has one more segment,
from its last point to the world's origin; and a signal that is not reported stops at the world's origin. Version
matched: waymo-open-dataset 1.6.7, ``traffic_light_features``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from navsim_ext.realism.rules import HISTORY_STEPS

ARROW_STOP, STOP = 1, 4
"""Signal states that forbid crossing; a flashing stop (7) does not."""
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@dataclass(frozen=True)
class LaneSegments:
    """Segments of the surface-street lanes, the one to the origin included: start, edge [G, 2] float32; offsets [L +
    1]."""

    start: np.ndarray
    edge: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_polylines(cls, polylines: list[np.ndarray]) -> LaneSegments:
        """``polylines``: points [., 2] float32 in world coordinates of every lane with at least two points, in file
        order."""
        longest = max((len(line) for line in polylines), default=0)
        starts, ends, offsets = [np.empty((0, 2), np.float32)], [np.empty((0, 2), np.float32)], [0]
        for line in polylines:
            padded = line if len(line) == longest else np.concatenate([line, np.zeros((1, 2), np.float32)])
            starts.append(padded[:-1])
            ends.append(padded[1:])
            offsets.append(offsets[-1] + len(padded) - 1)
        start = np.concatenate(starts)
        return cls(start, np.concatenate(ends) - start, np.array(offsets, np.int64))


@dataclass(frozen=True)
class RedLights:
    """``lane`` [K] index into the lane segments (-1: a lane of another kind, or not in the map, which never violates);
    ``state`` [K, T] WOMD's codes, 0 where not reported; ``stop`` [K, T, 2] float32 world, (0, 0) where not reported."""

    lane: np.ndarray
    state: np.ndarray
    stop: np.ndarray


@numba.njit(cache=True)
def _fraction(px, py, index, start, edge):
    """Position along one segment in units of its length; 0 for a segment of no length."""
    ex, ey = edge[index, 0], edge[index, 1]
    square = ex * ex + ey * ey
    if square > _ZERO:
        return ((px - start[index, 0]) * ex + (py - start[index, 1]) * ey) / square
    return _ZERO


@numba.njit(cache=True)
def _nearest_segment(px, py, low, high, start, edge):
    best, found = np.float32(np.inf), low
    for index in range(low, high):
        tau = min(max(_fraction(px, py, index, start, edge), _ZERO), _ONE)
        # The offset along the segment is added, as in the original.
        dx = (px - start[index, 0]) + tau * edge[index, 0]
        dy = (py - start[index, 1]) + tau * edge[index, 1]
        distance = np.sqrt(dx * dx + dy * dy)
        if distance < best:
            best, found = distance, index
    return found


@numba.njit(cache=True)
def _violations(states, valid, start, edge, offsets, lane, state, stop, history):
    rollouts, scored, steps = valid.shape
    result = np.zeros((rollouts, scored, steps - history), np.bool_)
    for k in range(lane.shape[0]):
        if lane[k] < 0:
            continue
        low, high = offsets[lane[k]], offsets[lane[k] + 1]
        segment, line = np.empty(steps, np.int64), np.empty(steps, np.float32)
        for time in range(history - 1, steps):
            segment[time] = _nearest_segment(stop[k, time, 0], stop[k, time, 1], low, high, start, edge)
            line[time] = _fraction(stop[k, time, 0], stop[k, time, 1], segment[time], start, edge)
        for rollout in range(rollouts):
            for i in range(scored):
                for time in range(history, steps):
                    if not valid[rollout, i, time] or (state[k, time] != ARROW_STOP and state[k, time] != STOP):
                        continue
                    x, y = states[rollout, i, time, 0], states[rollout, i, time, 1]
                    if not _fraction(x, y, segment[time], start, edge) > line[time]:
                        continue
                    before_x, before_y = states[rollout, i, time - 1, 0], states[rollout, i, time - 1, 1]
                    if not _fraction(before_x, before_y, segment[time - 1], start, edge) < line[time - 1]:
                        continue
                    nearest = _nearest_segment(x, y, 0, start.shape[0], start, edge)
                    if low <= nearest < high:
                        result[rollout, i, time - history] = True
    return result


def red_light_violations(
    states: np.ndarray, valid: np.ndarray, lanes: LaneSegments, signals: RedLights | None
) -> np.ndarray:
    """Which scored objects cross a red light's stop point at which step, [R, E, H] bool.

    ``states`` [R, E, T, 4], ``valid`` [R, E, T]. ``signals`` is None for a scenario without signal messages.
    """
    if signals is None or len(lanes.start) == 0:
        return np.zeros((valid.shape[0], valid.shape[1], valid.shape[2] - HISTORY_STEPS), bool)
    return _violations(
        states, valid, lanes.start, lanes.edge, lanes.offsets, signals.lane, signals.state, signals.stop, HISTORY_STEPS
    )
