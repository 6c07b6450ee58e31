"""Meta-actions: what a drive does over the next 3 s, in one word for its speed and one for its path.

    SPEED  KEEP, ACCELERATE, DECELERATE, STOP
    PATH   STRAIGHT, LEFT_TURN, RIGHT_TURN, LEFT_CHANGE, RIGHT_CHANGE

The words are AlphaDrive's (arXiv:2503.07608); their rules are ours, since its data set was never released. They read
any trajectory, driven or planned, with the road that it starts on (:class:`LaneAhead`):

    v1 = |p_n - p_(n-1)| / 0.5 s at the end of the horizon, v0 the speed now, h the change of heading, s the change of
    the signed distance to the lane's centre line
    STOP            v1 < stop_mps
    ACCELERATE      v1 - v0 > speed_change_mps;  DECELERATE  v0 - v1 > speed_change_mps;  KEEP otherwise
    *_TURN          |h| > turn_rad, at a junction (a bend of the road is no decision) or where there is no lane
    *_CHANGE        |s| > lane_change_m;  STRAIGHT otherwise
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import POSE_INTERVAL_S, to_local
from navsim_ext.maps.vector_map import VectorMap

SPEEDS = ("KEEP", "ACCELERATE", "DECELERATE", "STOP")
PATHS = ("STRAIGHT", "LEFT_TURN", "RIGHT_TURN", "LEFT_CHANGE", "RIGHT_CHANGE")
LEAST_WEIGHT = 0.8  # of the most frequent action, as AlphaDrive weighs KEEP and STRAIGHT
JUNCTION_MARGIN_M = 3.0  # a turn begins a little before the polygon of the junction
ROAD_POINT_M = 2.0  # between the points of a road's centre line


@dataclass(frozen=True)
class Decision:
    """One of the 20 pairs; ``str()`` is the text of an answer, ``KEEP, STRAIGHT``."""

    speed: str
    path: str

    def __post_init__(self) -> None:
        if self.speed not in SPEEDS or self.path not in PATHS:
            raise DataError(f"no decision: {self.speed!r}, {self.path!r}; speed is one of {SPEEDS}, path of {PATHS}")

    def __str__(self) -> str:
        return f"{self.speed}, {self.path}"

    @classmethod
    def parse(cls, text: str) -> Decision:
        """The inverse of ``str()``, for labels; raises DataError. Replies are read by ``read_decision``."""
        parts = text.split(", ")
        if len(parts) != 2:
            raise DataError(f"{text!r:.80} is no decision: 'SPEED, PATH' was expected")
        return cls(*parts)


PAIRS = tuple(str(Decision(speed, path)) for speed in SPEEDS for path in PATHS)


@dataclass(frozen=True)
class DecisionRules:
    """Thresholds; speeds in m/s, lengths in metres, angles in radians, times in seconds."""

    horizon_s: float = 3.0
    stop_mps: float = 0.5
    speed_change_mps: float = 1.2
    turn_rad: float = 0.3
    lane_change_m: float = 1.9

    def __post_init__(self) -> None:
        for name in ("horizon_s", "stop_mps", "speed_change_mps", "turn_rad", "lane_change_m"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise DataError(f"decision rule {name} is {value}; a positive number was expected")
        if abs(self.poses * POSE_INTERVAL_S - self.horizon_s) > 1e-6 or self.poses < 2:
            raise DataError(
                f"decision rule horizon_s is {self.horizon_s}: a multiple of {POSE_INTERVAL_S} s from 1 s was expected"
            )

    @property
    def poses(self) -> int:
        """Future poses that the horizon covers."""
        return round(self.horizon_s / POSE_INTERVAL_S)


@dataclass(frozen=True, eq=False)
class LaneAhead:
    """The lane ahead: ``centre`` [n,2] in the ego frame of now (metres), and which of its points lie at a junction.

    ``known``: the map has a lane there; without it ``centre`` leads straight ahead, and every turn counts as one.
    """

    centre: NDArray[np.float64]
    junction: NDArray[np.bool_]  # [n]
    known: bool

    @classmethod
    def of(cls, vector_map: VectorMap, ego: ArrayLike, path: NDArray[np.float64], known: bool) -> LaneAhead:
        """From a lane path [n,2] in global coordinates (``lane_path``) and the ego pose [3] that it starts beside."""
        line = shapely.LineString(path)
        count = max(2, int(np.ceil(line.length / ROAD_POINT_M)) + 1)
        points = shapely.line_interpolate_point(line, np.linspace(0.0, line.length, count))
        reach, junction = line.buffer(JUNCTION_MARGIN_M), np.zeros(count, dtype=bool)
        for areas in (vector_map.intersections, vector_map.roadblock_connectors):
            for k in areas.query(reach):
                junction |= shapely.distance(points, areas.polygons[k]) <= JUNCTION_MARGIN_M
        xy = shapely.get_coordinates(points)
        poses = np.concatenate([xy, np.zeros((count, 1))], axis=1)
        return cls(to_local(poses, np.asarray(ego, np.float64))[:, :2], junction, known)

    def to_json(self) -> dict[str, object]:
        """What a question record carries: centimetres are enough for thresholds of decimetres."""
        flags = "".join("1" if flag else "0" for flag in self.junction)
        return {"centre": np.round(self.centre, 2).tolist(), "junction": flags, "known": self.known}

    @classmethod
    def from_json(cls, content: object) -> LaneAhead:
        """Raises DataError when ``content`` is not what :meth:`to_json` gives."""
        try:
            centre = np.asarray(content["centre"], dtype=np.float64)
            flags, known = content["junction"], content["known"]
            junction = np.array([{"0": False, "1": True}[flag] for flag in flags], dtype=bool)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"road {content!r:.80}: {{centre, junction, known}} was expected") from error
        shaped = centre.ndim == 2 and centre.shape[1:] == (2,) and len(centre) == len(junction) >= 2
        if not shaped or not np.isfinite(centre).all() or not isinstance(known, bool):
            raise DataError(f"road of {centre.shape} points and {len(junction)} flags: [n >= 2, 2] and n were expected")
        return cls(centre, junction, known)


def decide(poses: ArrayLike, speed_mps: float, road: LaneAhead, rules: DecisionRules | None = None) -> Decision:
    """The decision of a trajectory [F,3] (x, y, heading in the ego frame of now, 0.5 s apart) that starts at a speed.

    Raises DataError for a trajectory that is shorter than the horizon or not finite.
    """
    rules = rules or DecisionRules()
    poses = np.asarray(poses, dtype=np.float64)
    if poses.ndim != 2 or poses.shape[1] != 3 or len(poses) < rules.poses:
        raise DataError(f"a trajectory of shape {poses.shape} has no decision of {rules.horizon_s} s: "
                        f"[>= {rules.poses}, 3] was expected")  # fmt: skip
    if not (np.isfinite(poses).all() and np.isfinite(speed_mps)):
        raise DataError("a trajectory or speed that is not finite has no decision")
    poses = poses[: rules.poses]
    return Decision(_speed(poses, speed_mps, rules), _path(poses, road, rules))


def _speed(poses: NDArray[np.float64], start: float, rules: DecisionRules) -> str:
    end = float(np.linalg.norm(poses[-1, :2] - poses[-2, :2])) / POSE_INTERVAL_S
    if end < rules.stop_mps:
        return "STOP"
    if end - start > rules.speed_change_mps:
        return "ACCELERATE"
    return "DECELERATE" if start - end > rules.speed_change_mps else "KEEP"


def _path(poses: NDArray[np.float64], road: LaneAhead, rules: DecisionRules) -> str:
    whole = np.concatenate([np.zeros((1, 3)), poses])
    arc, lateral = beside(road.centre, whole[:, :2])
    # Unwrapped: more than half a circle in 3 s is a turn to the side that it was driven to.
    heading = float(np.unwrap(whole[:, 2])[-1])
    if abs(heading) > rules.turn_rad and (not road.known or _at_junction(road, arc)):
        return "LEFT_TURN" if heading > 0 else "RIGHT_TURN"
    shift = float(lateral[-1] - lateral[0])
    if abs(shift) > rules.lane_change_m:
        return "LEFT_CHANGE" if shift > 0 else "RIGHT_CHANGE"
    return "STRAIGHT"


def _at_junction(road: LaneAhead, arc: NDArray[np.float64]) -> bool:
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(road.centre, axis=0), axis=1))])
    covered = (lengths >= arc.min() - ROAD_POINT_M) & (lengths <= arc.max() + ROAD_POINT_M)
    return bool(road.junction[covered].any())


def beside(path: ArrayLike, points: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(arc length of the nearest point of ``path`` [n,2], signed distance, + = left) of points [m,2]."""
    line = shapely.LineString(path)
    points = np.asarray(points, dtype=np.float64)
    arc = shapely.line_locate_point(line, shapely.points(points))
    base = shapely.get_coordinates(shapely.line_interpolate_point(line, arc))
    ahead = shapely.get_coordinates(shapely.line_interpolate_point(line, np.minimum(arc + 0.5, line.length)))
    behind = shapely.get_coordinates(shapely.line_interpolate_point(line, np.maximum(arc - 0.5, 0.0)))
    direction = ahead - behind
    offset = points - base
    side = np.sign(direction[:, 0] * offset[:, 1] - direction[:, 1] * offset[:, 0])
    return arc, side * np.linalg.norm(offset, axis=1)


def frequencies(decisions: Sequence[Decision]) -> dict[str, int]:
    """How often each of the 9 actions occurs, those that never do included with 0."""
    counts = dict.fromkeys((*SPEEDS, *PATHS), 0)
    for decision in decisions:
        counts[decision.speed] += 1
        counts[decision.path] += 1
    return counts


def action_weights(counts: Mapping[str, int], least: float = LEAST_WEIGHT) -> dict[str, float]:
    """Weight of each action: w = 1 - (1 - least) n / n_max within its axis, so the most frequent has ``least``.

    AlphaDrive's own table is a case of it by hand (KEEP and STRAIGHT 0.8, ACCELERATE 0.9, the others 1). An action
    that never occurs has weight 1. Raises DataError for a count that is missing or negative, or an axis without any.
    """
    if not 0.0 < least <= 1.0:
        raise DataError(f"least weight {least}: a number in (0, 1] was expected")
    weights = {}
    for axis in (SPEEDS, PATHS):
        wrong = [word for word in axis if not isinstance(counts.get(word), int) or counts[word] < 0]
        if wrong:
            raise DataError(f"frequencies {dict(counts)}: no count of {wrong}")
        most = max(counts[word] for word in axis)
        if most == 0:
            raise DataError(f"none of the actions {axis} ever occurs: there is nothing to weigh")
        weights |= {word: 1.0 - (1.0 - least) * counts[word] / most for word in axis}
    return weights
