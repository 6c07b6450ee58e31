"""The rater feedback score of WOD-E2E: how well predicted trajectories agree with trajectories that people rated.

Legend: I predictions of a frame, P rated trajectories (3 after padding), H = 20 points at 4 Hz (t = 0.25 ... 5 s).
Frame of all points: the ego at t = 0, x forward, y left, metres. Version matched: the function that the data set's
authors published.

At t = 3 s and t = 5 s a prediction is D away from a rated trajectory, in units of a threshold that grows with the
speed v_0:
    D = max(d_lon / (s theta_lon), d_lat / (s theta_lat)),  s = clip(0.5 + 0.5 (v_0 - 1.4) / (11 - 1.4), 0.5, 1)
    score = rating * 0.1^max(D - 1, 0), the best over the rated trajectories, averaged over the two times;
    a prediction that no rated trajectory has within D <= 1 at both times scores at least 4.
The frame's score is the mean over predictions, weighted by their probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError

POINTS = 20
RATED = 3
FREQUENCY_HZ = 4
JUDGED_S = (3.0, 5.0)
LATERAL_M = (1.0, 1.8)
LONGITUDINAL_M = (4.0, 7.2)
SLOW_M_S, FAST_M_S = 1.4, 11.0
DECAY = 0.1
FLOOR = 4.0
HIGHEST_RATING = 10.0
_JUDGED = np.array([round(time * FREQUENCY_HZ) - 1 for time in JUDGED_S])


@dataclass(frozen=True)
class RaterFeedback:
    """``score`` of the frame, and which predictions [I] lie within the thresholds of a rated trajectory at both
    times."""

    score: float
    within: NDArray[np.bool_]


def rater_feedback(
    predictions: NDArray[np.floating],
    probabilities: NDArray[np.floating],
    rated: Sequence[NDArray[np.floating]],
    ratings: NDArray[np.floating],
    speed: float,
) -> RaterFeedback:
    """Scores one frame: ``predictions`` [I, 20, 2] with ``probabilities`` [I] that add up to 1, ``rated`` P
    trajectories [., 2] with ``ratings`` [P] (0 to 10), ``speed`` at t = 0 in m/s.

    Rated trajectories are cut or padded (last point repeated) to 20 points and to three (the first three; the last
    repeated). Raises DataError, saying what is wrong, for shapes, values that are not finite, probabilities or
    ratings out of range.
    """
    predictions = np.asarray(predictions, np.float64)
    probabilities = np.asarray(probabilities, np.float64)
    _check(predictions, probabilities, rated, np.asarray(ratings, np.float64), speed)
    paths = np.stack([padded(np.asarray(path, np.float64)) for path in _three(rated)])
    marks = np.asarray(_three(list(np.asarray(ratings, np.float64))))
    lon = _directions(paths)[:, _JUDGED]  # [3, 2, 2]
    lat = np.stack([-lon[..., 1], lon[..., 0]], axis=-1)
    apart = predictions[:, None, _JUDGED] - paths[None, :, _JUDGED]  # [I, 3, 2, 2]
    scale = np.clip(0.5 + 0.5 * (speed - SLOW_M_S) / (FAST_M_S - SLOW_M_S), 0.5, 1.0)
    along = np.abs((apart * lon).sum(-1)) / (np.array(LONGITUDINAL_M) * scale)
    across = np.abs((apart * lat).sum(-1)) / (np.array(LATERAL_M) * scale)
    distance = np.maximum(along, across)  # [I, 3, 2]
    score = (marks[:, None] * DECAY ** np.maximum(distance - 1.0, 0.0)).max(axis=1).mean(axis=-1)
    within = (distance <= 1.0).all(axis=-1).any(axis=-1)
    score = np.where(within, score, np.maximum(score, FLOOR))
    return RaterFeedback(float((probabilities * score).sum()), within)


def _three(items: Sequence) -> list:
    return [*items[:RATED], *[items[-1]] * (RATED - len(items))]


def padded(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """[20,2] of a rated trajectory [.,2]: cut, or its last point repeated."""
    return np.concatenate([path[:POINTS], np.repeat(path[-1:], max(POINTS - len(path), 0), axis=0)])


def _directions(paths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit direction [..., 20, 2] of the step to each point from the one before (from the origin to the first).

    Where a step has no length the direction of the point before stays; at the first point it is (1, 0).
    """
    steps = np.diff(paths, axis=-2, prepend=np.zeros_like(paths[..., :1, :]))
    lengths = np.linalg.norm(steps, axis=-1)
    moves = lengths > 0
    last = np.maximum.accumulate(np.where(moves, np.arange(POINTS), -1), axis=-1)
    unit = steps / np.where(moves, lengths, 1.0)[..., None]
    held = np.take_along_axis(unit, np.maximum(last, 0)[..., None], axis=-2)
    return np.where((last >= 0)[..., None], held, np.array([1.0, 0.0]))


def _check(
    predictions: NDArray, probabilities: NDArray, rated: Sequence[NDArray], ratings: NDArray, speed: float
) -> None:
    if predictions.ndim != 3 or predictions.shape[1:] != (POINTS, 2) or probabilities.shape != predictions.shape[:1]:
        raise DataError(
            f"predictions {predictions.shape} with probabilities {probabilities.shape}: [I, {POINTS}, 2] and [I] needed"
        )
    if not np.isfinite(predictions).all() or not np.isfinite(speed) or speed < 0:
        raise DataError(f"a prediction is not finite, or the speed {speed} is no speed")
    if not (probabilities >= 0).all() or abs(probabilities.sum() - 1.0) > 1e-3:
        total = probabilities.sum()
        raise DataError(f"probabilities {probabilities.tolist()} are no distribution: they add up to {total:g}")
    if len(rated) == 0 or len(rated) != len(ratings):
        raise DataError(f"{len(rated)} rated trajectories with {len(ratings)} ratings: one rating each, at least one")
    if not ((ratings >= 0) & (ratings <= HIGHEST_RATING)).all():
        raise DataError(f"ratings {ratings.tolist()}: 0 to {HIGHEST_RATING:g} expected (-1 marks a frame without one)")
    for place, path in enumerate(rated):
        path = np.asarray(path)
        if path.ndim != 2 or path.shape[1] != 2 or len(path) == 0 or not np.isfinite(path).all():
            raise DataError(f"rated trajectory {place} of shape {path.shape}: finite points [., 2] are needed")
