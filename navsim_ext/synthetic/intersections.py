"""Junctions: which lane leads where, the shape of every connector, who conflicts with whom and who gives way.

Legend: arms are numbered counter-clockwise by the angle at which they leave the node. A connector is the path of
one incoming lane to one outgoing lane. Distances along connectors in metres from the stop line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from navsim_ext.synthetic import roads

if TYPE_CHECKING:
    from navsim_ext.synthetic.town import Lane, Road

TURNS = ("straight", "right", "left")
CONFLICT_DISTANCE = 2.7  # m between two centre lines: narrower than that, two cars cannot pass
TURN_LATERAL_ACCELERATION = 3.2  # m/s^2 at the posted speed of a turn
RING_RADIUS = 15.0  # m, centre line of a roundabout's ring
ISLAND_RADIUS = 11.0  # m


@dataclass
class Node:
    """A junction. ``arms`` (road, does the road's centre line start here) is filled while roads are laid."""

    index: int
    cell: tuple[int, int]
    position: NDArray[np.float64]
    tilt: float
    kind: str  # "signal", "give_way" or "roundabout"
    reach: float  # m from the node to its stop lines
    arterial_row: bool
    arterial_column: bool
    arms: list[tuple[int, bool]] = field(default_factory=list)
    arm_angles: list[float] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)  # per arm: which of the two signal phases, or 0 = major road

    def sort_arms(self, laid: Sequence[Road]) -> None:
        """Orders the arms by angle; opposite arms share a phase, and at a T the through road is the major one."""

        def angle(arm: tuple[int, bool]) -> float:
            centre = laid[arm[0]].centre
            end = centre[0] if arm[1] else centre[-1]
            outward = end - self.position
            return float((np.arctan2(outward[1], outward[0]) - self.tilt + 0.5) % (2 * np.pi) - 0.5)

        self.arms.sort(key=angle)
        quarter = [int(round(angle(arm) / (np.pi / 2))) % 4 for arm in self.arms]
        self.arm_angles = [self.tilt + angle(arm) for arm in self.arms]
        axis = [q % 2 for q in quarter]
        if self.kind == "give_way" and axis.count(0) < axis.count(1):
            axis = [1 - a for a in axis]
        self.phases = axis


@dataclass(frozen=True)
class Connector:
    index: int
    node: int
    from_lane: int
    to_lane: int
    from_arm: int
    to_arm: int
    turn: str
    baseline: roads.Line
    left: roads.Line
    right: roads.Line
    speed: float
    phase: int  # signal phase, -1 without a signal
    priority: int  # smaller goes first


@dataclass(frozen=True)
class Conflicts:
    """For connector c the rows pointer[c]:pointer[c+1]: other connector, zone on c, zone on the other, c gives way."""

    pointer: NDArray[np.int64]  # [C+1]
    other: NDArray[np.int64]  # [K]
    zone: NDArray[np.float64]  # [K,4] start, end on c; start, end on the other
    gives_way: NDArray[np.bool_]  # [K]


def connect_node(node: Node, lanes: Sequence[Lane], width: float, first: int, spacing: float) -> list[Connector]:
    """Connectors of one node: left from the leftmost lane, right from the rightmost, straight lane by lane."""
    incoming = [_lanes_of(lanes, road, not outgoing) for road, outgoing in node.arms]
    leaving = [_lanes_of(lanes, road, outgoing) for road, outgoing in node.arms]
    made: list[Connector] = []
    for from_arm, into in enumerate(incoming):
        for to_arm, out in enumerate(leaving):
            if from_arm == to_arm:
                continue
            change = node.arm_angles[to_arm] - (node.arm_angles[from_arm] + np.pi)
            change = (change + np.pi) % (2 * np.pi) - np.pi
            turn = "straight" if abs(change) < np.pi / 4 else "left" if change > 0 else "right"
            for lane, target in _pairs(turn, into, out):
                line = _connector_line(node, lane, target, from_arm, to_arm, spacing)
                bend = float(np.abs(np.gradient(roads.headings(line), roads.arc_lengths(line))).max())
                speed = min(lane.speed, target.speed, np.sqrt(TURN_LATERAL_ACCELERATION / max(bend, 1e-6)))
                made.append(
                    Connector(
                        index=first + len(made),
                        node=node.index,
                        from_lane=lane.index,
                        to_lane=target.index,
                        from_arm=from_arm,
                        to_arm=to_arm,
                        turn=turn,
                        baseline=line,
                        left=roads.offset(line, width / 2),
                        right=roads.offset(line, -width / 2),
                        speed=float(round(speed, 1)),
                        phase=node.phases[from_arm] if node.kind == "signal" else -1,
                        priority=_priority(node, from_arm, turn),
                    )
                )
    return made


def _lanes_of(lanes: Sequence[Lane], road: int, forward: bool) -> list[Lane]:
    return [lane for lane in lanes if lane.road == road and lane.forward == forward]


def _pairs(turn: str, into: list[Lane], out: list[Lane]) -> list[tuple[Lane, Lane]]:
    if turn == "left":
        return [(into[0], out[0])]
    if turn == "right":
        return [(into[-1], out[-1])]
    return list(zip(into, out))


def _priority(node: Node, arm: int, turn: str) -> int:
    minor = node.kind == "give_way" and node.phases[arm] == 1
    return 2 * int(minor) + int(turn == "left")


def _connector_line(node: Node, lane: Lane, target: Lane, from_arm: int, to_arm: int, spacing: float) -> roads.Line:
    start, end = lane.baseline[-1], target.baseline[0]
    start_heading = float(np.arctan2(*(lane.baseline[-1] - lane.baseline[-2])[::-1]))
    end_heading = float(np.arctan2(*(target.baseline[1] - target.baseline[0])[::-1]))
    if node.kind != "roundabout":
        return roads.connect(start, start_heading, end, end_heading, spacing)
    first, last = node.arm_angles[from_arm] + 0.62, node.arm_angles[to_arm] - 0.62
    while last < first - 0.35:
        last += 2 * np.pi
    count = max(int(np.ceil((last - first) / 0.45)), 1)
    around = np.linspace(first, last, count + 1) if last > first + 0.2 else np.array([0.5 * (first + last)])
    ring = node.position + RING_RADIUS * np.column_stack([np.cos(around), np.sin(around)])
    return roads.spline(np.concatenate([start[None], ring, end[None]]), start_heading, end_heading, spacing)


def find_conflicts(connectors: Sequence[Connector], nodes: Sequence[Node]) -> Conflicts:
    """Pairs of connectors of a node that start on different arms and come closer than CONFLICT_DISTANCE."""
    rows: list[list[tuple[int, tuple[float, float, float, float], bool]]] = [[] for _ in connectors]
    lengths = [roads.arc_lengths(c.baseline) for c in connectors]
    for c in connectors:
        for o in connectors:
            if o.index <= c.index or o.node != c.node or o.from_arm == c.from_arm:
                continue
            near = cdist(c.baseline, o.baseline) < CONFLICT_DISTANCE
            if not near.any():
                continue
            on_c, on_o = lengths[c.index][near.any(axis=1)], lengths[o.index][near.any(axis=0)]
            zone_c = (float(on_c[0]), float(on_c[-1]))
            zone_o = (float(on_o[0]), float(on_o[-1]))
            if nodes[c.node].kind == "roundabout":  # who comes later along its own path is already circulating
                c_yields = zone_c[0] < zone_o[0]
            else:
                c_yields = (c.priority, c.turn == "right", c.index) > (o.priority, o.turn == "right", o.index)
            rows[c.index].append((o.index, (*zone_c, *zone_o), c_yields))
            rows[o.index].append((c.index, (*zone_o, *zone_c), not c_yields))
    flat = [row for per_connector in rows for row in per_connector]
    return Conflicts(
        pointer=np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
        other=np.array([row[0] for row in flat], dtype=np.int64),
        zone=np.array([row[1] for row in flat], dtype=np.float64).reshape(-1, 4),
        gives_way=np.array([row[2] for row in flat], dtype=bool),
    )
