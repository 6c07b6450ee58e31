"""A rollout as NAVSIM's second-stage scenes: the dictionaries that its ``Scene.save_to_disk`` pickles, and its classes.

Source: NAVSIM 2.2 ``navsim/common/dataclasses.py``; nuPlan devkit 1.2 ``common/actor_state``. The classes below hold
exactly the attributes that theirs do, and are pickled under their names; nothing of them is installed here.

A pair of scenes shares one rollout: ``now`` begins with its frames 1 to 4, ``prev`` with its frames 0 to 3. Ahead of
the last of these stand the "extended" objects and lights of the following 4 s, in global coordinates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.pickles.writing import dumps_as
from navsim_ext.scene import CAMERAS, OBJECT_TYPES, SYNTHETIC_TOKEN_LENGTH
from navsim_ext.synthetic.drive import Drive

PROTOCOL = 4
NUM_HISTORY = 4
NUM_EXTENDED = 8  # 0.5 s apart
MOVING = OBJECT_TYPES[:3]  # vehicle, pedestrian, bicycle: the devkit's "agents"; the others are static objects
GREEN, RED = 0, 2


class _Fields:
    """Attributes as given."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class _Agent(_Fields):
    pass


class _StaticObject(_Fields):
    pass


class _OrientedBox(_Fields):
    pass


class _SceneObjectMetadata(_Fields):
    pass


class _TrackedObjects(_Fields):
    pass


class _DetectionsTracks(_Fields):
    pass


class _TrafficLightStatuses(_Fields):
    pass


class _TrafficLightStatusData(_Fields):
    pass


class _Number:
    """A member of one of the devkit's enumerations, pickled by its value."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> tuple:
        return type(self), (self.value,)


class _TrackedObjectType(_Number):
    pass


class _TrafficLightStatusType(_Number):
    pass


class _StateSE2:
    __slots__ = ("heading", "x", "y")

    def __init__(self, x: float, y: float, heading: float) -> None:
        self.x, self.y, self.heading = x, y, heading


class _StateVector2D:
    __slots__ = ("_array", "_x", "_y")

    def __init__(self, x: float, y: float) -> None:
        self._x, self._y, self._array = x, y, np.array([x, y])


class _TimePoint:
    __slots__ = ("time_us",)

    def __init__(self, time_us: int) -> None:
        self.time_us = time_us


_ACTOR, _MAPS = "nuplan.common.actor_state.", "nuplan.common.maps.maps_datatypes"
CLASSES: dict[tuple[str, str], type] = {
    (_ACTOR + "agent", "Agent"): _Agent,
    (_ACTOR + "static_object", "StaticObject"): _StaticObject,
    (_ACTOR + "oriented_box", "OrientedBox"): _OrientedBox,
    (_ACTOR + "scene_object", "SceneObjectMetadata"): _SceneObjectMetadata,
    (_ACTOR + "state_representation", "StateSE2"): _StateSE2,
    (_ACTOR + "state_representation", "StateVector2D"): _StateVector2D,
    (_ACTOR + "state_representation", "TimePoint"): _TimePoint,
    (_ACTOR + "tracked_objects", "TrackedObjects"): _TrackedObjects,
    (_ACTOR + "tracked_objects_types", "TrackedObjectType"): _TrackedObjectType,
    (_MAPS, "TrafficLightStatuses"): _TrafficLightStatuses,
    (_MAPS, "TrafficLightStatusData"): _TrafficLightStatusData,
    (_MAPS, "TrafficLightStatusType"): _TrafficLightStatusType,
    ("nuplan.planning.simulation.observation.observation_type", "DetectionsTracks"): _DetectionsTracks,
}


def second_stage_token(*key: int | str) -> str:
    """17 hexadecimal characters: what tells a second-stage scene from a recorded one."""
    return hashlib.sha256("|".join(str(part) for part in key).encode()).hexdigest()[:SYNTHETIC_TOKEN_LENGTH]


def frame_of(log_frame: Mapping[str, Any], token: str, cameras: Mapping[str, str]) -> dict[str, Any]:
    """A frame of a second-stage scene from a frame of a log; ``cameras``: CAM_* -> path of its picture."""
    anns, dynamics = log_frame["anns"], log_frame["ego_dynamic_state"]
    x, y = (float(value) for value in log_frame["ego2global_translation"][:2])
    w, _, _, z = log_frame["ego2global_rotation"]
    return {
        "token": token,
        "timestamp": int(log_frame["timestamp"]),
        "roadblock_ids": list(log_frame["roadblock_ids"]),
        "traffic_lights": list(log_frame["traffic_lights"]),
        "annotations": {
            "boxes": anns["gt_boxes"],
            "names": [str(name) for name in anns["gt_names"]],
            "velocity_3d": anns["gt_velocity_3d"],
            "instance_tokens": list(anns["instance_tokens"]),
            "track_tokens": list(anns["track_tokens"]),
        },
        "ego_status": {
            "ego_pose": np.array([x, y, 2.0 * np.arctan2(z, w)]),
            "ego_velocity": np.array(dynamics[:2], dtype=np.float32),
            "ego_acceleration": np.array(dynamics[2:], dtype=np.float32),
            "driving_command": np.array(log_frame["driving_command"]),
            "in_global_frame": True,
        },
        "lidar_path": None,
        "camera_dict": {
            view.lower(): {**log_frame["cams"][view], "data_path": cameras[view]} if view in cameras else {}
            for view in CAMERAS
        },
    }


def scene_of(
    log_name: str,
    location: str,
    frames: Sequence[dict[str, Any]],
    later: Sequence[tuple[Any, Any]],
    original_token: str,
    original_frame: str,
) -> bytes:
    """The pickle of a scene. ``later``: NUM_EXTENDED pairs (objects, lights) of :func:`objects_at`, ``lights_at``."""
    token = frames[NUM_HISTORY - 1]["token"]
    content = {
        "scene_metadata": {
            "log_name": log_name,
            "scene_token": token,
            "map_name": location,
            "initial_token": token,
            "num_history_frames": NUM_HISTORY,
            "num_future_frames": 0,
            "corresponding_original_scene": original_frame,
            "corresponding_original_initial_token": original_token,
        },
        "frames": list(frames),
        "extended_traffic_light_data": [lights for _, lights in later],
        "extended_detections_tracks": [objects for objects, _ in later],
    }
    return dumps_as(content, CLASSES, PROTOCOL)


def objects_at(
    drive: Drive, frame: int, there: NDArray[np.bool_], tracks: Sequence[str], time_us: int, token: str
) -> Any:
    """The objects of a frame in global coordinates, sorted by type as the devkit sorts them; ``there`` [N] of them."""
    origin, rows = drive.plan.town.origin, []
    for i, member in enumerate(drive.members):
        if there[i]:
            number = OBJECT_TYPES.index(drive.cast.names[member])
            rows.append((number, i, member))
    items = []
    for number, i, member in sorted(rows, key=lambda row: row[0]):
        x, y, heading = (float(value) for value in drive.objects[frame, i])
        length, width, height = (float(value) for value in drive.cast.rows[member]["size"])
        fields: dict[str, Any] = {
            "_metadata": _SceneObjectMetadata(
                timestamp_us=time_us, token=token, track_id=None, track_token=tracks[i], category_name=None
            ),
            "instance_token": None,
            "_tracked_object_type": _TrackedObjectType(number),
            "_box": _OrientedBox(
                _center=_StateSE2(x + float(origin[0]), y + float(origin[1]), heading),
                _length=length, _width=width, _height=height,
            ),
        }  # fmt: skip
        if OBJECT_TYPES[number] in MOVING:
            speed = float(drive.speeds[frame, i])
            velocity = _StateVector2D(speed * float(np.cos(heading)), speed * float(np.sin(heading)))
            time = {"_initial_time_stamp": _TimePoint(time_us), "_predictions": [], "_past_trajectory": None}
            items.append(_Agent(**time, **fields, _velocity=velocity, _angular_velocity=None))
        else:
            still = {"velocity": _StateVector2D(0.0, 0.0), "predictions": [], "past_trajectory": None}
            items.append(_StaticObject(**fields, **still))
    return _DetectionsTracks(tracked_objects=_TrackedObjects(tracked_objects=items))


def lights_at(lights: Sequence[tuple[int, bool]], time_us: int) -> Any:
    """(lane connector, is red) of a frame as the devkit's statuses."""
    items = [
        _TrafficLightStatusData(
            status=_TrafficLightStatusType(RED if red else GREEN),
            lane_connector_id=connector,
            timestamp=_TimePoint(time_us),
        )
        for connector, red in lights
    ]
    return _TrafficLightStatuses(traffic_lights=items)
