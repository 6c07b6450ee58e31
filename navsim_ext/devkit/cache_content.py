"""What a NAVSIM metric cache says, as arrays: ego, centreline, map patch, boxes at 10 Hz, PDM-Closed.

Legend: T steps of 0.1 s (v1.1: 51, v2.2: 41), n tracks, P map polygons.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.files import reading
from navsim_ext.metric_cache.scene_record import HUMAN_POSES
from navsim_ext.pdm.ego import REAR_AXLE_TO_CENTER, STATE_SIZE
from navsim_ext.pickles import Holder

STEPS = {"v1": 51, "v2": 41}
RED_LIGHT = "red_light_"
PAST_FRAMES = 4  # of a record; v1's caches have none
LARGEST = 1e8  # m, m/s, rad/s: beyond it nothing is on a map
AREAS = (shapely.Polygon, shapely.MultiPolygon)
REMEDY = "build the cache again with NAVSIM 1.1 or 2.2"


@dataclass(frozen=True, eq=False)
class CacheContent:
    """One pickled cache. ``version`` is told by the length of its observation."""

    version: str
    time_us: int
    ego_state: NDArray[np.float64]  # [11]
    centerline: NDArray[np.float64]  # [C,3]
    route_lane_ids: list[str]
    map_tokens: list[str]  # P
    map_types: NDArray[np.int64]  # [P]
    map_polygons: list[shapely.Polygon]  # P
    track_tokens: list[str]  # n, in the order of the occupancy maps
    track_poses: NDArray[np.float64]  # [T,n,3] box centre, NaN where absent
    track_types: NDArray[np.int64]  # [n]
    track_sizes: NDArray[np.float64]  # [n,3] of the first sighting
    track_velocities: NDArray[np.float64]  # [n,2] of the first sighting
    pdm_closed: NDArray[np.float64]  # [51,3]
    # v2.2 only
    red_lights: dict[str, tuple[shapely.Polygon, NDArray[np.bool_]]]  # connector -> polygon, red at step [T]
    human_poses: NDArray[np.float64] | None  # [8,3]
    past_states: NDArray[np.float64] | None  # [4,11]
    past_time_us: NDArray[np.int64] | None  # [4]
    map_name: str | None
    log_name: str | None


def read_content(cache: Holder, where: str | os.PathLike[str]) -> CacheContent:
    """Raises DataError naming ``where`` and what is not as NAVSIM 1.1 or 2.2 writes it."""
    with reading(where, f"it is not as NAVSIM writes it; {REMEDY}", DataError):
        content = _content(cache)
        wrong = next(_wrong(content), None)
    if wrong is not None:
        raise DataError(f"{where}: {wrong}: {REMEDY}")
    return content


def _wrong(content: CacheContent) -> Iterator[str]:
    """What no cache of NAVSIM's holds, in words."""
    shapes = {
        "ego_state": (STATE_SIZE,), "pdm_closed": (STEPS["v1"], 3), "human_poses": (HUMAN_POSES, 3),
        "past_states": (PAST_FRAMES, STATE_SIZE), "centerline": (len(content.centerline), 3),
        "track_sizes": (len(content.track_tokens), 3), "track_velocities": (len(content.track_tokens), 2),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = getattr(content, name)
        if values is None:
            continue
        if values.shape != shape:
            yield f"{name} has shape {values.shape}, {shape} was expected"
        elif not np.abs(values).max(initial=0.0) <= LARGEST:
            yield f"{name} has a value that is not finite, or beyond {LARGEST:g}"
    if len(content.centerline) < 2:
        yield f"the centreline has {len(content.centerline)} points, 2 or more were expected"
    if not np.nanmax(np.abs(content.track_poses), initial=0.0) <= LARGEST:
        yield f"a track stands beyond {LARGEST:g}"
    if (content.track_sizes < 0.0).any():
        yield "a track has a negative size"
    lengths = len(content.map_tokens), len(content.map_types), len(content.map_polygons)
    if len(set(lengths)) != 1:
        yield f"the map has {lengths} tokens, types and polygons; as many of each were expected"
    polygons = [*content.map_polygons, *(polygon for polygon, _ in content.red_lights.values())]
    other = next((type(each).__name__ for each in polygons if not isinstance(each, AREAS)), None)
    if other is not None:
        yield f"a polygon of the map is a {other}"


def _content(cache: Holder) -> CacheContent:
    maps = cache.observation.occupancy_maps
    version = next((version for version, steps in STEPS.items() if steps == len(maps)), None)
    if version is None:
        raise DataError(f"the observation has {len(maps)} steps; {STEPS} were expected: another NAVSIM version?")
    closed = [ego_state(state) for state in cache.trajectory.args[0]]
    if len(closed) != STEPS["v1"]:
        raise DataError(f"PDM-Closed's trajectory has {len(closed)} states, 51 were expected")
    drivable = cache.drivable_area_map.args
    stored = cache.fields
    human, past = stored.get("human_trajectory"), stored.get("past_human_trajectory")
    parameters = stored.get("map_parameters")
    return CacheContent(
        version=version,
        time_us=int(cache.ego_state.time_point.time_us),
        ego_state=ego_state(cache.ego_state),
        centerline=np.array([_pose(state) for state in cache.centerline.args[0]]),
        route_lane_ids=[str(fid) for fid in cache.route_lane_ids],
        map_tokens=[str(token) for token in drivable[0]],
        map_types=np.array([int(kind.args[0]) for kind in drivable[1]], dtype=np.int64),
        map_polygons=list(drivable[2]),
        **_tracks(maps, cache.observation.unique_objects, cache.observation.fields.get("detections_tracks")),
        pdm_closed=np.array([state[:3] for state in closed]),
        red_lights=_red_lights(maps),
        human_poses=None if human is None else np.asarray(human.poses, dtype=np.float64),
        past_states=None if past is None else np.array([ego_state(state) for state in past.args[0]]),
        past_time_us=None
        if past is None
        else np.array([state.time_point.time_us for state in past.args[0]], dtype=np.int64),
        map_name=None if parameters is None else str(parameters.map_name),
        log_name=None if stored.get("log_name") is None else str(stored["log_name"]),
    )


def ego_state(state: Holder) -> NDArray[np.float64]:
    """[11] of a pickled EgoState; the rear axle follows from the box centre, as in the devkit."""
    x, y, heading = _pose(state.car_footprint.center)
    dynamics = state.dynamic_car_state
    velocity, acceleration = dynamics.rear_axle_velocity_2d, dynamics.rear_axle_acceleration_2d
    values = np.empty(STATE_SIZE)
    values[:3] = x - REAR_AXLE_TO_CENTER * np.cos(heading), y - REAR_AXLE_TO_CENTER * np.sin(heading), heading
    values[3:7] = velocity.x, velocity.y, acceleration.x, acceleration.y
    values[7:9] = state.tire_steering_angle, dynamics.tire_steering_rate
    values[9:] = dynamics.angular_velocity, dynamics.angular_acceleration
    return values


def _pose(state: Holder) -> tuple[float, float, float]:
    return float(state.x), float(state.y), float(state.heading)


def _tracks(maps: list[Holder], unique: dict[str, Holder], detections: list[Holder] | None) -> dict[str, Any]:
    """Track arrays. NAVSIM 2.2 keeps the boxes of each step; 1.1 only their polygons, from which they are read back
    to about 1e-9 m."""
    tokens = [token for token in _merged_order(maps) if not token.startswith(RED_LIGHT)]
    row = {token: i for i, token in enumerate(tokens)}
    poses = np.full((len(maps), len(tokens), 3), np.nan)
    for step, occupancy in enumerate(maps):
        exact = {} if detections is None else _boxes(detections[step])
        for token, polygon in zip(occupancy.args[0], occupancy.args[1]):
            if token in row:
                poses[step, row[token]] = exact[token] if token in exact else box_pose(polygon)
    boxes = [unique[token].box for token in tokens]
    velocities = [unique[token].fields.get("velocity") for token in tokens]  # static objects have none
    return {
        "track_tokens": tokens,
        "track_poses": poses,
        "track_types": np.array([int(unique[t].tracked_object_type.args[0]) for t in tokens], dtype=np.int64),
        "track_sizes": np.array([[box.length, box.width, box.height] for box in boxes], np.float64).reshape(-1, 3),
        "track_velocities": np.array(
            [[0.0, 0.0] if velocity is None else [velocity.x, velocity.y] for velocity in velocities], np.float64
        ).reshape(-1, 2),
    }


def _boxes(detections: Holder) -> dict[str, tuple[float, float, float]]:
    """Box poses by track of one step."""
    tracked = detections.tracked_objects.tracked_objects
    return {str(item.metadata.track_token): _pose(item.box.center) for item in tracked}


def _merged_order(maps: list[Holder]) -> list[str]:
    """One order of all tokens that agrees with the order inside each step."""
    order: list[str] = []
    known: set[str] = set()
    for occupancy in maps:
        after = -1
        for token in occupancy.args[0]:
            if token in known:
                after = order.index(token)
            else:
                after += 1
                order.insert(after, token)
                known.add(token)
    return order


def box_pose(polygon: shapely.Polygon) -> NDArray[np.float64]:
    """(x, y, heading) of a box polygon."""
    corners = shapely.get_coordinates(polygon)[:4]
    center = corners.mean(axis=0)
    ahead = (corners[0] + corners[3]) - (corners[1] + corners[2])
    return np.array([center[0], center[1], np.arctan2(ahead[1], ahead[0])])


def _red_lights(maps: list[Holder]) -> dict[str, tuple[shapely.Polygon, NDArray[np.bool_]]]:
    found: dict[str, tuple[shapely.Polygon, NDArray[np.bool_]]] = {}
    for step, occupancy in enumerate(maps):
        for token, polygon in zip(occupancy.args[0], occupancy.args[1]):
            if token.startswith(RED_LIGHT):
                fid = token.removeprefix(RED_LIGHT)
                found.setdefault(fid, (polygon, np.zeros(len(maps), dtype=bool)))[1][step] = True
    return found
