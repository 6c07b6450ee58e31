"""ScenarioNet map features -> VectorMap with the label "approx".

ScenarioNet keeps centre lines, some lane polygons and painted lines; roadblocks, connectors, intersections and car
parks of nuPlan's kind are rebuilt here:

    polygon        stored, else the centre line buffered by the stored half widths, its neighbours' or 1.75 m
    connector      nuScenes: a lane without a polygon; elsewhere: a lane with a light, or one that overlaps another lane
                   which is neither before, after nor beside it
    lane graph     end points within END_POINT_M, and ``exit_lanes`` where stored
    roadblock      lanes side by side (heading < 20 degrees, ends within 6 m lengthwise, common border > half the
                   shorter one), polygon = closed union without holes; connectors by (roadblock from, roadblock to)
    intersection   closed union of connectors that overlap
    car park       closed union of vehicles that never move and stand off the road
Speed limits that converters fill in without knowing (nuScenes 100 km/h, AV2 85 mph) are dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from navsim_ext.errors import DataError
from navsim_ext.frames import wrap_angle
from navsim_ext.maps.layers import LaneLayer, LineLayer, PolygonLayer, polyline_headings
from navsim_ext.maps.vector_map import VectorMap, sorted_edges

DEFAULT_HALF_WIDTH_M = 1.75
END_POINT_M = 0.5
CLOSING_M = 1.0
CROP_M = 170.0
SIDE_BY_SIDE_RAD = np.radians(20.0)
SIDE_BY_SIDE_ENDS_M = 6.0
OVERLAP_SHARE = 0.2
INVENTED_SPEED_LIMITS_KMH = {"nuscenes": (100,), "av2": (136, 137)}

# Boundary types of a rebuilt map: kind -> (yellow, broken). nuPlan's own types end below 10.
STATED_LINES: dict[int, tuple[bool, bool]] = {
    10: (False, True),
    11: (False, False),
    12: (True, True),
    13: (True, False),
}
_LINE_KINDS = {lines: kind for kind, lines in STATED_LINES.items()}


@dataclass
class _Lane:
    fid: str
    centre: NDArray[np.float64]  # [n,2]
    polygon: shapely.Polygon | None
    half_width: float | None  # m
    exits: tuple[str, ...]
    speed_limit: float  # m/s, NaN = unknown


def build_map(
    features: Mapping[str, Mapping[str, Any]],
    *,
    location: str,
    dataset: str,
    driven: NDArray[np.float64],
    lights: Iterable[str] = (),
    parked: Sequence[shapely.Polygon] = (),
) -> VectorMap:
    """The map within CROP_M of the ``driven`` path [n,2].

    ``lights``: lanes that have a traffic light; ``parked``: footprints of vehicles that never move. Raises DataError
    when no lane is left.
    """
    near = shapely.LineString(driven).buffer(CROP_M) if len(driven) > 1 else shapely.Point(driven[0]).buffer(CROP_M)
    shapely.prepare(near)
    lanes = [lane for lane in _lanes(features, dataset) if near.intersects(shapely.LineString(lane.centre))]
    if not lanes:
        raise DataError(f"map {location}: no lane within {CROP_M:.0f} m of the driven path")
    edges = _edges(lanes)
    is_connector = _connectors(lanes, edges, dataset, set(lights))
    keep = _connected(is_connector, edges)
    lanes, is_connector = [lanes[i] for i in keep], is_connector[keep]
    new_position = {old: new for new, old in enumerate(keep)}
    edges = [(new_position[a], new_position[b]) for a, b in edges if a in new_position and b in new_position]
    _fill_polygons(lanes, edges)
    order = [*np.flatnonzero(~is_connector).tolist(), *np.flatnonzero(is_connector).tolist()]
    node = {position: k for k, position in enumerate(order)}
    plain, ways = [lanes[i] for i in order if not is_connector[i]], [lanes[i] for i in order if is_connector[i]]
    lane_edges = sorted_edges([(node[a], node[b]) for a, b in edges])
    blocks = _side_by_side(plain)
    way_blocks, block_edges = _block_connectors(len(plain), len(ways), blocks, lane_edges)
    roadblocks = _unions("b", [lane.polygon for lane in plain], blocks)
    connectors = _unions("c", [lane.polygon for lane in ways], way_blocks)
    intersections = [_closed(group) for group in _overlapping([lane.polygon for lane in ways])]
    road = shapely.union_all([*roadblocks.polygons, *intersections])
    carparks = _carparks([p for p in parked if near.intersects(p)], road)
    lines = [line for line in _painted(features) if near.intersects(shapely.LineString(line[1]))]
    crosswalks = _polygons(features, "CROSSWALK", near)
    return VectorMap(
        location=location,
        label="approx",
        lanes=_layer(plain, blocks),
        lane_connectors=_layer(ways, way_blocks),
        roadblocks=roadblocks,
        roadblock_connectors=connectors,
        lane_edges=lane_edges,
        block_edges=block_edges,
        intersections=PolygonLayer.from_shapely([f"i{k}" for k in range(len(intersections))], intersections),
        carparks=PolygonLayer.from_shapely([f"p{k}" for k in range(len(carparks))], carparks),
        crosswalks=PolygonLayer.from_shapely([fid for fid, _ in crosswalks], [polygon for _, polygon in crosswalks]),
        boundaries=LineLayer.from_lines([fid for fid, _, _ in lines], [line for _, line, _ in lines]),
        boundary_types=np.array([kind for _, _, kind in lines], dtype=np.int64),
    ).validate()


def _lanes(features: Mapping[str, Mapping[str, Any]], dataset: str) -> list[_Lane]:
    lanes = []
    for fid, feature in features.items():
        if not str(feature.get("type", "")).startswith("LANE_") or "polyline" not in feature:
            continue
        centre = _points(feature["polyline"], fid, "polyline")
        centre = centre[np.concatenate([[True], np.linalg.norm(np.diff(centre, axis=0), axis=1) > 1e-3])]
        if len(centre) < 2:
            continue
        polygon = None
        if len(feature.get("polygon", ())) >= 3:
            polygon = _largest(shapely.make_valid(shapely.Polygon(_points(feature["polygon"], fid, "polygon"))))
        widths = np.asarray(feature.get("width", ()), dtype=np.float64)
        known = widths[widths > 0.5] if widths.size else widths
        limit = feature.get("speed_limit_kmh")
        if limit is None or not limit or int(limit) in INVENTED_SPEED_LIMITS_KMH.get(dataset, ()):
            limit = np.nan
        exits = tuple(str(exit_lane) for exit_lane in feature.get("exit_lanes", ()))
        half = float(known.mean()) if known.size else None
        lanes.append(_Lane(str(fid), centre, polygon, half, exits, float(limit) / 3.6))
    return lanes


def _points(values: Any, fid: str, key: str) -> NDArray[np.float64]:
    """[n,2] of a feature's coordinates (2 or more columns); raises DataError naming the feature."""
    points = np.asarray(values, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] < 2 or not np.isfinite(points[:, :2]).all():
        raise DataError(f"map feature {fid}: {key} of shape {points.shape} is not a list of finite points")
    return points[:, :2]


def _largest(geometry: shapely.Geometry) -> shapely.Polygon | None:
    parts = [part for part in shapely.get_parts(geometry) if part.geom_type == "Polygon" and part.area > 0.5]
    return max(parts, key=lambda part: part.area) if parts else None


def _edges(lanes: Sequence[_Lane]) -> list[tuple[int, int]]:
    """(from, to) where the end of one lane is the start of another, or where the source says so."""
    position = {lane.fid: i for i, lane in enumerate(lanes)}
    stated = {(i, position[fid]) for i, lane in enumerate(lanes) for fid in lane.exits if fid in position}
    starts = shapely.STRtree(shapely.points([lane.centre[0] for lane in lanes]))
    ends = shapely.points([lane.centre[-1] for lane in lanes])
    sources, targets = starts.query(ends, predicate="dwithin", distance=END_POINT_M)
    return sorted(stated | {(a, b) for a, b in zip(sources.tolist(), targets.tolist()) if a != b})


def _connectors(
    lanes: Sequence[_Lane], edges: Sequence[tuple[int, int]], dataset: str, lights: set[str]
) -> NDArray[np.bool_]:
    if dataset == "nuscenes":
        return np.array([lane.polygon is None for lane in lanes])
    shapes = [lane.polygon or _buffered(lane.centre, lane.half_width or DEFAULT_HALF_WIDTH_M) for lane in lanes]
    found = np.array([lane.fid in lights for lane in lanes])
    linked = {frozenset(edge) for edge in edges}
    first, second = shapely.STRtree(shapes).query(shapes, predicate="intersects")
    for a, b in zip(first.tolist(), second.tolist()):
        if a >= b or frozenset((a, b)) in linked:
            continue
        shared = shapely.area(shapely.intersection(shapes[a], shapes[b]))
        for lane in (a, b):
            found[lane] |= shared > OVERLAP_SHARE * shapes[lane].area
    return found


def _connected(is_connector: NDArray[np.bool_], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Lanes, and connectors that have both a predecessor and a successor inside the crop."""
    has_source, has_target = {b for _, b in edges}, {a for a, _ in edges}
    return [i for i, way in enumerate(is_connector) if not way or (i in has_source and i in has_target)]


def _buffered(centre: NDArray[np.float64], half_width: float) -> shapely.Polygon:
    return shapely.LineString(centre).buffer(half_width, cap_style="flat")


def _fill_polygons(lanes: Sequence[_Lane], edges: Sequence[tuple[int, int]]) -> None:
    """Gives every lane a polygon: its own, or the centre line buffered by the mean half width of its neighbours."""
    half = {
        i: lane.half_width or 0.5 * lane.polygon.area / shapely.LineString(lane.centre).length
        for i, lane in enumerate(lanes)
        if lane.half_width or lane.polygon is not None
    }
    linked: dict[int, list[int]] = defaultdict(list)
    for a, b in edges:
        linked[a].append(b)
        linked[b].append(a)
    for i, lane in enumerate(lanes):
        if lane.polygon is None:
            around = [half[j] for j in linked[i] if j in half]
            width = lane.half_width or (float(np.mean(around)) if around else DEFAULT_HALF_WIDTH_M)
            buffered = _buffered(lane.centre, float(np.clip(width, 1.2, 3.5)))
            lane.polygon = _largest(buffered) or shapely.LineString(lane.centre).buffer(0.5)


def _side_by_side(lanes: Sequence[_Lane]) -> NDArray[np.int64]:
    """[lanes] roadblock of each lane."""
    if not lanes:
        return np.empty(0, dtype=np.int64)
    polygons = [lane.polygon for lane in lanes]
    first, second = shapely.STRtree(polygons).query(polygons, predicate="dwithin", distance=0.5)
    pairs = [(a, b) for a, b in zip(first.tolist(), second.tolist()) if a < b and _is_beside(lanes[a], lanes[b])]
    return _components(len(lanes), pairs)


def _is_beside(a: _Lane, b: _Lane) -> bool:
    heading_a, heading_b = (polyline_headings(lane.centre) for lane in (a, b))
    middle = float(heading_a[len(heading_a) // 2])
    if abs(float(wrap_angle(middle - heading_b[len(heading_b) // 2]))) > SIDE_BY_SIDE_RAD:
        return False
    for end in (0, -1):
        direction = np.array([np.cos(heading_a[end]), np.sin(heading_a[end])])
        if abs(float((a.centre[end] - b.centre[end]) @ direction)) > SIDE_BY_SIDE_ENDS_M:
            return False
    lengths = [shapely.LineString(lane.centre).length for lane in (a, b)]
    border = shapely.intersection(a.polygon.boundary, b.polygon.buffer(0.5))
    return shapely.length(border) > 0.5 * min(lengths)


def _components(count: int, pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """[count] number of the connected component, in order of first appearance."""
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _block_connectors(
    lane_count: int, way_count: int, blocks: NDArray[np.int64], lane_edges: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(roadblock connector of each connector, block edges). A connector of several links goes by its first ones."""
    before: dict[int, int] = {}
    after: dict[int, int] = {}
    direct: set[tuple[int, int]] = set()
    for source, target in lane_edges.tolist():
        if source < lane_count <= target:
            before.setdefault(target - lane_count, int(blocks[source]))
        elif target < lane_count <= source:
            after.setdefault(source - lane_count, int(blocks[target]))
        elif target < lane_count and source < lane_count and blocks[source] != blocks[target]:
            direct.add((int(blocks[source]), int(blocks[target])))
    keys = [(before.get(way, -1), after.get(way, -1)) for way in range(way_count)]
    # Connectors that follow one another have no roadblock on one side: each is a block of its own.
    names = [key if min(key) >= 0 else (*key, way) for way, key in enumerate(keys)]
    numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
    of_way = np.array([numbers[name] for name in names], dtype=np.int64)
    count = int(blocks.max()) + 1 if len(blocks) else 0
    edges = set(direct)
    for source, target in lane_edges.tolist():
        ends = [int(blocks[n]) if n < lane_count else count + int(of_way[n - lane_count]) for n in (source, target)]
        if ends[0] != ends[1]:
            edges.add((ends[0], ends[1]))
    return of_way, sorted_edges(sorted(edges))


def _unions(prefix: str, polygons: Sequence[shapely.Polygon], group: NDArray[np.int64]) -> PolygonLayer:
    count = int(group.max()) + 1 if len(group) else 0
    merged = [_closed([polygons[i] for i in np.flatnonzero(group == k)]) for k in range(count)]
    return PolygonLayer.from_shapely([f"{prefix}{k}" for k in range(count)], merged)


def _closed(polygons: Sequence[shapely.Polygon]) -> shapely.Polygon:
    """Union whose gaps narrower than 2 CLOSING_M are filled, without holes; its largest part."""
    closed = (
        shapely.union_all(list(polygons)).buffer(CLOSING_M, join_style="mitre").buffer(-CLOSING_M, join_style="mitre")
    )
    part = _largest(closed) or max(polygons, key=lambda polygon: polygon.area)
    return shapely.Polygon(part.exterior)


def _overlapping(polygons: Sequence[shapely.Polygon]) -> list[list[shapely.Polygon]]:
    if not polygons:
        return []
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    pairs = [
        (a, b)
        for a, b in zip(first.tolist(), second.tolist())
        if a < b and shapely.area(shapely.intersection(polygons[a], polygons[b])) > 0.1
    ]
    group = _components(len(polygons), pairs)
    return [[polygons[i] for i in np.flatnonzero(group == k)] for k in range(int(group.max()) + 1)]


def _carparks(parked: Sequence[shapely.Polygon], road: shapely.Geometry) -> list[shapely.Polygon]:
    shapely.prepare(road)
    off_road = [polygon.buffer(0.6) for polygon in parked if not road.intersects(polygon.centroid)]
    if not off_road:
        return []
    joined = shapely.union_all(off_road).buffer(2.0).buffer(-2.0)
    return [shapely.Polygon(part.exterior) for part in shapely.get_parts(joined)]


def _layer(lanes: Sequence[_Lane], roadblock: NDArray[np.int64]) -> LaneLayer:
    return LaneLayer.from_arrays(
        [lane.fid for lane in lanes],
        [[shapely.get_coordinates(lane.polygon.exterior)] for lane in lanes],
        [lane.centre for lane in lanes],
        roadblock,
        [lane.speed_limit for lane in lanes],
    )


def _painted(features: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, NDArray[np.float64], int]]:
    lines = []
    for fid, feature in features.items():
        kind = str(feature.get("type", ""))
        if (kind.startswith("ROAD_LINE") or kind.startswith("ROAD_EDGE")) and len(feature.get("polyline", ())) > 1:
            stated = ("YELLOW" in kind, "BROKEN" in kind or "DASHED" in kind)
            lines.append((str(fid), _points(feature["polyline"], fid, "polyline"), _LINE_KINDS[stated]))
    return lines


def _polygons(
    features: Mapping[str, Mapping[str, Any]], kind: str, near: shapely.Geometry
) -> list[tuple[str, shapely.Polygon]]:
    found = []
    for fid, feature in features.items():
        if feature.get("type") == kind and len(feature.get("polygon", ())) >= 3:
            polygon = _largest(shapely.make_valid(shapely.Polygon(_points(feature["polygon"], fid, "polygon"))))
            if polygon is not None and near.intersects(polygon):
                found.append((str(fid), polygon))
    return found
