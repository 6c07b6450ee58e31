"""Reads NAVSIM's ``metric_cache.pkl`` (lzma-compressed pickles of devkit objects) without the devkit.

A pickle may name any importable object. Here the devkit's classes stand for plain holders of what was stored,
shapely geometries are read from their WKB bytes once those were looked through, all else as in
:mod:`navsim_ext.pickles`; every other name is refused before anything is built.
"""

from __future__ import annotations

import lzma
import os
from pathlib import Path
from typing import Any

from navsim_ext.devkit.wkb import geometry
from navsim_ext.errors import DataError, MissingError
from navsim_ext.pickles import DamagedPickle, Holder, holders, loads

MAX_BYTES = 256 << 20  # unpacked; the densest scenes need some 10 MB

_ACTOR = "nuplan.common.actor_state."
_PDM = "navsim.planning.simulation.planner.pdm_planner."
HELD = {
    ("navsim.planning.metric_caching.metric_cache", "MetricCache"),
    ("navsim.planning.metric_caching.metric_cache", "MapParameters"),
    ("navsim.common.enums", "SceneFrameType"),
    ("navsim.common.dataclasses", "Trajectory"),
    ("nuplan.planning.simulation.trajectory.interpolated_trajectory", "InterpolatedTrajectory"),
    ("nuplan.planning.simulation.trajectory.trajectory_sampling", "TrajectorySampling"),
    ("nuplan.planning.simulation.observation.observation_type", "DetectionsTracks"),
    ("nuplan.common.maps.maps_datatypes", "SemanticMapLayer"),
    (_ACTOR + "ego_state", "EgoState"),
    (_ACTOR + "car_footprint", "CarFootprint"),
    (_ACTOR + "dynamic_car_state", "DynamicCarState"),
    (_ACTOR + "vehicle_parameters", "VehicleParameters"),
    (_ACTOR + "state_representation", "Point2D"),
    (_ACTOR + "state_representation", "StateSE2"),
    (_ACTOR + "state_representation", "StateVector2D"),
    (_ACTOR + "state_representation", "TimePoint"),
    (_ACTOR + "state_representation", "TimeDuration"),
    (_ACTOR + "state_representation", "ProgressStateSE2"),
    (_ACTOR + "oriented_box", "OrientedBox"),
    (_ACTOR + "oriented_box", "Dimension"),
    (_ACTOR + "agent", "Agent"),
    (_ACTOR + "agent", "PredictedTrajectory"),
    (_ACTOR + "static_object", "StaticObject"),
    (_ACTOR + "scene_object", "SceneObject"),
    (_ACTOR + "scene_object", "SceneObjectMetadata"),
    (_ACTOR + "tracked_objects", "TrackedObjects"),
    (_ACTOR + "tracked_objects_types", "TrackedObjectType"),
    (_ACTOR + "waypoint", "Waypoint"),
    (_PDM + "observation.pdm_observation", "PDMObservation"),
    (_PDM + "observation.pdm_occupancy_map", "PDMOccupancyMap"),
    (_PDM + "observation.pdm_occupancy_map", "PDMDrivableMap"),
    (_PDM + "utils.pdm_path", "PDMPath"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
}


_STAND_INS: dict[tuple[str, str], Any] = holders(HELD)
_STAND_INS |= {(module, "from_wkb"): geometry for module in ("shapely.io", "shapely._geometry", "shapely")}


def read_cache(path: str | os.PathLike[str]) -> Holder:
    """The pickled MetricCache as a holder.

    Raises MissingError for an absent file, RefusedObject for a pickle that names anything else than NAVSIM's cache
    does, DamagedPickle for a file that is cut off or of another kind.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingError(f"{file} does not exist")
    cache = loads(_unpacked(file), str(file), also_allowed=_STAND_INS)
    if not isinstance(cache, Holder) or cache.kind != "MetricCache":
        raise DataError(f"{file} holds a {type(cache).__name__}; NAVSIM's MetricCache was expected")
    return cache


def _unpacked(file: Path) -> bytes:
    unpacker = lzma.LZMADecompressor(memlimit=MAX_BYTES)  # else a header may ask for 4 GB
    try:
        content = unpacker.decompress(file.read_bytes(), max_length=MAX_BYTES)
    except (OSError, lzma.LZMAError, EOFError, MemoryError) as error:
        raise DamagedPickle(f"{file} is damaged or no NAVSIM metric cache ({error}): build it again") from error
    if not unpacker.eof:
        limit = f"unpacks to more than {MAX_BYTES:,} bytes" if len(content) == MAX_BYTES else "is cut off"
        raise DamagedPickle(f"{file} {limit}: it is damaged or no NAVSIM metric cache, build it again")
    return content
