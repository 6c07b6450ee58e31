"""Writes a town as a nuPlan map: ``<location>/<version>/map.gpkg`` with every layer and column the devkit reads.

Geometry is stored in EPSG:4326 and the UTM zone stands in layer ``meta``, as in nuPlan. The bytes depend on the
town alone: GeoPackage's change stamps are fixed through GDAL's OGR_CURRENT_DATE.
Connectors keep nuPlan's naming: ``exit_lane_fid`` is the lane that a connector comes from, ``entry_lane_fid`` the
lane it leads into.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyogrio
import pyproj
import shapely

from navsim_ext.files import atomic_file, write_json_atomic
from navsim_ext.scene import MAP_LOCATIONS
from navsim_ext.synthetic import roads
from navsim_ext.synthetic.fids import Fids
from navsim_ext.synthetic.intersections import ISLAND_RADIUS, TURNS
from navsim_ext.synthetic.town import LANE_WIDTH, SHOULDER_WIDTH, Town, make_town

MAP_VERSIONS = dict(zip(MAP_LOCATIONS, ("9.17.1964", "9.12.1817", "9.15.1915", "9.17.1937")))
CREATOR = "synthetic"
logging.getLogger("pyogrio").setLevel(logging.WARNING)  # it tells of every layer
STAMP = "2021-06-01T00:00:00.000Z"
STOP_TRAFFIC_LIGHT, STOP_YIELD = 2, 4  # nuPlan's stop_polygon_type_fid
_MOUTH = (6.0, 1.0)  # m: a junction's area reaches this far into its arms, and is this much wider where they begin
_SWEPT = 2.6  # m to both sides of every connector that belong to the junction's area

Rows = list[dict[str, Any]]


def map_path(maps_root: Path, location: str) -> Path:
    return maps_root / location / MAP_VERSIONS[location] / "map.gpkg"


def write_maps(maps_root: Path, seed: int) -> None:
    """Writes all four locations and ``nuplan-maps-v1.0.json``; files that are already there are left alone."""
    maps_root.mkdir(parents=True, exist_ok=True)
    for location in MAP_LOCATIONS:
        path = map_path(maps_root, location)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_gpkg(make_town(location, seed), path)
    eye = np.eye(4).tolist()
    layers = {"drivable_area": {"transform_matrix": eye}, "Intensity": {"shape": [10, 10], "transform_matrix": eye}}
    index = {location: {"version": version, "layers": layers} for location, version in MAP_VERSIONS.items()}
    write_json_atomic(maps_root / "nuplan-maps-v1.0.json", index)


def write_gpkg(town: Town, path: Path) -> None:
    """Writes one town atomically."""
    with atomic_file(path, suffix=".tmp.gpkg") as temporary:
        _write_layers(town, temporary)


def _write_layers(town: Town, path: Path) -> None:
    to_degrees = pyproj.Transformer.from_crs(town.epsg, 4326, always_xy=True)

    def degrees(xy: np.ndarray) -> np.ndarray:
        return np.column_stack(to_degrees.transform(*(xy + town.origin).T))

    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": STAMP})
    try:
        for name, rows in layers_of(town).items():
            geometry = shapely.transform(np.array([row.pop("geometry") for row in rows], dtype=object), degrees)
            frame = geopandas.GeoDataFrame(rows, geometry=geometry, crs=4326)
            pyogrio.write_dataframe(
                frame, path, layer=name, driver="GPKG", append=path.exists(), geometry_type=_kind(geometry)
            )
        meta = pd.DataFrame(
            {
                "key": ["projectedCoordSystem", "mapName", "synthetic", "seed"],
                "value": [f"EPSG:{town.epsg}", town.location, "1", str(town.seed)],
            }
        )
        pyogrio.write_dataframe(meta, path, layer="meta", driver="GPKG", append=True)
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})


def _kind(geometry: np.ndarray) -> str:
    return geometry[0].geom_type


def layers_of(town: Town) -> dict[str, Rows]:
    """Rows of every spatial layer; ``geometry`` is shapely in the town's frame."""
    fids = Fids(town)
    layers: dict[str, Rows] = {"baseline_paths": [], "boundaries": []}
    _lanes(town, fids, layers)
    _connectors(town, fids, layers)
    _junctions(town, fids, layers)
    _kerbside(town, fids, layers)
    return layers


def _boundary(layers: dict[str, Rows], fids: Fids, line: roads.Line, kind: int) -> int:
    fid = fids.new()
    layers["boundaries"].append(
        {
            "fid": fid,
            "boundary_segment_fids": "",
            "has_reflectors": False,
            "boundary_type_fid": kind,
            "creator_id": CREATOR,
            "geometry": shapely.LineString(line),
        }
    )
    return fid


def _baseline(layers: dict[str, Rows], fids: Fids, line: roads.Line, lane: float, connector: float) -> None:
    layers["baseline_paths"].append(
        {
            "fid": fids.new(),
            "path_type_fid": 0,
            "creator_id": CREATOR,
            "lane_fid": lane,
            "lane_connector_fid": connector,
            "geometry": shapely.LineString(line),
        }
    )


def _ring(left: roads.Line, right: roads.Line) -> shapely.Polygon:
    return shapely.Polygon(np.concatenate([left, right[::-1]]))


def _lanes(town: Town, fids: Fids, layers: dict[str, Rows]) -> None:
    lanes: Rows = []
    groups: Rows = []
    segments: Rows = []
    for road in town.roads:
        geometry = shapely.Polygon(roads.strip(road.centre, road.half_width, -road.half_width))
        segments.append({"fid": fids.road(road.index), "creator_id": CREATOR, "geometry": geometry})
    for group, members in town.lanes_of_group.items():
        # Lines between lanes are shared by the two lanes that they divide: left edge of lane i+1 = right edge of i.
        edges = [_boundary(layers, fids, members[0].left, 0)]
        for lane in members:
            last = lane is members[-1]
            edges.append(_boundary(layers, fids, lane.right, 2 if last else 1))
        for lane, left, right in zip(members, edges, edges[1:]):
            _baseline(layers, fids, lane.baseline, float(fids.lane(lane.index)), np.nan)
            lanes.append(
                {
                    "fid": fids.lane(lane.index),
                    "lane_fid": fids.lane(lane.index),
                    "lane_group_fid": fids.group(group),
                    "lane_index": lane.lane_index + 1,
                    "creator_id": CREATOR,
                    "name": f"road {lane.road}",
                    "road_type_fid": 0,
                    "lane_type_fid": 0,
                    "width": LANE_WIDTH,
                    "left_offset": 0.0,
                    "right_offset": 0.0,
                    "min_speed": 0.0,
                    "max_speed": lane.speed,
                    "stops": 0,
                    "left_boundary_fid": left,
                    "right_boundary_fid": right,
                    "speed_limit_mps": lane.speed,
                    "left_has_reflectors": False,
                    "right_has_reflectors": False,
                    "from_edge_fid": 0,
                    "to_edge_fid": 0,
                    "geometry": _ring(lane.left, lane.right),
                }
            )
        groups.append(
            {
                "fid": fids.group(group),
                "road_segment_fid": fids.road(members[0].road),
                "from_edge_fid": 0,
                "to_edge_fid": 0,
                "left_boundary_fid": edges[0],
                "right_boundary_fid": edges[-1],
                "creator_id": CREATOR,
                "geometry": _ring(members[0].left, roads.offset(members[-1].right, -SHOULDER_WIDTH)),
            }
        )
    layers |= {"lanes_polygons": lanes, "lane_groups_polygons": groups, "road_segments": segments}


def _connectors(town: Town, fids: Fids, layers: dict[str, Rows]) -> None:
    connectors: Rows = []
    polygons: Rows = []
    members: dict[tuple[int, int], list[shapely.Polygon]] = {}
    for c in town.connectors:
        source, target = town.lanes[c.from_lane], town.lanes[c.to_lane]
        left, right = _boundary(layers, fids, c.left, 3), _boundary(layers, fids, c.right, 3)
        _baseline(layers, fids, c.baseline, np.nan, float(fids.connector(c.index)))
        connectors.append(
            {
                "fid": fids.connector(c.index),
                "exit_lane_group_fid": fids.group(source.group),
                "exit_lane_fid": fids.lane(c.from_lane),
                "entry_lane_group_fid": fids.group(target.group),
                "entry_lane_fid": fids.lane(c.to_lane),
                "lane_group_connector_fid": fids.group_connector(c.index),
                "intersection_fid": fids.intersection(c.node),
                "to_edge_fid": 0,
                "turn_type_fid": TURNS.index(c.turn),
                "bulb_fids": "",
                "traffic_light_stop_line_fids": str(stop_fid(fids, c.node, c.from_arm)) if c.phase >= 0 else "",
                "overlap": 0,
                "creator_id": CREATOR,
                "left_has_reflectors": False,
                "right_has_reflectors": False,
                "speed_limit_mps": c.speed,
                "geometry": shapely.LineString(c.baseline),
            }
        )
        polygon = _ring(c.left, c.right)
        polygons.append(
            {
                "fid": fids.new(),
                "lane_connector_fid": fids.connector(c.index),
                "left_boundary_fid": left,
                "right_boundary_fid": right,
                "geometry": polygon,
            }
        )
        members.setdefault((source.group, target.group), []).append(polygon)
    groups: Rows = []
    for pair in fids.group_pairs:
        first = next(c for c in town.connectors if (town.lanes[c.from_lane].group, town.lanes[c.to_lane].group) == pair)
        groups.append(
            {
                "fid": fids.group_connector(first.index),
                "intersection_fid": fids.intersection(first.node),
                "from_lane_group_fid": fids.group(pair[0]),
                "to_lane_group_fid": fids.group(pair[1]),
                "from_edge_fid": 0,
                "to_edge_fid": 0,
                "left_boundary_fid": 0,
                "right_boundary_fid": 0,
                "creator_id": CREATOR,
                "geometry": _union(members[pair]),
            }
        )
    layers |= {
        "lane_connectors": connectors,
        "gen_lane_connectors_scaled_width_polygons": polygons,
        "lane_group_connectors": groups,
    }


def _union(polygons: list[shapely.Polygon]) -> shapely.Polygon:
    """One polygon over parallel connectors, closing hairline gaps between them."""
    if len(polygons) == 1:
        return polygons[0]
    merged = shapely.union_all([polygon.buffer(0.02, join_style="mitre") for polygon in polygons])
    return merged if merged.geom_type == "Polygon" else merged.convex_hull


def stop_fid(fids: Fids, node: int, arm: int) -> int:
    """Id of the stop polygon of an arm; a range of its own because connectors refer to it before it is written."""
    return fids.intersection(node) + 2_000 + 100 * arm


def _junctions(town: Town, fids: Fids, layers: dict[str, Rows]) -> None:
    intersections: Rows = []
    stops: Rows = []
    lights: Rows = []
    for node in town.nodes:
        intersections.append(
            {
                "fid": fids.intersection(node.index),
                "creator_id": CREATOR,
                "intersection_type_fid": {"signal": 1, "give_way": 2, "roundabout": 2}[node.kind],
                "is_mini": node.kind != "signal",
                "geometry": junction_polygon(town, node.index),
            }
        )
        for arm, (road_index, outgoing) in enumerate(node.arms):
            road = town.roads[road_index]
            if node.kind == "give_way" and node.phases[arm] == 0:
                continue
            inward = road.centre[::-1] if outgoing else road.centre
            end = roads.arc_lengths(inward)[-1]
            ring = roads.strip(roads.cut(inward, end - 1.2, end), 0.0, -road.lanes * LANE_WIDTH)
            stops.append(
                {
                    "fid": stop_fid(fids, node.index, arm),
                    "creator_id": CREATOR,
                    "stop_polygon_type_fid": STOP_TRAFFIC_LIGHT if node.kind == "signal" else STOP_YIELD,
                    "intersection_fids": str(fids.intersection(node.index)),
                    "lane_fids": ",".join(
                        str(fids.lane(lane.index))
                        for lane in town.lanes
                        if lane.road == road_index and lane.end_node == node.index and lane.forward != outgoing
                    ),
                    "layer_fid": 0,
                    "geometry": shapely.Polygon(ring),
                }
            )
            if node.kind == "signal":
                heading = float(roads.headings(inward)[-1])
                lights.append(
                    {
                        "fid": fids.new(),
                        "traffic_light_type_fid": 0,
                        "ori_mean_yaw": heading,
                        "ori_mean_pitch": 0.0,
                        "ori_mean_roll": 0.0,
                        "creator_id": CREATOR,
                        "geometry": shapely.Point(ring[1] + 1.0 * roads.unit(heading - np.pi / 2)),
                    }
                )
    layers |= {"intersections": intersections, "stop_polygons": stops, "traffic_lights": lights}


def junction_polygon(town: Town, node: int) -> shapely.Polygon:
    """Hull over the mouths of all arms and all that connectors sweep; a roundabout has its island as a hole."""
    corners = []
    for road_index, outgoing in town.nodes[node].arms:
        road = town.roads[road_index]
        line = road.centre if outgoing else road.centre[::-1]
        reach, flare = _MOUTH
        for at, half in ((0.0, road.half_width + flare), (reach, road.half_width)):
            corners.append(roads.strip(roads.cut(line, at, at + 0.1), half, -half))
    hull = shapely.convex_hull(shapely.MultiPoint(np.concatenate(corners)))
    swept = [shapely.LineString(c.baseline).buffer(_SWEPT) for c in town.connectors if c.node == node]
    hull = shapely.simplify(shapely.union_all([hull, *swept]), 0.02)
    if town.nodes[node].kind != "roundabout":
        return hull
    return hull.difference(shapely.Point(town.nodes[node].position).buffer(ISLAND_RADIUS, quad_segs=12))


def _kerbside(town: Town, fids: Fids, layers: dict[str, Rows]) -> None:
    def rows(rings, **columns) -> Rows:
        return [
            {"fid": fids.new(), "creator_id": CREATOR, **columns, "geometry": shapely.Polygon(ring)} for ring in rings
        ]

    carparks = [ring for _, _, ring in town.parking] + list(town.lots)
    layers["carpark_areas"] = rows(carparks, heading=0.0, parking_type_fid=0)
    layers["generic_drivable_areas"] = rows(town.driveways, generic_drivable_area_type_fid=0)
    layers["walkways"] = rows(town.walkways)
    layers["crosswalks"] = [
        {
            "fid": fids.new(),
            "creator_id": CREATOR,
            "intersection_fids": "" if crossing.node < 0 else str(fids.intersection(crossing.node)),
            "lane_fids": ",".join(str(fids.lane(lane.index)) for lane in town.lanes if lane.road == crossing.road),
            "is_marked": 1,
            "geometry": shapely.Polygon(crossing.ring),
        }
        for crossing in town.crosswalks
    ]
