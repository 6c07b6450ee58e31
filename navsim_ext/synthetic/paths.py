"""Paths through a town: what one road user follows, as poses every 0.5 m with a comfortable speed at each.

A path is the concatenation of lane and connector baselines along a route; a lane change is part of the shape.
Positions along a path refer to the rear axle of a vehicle (the centre of a pedestrian).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.synthetic import roads
from navsim_ext.synthetic.town import LANE_WIDTH, Lane, Town

SPACING = 0.5  # m between the poses of a path
COMFORT_BRAKING = 1.5  # m/s^2 with which a driver slows for a bend ahead


@dataclass(frozen=True)
class Crossing:
    """One junction on a path: where its connector starts and ends."""

    connector: int
    start: float  # m along the path
    end: float


@dataclass(frozen=True)
class Path:
    xy: NDArray[np.float64]  # [n,2] every SPACING metres
    heading: NDArray[np.float64]  # [n] unwrapped
    curvature: NDArray[np.float64]  # [n] 1/m
    speed: NDArray[np.float64]  # [n] m/s that limit and bends allow
    crossings: tuple[Crossing, ...]
    lanes: tuple[tuple[int, float], ...]  # (lane, where it starts along the path), in driving order

    @property
    def length(self) -> float:
        return SPACING * (len(self.xy) - 1)


@dataclass(frozen=True)
class LaneChange:
    """Move to the neighbouring lane (+1 left, -1 right) over ``length`` metres from ``start`` of the current lane."""

    start: float
    length: float
    side: int


def follow(
    town: Town,
    lane: int,
    turns: list[int],
    *,
    lateral_acceleration: float = 2.2,
    lateral_offset: float = 0.0,
    inset: float = 0.0,
    change: LaneChange | None = None,
) -> Path:
    """Path from the start of ``lane`` through the connectors ``turns`` to the end of the last lane.

    ``change`` is a lane change on the first lane: ``turns`` continue from the lane it ends on. ``lateral_offset``
    [m, left positive] keeps the whole path beside the centre line (cyclists). ``inset`` [m^2] moves the rear axle by
    inset * curvature to the inside of a bend, so that a long car swings out less. ``lateral_acceleration`` [m/s^2]
    limits the speed in bends.
    """
    pieces: list[roads.Line] = []
    limits: list[NDArray[np.float64]] = []
    marks: list[tuple[str, int, float]] = []
    at = 0.0

    def add(kind: str, index: int, line: roads.Line, speed: float) -> None:
        nonlocal at
        marks.append((kind, index, at))
        pieces.append(line if not pieces else line[1:])
        limits.append(np.full(len(pieces[-1]), speed))
        at += float(roads.arc_lengths(line)[-1])

    first = town.lanes[lane]
    line = first.baseline
    if change is not None:
        line, lane = _changed(town, first, change)
        marks_change = (change.start + 0.5 * change.length, lane)
    add("lane", first.index, line, first.speed)
    for turn in turns:
        connector = town.connectors[turn]
        if connector.from_lane != lane:
            raise ValueError(f"connector {turn} leaves lane {connector.from_lane}, the route is on lane {lane}")
        lane = connector.to_lane
        add("connector", turn, connector.baseline, connector.speed)
        add("lane", lane, town.lanes[lane].baseline, town.lanes[lane].speed)
    xy = np.concatenate(pieces)
    if lateral_offset:
        xy = roads.offset(xy, lateral_offset)
    distance = roads.arc_lengths(xy)
    samples = np.arange(0.0, distance[-1], SPACING)
    scale = distance[-1] / at  # an offset path is a little longer or shorter than the centre line
    sampled = np.column_stack([np.interp(samples, distance, xy[:, 0]), np.interp(samples, distance, xy[:, 1])])
    heading = roads.headings(sampled)
    if inset:
        sampled = roads.offset(sampled, inset * _smooth(np.gradient(heading, SPACING), 9))
        heading = roads.headings(sampled)
    curvature = _smooth(np.gradient(heading, SPACING), 5)
    limit = np.concatenate(limits)[np.minimum(np.searchsorted(distance, samples), len(distance) - 1)]
    crossings = tuple(
        Crossing(index, start * scale, marks[k + 1][2] * scale)
        for k, (kind, index, start) in enumerate(marks)
        if kind == "connector"
    )
    lanes = [(index, start * scale) for kind, index, start in marks if kind == "lane"]
    if change is not None:
        lanes.insert(1, (marks_change[1], marks_change[0]))
    speed = comfortable_speed(limit, curvature, lateral_acceleration)
    return Path(sampled, heading, curvature, speed, crossings, tuple(lanes))


def straight(start: NDArray, end: NDArray, speed: float) -> Path:
    """A straight walk."""
    length = float(np.hypot(*(end - start)))
    samples = np.arange(0.0, length + SPACING, SPACING)
    heading = float(np.arctan2(*(end - start)[::-1]))
    xy = start + samples[:, None] * roads.unit(heading)
    return polyline(xy, speed)


def polyline(xy: NDArray, speed: float) -> Path:
    """A walk along given points, already SPACING metres apart."""
    heading = roads.headings(xy)
    return Path(xy, heading, np.gradient(heading, SPACING), np.full(len(xy), speed), (), ())


def comfortable_speed(limit: NDArray, curvature: NDArray, lateral_acceleration: float) -> NDArray[np.float64]:
    """[n] v(s) = min(limit, sqrt(a_lat/|kappa|)), lowered so that braking with COMFORT_BRAKING reaches every bend."""
    allowed = np.minimum(limit, np.sqrt(lateral_acceleration / np.maximum(np.abs(curvature), 1e-4)))
    squared = allowed**2 + 2.0 * COMFORT_BRAKING * SPACING * np.arange(len(allowed))
    reachable = np.minimum.accumulate(squared[::-1])[::-1] - 2.0 * COMFORT_BRAKING * SPACING * np.arange(len(allowed))
    return np.sqrt(reachable)


def _smooth(values: NDArray, width: int) -> NDArray[np.float64]:
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.full(width, 1.0 / width), mode="valid")


def _changed(town: Town, lane: Lane, change: LaneChange) -> tuple[roads.Line, int]:
    """Baseline of ``lane`` that moves over to its neighbour; lateral shift y(u) = w (10u^3 - 15u^4 + 6u^5)."""
    target = town.lane_at(lane.group, lane.lane_index - change.side)
    if target is None:
        raise ValueError(f"lane {lane.index} has no neighbour on side {change.side:+d}")
    u = np.clip((roads.arc_lengths(lane.baseline) - change.start) / change.length, 0.0, 1.0)
    shift = change.side * LANE_WIDTH * (10 * u**3 - 15 * u**4 + 6 * u**5)
    return roads.offset(lane.baseline, shift), target.index


def random_route(town: Town, random: np.random.Generator, lane: int, length: float) -> list[int]:
    """Connectors of a random drive of at least ``length`` metres beyond the first lane; straight on is likelier."""
    turns: list[int] = []
    total = 0.0
    while total < length:
        options = town.successors[lane]
        weights = np.array([2.0 if town.connectors[o].turn == "straight" else 1.0 for o in options])
        chosen = int(random.choice(np.array(options), p=weights / weights.sum()))
        turns.append(chosen)
        lane = town.connectors[chosen].to_lane
        total += float(roads.arc_lengths(town.lanes[lane].baseline)[-1])
    return turns
