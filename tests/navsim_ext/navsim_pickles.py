"""Writes metric_cache.pkl files as NAVSIM 1.1 and 2.2 do, from a record, with look-alike classes of the devkit."""

from __future__ import annotations

import copyreg
import lzma
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from navsim_ext.devkit.cache_content import STEPS
from navsim_ext.devkit.cache_pickle import HELD
from navsim_ext.pdm.ego import REAR_AXLE_TO_CENTER
from navsim_ext.pdm.log_replay import replayed_boxes
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.record import SceneMetricCache

PROTOCOL = 4


class LookAlikes:
    """Classes of the devkit's names in modules of the devkit's names; ``install`` puts those into ``sys.modules``."""

    def __init__(self) -> None:
        self.modules: dict[str, types.ModuleType] = {}
        self.classes: dict[str, type] = {}
        for module, name in sorted(HELD):
            if module != "pathlib":
                cls = type(name, (), {"__module__": module, "__reduce__": _reduce})
                setattr(self.modules.setdefault(module, types.ModuleType(module)), name, cls)
                self.classes[name] = cls

    def install(self, monkeypatch) -> LookAlikes:
        roots = {name: types.ModuleType(name) for name in ("navsim", "nuplan")}
        for name, module in (roots | self.modules).items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def make(self, name: str, *args: Any, **fields: Any) -> Any:
        """An object that is pickled with constructor arguments or, without any, with attributes."""
        made = object.__new__(self.classes[name])
        made.__dict__.update({"_args": args, **fields} if args else fields)
        return made


def _reduce(self) -> tuple:
    fields = dict(self.__dict__)
    args = fields.pop("_args", ())
    return (type(self), args) if args else (copyreg.__newobj__, (type(self),), fields)


def write_cache(path: Path, make: LookAlikes, record: SceneMetricCache, table: PolygonTable, version: str) -> None:
    """One pickle of a record's scene in one version's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wb", preset=0) as stream:
        pickle.dump(cache_of(path, make, record, table, version), stream, protocol=PROTOCOL)


def cache_of(path: Path, make: LookAlikes, record: SceneMetricCache, table: PolygonTable, version: str) -> Any:
    """What is pickled."""
    m = make.make
    boxes = replayed_boxes(record, version)
    steps = STEPS[version]
    centers = boxes.mean(axis=2)
    headings = np.arctan2(*np.flip((boxes[:, :, 0] - boxes[:, :, 1]).transpose(2, 0, 1), axis=0))

    def tracked(track: int, step: int) -> Any:
        x, y = centers[step, track]
        length, width, height = record.track_sizes[track]
        center = m("StateSE2", x=x, y=y, heading=headings[step, track])
        vx, vy = record.track_velocities[track]
        return m(
            "Agent",
            _box=m("OrientedBox", _center=center, _length=length, _width=width, _height=height),
            _tracked_object_type=m("TrackedObjectType", int(record.track_types[track])),
            _metadata=m("SceneObjectMetadata", track_token=record.track_tokens[track]),
            _velocity=m("StateVector2D", _x=vx, _y=vy),
        )

    occupancy, detections, unique = [], [], {}
    for step in range(steps):
        present = [track for track in range(len(record.track_types)) if np.isfinite(centers[step, track, 0])]
        tokens = [record.track_tokens[track] for track in present]
        polygons = [shapely.Polygon(boxes[step, track]) for track in present]
        for track in present:
            unique.setdefault(record.track_tokens[track], tracked(track, step))
        if version == "v2":
            for row, red in zip(record.red_polygons, record.red_frames):
                if red[step // 5]:
                    tokens.append(f"red_light_{table.ids[row]}")
                    polygons.append(shapely.Polygon(table.rings(row)[0]))
            polygons = np.array(polygons, dtype=object)
            inner = m("TrackedObjects", tracked_objects=[tracked(track, step) for track in present])
            detections.append(m("DetectionsTracks", tracked_objects=inner))
        occupancy.append(m("PDMOccupancyMap", tokens, polygons, 10))
    observation = {"_occupancy_maps": occupancy, "_unique_objects": unique, "_collided_track_ids": []}
    if version == "v2":
        observation["_detections_tracks"] = detections
    closed = record.pdm_closed[("v1", "v2").index(version)]
    states = np.zeros((len(closed), 11))
    states[:, :3] = closed
    rows = record.map_polygons
    fields: dict[str, Any] = {
        "file_path": path,
        "ego_state": _ego(m, record.ego_state, record.time_us),
        "trajectory": m("InterpolatedTrajectory", [_ego(m, state, record.time_us) for state in states]),
        "observation": m("PDMObservation", **observation),
        "centerline": m("PDMPath", [m("StateSE2", x=x, y=y, heading=h) for x, y, h in record.centerline]),
        "route_lane_ids": record.route_lane_ids,
        "drivable_area_map": m(
            "PDMDrivableMap",
            table.ids[rows].tolist(),
            [m("SemanticMapLayer", int(kind)) for kind in table.types[rows]],
            [shapely.Polygon(table.rings(row)[0]) for row in rows],
            10,
        ),
    }
    if version == "v2":
        past = [_ego(m, state, int(time)) for state, time in zip(record.past_states, record.past_time_us)]
        fields |= {
            "log_name": record.log_name,
            "human_trajectory": m("Trajectory", poses=record.human_poses),
            "past_human_trajectory": m("InterpolatedTrajectory", past),
            "map_parameters": m("MapParameters", map_root="/x", map_version="1", map_name=record.map_location),
        }
    return m("MetricCache", **fields)


def _ego(m, state: np.ndarray, time_us: int) -> Any:
    x, y, heading = state[:3]
    center = m(
        "StateSE2",
        x=x + REAR_AXLE_TO_CENTER * np.cos(heading),
        y=y + REAR_AXLE_TO_CENTER * np.sin(heading),
        heading=heading,
    )
    dynamics = m(
        "DynamicCarState",
        _rear_axle_velocity_2d=m("StateVector2D", _x=np.float32(state[3]), _y=np.float32(state[4])),
        _rear_axle_acceleration_2d=m("StateVector2D", _x=np.float32(state[5]), _y=np.float32(state[6])),
        _tire_steering_rate=0.0,
        _angular_velocity=0.0,
        _angular_acceleration=0.0,
    )
    return m(
        "EgoState",
        _car_footprint=m("CarFootprint", _center=center),
        _tire_steering_angle=0.0,
        _time_point=m("TimePoint", time_us=time_us),
        _dynamic_car_state=dynamics,
    )
