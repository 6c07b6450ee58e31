"""What follows from recorded poses: unwrapped headings, velocities and speeds. Nothing is filled in across gaps.

Legend: N road users, T steps, valid [N,T] where a pose was observed. Compiled: a stored scene derives all of this again
whenever it is loaded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pdm.compiled import kernel

TURN = 2.0 * np.pi


def unwrap_headings(heading: NDArray[np.floating], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[N,T] headings that change by at most pi from one observation of a track to its next, also across gaps.

    Whole turns are added: h'[t] = h[t] + 2 pi k[t], k chosen so that |h'[t] - h'[t-]| <= pi for the observation t-
    before t. The first observation keeps its value, and so does every track that needs no turn, bit by bit.
    """
    return _unwrap(np.ascontiguousarray(heading, np.float32), np.ascontiguousarray(valid, np.bool_))


def velocities(xy: NDArray[np.floating], valid: NDArray[np.bool_], dt: float) -> NDArray[np.float32]:
    """[N,T,2] m/s from positions [N,T,2]: (p[t+1] - p[t-1]) / (2 dt) where both neighbours were observed, the one-sided
    difference at the ends of an observed stretch, 0 where :func:`speed_known` is False.
    """
    return _differences(np.asarray(xy, np.float32), np.asarray(valid, np.bool_), np.float32(dt))


def speeds(xy: NDArray[np.floating], valid: NDArray[np.bool_], dt: float) -> NDArray[np.float32]:
    """[N,T] length of :func:`velocities`, m/s."""
    velocity = velocities(xy, valid, dt)
    return np.sqrt(velocity[..., 0] ** 2 + velocity[..., 1] ** 2)


def speed_known(valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N,T] whether a neighbouring step was observed too, so that positions tell a speed."""
    known = np.zeros_like(valid)
    both = valid[:, 1:] & valid[:, :-1]
    known[:, 1:] |= both
    known[:, :-1] |= both
    return known


@kernel
def _unwrap(heading, valid):
    out = heading.copy()
    for n in range(heading.shape[0]):
        turns, before, seen = 0.0, np.float64(0.0), False
        for t in range(heading.shape[1]):
            if not valid[n, t]:
                continue
            now = np.float64(heading[n, t])
            if seen and abs(now - before) > np.pi:
                turns -= np.rint((now - before) / TURN)
            if turns != 0.0:
                out[n, t] = np.float32(now + TURN * turns)
            before, seen = now, True
    return out


@kernel
def _differences(xy, valid, dt):
    count, steps = valid.shape
    out = np.zeros((count, steps, 2), np.float32)
    for n in range(count):
        for t in range(steps):
            if not valid[n, t]:
                continue
            before = t - 1 if t > 0 and valid[n, t - 1] else t
            after = t + 1 if t + 1 < steps and valid[n, t + 1] else t
            if after > before:
                span = np.float32(after - before) * dt
                out[n, t, 0] = (xy[n, after, 0] - xy[n, before, 0]) / span
                out[n, t, 1] = (xy[n, after, 1] - xy[n, before, 1]) / span
    return out


def still(xy: NDArray[np.floating], valid: NDArray[np.bool_], within_m: float = 0.5) -> NDArray[np.bool_]:
    """[N] whether all observed positions [N,T,2] of a track lie within a square of this side: it never moves."""
    low = np.where(valid[..., None], xy, np.inf).min(axis=1)
    high = np.where(valid[..., None], xy, -np.inf).max(axis=1)
    return (high - low <= within_m).all(axis=1)


def nearest_observed(valid: NDArray[np.bool_], now: int) -> NDArray[np.int64]:
    """[N] the observed step nearest to ``now`` of each track, the earlier one on ties."""
    distance = np.abs(np.arange(valid.shape[1]) - now) * 2 + (np.arange(valid.shape[1]) > now)
    return np.where(valid, distance, np.iinfo(np.int64).max).argmin(axis=1)
