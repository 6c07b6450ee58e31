"""What can be known about a scene, computed from log and map: the ground that questions and answers stand on.

Distances in metres along the lane ahead of the ego car, speeds in m/s. "Visible" means: shows in the front camera's
picture, after occlusion. A fact is None where the scene leaves it open; then nobody is asked about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
import shapely.ops
from numpy.typing import NDArray

from navsim_ext.frames import POSE_INTERVAL_S, rotate, to_global, wrap_angle
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.prompts import COMMAND_WORDS
from navsim_ext.questions.meta_actions import Decision, DecisionRules, LaneAhead, beside, decide
from navsim_ext.rendering.camera import CameraView
from navsim_ext.rendering.ground import lane_width
from navsim_ext.rendering.objects import braking_tracks
from navsim_ext.rendering.renderer import render_instances, scene_camera
from navsim_ext.rendering.signals import Signal, signals_near
from navsim_ext.scene import COMMANDS, Annotations, Scene

EGO_FRONT_M = 4.049  # rear axle to front bumper
PATH_M = 90.0  # how far ahead the lane is followed
LEAD_M, LEAD_OPEN_M = 60.0, 70.0  # a gap between the two leaves open whether there is a lead vehicle
LEAD_LATERAL_M = 1.6
PEDESTRIAN_M, PEDESTRIAN_OPEN_M, PEDESTRIAN_LATERAL_M = 35.0, 45.0, 12.0
BESIDE_M, BESIDE_OPEN_M = 2.5, 4.0  # from the edge of the road
LIGHT_M, LIGHT_OPEN_M = 75.0, 140.0
LIGHT_FACING_RAD, LIGHT_OBLIQUE_RAD = np.radians(35.0), np.radians(75.0)  # in between one may say either
VISIBLE_SIZE = (480, 270)
VISIBLE_PIXELS = {"vehicle": 25, "pedestrian": 8, "bicycle": 8}  # at VISIBLE_SIZE
ROAD_USERS, ROAD_USERS_M = 4, 50.0  # how many are named at most, and up to which distance
NAVIGATION_M = 200.0  # how far ahead the navigation looks
ROUTE_TURN_RAD = 0.6  # a junction that the route leaves in another direction
HORIZON_POSES = 8


@dataclass(frozen=True)
class Lead:
    """The vehicle ahead in the ego car's lane."""

    gap: float  # m, bumper to bumper
    speed: float  # m/s
    braking: bool
    earlier_gap: float | None  # m, one frame before


@dataclass(frozen=True)
class RoadUser:
    """A vehicle, pedestrian or bicycle that shows in the picture; ego frame, m, of its middle."""

    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class Facts:
    """None = open. ``lead`` is absent (None) and known when ``lead_known``."""

    ego_speed: float
    command: str
    lead: Lead | None
    lead_known: bool
    light: str | None  # red, green, none
    pedestrian: str | None  # road, beside, none
    left: str | None  # same, oncoming, none
    right: str | None
    navigation: str  # of the command, and where the route turns
    road: LaneAhead
    decision: Decision  # what was driven, by the ``rules``
    rules: DecisionRules
    road_users: tuple[RoadUser, ...] = ()  # visible ones, nearest first


def facts_of(scene: Scene, vector_map: VectorMap, camera: str = "CAM_F0", rules: DecisionRules | None = None) -> Facts:
    """All facts of the frame now. Needs 8 future frames for the decision (DataError otherwise)."""
    now, rules = scene.now, rules or DecisionRules()
    ego, objects = scene.ego_global[now], scene.annotations[now]
    path = lane_path(vector_map, ego, scene.roadblock_ids)
    view = scene_camera(scene, camera, VISIBLE_SIZE)
    lidar2ego = scene.lidar2ego if camera in scene.cameras else None
    instances = render_instances(
        vector_map, objects, ego, scene.traffic_lights[now], view, VISIBLE_SIZE, lidar2ego=lidar2ego
    )
    pixels = np.bincount(np.maximum(instances, 0).ravel(), minlength=len(objects.names) + 1)[1:]
    lead, lead_known = _lead(scene, path, pixels)
    left, right = _neighbours(vector_map, ego, path)
    ego_speed = float(np.hypot(*scene.ego_dynamics[now, :2]))
    command = COMMANDS[int(scene.commands[now].argmax())]
    known = start_lane(vector_map, ego, scene.roadblock_ids) is not None
    road = LaneAhead.of(vector_map, ego, path, known)
    route = lane_path(vector_map, ego, scene.roadblock_ids, NAVIGATION_M)
    poses = scene.future_poses(max(HORIZON_POSES, rules.poses))
    return Facts(
        ego_speed=ego_speed,
        command=command,
        lead=lead,
        lead_known=lead_known,
        light=_light(scene, vector_map, CameraView.of(view, lidar2ego)),
        pedestrian=_pedestrian(scene, vector_map, path, pixels),
        left=left,
        right=right,
        navigation=navigation(command, LaneAhead.of(vector_map, ego, route, known)),
        road=road,
        decision=decide(poses, ego_speed, road, rules),
        rules=rules,
        road_users=_road_users(objects, pixels),
    )


def navigation(command: str, route: LaneAhead) -> str:
    """The command, and the first junction at which the route turns: ``TURN LEFT, left turn in 40 m``."""
    words = COMMAND_WORDS[command]
    if not route.known:
        return words
    step = np.diff(route.centre, axis=0)
    heading = np.unwrap(np.arctan2(step[:, 1], step[:, 0]))
    arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(step, axis=1))])
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], route.junction, [False]]).astype(int)))
    for begin, end in zip(bounds[::2], bounds[1::2]):
        if end == len(arc):  # the path ends amid the junction: where it leaves is not known
            break
        turn = heading[min(end, len(heading) - 1)] - heading[max(begin - 1, 0)]
        if abs(turn) > ROUTE_TURN_RAD:
            return f"{words}, {'left' if turn > 0 else 'right'} turn in {round(arc[begin], -1):.0f} m"
    return f"{words}, no turn for {round(arc[-1], -1):.0f} m"


def _baseline(vector_map: VectorMap, node: int) -> NDArray[np.float64]:
    layer, position = vector_map.lane_node_layer(node)
    return layer.baseline_of(position)


def start_lane(vector_map: VectorMap, ego: NDArray[np.float64], roadblock_ids: tuple[str, ...]) -> int | None:
    """The lane node that the ego car drives on, one of the route if there is one; None off the map."""
    point = shapely.Point(ego[:2])
    count = len(vector_map.lanes)
    nodes = [int(k) for k in vector_map.lanes.query(point)]
    nodes += [int(k) + count for k in vector_map.lane_connectors.query(point)]
    route = set(roadblock_ids)

    def cost(node: int) -> tuple[bool, float]:
        poses = _baseline(vector_map, node)
        nearest = poses[np.linalg.norm(poses[:, :2] - ego[:2], axis=1).argmin()]
        return not _on_route(vector_map, node, route), abs(float(wrap_angle(nearest[2] - ego[2])))

    return min((node for node in nodes if cost(node)[1] < np.pi / 3), key=cost, default=None)


def lane_path(
    vector_map: VectorMap, ego: NDArray[np.float64], roadblock_ids: tuple[str, ...], reach: float = PATH_M
) -> NDArray[np.float64]:
    """[n,2] global: from beside the ego car along its lane and the route, ``reach`` m; straight ahead off the map."""
    node = start_lane(vector_map, ego, roadblock_ids)
    if node is None:
        return np.array([ego[:2], ego[:2] + reach * np.array([np.cos(ego[2]), np.sin(ego[2])])])
    route = set(roadblock_ids)
    line = _baseline(vector_map, node)[:, :2]
    start = shapely.LineString(line).project(shapely.Point(ego[:2]))
    pieces, length, seen = [line], shapely.LineString(line).length - start, {node}
    while length < reach:
        following = [k for k in vector_map.lane_successors[node] if k not in seen]
        if not following:
            break
        heading = _baseline(vector_map, node)[-1, 2]
        turn = {k: abs(float(wrap_angle(_baseline(vector_map, k)[-1, 2] - heading))) for k in following}
        node = min(following, key=lambda k: (not _on_route(vector_map, k, route), turn[k]))
        seen.add(node)
        pieces.append(_baseline(vector_map, node)[:, :2])
        length += shapely.LineString(pieces[-1]).length
    whole = shapely.LineString(np.concatenate(pieces))
    return shapely.get_coordinates(shapely.ops.substring(whole, start, min(start + reach, whole.length)))


def _on_route(vector_map: VectorMap, node: int, route: set[str]) -> bool:
    block = int(vector_map.block_of_lane_node[node])
    return block >= 0 and vector_map.block_node_fid(block) in route


def _global_boxes(scene: Scene, frame: int) -> NDArray[np.float64]:
    """[N,3] x, y, yaw of the annotated boxes of a frame."""
    return to_global(np.asarray(scene.annotations[frame].boxes, np.float64)[:, [0, 1, 6]], scene.ego_global[frame])


def _lead(scene: Scene, path: NDArray[np.float64], pixels: NDArray[np.int64]) -> tuple[Lead | None, bool]:
    """(lead vehicle, known). Unknown: hidden, or at a distance where one may say either."""
    now = scene.now
    objects = scene.annotations[now]
    vehicles = np.flatnonzero(np.array(objects.names, dtype=str) == "vehicle") if objects.names else np.empty(0, int)
    if not len(vehicles):
        return None, True
    poses = _global_boxes(scene, now)[vehicles]
    arc, lateral = beside(path, poses[:, :2])
    same_way = np.cos(poses[:, 2] - _heading_at(path, arc)) > -0.5
    gap = arc - 0.5 * np.asarray(objects.boxes, np.float64)[vehicles, 3] - EGO_FRONT_M
    ahead = np.flatnonzero((np.abs(lateral) < LEAD_LATERAL_M) & same_way & (arc > EGO_FRONT_M) & (gap < LEAD_OPEN_M))
    if not len(ahead):
        return None, True
    nearest = ahead[gap[ahead].argmin()]
    index = int(vehicles[nearest])
    if gap[nearest] > LEAD_M or gap[nearest] < 0.0 or pixels[index] < VISIBLE_PIXELS["vehicle"]:
        return None, False
    token = objects.track_tokens[index]
    braking = token in braking_tracks(scene.annotations[: now + 1], now, POSE_INTERVAL_S)
    speed = float(np.hypot(*objects.velocities[index, :2]))
    return Lead(float(gap[nearest]), speed, braking, _earlier_gap(scene, path, token)), True


def _road_users(objects: Annotations, pixels: NDArray[np.int64]) -> tuple[RoadUser, ...]:
    """The nearest ROAD_USERS of those that show."""
    seen = [
        RoadUser(name, float(box[0]), float(box[1]))
        for name, box, count in zip(objects.names, objects.boxes, pixels, strict=True)
        if count >= VISIBLE_PIXELS.get(name, np.inf) and box[0] > 0.0 and np.hypot(box[0], box[1]) < ROAD_USERS_M
    ]
    return tuple(sorted(seen, key=lambda user: np.hypot(user.x, user.y))[:ROAD_USERS])


def _earlier_gap(scene: Scene, path: NDArray[np.float64], token: str) -> float | None:
    """Gap to the same vehicle one frame earlier; None where it was not seen then."""
    frame = scene.now - 1
    if frame < 0 or token not in scene.annotations[frame].track_tokens:
        return None
    index = scene.annotations[frame].track_tokens.index(token)
    pose = _global_boxes(scene, frame)[index]
    offset = pose[:2] - scene.ego_global[frame, :2]
    length = float(scene.annotations[frame].boxes[index, 3])
    return float(np.hypot(*offset)) - 0.5 * length - EGO_FRONT_M


def _heading_at(path: NDArray[np.float64], arc: NDArray[np.float64]) -> NDArray[np.float64]:
    line = shapely.LineString(path)
    ends = [shapely.get_coordinates(shapely.line_interpolate_point(line, np.clip(arc + d, 0.0, line.length)))
            for d in (-0.5, 0.5)]  # fmt: skip
    step = ends[1] - ends[0]
    return np.arctan2(step[:, 1], step[:, 0])


def _light(scene: Scene, vector_map: VectorMap, view: CameraView) -> str | None:
    """State of the lights ahead that face the ego car and show in the picture; None if that is open to dispute."""
    ego = scene.ego_global[scene.now]
    signals = signals_near(vector_map, scene.traffic_lights[scene.now], ego[:2], LIGHT_OPEN_M)
    states, is_open = set(), False
    for signal in signals:
        x, y = rotate(signal.pose[:2] - ego[:2], -ego[2])
        turn = abs(float(wrap_angle(signal.pose[2] - ego[2])))
        if turn > LIGHT_OBLIQUE_RAD or abs(y) > max(9.0, 0.4 * x) or not _shows(signal, ego, view):
            continue
        if x <= LIGHT_M and turn < LIGHT_FACING_RAD:
            states.add("red" if signal.is_red else "green")
        else:
            is_open = True
    if len(states) == 1:
        return states.pop()
    return None if states or is_open else "none"


def _shows(signal: Signal, ego: NDArray[np.float64], view: CameraView) -> bool:
    xy = rotate(signal.pose[:2] - ego[:2], -ego[2])
    (u, v), depth = view.project(np.array([*xy, signal.height]))
    return bool(depth > 1.0 and 0 <= u < VISIBLE_SIZE[0] and 0 <= v < VISIBLE_SIZE[1])


def _pedestrian(
    scene: Scene, vector_map: VectorMap, path: NDArray[np.float64], pixels: NDArray[np.int64]
) -> str | None:
    """Nearest to the road of the visible pedestrians ahead; None if one that matters is hidden or at the limits."""
    objects = scene.annotations[scene.now]
    people = [i for i, name in enumerate(objects.names) if name == "pedestrian"]
    if not people:
        return "none"
    poses = _global_boxes(scene, scene.now)[people]
    arc, lateral = beside(path, poses[:, :2])
    found, is_open = set(), False
    for k, index in enumerate(people):
        if not (1.0 < arc[k] < PEDESTRIAN_OPEN_M and abs(lateral[k]) < PEDESTRIAN_LATERAL_M):
            continue
        distance = _distance_to_road(vector_map, poses[k, :2])
        if distance > BESIDE_OPEN_M:
            continue
        clear = arc[k] <= PEDESTRIAN_M and not BESIDE_M < distance
        if clear and pixels[index] >= VISIBLE_PIXELS["pedestrian"]:
            found.add("road" if distance == 0.0 else "beside")
        else:
            is_open = True
    if "road" in found:
        return "road"
    if is_open:
        return None
    return "beside" if found else "none"


def _distance_to_road(vector_map: VectorMap, xy: NDArray[np.float64]) -> float:
    """Metres from a point to the nearest roadblock or intersection; 0 on it, infinite beyond BESIDE_OPEN_M."""
    point = shapely.Point(xy)
    reach = point.buffer(BESIDE_OPEN_M)
    near = [
        layer.polygons[i] for layer in (vector_map.roadblocks, vector_map.intersections) for i in layer.query(reach)
    ]
    return min((point.distance(polygon) for polygon in near), default=np.inf)


def _neighbours(
    vector_map: VectorMap, ego: NDArray[np.float64], path: NDArray[np.float64]
) -> tuple[str | None, str | None]:
    """What lies beside the lane: one in the same direction, an oncoming one, or none. None (open) at junctions."""
    lanes = vector_map.lanes.query(shapely.Point(ego[:2]))
    if not len(lanes) or shapely.LineString(path).length < 15.0:
        return None, None
    spot = shapely.get_coordinates(shapely.line_interpolate_point(shapely.LineString(path), 10.0))[0]
    if len(vector_map.intersections.query(shapely.Point(spot))):
        return None, None
    heading = float(_heading_at(path, np.array([10.0]))[0])
    width = lane_width(vector_map, int(lanes[0]))
    sides = []
    for sign in (1.0, -1.0):
        beside = spot + sign * width * np.array([-np.sin(heading), np.cos(heading)])
        point = shapely.Point(beside)
        headings = []
        for position in vector_map.lanes.query(point):
            poses = vector_map.lanes.baseline_of(int(position))
            headings.append(poses[np.linalg.norm(poses[:, :2] - beside, axis=1).argmin(), 2])
        cosines = np.cos(np.array(headings) - heading)
        if not headings:
            crossing = len(vector_map.lane_connectors.query(point)) or len(vector_map.intersections.query(point))
            sides.append(None if crossing else "none")
        elif (cosines > 0.7).all():
            sides.append("same")
        elif (cosines < -0.7).all():
            sides.append("oncoming")
        else:
            sides.append(None)
    return sides[0], sides[1]
