"""A procedural town: nodes (signals, give-way junctions, a roundabout), two-way roads, lanes, connectors, kerbside.

Legend: positions are metres in the town's own frame; ``Town.origin`` adds the UTM offset when data is written.
Right-hand traffic. Lane 0 of a direction is the leftmost (beside the centre line). Everything is a function of
(seed, location) alone.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from navsim_ext.scene import MAP_LOCATIONS
from navsim_ext.synthetic import roads
from navsim_ext.synthetic.intersections import Conflicts, Connector, Node, connect_node, find_conflicts

LANE_WIDTH = 3.5  # m
SHOULDER_WIDTH = 0.7  # m of paved road beyond the edge line, part of the roadblock
PARKING_WIDTH = 2.5  # m
WALKWAY_WIDTH = 2.6  # m
BASELINE_SPACING = 1.0  # m
GRID = 4  # nodes per side; the four corners are bends, not junctions
UTM = {  # EPSG code and a plausible south-west corner of the location [m]
    "sg-one-north": (32648, 364_500.0, 142_600.0),
    "us-ma-boston": (32619, 330_800.0, 4_689_700.0),
    "us-nv-las-vegas-strip": (32611, 664_300.0, 3_997_300.0),
    "us-pa-pittsburgh-hazelwood": (32617, 586_900.0, 4_474_600.0),
}
SINGLE_SPEEDS = (8.3, 9.0, 9.7)  # m/s, roads of one lane per direction
ARTERIAL_SPEEDS = (10.5, 11.1, 12.0)  # m/s, roads of two


@dataclass(frozen=True)
class Road:
    """A two-way road between the stop lines of two nodes; ``centre`` runs from node ``a`` to node ``b``."""

    index: int
    a: int
    b: int
    centre: roads.Line
    lanes: int  # per direction
    speed: float
    parking: tuple[bool, bool]  # right side of a->b, right side of b->a
    crossing: float | None  # distance along ``centre`` of a mid-block crosswalk

    @property
    def half_width(self) -> float:
        """m from the centre line to the end of the shoulder."""
        return self.lanes * LANE_WIDTH + SHOULDER_WIDTH


@dataclass(frozen=True)
class Lane:
    index: int
    road: int
    forward: bool  # along Road.centre or against it
    lane_index: int  # 0 = leftmost
    start_node: int
    end_node: int
    baseline: roads.Line
    left: roads.Line
    right: roads.Line
    speed: float
    group: int  # index of the lane group (roadblock): 2 * road + (0 forward, 1 backward)


@dataclass(frozen=True)
class Crosswalk:
    ring: NDArray[np.float64]  # [4,2]
    ends: NDArray[np.float64]  # [2,2] kerb points
    node: int  # -1 for mid-block
    arm: int  # arm of the node, -1 for mid-block
    road: int


@dataclass(frozen=True)
class Town:
    location: str
    seed: int
    nodes: tuple[Node, ...]
    roads: tuple[Road, ...]
    lanes: tuple[Lane, ...]
    connectors: tuple[Connector, ...]
    conflicts: Conflicts
    crosswalks: tuple[Crosswalk, ...]
    parking: tuple[tuple[int, bool, NDArray[np.float64]], ...]  # (road, forward side, ring)
    lots: tuple[NDArray[np.float64], ...]  # rings of off-street carparks
    driveways: tuple[NDArray[np.float64], ...]
    walkways: tuple[NDArray[np.float64], ...]
    successors: tuple[tuple[int, ...], ...] = field(default=())  # connectors leaving each lane

    @property
    def epsg(self) -> int:
        return UTM[self.location][0]

    @property
    def origin(self) -> NDArray[np.float64]:
        """[2] UTM metres of the town frame's origin."""
        return np.array(UTM[self.location][1:])

    def lane_at(self, group: int, lane_index: int) -> Lane | None:
        """Lane of a lane group, or None where the road has no such lane."""
        for lane in self.lanes_of_group[group]:
            if lane.lane_index == lane_index:
                return lane
        return None

    @functools.cached_property
    def lanes_of_group(self) -> dict[int, tuple[Lane, ...]]:
        groups: dict[int, list[Lane]] = {}
        for lane in self.lanes:
            groups.setdefault(lane.group, []).append(lane)
        return {group: tuple(lanes) for group, lanes in groups.items()}


def stream(*key: int | str) -> np.random.Generator:
    """Random stream of a key; equal keys give equal streams on every machine."""
    digest = hashlib.sha256("|".join(str(part) for part in key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


@functools.lru_cache(maxsize=8)
def make_town(location: str, seed: int) -> Town:
    """Builds the town of a location; a second call of the same process returns the same object."""
    if location not in MAP_LOCATIONS:
        raise ValueError(f"location {location!r} is not one of {MAP_LOCATIONS}")
    random = stream("town", seed, location)
    nodes = _place_nodes(random)
    roads_ = _lay_roads(random, nodes)
    lanes = _lay_lanes(roads_)
    connectors: list[Connector] = []
    for node in nodes:
        connectors += connect_node(node, lanes, LANE_WIDTH, len(connectors), BASELINE_SPACING)
    successors: list[list[int]] = [[] for _ in lanes]
    for connector in connectors:
        successors[connector.from_lane].append(connector.index)
    lots, driveways = _place_lots(random, roads_)
    return Town(
        location=location,
        seed=seed,
        nodes=tuple(nodes),
        roads=tuple(roads_),
        lanes=tuple(lanes),
        connectors=tuple(connectors),
        conflicts=find_conflicts(connectors, nodes),
        crosswalks=tuple(_crosswalks(nodes, roads_)),
        parking=tuple(_parking(roads_)),
        lots=lots,
        driveways=driveways,
        walkways=tuple(_walkways(roads_)),
        successors=tuple(tuple(leaving) for leaving in successors),
    )


def _place_nodes(random: np.random.Generator) -> list[Node]:
    """Junctions of a jittered grid without its corners, with kinds spread so that every town has all of them."""
    spacing = random.uniform(118.0, 138.0, size=2)
    turn = random.uniform(0.0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    cells = [(i, j) for j in range(GRID) for i in range(GRID) if not _is_corner(i, j)]
    arterial_row, arterial_column = (int(x) for x in random.integers(1, GRID - 1, size=2))
    round_cell = (GRID - 1 - arterial_column, GRID - 1 - arterial_row)  # the inner node without an arterial
    nodes: list[Node] = []
    for index, (i, j) in enumerate(cells):
        jitter = random.uniform(-9.0, 9.0, size=2)
        position = rotation @ (np.array([i, j]) * spacing + jitter) + 300.0
        inner = 0 < i < GRID - 1 and 0 < j < GRID - 1
        if (i, j) == round_cell:
            kind, reach = "roundabout", 29.0
        elif inner or (i + j) % 2 == 0:
            kind, reach = "signal", 21.0
        else:
            kind, reach = "give_way", 19.0
        tilt = turn + random.uniform(-0.1, 0.1)
        nodes.append(Node(index, (i, j), position, tilt, kind, reach, arterial_row == j, arterial_column == i))
    return nodes


def _is_corner(i: int, j: int) -> bool:
    return i in (0, GRID - 1) and j in (0, GRID - 1)


def _lay_roads(random: np.random.Generator, nodes: list[Node]) -> list[Road]:
    by_cell = {node.cell: node for node in nodes}
    laid: list[Road] = []
    for node in nodes:
        i, j = node.cell
        for direction, (di, dj) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
            cell = (i + di, j + dj)
            if cell in by_cell:
                other, other_arm = by_cell[cell], (direction + 2) % 4
                if other.index < node.index:
                    continue
            elif _is_corner(*cell) if 0 <= cell[0] < GRID and 0 <= cell[1] < GRID else False:
                # Round the corner: the neighbour on the other side of it.
                options = [(cell[0] + a, cell[1] + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))]
                other = next(by_cell[o] for o in options if o in by_cell and o != (i, j))
                if other.index < node.index:
                    continue
                other_arm = next(
                    k
                    for k, (a, b) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1)))
                    if (other.cell[0] + a, other.cell[1] + b) == cell
                )
            else:
                continue
            arterial = (dj == 0 and node.arterial_row) or (di == 0 and node.arterial_column)
            laid.append(_road(random, len(laid), node, direction, other, other_arm, arterial and cell in by_cell))
    for road in laid:
        for node_index, arm in ((road.a, 0), (road.b, 1)):
            nodes[node_index].arms.append((road.index, arm == 0))
    for node in nodes:
        node.sort_arms(laid)
    return laid


def _road(random: np.random.Generator, index: int, a: Node, arm_a: int, b: Node, arm_b: int, arterial: bool) -> Road:
    angle_a, angle_b = a.tilt + arm_a * np.pi / 2, b.tilt + arm_b * np.pi / 2
    start, end = a.position + a.reach * roads.unit(angle_a), b.position + b.reach * roads.unit(angle_b)
    bends = abs(((angle_b + np.pi - angle_a) + np.pi) % (2 * np.pi) - np.pi) > 0.8
    if bends:
        centre = _corner(start, angle_a, end, angle_b + np.pi, random.uniform(46.0, 70.0))
    else:
        length = float(np.hypot(*(end - start)))
        bulge = float(random.choice([0.0, random.uniform(-9.0, 9.0)])) * roads.unit(angle_a + np.pi / 2)
        points = np.stack(
            [
                start,
                start + 0.4 * length * roads.unit(angle_a) + bulge,
                end + 0.4 * length * roads.unit(angle_b) - bulge,
                end,
            ]
        )
        centre = roads.bezier(points, BASELINE_SPACING)
    lanes = 2 if arterial else 1
    speed = float(random.choice(ARTERIAL_SPEEDS if arterial else SINGLE_SPEEDS))
    length = float(roads.arc_lengths(centre)[-1])
    parking = (bool(random.random() < 0.55), bool(random.random() < 0.55))
    crossing = float(length * random.uniform(0.42, 0.58)) if not bends and random.random() < 0.6 else None
    return Road(index, a.index, b.index, centre, lanes, speed, parking, crossing)


def _corner(start: NDArray, heading: float, end: NDArray, end_heading: float, tangent: float) -> roads.Line:
    """Straight, a bend whose tangents are ``tangent`` metres long, straight."""
    basis = np.column_stack([roads.unit(heading), roads.unit(end_heading)])
    ahead, behind = np.linalg.solve(basis, end - start)
    tangent = min(tangent, ahead - 2.0, behind - 2.0)
    first = start + (ahead - tangent) * roads.unit(heading)
    last = end - (behind - tangent) * roads.unit(end_heading)
    bend = roads.connect(first, heading, last, end_heading, BASELINE_SPACING)
    return roads.resample(np.concatenate([start[None], bend, end[None]]), BASELINE_SPACING)


def _lay_lanes(laid: list[Road]) -> list[Lane]:
    lanes: list[Lane] = []
    for road in laid:
        for forward in (True, False):
            line = road.centre if forward else road.centre[::-1]
            start, end = (road.a, road.b) if forward else (road.b, road.a)
            for lane_index in range(road.lanes):
                at = -(lane_index + 0.5) * LANE_WIDTH
                lanes.append(
                    Lane(
                        index=len(lanes),
                        road=road.index,
                        forward=forward,
                        lane_index=lane_index,
                        start_node=start,
                        end_node=end,
                        baseline=roads.offset(line, at),
                        left=roads.offset(line, at + LANE_WIDTH / 2),
                        right=roads.offset(line, at - LANE_WIDTH / 2),
                        speed=road.speed,
                        group=2 * road.index + (0 if forward else 1),
                    )
                )
    return lanes


def _crosswalks(nodes: list[Node], laid: list[Road]) -> list[Crosswalk]:
    """Across every arm of signals and give-way junctions, inside the stop lines, and mid-block where a road has one."""
    made: list[Crosswalk] = []
    for node in nodes:
        if node.kind == "roundabout":
            continue
        for arm, (road_index, outgoing) in enumerate(node.arms):
            road = laid[road_index]
            line = road.centre if outgoing else road.centre[::-1]
            heading = float(np.arctan2(*(line[0] - line[1])[::-1]))  # towards the node
            middle = line[0] + 2.9 * roads.unit(heading)
            made.append(_crosswalk(middle, heading, road, node.index, arm))
    for road in laid:
        if road.crossing is not None:
            piece = roads.cut(road.centre, road.crossing, road.crossing + 1.0)
            heading = float(np.arctan2(*(piece[-1] - piece[0])[::-1]))
            made.append(_crosswalk(piece[0], heading, road, -1, -1))
    return made


def _crosswalk(middle: NDArray, heading: float, road: Road, node: int, arm: int) -> Crosswalk:
    along, across = roads.unit(heading), roads.unit(heading + np.pi / 2)
    half = road.half_width
    ring = np.stack(
        [
            middle + sign_u * 1.5 * along + sign_v * half * across
            for sign_u, sign_v in ((1, 1), (-1, 1), (-1, -1), (1, -1))
        ]
    )
    ends = np.stack([middle + (half + 0.8) * across, middle - (half + 0.8) * across])
    return Crosswalk(ring, ends, node, arm, road.index)


def side_line(road: Road, forward: bool, margin: float) -> roads.Line:
    """Kerb of one direction of travel, without ``margin`` metres at both ends."""
    line = road.centre if forward else road.centre[::-1]
    kerb = roads.offset(line, -road.half_width)
    return roads.cut(kerb, margin, float(roads.arc_lengths(kerb)[-1]) - margin)


def _parking(laid: list[Road]) -> list[tuple[int, bool, NDArray[np.float64]]]:
    strips = []
    for road in laid:
        for forward, has in ((True, road.parking[0]), (False, road.parking[1])):
            if not has:
                continue
            edge = side_line(road, forward, 14.0)
            if road.crossing is None:
                pieces = [edge]
            else:
                length = float(roads.arc_lengths(road.centre)[-1])
                at = (road.crossing if forward else length - road.crossing) - 14.0
                end = float(roads.arc_lengths(edge)[-1])
                pieces = [roads.cut(edge, 0.0, at - 7.0), roads.cut(edge, at + 7.0, end)]
            strips += [
                (road.index, forward, roads.strip(piece, 0.05, -PARKING_WIDTH))
                for piece in pieces
                if roads.arc_lengths(piece)[-1] > 12.0
            ]
    return strips


def _place_lots(random: np.random.Generator, laid: list[Road]):
    """Off-street carparks beside roads without a parking strip there (every town has one), each with a driveway."""
    lots, driveways = [], []
    fit = [road for road in laid if roads.arc_lengths(road.centre)[-1] > 92.0]
    free = [road for road in fit if not road.parking[0]] or fit[:1]
    for number, road in enumerate(free):
        if number and random.random() > 0.5:
            continue
        edge = side_line(road, True, 30.0)
        piece = roads.cut(edge, 2.0, 28.0)
        lots.append(roads.strip(piece, -9.0, -25.0))
        driveways.append(roads.strip(roads.cut(edge, 12.0, 17.0), 0.05, -9.05))
    return tuple(lots), tuple(driveways)


def _walkways(laid: list[Road]) -> list[NDArray[np.float64]]:
    return [
        roads.strip(side_line(road, forward, 4.0), -inner, -inner - WALKWAY_WIDTH)
        for road in laid
        for forward, inner in (
            (True, PARKING_WIDTH if road.parking[0] else 0.3),
            (False, PARKING_WIDTH if road.parking[1] else 0.3),
        )
    ]
