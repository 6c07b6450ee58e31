"""One scene -> one record of the metric cache: route, centreline, map patch, tracks, PDM-Closed, human."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.maps.centerline import Centerline, route_centerline, starting_lane
from navsim_ext.maps.drivable import LANE_KINDS, DrivableMap, MapKind, drivable_map
from navsim_ext.maps.route import Route, corrected_route
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.metric_cache.map_table import table_rows
from navsim_ext.pdm import observation
from navsim_ext.pdm.areas import make_surroundings
from navsim_ext.pdm.closed.forecast import forecast
from navsim_ext.pdm.closed.plan import ClosedPlan, plan_closed
from navsim_ext.pdm.closed.rollout import NUM_TRAJECTORY_STEPS, ego_boxes, ego_centers
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.reactive.agents import traffic_agents
from navsim_ext.pdm.record import NUM_FRAMES, NUM_FRAMES_V2, SceneMetricCache, encode_text
from navsim_ext.pdm.references import references_from_predictions, references_from_trajectory
from navsim_ext.pdm.resident import ResidentScene, indexed, prepare
from navsim_ext.pdm.scorer import score_proposals
from navsim_ext.pdm.simulator import simulate
from navsim_ext.pdm.traffic_agents import TrafficAgents
from navsim_ext.pdm.version import VERSIONS
from navsim_ext.scene import OBJECT_TYPES, Scene

HUMAN_POSES = 8
VEHICLE = OBJECT_TYPES.index("vehicle")


@dataclass(frozen=True, eq=False)
class MapContext:
    """A map and its polygon table; kept between scenes, because the scorer indexes a table once."""

    name: str  # of the table in the cache: the location, for reconstructed maps with the log's name
    vector_map: VectorMap
    table: PolygonTable


@dataclass(frozen=True, eq=False)
class SceneRoad:
    """What the map says about a scene: the way that PDM-Closed takes through it, and the patch the scorer sees."""

    route: Route
    drivable: DrivableMap
    start_lane: int
    centerline: Centerline
    rows: NDArray[np.int32]  # [P] polygons of the patch in the map's table
    on_route: NDArray[np.bool_]  # [P]


def build_scene(scene: Scene, context: MapContext, versions: Sequence[str] = VERSIONS) -> SceneMetricCache:
    """The record of a scene for both versions, or for "v2" alone where the scene's 4 s are all that is known.

    Raises DataError (or a kind of it: RouteError, EmptyMapPatch) saying why the scene cannot be cached, UnscorableScene
    where the map around it is degenerate. Only the scene decides: scenes that were built before have no influence.
    """
    try:
        return _build(scene, context, versions).validate()
    except shapely.GEOSException as error:
        raise DataError(
            f"log {scene.log_name}, scene {scene.token}: the map around it has an invalid geometry ({error})"
        ) from error


def _build(scene: Scene, context: MapContext, versions: Sequence[str]) -> SceneMetricCache:
    states = observation.ego_states(scene)
    tracks = observation.tracks(scene, NUM_FRAMES if "v1" in versions else NUM_FRAMES_V2)
    road = read_road(context.vector_map, states[-1], scene.roadblock_ids)
    red_fids, red_frames = observation.red_connectors(scene, _route_connectors(context.vector_map, scene))
    agents = _agents(context.vector_map, states[-1], tracks)
    record = SceneMetricCache(
        token=scene.token,
        log_name=scene.log_name,
        map_location=context.name,
        map_label=context.vector_map.label,
        time_us=int(scene.timestamps_us[scene.now]),
        ego_state=states[-1],
        past_time_us=scene.timestamps_us[: scene.num_history].astype(np.int64),
        past_states=states,
        human_poses=observation.human_poses(scene, HUMAN_POSES),
        centerline=road.centerline.poses,
        map_polygons=road.rows,
        map_on_route=road.on_route,
        track_poses=tracks.poses,
        track_velocities=tracks.velocities,
        track_sizes=tracks.sizes,
        track_types=tracks.types,
        red_polygons=_connector_rows(context.vector_map, red_fids),
        red_frames=red_frames,
        pdm_closed=np.zeros((len(VERSIONS), NUM_TRAJECTORY_STEPS, 3)),
        pdm_closed_index=np.zeros(len(VERSIONS), dtype=np.int8),
        pdm_progress=np.full(len(VERSIONS), np.nan),
        pdm_multiplier=np.full(len(VERSIONS), np.nan),
        human_sub_scores=np.full(HUMAN_POSES, np.nan),
        text=encode_text(
            route_lane_ids=[context.vector_map.lane_node_fid(node) for node in road.route.lanes],
            route_roadblock_ids=[context.vector_map.block_node_fid(node) for node in road.route.blocks],
            track_tokens=tracks.tokens,
        ),
        agent_rows=agents.rows,
        agent_kinds=agents.kinds,
        agent_path=agents.path,
        agent_start=agents.start,
        path_offsets=agents.path_offsets,
        path_vertices=agents.path_vertices,
    )
    plan = closed_plan(scene, context, road, states[-1])
    known = np.isin(VERSIONS, list(versions))[:, None, None]
    record = replace(record, pdm_closed=np.where(known, plan.trajectories, np.nan), pdm_closed_index=plan.chosen)
    return with_closed_scores(record, prepare(record, context.table))


def _agents(vector_map: VectorMap, ego_state: NDArray[np.float64], tracks: observation.Tracks) -> TrafficAgents:
    """What reactive traffic needs of the map: the vehicles of the annotation now, on their lanes."""
    rows = np.flatnonzero((tracks.types == VEHICLE) & np.isfinite(tracks.poses[:, 0]).all(axis=-1))
    now, sizes, velocities = tracks.poses[rows, 0], tracks.sizes[rows], tracks.velocities[rows]
    return traffic_agents(vector_map, ego_state[:3], rows, now, sizes, velocities)


def read_road(vector_map: VectorMap, ego_state: NDArray[np.float64], roadblock_ids: tuple[str, ...]) -> SceneRoad:
    """Route, map patch, start lane and centreline for an ego state [11]. Raises EmptyMapPatch or RouteError."""
    rear_axle = ego_state[:3]
    center = ego_centers(rear_axle)
    drivable = drivable_map(vector_map, center)
    route = corrected_route(vector_map, rear_axle, roadblock_ids)
    footprint = shapely.Polygon(ego_boxes(rear_axle))
    start = starting_lane(vector_map, route, drivable, rear_axle, center, footprint)
    fids = {vector_map.lane_node_fid(node) for node in route.lanes}
    on_route = np.isin(drivable.kinds, [int(kind) for kind in LANE_KINDS]) & np.isin(drivable.fids, list(fids))
    rows = table_rows(vector_map, drivable.kinds, drivable.positions)
    return SceneRoad(route, drivable, start, route_centerline(vector_map, route, start), rows, on_route)


def closed_plan(scene: Scene, context: MapContext, road: SceneRoad, ego_state: NDArray[np.float64]) -> ClosedPlan:
    """PDM-Closed in this scene; its world is the frame now, red connectors those of the corrected route."""
    vector_map = context.vector_map
    on_route = {vector_map.lane_node_fid(node): node for node in road.route.lanes}
    red = [fid for fid, is_red in scene.traffic_lights[scene.now] if is_red and fid in on_route]
    nodes = [vector_map.lane_node_layer(on_route[fid]) for fid in red]
    footprint = ego_boxes(ego_state[:3])
    world = forecast(
        observation.objects_at(scene, scene.now),
        ego_centers(ego_state[:3]),
        shapely.Polygon(footprint),
        [(fid, layer.polygons[position]) for fid, (layer, position) in zip(red, nodes)],
    )
    surroundings = make_surroundings(
        indexed(context.table), road.rows, context.table.types[road.rows], road.on_route, road.centerline.poses
    )
    layer, position = vector_map.lane_node_layer(road.start_lane)
    return plan_closed(
        road.centerline.poses,
        ego_state,
        float(layer.speed_limit[position]),
        world,
        surroundings,
        _connector_rows(vector_map, red),
    )


def with_closed_scores(record: SceneMetricCache, resident: ResidentScene) -> SceneMetricCache:
    """Fills what every prediction is measured against: PDM-Closed's progress and multiplier per version, and the
    human's own v2 sub-scores (without history comfort, progress relative to itself). NaN for unknown versions."""
    progress, multiplier = np.full(len(VERSIONS), np.nan), np.full(len(VERSIONS), np.nan)
    for version in record.versions:
        v = VERSIONS.index(version)
        reference = references_from_trajectory(record.pdm_closed[v], record.time_us)
        states = simulate(reference[None], record.ego_state)
        scores = score_proposals(states, resident.surroundings, resident.traffic, version)
        progress[v], multiplier[v] = scores.progress[0], scores.multiplicative[0].prod()
    human = np.full(HUMAN_POSES, np.nan)
    if "v2" in record.versions and np.isfinite(record.human_poses).all():
        references = references_from_predictions(record.human_poses[None], record.ego_state, record.time_us)
        states = simulate(references, record.ego_state)
        scores = score_proposals(states, resident.surroundings, resident.traffic, "v2")
        nc, dac, tlc, ddc = scores.multiplicative[0]
        human = np.array([nc, dac, ddc, tlc, *scores.weighted[0]])
    return replace(record, pdm_progress=progress, pdm_multiplier=multiplier, human_sub_scores=human)


def _route_connectors(vector_map: VectorMap, scene: Scene) -> set[str]:
    """Lanes and connectors of the roadblocks of the route as recorded."""
    blocks = Route.from_blocks(vector_map, [vector_map.block_node_by_fid[fid] for fid in scene.roadblock_ids])
    return {vector_map.lane_node_fid(node) for node in blocks.lanes}


def _connector_rows(vector_map: VectorMap, fids: list[str]) -> NDArray[np.int32]:
    """Table rows of lanes or connectors by fid."""
    nodes = np.array([vector_map.lane_node_by_fid[fid] for fid in fids], dtype=np.int64)
    lanes = len(vector_map.lanes)
    kinds = np.where(nodes < lanes, int(MapKind.LANE), int(MapKind.LANE_CONNECTOR))
    return table_rows(vector_map, kinds, np.where(nodes < lanes, nodes, nodes - lanes))
