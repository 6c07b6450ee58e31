"""What lies flat on the road, derived once from a VectorMap: surfaces, markings, crosswalks, stop lines.

Everything is a ring of vertices in global metres with a colour and a rank; rings are painted by rank, so that
markings lie on the asphalt. nuPlan's maps do not say how a line is painted; the rule here: a border shared by two
lanes of one roadblock is broken white, the left border of the leftmost lane (towards oncoming traffic) solid yellow,
the right border of the rightmost lane solid white. Roads inside intersections carry no lines.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.maps.layers import NONE, PolygonLayer, offsets_of
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.readers.scenarionet_map import STATED_LINES

LINE_WIDTH_M = 0.16
DASH_M, GAP_M = 3.0, 4.5
SOLID_PIECE_M = 6.0
STRIPE_M = 0.55  # crosswalk stripes and the gaps between them
STOP_LINE_M = 0.5


class Surface(IntEnum):
    """Rank (painted in this order) of what lies on the ground."""

    EARTH = 0
    WALKWAY = 1
    DRIVABLE = 2
    CARPARK = 3
    ROAD = 4
    CROSSWALK = 5
    WHITE_LINE = 6
    YELLOW_LINE = 7
    STOP_LINE = 8


COLOURS: dict[Surface, tuple[int, int, int]] = {
    Surface.EARTH: (108, 122, 88),
    Surface.WALKWAY: (166, 162, 152),
    Surface.DRIVABLE: (96, 96, 98),
    Surface.CARPARK: (104, 100, 98),
    Surface.ROAD: (78, 79, 83),
    Surface.CROSSWALK: (226, 226, 222),
    Surface.WHITE_LINE: (222, 222, 218),
    Surface.YELLOW_LINE: (222, 178, 52),
    Surface.STOP_LINE: (238, 238, 234),
}


@dataclass(frozen=True)
class Ground:
    """Rings sorted by rank: ring i = ``xy[offsets[i]:offsets[i+1]]`` of surface ``surface[i]``."""

    xy: NDArray[np.float64]  # [V,2] global metres
    offsets: NDArray[np.int64]  # [R+1]
    surface: NDArray[np.int64]  # [R] Surface
    bounds: NDArray[np.float64]  # [R,4] min x, min y, max x, max y
    heads: dict[tuple, list] = field(default_factory=dict)  # signal heads seen so far, by approach and state

    def near(self, centre: NDArray[np.float64], reach_m: float) -> NDArray[np.int64]:
        """Rings whose bounding box touches the square of half side ``reach_m`` around ``centre``; by rank."""
        low, high = centre - reach_m, centre + reach_m
        return np.flatnonzero(
            (self.bounds[:, 0] <= high[0])
            & (self.bounds[:, 2] >= low[0])
            & (self.bounds[:, 1] <= high[1])
            & (self.bounds[:, 3] >= low[1])
        )


_GROUNDS: dict[int, tuple[weakref.ref[VectorMap], Ground]] = {}


def ground_of(vector_map: VectorMap) -> Ground:
    """The ground of a map, built on first use and kept as long as the map lives."""
    key = id(vector_map)
    entry = _GROUNDS.get(key)
    if entry is None or entry[0]() is not vector_map:
        forget = lambda _, key=key: _GROUNDS.pop(key, None)  # noqa: E731
        entry = _GROUNDS[key] = (weakref.ref(vector_map, forget), build_ground(vector_map))
    return entry[1]


def build_ground(vector_map: VectorMap) -> Ground:
    """Derives all rings; see the module's rule for line types."""
    rings: list[NDArray[np.float64]] = []
    surfaces: list[int] = []

    def add(surface: Surface, shapes: list[NDArray[np.float64]]) -> None:
        rings.extend(shapes)
        surfaces.extend([int(surface)] * len(shapes))

    add(Surface.WALKWAY, exteriors(vector_map.walkways))
    add(Surface.DRIVABLE, exteriors(vector_map.generic_drivable_areas))
    add(Surface.CARPARK, exteriors(vector_map.carparks))
    for layer in (vector_map.roadblocks, vector_map.roadblock_connectors, vector_map.intersections):
        add(Surface.ROAD, exteriors(layer))
    for lanes in (vector_map.lanes, vector_map.lane_connectors):  # roadblocks cover their lanes
        add(Surface.ROAD, exteriors(lanes, np.flatnonzero(lanes.roadblock == NONE)))
    add(Surface.CROSSWALK, [stripe for polygon in vector_map.crosswalks.polygons for stripe in crosswalk(polygon)])
    for surface, painted in lane_lines(vector_map).items():
        add(surface, painted)
    add(Surface.STOP_LINE, stop_lines(vector_map))

    surface_of_ring = np.array(surfaces, dtype=np.int64)
    order = np.argsort(surface_of_ring, kind="stable")
    rings = [rings[i] for i in order]
    bounds = np.array([[*ring.min(axis=0), *ring.max(axis=0)] for ring in rings]).reshape(-1, 4)
    xy = np.concatenate(rings) if rings else np.empty((0, 2))
    return Ground(xy, offsets_of([len(ring) for ring in rings]), surface_of_ring[order], bounds)


def exteriors(layer: PolygonLayer, positions: NDArray[np.int64] | None = None) -> list[NDArray[np.float64]]:
    """Open rings that cover the polygons of a layer; a polygon with holes is cut into pieces without."""
    chosen = layer.polygons if positions is None else layer.polygons[positions]
    return [
        shapely.get_coordinates(piece.exterior)[:-1]
        for polygon in chosen
        for part in shapely.get_parts(polygon)
        for piece in without_holes(part)
    ]


def without_holes(polygon: shapely.Polygon) -> list[shapely.Polygon]:
    """Pieces of a polygon, none with a hole: cut down the middle of one hole after the other."""
    if not polygon.interiors:
        return [polygon]
    x0, y0, x1, y1 = polygon.bounds
    hole_x0, _, hole_x1, _ = polygon.interiors[0].bounds
    middle = 0.5 * (hole_x0 + hole_x1)
    halves = [shapely.box(x0, y0, middle, y1), shapely.box(middle, y0, x1, y1)]
    parts = [part for half in halves for part in shapely.get_parts(shapely.intersection(polygon, half))]
    return [piece for part in parts if part.geom_type == "Polygon" for piece in without_holes(part)]


def crosswalk(polygon: shapely.Polygon) -> list[NDArray[np.float64]]:
    """Zebra stripes: the polygon's smallest rectangle cut across its long side, which is the way people walk."""
    corners = shapely.get_coordinates(shapely.minimum_rotated_rectangle(polygon))[:4]
    along, across = corners[1] - corners[0], corners[3] - corners[0]
    origin, length, width = corners[0], np.linalg.norm(along), np.linalg.norm(across)
    if length < width:
        along, across, length, width = across, along, width, length
    if width < 1e-6:
        return []
    starts = np.arange(STRIPE_M / 2, length - STRIPE_M / 2, 2 * STRIPE_M)
    unit = along / length
    return [
        np.array([origin + unit * s, origin + unit * e, origin + unit * e + across, origin + unit * s + across])
        for s, e in zip(starts, np.minimum(starts + STRIPE_M, length))
    ]


def strips(line: NDArray[np.float64], width_m: float, piece_m: float, gap_m: float) -> list[NDArray[np.float64]]:
    """Quadrilaterals [4,2] of a painted line [n,2]: pieces of ``piece_m`` with ``gap_m`` between them."""
    step = np.linalg.norm(np.diff(line, axis=0), axis=1)
    line, step = line[np.concatenate([[True], step > 1e-6])], step[step > 1e-6]
    if not len(step):
        return []
    arc = np.concatenate([[0.0], np.cumsum(step)])
    starts = np.arange(0.0, arc[-1], piece_m + gap_m)
    ends = np.minimum(starts + piece_m, arc[-1])
    middle = 0.5 * (starts + ends)
    knots = np.stack([starts, middle, ends], axis=1)  # a piece bends once, in its middle
    xy = np.stack([np.interp(knots, arc, line[:, 0]), np.interp(knots, arc, line[:, 1])], axis=-1)  # [n,3,2]
    direction = np.gradient(xy, axis=1)
    direction /= np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-9)
    normal = 0.5 * width_m * np.stack([-direction[..., 1], direction[..., 0]], axis=-1)
    return list(np.concatenate([xy + normal, (xy - normal)[:, ::-1]], axis=1))


def lane_lines(vector_map: VectorMap) -> dict[Surface, list[NDArray[np.float64]]]:
    """Painted pieces by colour: from the borders of the lanes, and from lines whose type the map states."""
    painted: dict[Surface, list[NDArray[np.float64]]] = {Surface.WHITE_LINE: [], Surface.YELLOW_LINE: []}
    lanes, boundaries = vector_map.lanes, vector_map.boundaries
    lefts, rights = Counter(lanes.left_boundary.tolist()), Counter(lanes.right_boundary.tolist())
    for position in sorted((lefts.keys() | rights.keys()) - {NONE}):
        line = boundaries.line(position)
        if position in lefts and position in rights:
            painted[Surface.WHITE_LINE] += strips(line, LINE_WIDTH_M, DASH_M, GAP_M)
        else:
            colour = Surface.YELLOW_LINE if position in lefts else Surface.WHITE_LINE
            painted[colour] += strips(line, LINE_WIDTH_M, SOLID_PIECE_M, 0.0)
    for position, kind in enumerate(vector_map.boundary_types.tolist()):
        if kind in STATED_LINES:
            yellow, broken = STATED_LINES[kind]
            colour = Surface.YELLOW_LINE if yellow else Surface.WHITE_LINE
            piece, gap = (DASH_M, GAP_M) if broken else (SOLID_PIECE_M, 0.0)
            painted[colour] += strips(boundaries.line(position), LINE_WIDTH_M, piece, gap)
    return painted


def stop_lines(vector_map: VectorMap) -> list[NDArray[np.float64]]:
    """A bar across the end of every lane that a stop polygon touches (nuPlan draws areas, not the paint)."""
    bars = []
    stops = vector_map.stop_polygons
    for lane in range(len(vector_map.lanes)) if len(stops) else ():
        x, y, heading = vector_map.lanes.baseline_of(lane)[-1]
        unit = np.array([np.cos(heading), np.sin(heading)])
        left = np.array([-unit[1], unit[0]])
        reach = shapely.LineString([(x, y) - 2.0 * unit, (x, y) + 3.0 * unit])
        if not len(stops.query(reach)):
            continue
        half = 0.5 * lane_width(vector_map, lane) - 0.15
        front = np.array([x, y]) - 0.3 * unit
        back = front - STOP_LINE_M * unit
        bars.append(np.array([front + half * left, front - half * left, back - half * left, back + half * left]))
    return bars


def lane_width(vector_map: VectorMap, lane: int) -> float:
    """Mean width of a lane [m]: area over length, within 2 ... 6 m."""
    area = shapely.area(vector_map.lanes.polygons[lane])
    return float(np.clip(area / max(vector_map.lanes.lengths[lane], 1e-3), 2.0, 6.0))
