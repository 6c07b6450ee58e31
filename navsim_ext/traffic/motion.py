"""What follows from recorded poses: unwrapped headings, velocities and speeds. Nothing is filled in across gaps.

Legend: N road users, T steps, valid [N,T] where a pose was observed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TURN = 2.0 * np.pi


def unwrap_headings(heading: NDArray[np.floating], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[N,T] headings that change by at most pi from one observation of a track to its next, also across gaps.

    Whole turns are added: h'[t] = h[t] + 2 pi k[t], k chosen so that |h'[t] - h'[t-]| <= pi for the observation t-
    before t. The first observation keeps its value, and so does every track that needs no turn, bit by bit.
    """
    heading = np.asarray(heading, np.float32)
    steps = heading.shape[1]
    at = np.where(valid, np.arange(steps), 0)
    before = np.maximum.accumulate(at, axis=1)
    previous = np.concatenate([before[:, :1], before[:, :-1]], axis=1)  # last observation before t, or 0
    jump = heading.astype(np.float64) - np.take_along_axis(heading, previous, axis=1)
    seen_before = np.logical_or.accumulate(valid, axis=1)
    follows = valid & np.concatenate([np.zeros_like(valid[:, :1]), seen_before[:, :-1]], axis=1)
    turns = np.where(follows & (np.abs(jump) > np.pi), -np.rint(jump / TURN), 0.0)
    total = np.cumsum(turns, axis=1)
    return np.where(valid & (total != 0.0), heading + TURN * total, heading).astype(np.float32)


def velocities(xy: NDArray[np.floating], valid: NDArray[np.bool_], dt: float) -> NDArray[np.float32]:
    """[N,T,2] m/s from positions [N,T,2]: (p[t+1] - p[t-1]) / (2 dt) where both neighbours were observed, the one-sided
    difference at the ends of an observed stretch, 0 where :func:`speed_known` is False.
    """
    xy = np.asarray(xy, np.float32)
    before, after = _neighbours(valid)
    earlier = np.concatenate([xy[:, :1], xy[:, :-1]], axis=1)
    later = np.concatenate([xy[:, 1:], xy[:, -1:]], axis=1)
    earlier = np.where(before[..., None], earlier, xy)
    later = np.where(after[..., None], later, xy)
    span = (before.astype(np.float32) + after) * np.float32(dt)
    return (later - earlier) / np.where(span > 0.0, span, np.float32(1.0))[..., None]


def speeds(xy: NDArray[np.floating], valid: NDArray[np.bool_], dt: float) -> NDArray[np.float32]:
    """[N,T] length of :func:`velocities`, m/s."""
    velocity = velocities(xy, valid, dt)
    return np.sqrt(velocity[..., 0] ** 2 + velocity[..., 1] ** 2)


def speed_known(valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[N,T] whether a neighbouring step was observed too, so that positions tell a speed."""
    before, after = _neighbours(valid)
    return before | after


def _neighbours(valid: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(observed at t-1 and t, observed at t and t+1)."""
    both = valid[:, 1:] & valid[:, :-1]
    nothing = np.zeros_like(valid[:, :1])
    return np.concatenate([nothing, both], axis=1), np.concatenate([both, nothing], axis=1)
