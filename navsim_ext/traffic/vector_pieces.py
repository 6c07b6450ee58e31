"""VectorMap (NAVSIM's maps, rebuilt ScenarioNet maps, the synthetic world's) -> map pieces of a TrafficScene.

    lanes, lane connectors   centre lines; successors as the map says, neighbours where two lanes share a border
    road lines               borders of lanes: shared by two lanes = broken white, left border only = solid yellow,
                             right border only = solid white; and lines whose paint the map states
    road edges               outline of the union of all drivable polygons, drivable ground on the left. The union is
                             closed over gaps of 2 CLOSING_M: polygons that meet seldom meet exactly.
    crosswalks, stop lines   their polygons

Drivable are lanes, connectors, roadblocks, their connectors, intersections, car parks and generic drivable areas:
everything that a car may stand on. NAVSIM's drivable-area test is stricter: it leaves out the last two.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.maps.layers import NONE, PolygonLayer
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.traffic.codes import EdgeKind, EdgeType, LaneType, LineType, PieceKind

CLOSING_M = 0.05
SIMPLIFY_M = 0.02  # road edges may deviate by this much from the polygons
LINE_OF_TYPE = {  # boundary types of rebuilt maps: (kind, paint)
    10: (PieceKind.LINE_BROKEN, LineType.BROKEN_WHITE),
    11: (PieceKind.LINE_SOLID, LineType.SOLID_WHITE),
    12: (PieceKind.LINE_BROKEN, LineType.BROKEN_YELLOW),
    13: (PieceKind.LINE_SOLID, LineType.SOLID_YELLOW),
}


@dataclass
class Pieces:
    """Map pieces under construction: ``add`` one by one, then ``arrays`` for ``TrafficScene.make``."""

    origin: NDArray[np.float64]  # [2 or more] world position of the scene's origin
    lines: list[NDArray[np.float64]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    subtypes: list[int] = field(default_factory=list)
    closed: list[bool] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    edges: list[tuple[int, int, int]] = field(default_factory=list)

    def add(
        self,
        token: str,
        xy: NDArray[np.floating],
        kind: PieceKind,
        *,
        subtype: int = 0,
        closed: bool = False,
        limit: float = np.nan,
    ) -> int:
        """Adds a piece given by world points [n,2] and returns its row."""
        self.lines.append(np.asarray(xy, np.float64)[:, :2] - self.origin[:2])
        self.kinds.append(int(kind))
        self.subtypes.append(int(subtype))
        self.closed.append(closed)
        self.tokens.append(token)
        self.limits.append(limit)
        return len(self.kinds) - 1

    def arrays(self) -> dict[str, Any]:
        """Map fields of a TrafficScene; ``piece_id`` is the row, the source's names stand in ``piece_tokens``."""
        if not self.lines:
            raise DataError("no map piece is within reach of the recorded drive")
        edges = np.array(sorted(set(self.edges)), np.int32).reshape(-1, 3)
        return {
            "points": np.concatenate(self.lines).astype(np.float32),
            "piece_start": np.concatenate([[0], np.cumsum([len(line) for line in self.lines])]).astype(np.int32),
            "piece_kind": np.array(self.kinds, np.uint8),
            "piece_subtype": np.array(self.subtypes, np.uint8),
            "piece_closed": np.array(self.closed, np.bool_),
            "piece_id": np.arange(len(self.kinds), dtype=np.int64),
            "piece_tokens": tuple(self.tokens),
            "speed_limit": np.array(self.limits, np.float32),
            "edges": np.ascontiguousarray(edges[:, :2]),
            "edge_kind": edges[:, 2].astype(np.uint8),
        }


def vector_pieces(
    vector_map: VectorMap, driven: NDArray[np.float64], reach_m: float, origin: NDArray[np.float64]
) -> tuple[Pieces, dict[int, int]]:
    """Everything of a map within ``reach_m`` of the ``driven`` way [n,2] (world), and the row of each lane node in it.

    Lanes come whole, road edges are cut at the reach. Raises DataError where nothing drivable is within reach.
    """
    near = shapely.LineString(driven) if len(driven) > 1 else shapely.Point(driven[0])
    near = shapely.simplify(near, 0.5).buffer(reach_m, quad_segs=4)
    pieces = Pieces(origin)
    rows = _lanes(pieces, vector_map, near)
    _lane_graph(pieces, vector_map, rows)
    _painted(pieces, vector_map, near)
    for name, layer, kind in (
        ("crosswalk", vector_map.crosswalks, PieceKind.CROSSWALK),
        ("stop", vector_map.stop_polygons, PieceKind.STOP_LINE),
    ):
        for position in layer.query(near).tolist():
            ring = layer.rings_of(position)[0][0]
            pieces.add(f"{name} {layer.fids[position]}", ring[:-1], kind, closed=True)
    _road_edges(pieces, vector_map, near)
    return pieces, rows


def connector_rows(vector_map: VectorMap, rows: Mapping[int, int]) -> dict[str, int]:
    """Row of each lane connector within reach, by fid: traffic lights name them."""
    first = len(vector_map.lanes)
    return {fid: rows[first + i] for fid, i in vector_map.lane_connectors.index.items() if first + i in rows}


def route_rows(
    vector_map: VectorMap, rows: Mapping[int, int], blocks: Sequence[str], count: int
) -> tuple[NDArray[np.bool_], int]:
    """([count] whether a piece is a lane or connector of one of the roadblocks, how many blocks the map lacks)."""
    route, missing = np.zeros(count, np.bool_), 0
    for block in blocks:
        if block not in vector_map.block_node_by_fid:
            missing += 1
            continue
        nodes = vector_map.lane_nodes_of_block[vector_map.block_node_by_fid[block]]
        route[[rows[node] for node in nodes if node in rows]] = True
    return route, missing


def _lanes(pieces: Pieces, vector_map: VectorMap, near: shapely.Geometry) -> dict[int, int]:
    """Row by lane node."""
    rows = {}
    count = len(vector_map.lanes)
    for first, layer, name in ((0, vector_map.lanes, "lane"), (count, vector_map.lane_connectors, "connector")):
        for position in layer.query(near).tolist():
            rows[first + position] = pieces.add(
                f"{name} {layer.fids[position]}",
                layer.baseline_of(position),
                PieceKind.LANE,
                subtype=LaneType.SURFACE_STREET,
                limit=_limit(layer.speed_limit[position]),
            )
    return rows


def _limit(speed: float) -> float:
    return float(speed) if np.isfinite(speed) and speed > 0.0 else float("nan")


def _lane_graph(pieces: Pieces, vector_map: VectorMap, rows: dict[int, int]) -> None:
    for source, target in vector_map.lane_edges.tolist():
        if source in rows and target in rows:
            pieces.edges.append((rows[source], rows[target], EdgeKind.SUCCESSOR))
            pieces.edges.append((rows[target], rows[source], EdgeKind.PREDECESSOR))
    right_of: dict[int, list[int]] = defaultdict(list)  # border -> lanes that have it on their left
    for node in rows:
        layer, position = vector_map.lane_node_layer(node)
        if layer.left_boundary[position] != NONE:
            right_of[int(layer.left_boundary[position])].append(node)
    for node in rows:
        layer, position = vector_map.lane_node_layer(node)
        border = int(layer.right_boundary[position])
        for other in right_of.get(border, ()) if border != NONE else ():
            if other != node:
                pieces.edges.append((rows[node], rows[other], EdgeKind.RIGHT))
                pieces.edges.append((rows[other], rows[node], EdgeKind.LEFT))


def _painted(pieces: Pieces, vector_map: VectorMap, near: shapely.Geometry) -> None:
    lanes, boundaries = vector_map.lanes, vector_map.boundaries
    lefts, rights = Counter(lanes.left_boundary.tolist()), Counter(lanes.right_boundary.tolist())
    for position, kind in enumerate(vector_map.boundary_types.tolist()):
        if kind in LINE_OF_TYPE:
            piece, paint = LINE_OF_TYPE[kind]
        elif position in lefts and position in rights:
            piece, paint = PieceKind.LINE_BROKEN, LineType.BROKEN_WHITE
        elif position in lefts:
            piece, paint = PieceKind.LINE_SOLID, LineType.SOLID_YELLOW
        elif position in rights:
            piece, paint = PieceKind.LINE_SOLID, LineType.SOLID_WHITE
        else:
            continue  # borders of connectors are not painted
        line = boundaries.line(position)
        if len(line) > 1 and near.intersects(shapely.LineString(line)):
            pieces.add(f"line {boundaries.fids[position]}", line, piece, subtype=paint)


def _road_edges(pieces: Pieces, vector_map: VectorMap, near: shapely.Geometry) -> None:
    layers: tuple[PolygonLayer, ...] = (
        vector_map.roadblocks, vector_map.roadblock_connectors, vector_map.lanes, vector_map.lane_connectors,
        vector_map.intersections, vector_map.carparks, vector_map.generic_drivable_areas,
    )  # fmt: skip
    around = near.buffer(1.0)
    found = [polygon for layer in layers for polygon in layer.polygons[layer.query(around)]]
    if not found:
        raise DataError(f"map {vector_map.location}: no drivable ground within reach of the recorded drive")
    polygons = shapely.make_valid(np.array(found, dtype=object))
    ground = shapely.union_all(shapely.buffer(polygons, CLOSING_M, join_style="mitre"))
    ground = shapely.simplify(shapely.buffer(ground, -CLOSING_M, join_style="mitre"), SIMPLIFY_M)
    number = 0
    for part in shapely.get_parts(ground):
        if part.geom_type != "Polygon" or part.is_empty:
            continue
        part = shapely.geometry.polygon.orient(part)  # outline counter-clockwise, holes clockwise: ground on the left
        for ring in (part.exterior, *part.interiors):
            for line, whole in _cut(ring, near):
                pieces.add(f"edge {number}", line, PieceKind.ROAD_EDGE, subtype=EdgeType.BOUNDARY, closed=whole)
                number += 1


def _cut(ring: shapely.LinearRing, near: shapely.Geometry) -> list[tuple[NDArray[np.float64], bool]]:
    """[(points, is the whole ring)] of what lies within reach, in the ring's own direction."""
    if near.contains(ring):
        return [(shapely.get_coordinates(ring)[:-1], True)]
    inside = shapely.intersection(shapely.LineString(ring), near)
    if inside.is_empty:
        return []
    merged = shapely.line_merge(inside, directed=True) if inside.geom_type == "MultiLineString" else inside
    lines = [part for part in shapely.get_parts(merged) if part.geom_type == "LineString"]
    return [(shapely.get_coordinates(line), False) for line in lines if line.length > 0.05]
