"""Scenes of NAVSIM 2's second stage: ``<folder>/synthetic_scene_pickles/*.pkl``, one pickle per scene.

A scene starts 4 s after a recorded one, with the ego where a planner might have brought it. Its pickle holds at least
the four history frames (2 Hz), and the traffic of the instants after the last frame in global coordinates
("extended detections"). The objects in it are the devkit's; here plain holders stand for exactly those classes, and
any other name in the file is refused (:mod:`navsim_ext.pickles`).

The name of a file does not matter: the scene's token is the ``initial_token`` inside. A test server's second stage has
another form, ``openscene_meta_datas`` (:mod:`navsim_ext.readers.hidden_scenes`), which the same source reads.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext import pickles
from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import inside
from navsim_ext.frames import wrap_angle
from navsim_ext.pickles import Holder, holders
from navsim_ext.readers.hidden_scenes import META_FOLDER, NUM_HISTORY, STARTS, load_pair, read_hidden_scene
from navsim_ext.readers.log_files import LogFiles
from navsim_ext.readers.navsim_frames import is_list, short
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import (
    CAMERAS,
    COMMANDS,
    MAP_LOCATIONS,
    OBJECT_TYPES,
    SYNTHETIC_TOKEN_LENGTH,
    Annotations,
    Camera,
    GlobalObjects,
    Scene,
)

if TYPE_CHECKING:
    from navsim_ext.maps.vector_map import VectorMap
    from navsim_ext.readers.navsim_logs import NavsimLogs

log = logging.getLogger(__name__)

PICKLES_FOLDER = "synthetic_scene_pickles"
SENSOR_FOLDER = "sensor_blobs"
RED = 2  # nuPlan's TrafficLightStatusType: GREEN 0, YELLOW 1, RED 2, UNKNOWN 3

CLASSES = tuple(
    (module, name)
    for module, names in (
        ("nuplan.common.actor_state.agent", ("Agent",)),
        ("nuplan.common.actor_state.static_object", ("StaticObject",)),
        ("nuplan.common.actor_state.oriented_box", ("OrientedBox",)),
        ("nuplan.common.actor_state.scene_object", ("SceneObjectMetadata",)),
        ("nuplan.common.actor_state.state_representation", ("StateSE2", "StateVector2D", "TimePoint")),
        ("nuplan.common.actor_state.tracked_objects", ("TrackedObjects",)),
        ("nuplan.common.actor_state.tracked_objects_types", ("TrackedObjectType",)),
        (
            "nuplan.common.maps.maps_datatypes",
            ("TrafficLightStatuses", "TrafficLightStatusData", "TrafficLightStatusType"),
        ),
        ("nuplan.planning.simulation.observation.observation_type", ("DetectionsTracks",)),
    )
    for name in names
)


def kind_of(value: object) -> str:
    """The devkit class that a value stands for, or its own type's name."""
    return value.kind if isinstance(value, Holder) else type(value).__name__


def _path(*parts: str) -> str:
    """A pickled path as text, whatever system wrote it."""
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"a pickled path consists of {[type(part).__name__ for part in parts]}; text was expected")
    return "/".join(part.strip("/") if i else part for i, part in enumerate(parts))


def _unread(*_: Any) -> None:
    """A cached shapely geometry of a box: it follows from the box and is not looked at."""


STAND_INS: dict[tuple[str, str], Any] = holders(CLASSES)
STAND_INS |= {("pathlib", name): _path for name in ("PosixPath", "PurePosixPath", "WindowsPath")}
STAND_INS |= {(module, "from_wkb"): _unread for module in ("shapely.io", "shapely._geometry", "shapely")}


@dataclass(frozen=True)
class SceneFile:
    """Where a scene of the second stage is, and which recorded scene it continues."""

    path: str
    token: str
    log_name: str
    original_token: str  # first-stage token: the recorded frame 4 s earlier
    original_frame: str  # the recorded frame of the same time
    start: int | None = None  # of a test server's file of five frames: the first of this scene's four

    def read(self) -> Scene:
        return read_scene(self.path) if self.start is None else read_hidden_scene(self.path, self.start)


class SecondStageScenes(LogFiles):
    """The second-stage scenes of a folder, by log. ``scene_filter`` chooses logs and tokens; windows do not apply.

    ``folder`` holds ``synthetic_scene_pickles`` or ``openscene_meta_datas``, and ``sensor_blobs``; the first stage's
    ``logs`` give the maps.
    Bad pickles are reported as the first stage's bad logs are.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        logs: NavsimLogs,
        *,
        scene_filter: SceneFilter | None = None,
        required_cameras: Sequence[str] = (),
        skip_bad: bool = False,
        report_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = Path(folder)
        self.required_cameras = tuple(required_cameras)
        self.sensor_root = self.root / SENSOR_FOLDER
        self._logs = logs
        report = SkipReport(skip_bad, Path(report_path) if report_path is not None else None)
        pickled = stage_files(self.root)
        found, bad = scan(str(pickled))
        if scene_filter is None or scene_filter.log_names is None:  # a bad file tells no log: reported with the whole
            for path, error in bad:
                report.add(error, log_name=Path(path).stem)
        self._by_log: dict[str, list[SceneFile]] = {}
        wanted = None if scene_filter is None or scene_filter.tokens is None else set(scene_filter.tokens)
        for entry in found:
            if wanted is None or entry.token in wanted:
                self._by_log.setdefault(entry.log_name, []).append(entry)
        paths = {name: pickled for name in sorted(self._by_log)}
        super().__init__(pickled, paths, scene_filter or SceneFilter(), report)
        self.files = tuple(Path(entry.path) for name in self.log_names for entry in self._by_log[name])

    def scenes_of(self, log_name: str) -> list[Scene]:
        scenes: dict[str, Scene] = {}
        for entry in self._by_log.get(log_name, ()):
            try:
                scene = entry.read()
                self._require_cameras(scene)
            except TriviumError as error:
                self.report.add(error, log_name=log_name, token=entry.token)
                continue
            if scene.token in scenes:
                self.add_repeated(scene, log_name)
            else:
                scenes[scene.token] = scene
        self.report.write()
        return sorted(scenes.values(), key=lambda scene: (int(scene.timestamps_us[scene.now]), scene.token))

    def map_for(self, scene: Scene) -> VectorMap:
        """The nuPlan map of the scene's location."""
        return self._logs.map_for(scene)

    def _require_cameras(self, scene: Scene) -> None:
        for name in self.required_cameras:
            if name not in scene.cameras:
                raise DataError(
                    f"second-stage scene {scene.token}: the cameras are {sorted(scene.cameras)}; {name} was expected"
                )
            if not (self.sensor_root / scene.cameras[name].path).is_file():
                raise MissingError(
                    f"second-stage scene {scene.token}: picture {scene.cameras[name].path!r} of {name} is not in "
                    f"{self.sensor_root}: download the sensor blobs of the second stage"
                )


@functools.lru_cache(maxsize=8)
def scan(folder: str) -> tuple[tuple[SceneFile, ...], tuple[tuple[str, TriviumError], ...]]:
    """(scenes, bad files with their error) of a folder of pickles, by path; read once per process.

    Raises MissingError when there is no such folder or no pickle in it.
    """
    paths = sorted(Path(folder).glob("*.pkl"))
    if not paths:
        raise MissingError(
            f"{folder} holds no *.pkl: the second stage is not there. Download it beside the logs, or point "
            f"data.second_stage at the folder that holds {PICKLES_FOLDER} or {META_FOLDER}"
        )
    found: list[SceneFile] = []
    bad: list[tuple[str, TriviumError]] = []
    for path in paths:
        try:
            found += _hidden_pair(path) if Path(folder).name == META_FOLDER else [_scene_file(path)]
        except TriviumError as error:
            bad.append((str(path), error))
    log.info("%s: %d scenes, %d unreadable files", folder, len(found), len(bad))
    return tuple(found), tuple(bad)


def stage_files(folder: str | os.PathLike[str]) -> Path:
    """Where the scenes of a second stage lie: ``synthetic_scene_pickles``, or a test server's other form."""
    hidden = Path(folder) / META_FOLDER
    pickled = Path(folder) / PICKLES_FOLDER
    return hidden if hidden.is_dir() and not pickled.is_dir() else pickled


def _scene_file(path: Path) -> SceneFile:
    metadata = _metadata(_load(path), path)
    return SceneFile(
        str(path),
        metadata["initial_token"],
        metadata["log_name"],
        str(metadata.get("corresponding_original_initial_token") or ""),
        str(metadata.get("corresponding_original_scene") or ""),
    )


def _hidden_pair(path: Path) -> list[SceneFile]:
    frames = load_pair(path)
    now = [frames[start + NUM_HISTORY - 1] for start in STARTS]
    return [SceneFile(str(path), one["token"], one["log_name"], "", "", start) for start, one in zip(STARTS, now)]


def _load(path: Path) -> Mapping[str, Any]:
    content = pickles.load(path, also_allowed=STAND_INS)
    if not isinstance(content, dict) or not {"scene_metadata", "frames"} <= content.keys():
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} holds {found}; a dict with scene_metadata and frames was expected: this is no second-stage scene"
        )
    return content


def _metadata(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    metadata = content["scene_metadata"]
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: scene_metadata is a {type(metadata).__name__}; a dict was expected")
    for key in ("initial_token", "log_name", "map_name"):
        if not isinstance(metadata.get(key), str) or not metadata[key]:
            raise DataError(f"{path}: scene_metadata.{key} is {metadata.get(key)!r}; text was expected")
    return metadata


def read_scene(path: str | os.PathLike[str]) -> Scene:
    """One second-stage scene. Raises DataError or MissingError naming file, frame and key at the first broken promise.

    Frames after the fourth become future frames; the extended detections follow them.
    """
    path = Path(path)
    content = _load(path)
    metadata = _metadata(content, path)
    frames = content["frames"]
    if not isinstance(frames, list) or len(frames) < NUM_HISTORY or not all(isinstance(f, dict) for f in frames):
        count = len(frames) if isinstance(frames, list) else kind_of(frames)
        raise DataError(f"{path}: frames is {count}; a list of at least {NUM_HISTORY} frame dictionaries was expected")
    history = metadata.get("num_history_frames")
    if history is not None and not (isinstance(history, int | np.integer) and history == NUM_HISTORY):
        raise DataError(f"{path}: {short(history)} history frames; {NUM_HISTORY} were expected")
    location = metadata["map_name"]
    if not isinstance(location, str) or location not in MAP_LOCATIONS:
        raise DataError(
            f"{path}: scene_metadata.map_name is {short(location)}; one of {', '.join(MAP_LOCATIONS)} expected"
        )
    parsed = [_Frame(frame, f"{path}, frame {index}") for index, frame in enumerate(frames)]
    now = parsed[NUM_HISTORY - 1]
    if now.token != metadata["initial_token"]:
        raise DataError(f"{path}: initial_token is {metadata['initial_token']}, but frame 3 has token {now.token}")
    if len(now.token) != SYNTHETIC_TOKEN_LENGTH:
        raise DataError(f"{path}: token {now.token} has {len(now.token)} characters; a second-stage token has 17")
    objects = content.get("extended_detections_tracks") or ()
    lights = content.get("extended_traffic_light_data") or ()
    if kind_of(objects) not in ("list", "tuple") or kind_of(lights) not in ("list", "tuple"):
        raise DataError(
            f"{path}: the extended detections or lights are no lists: {kind_of(objects)}, {kind_of(lights)}"
        )
    return Scene(
        token=now.token,
        log_name=metadata["log_name"],
        map_location=location,
        num_history=NUM_HISTORY,
        frame_tokens=tuple(frame.token for frame in parsed),
        timestamps_us=np.array([frame.timestamp_us for frame in parsed], dtype=np.int64),
        ego_global=np.stack([frame.ego_global for frame in parsed]),
        ego_dynamics=np.stack([frame.ego_dynamics for frame in parsed]),
        commands=np.stack([frame.command for frame in parsed]),
        roadblock_ids=now.roadblock_ids,
        annotations=tuple(frame.annotations for frame in parsed),
        traffic_lights=tuple(frame.traffic_lights for frame in parsed),
        cameras=now.cameras,
        split="second_stage",
        later_objects=tuple(_objects(entry, f"{path}, extended detections {i}") for i, entry in enumerate(objects)),
        later_lights=tuple(_lights(entry, f"{path}, extended lights {i}") for i, entry in enumerate(lights)),
        original_token=str(metadata.get("corresponding_original_initial_token") or ""),
    ).validate()


class _Frame:
    """One frame dictionary, checked."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self._content, self._where = content, where
        self.token = self._get("token", str)
        timestamp = self._get("timestamp", int | np.integer)
        self.timestamp_us = int(timestamp)
        self.roadblock_ids = tuple(str(block) for block in self._get("roadblock_ids", list | tuple | set))
        self.traffic_lights = self._traffic_lights()
        self.annotations = self._annotations()
        status = self._get("ego_status", dict)
        self.ego_global = self._vector("ego_status.ego_pose", status.get("ego_pose"), (3,))
        if not status.get("in_global_frame", True):
            raise self._fail("ego_status.in_global_frame", False, "a global ego pose")
        velocity = self._vector("ego_status.ego_velocity", status.get("ego_velocity"), (2,))
        acceleration = self._vector("ego_status.ego_acceleration", status.get("ego_acceleration"), (2,))
        self.ego_dynamics = np.concatenate([velocity, acceleration]).astype(np.float32)
        command = self._vector("ego_status.driving_command", status.get("driving_command"), (len(COMMANDS),))
        if sorted(command.tolist()) != [0.0] * (len(COMMANDS) - 1) + [1.0]:
            raise self._fail("ego_status.driving_command", command.tolist(), f"a one-hot of {COMMANDS}")
        self.command = command.astype(np.float32)
        self.cameras = self._cameras()

    def _fail(self, key: str, found: Any, expected: str) -> DataError:
        return DataError(
            f"{self._where}: {key} is {found}; {expected} was expected: repair the file or leave the scene out"
        )

    def _get(self, key: str, kind: Any) -> Any:
        value = self._content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._fail(key, "absent" if key not in self._content else kind_of(value), str(kind))
        return value

    def _vector(self, key: str, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError, OverflowError, MemoryError):
            raise self._fail(key, kind_of(value), f"numbers of shape {shape}") from None
        if array.shape != shape or not np.isfinite(array).all():
            raise self._fail(key, f"of shape {array.shape}: {array.tolist()}", f"finite numbers of shape {shape}")
        return array

    def _texts(self, key: str, value: Any) -> list[str]:
        if not is_list(value):
            raise self._fail(key, kind_of(value), "a list of texts")
        bad = [entry for entry in value if isinstance(entry, bool) or not isinstance(entry, str | int | np.integer)]
        if bad:
            raise self._fail(key, f"a list with {short(bad[0])}", "a list of texts")
        return [str(entry) for entry in value]

    def _traffic_lights(self) -> tuple[tuple[str, bool], ...]:
        lights = self._get("traffic_lights", list | tuple)
        try:
            return tuple((str(connector), bool(is_red)) for connector, is_red in lights)
        except (TypeError, ValueError):
            raise self._fail("traffic_lights", repr(lights)[:80], "(lane connector id, is red) pairs") from None

    def _annotations(self) -> Annotations:
        content = self._get("annotations", dict | Holder)
        if isinstance(content, Holder):
            content = content.fields
        columns = {"boxes": 7, "velocity_3d": 3}
        names, tracks = (self._texts(f"annotations.{key}", content.get(key, ())) for key in ("names", "track_tokens"))
        arrays = {}
        for key, width in columns.items():
            value = content.get(key)
            if value is None:
                raise self._fail(f"annotations.{key}", "absent", f"numbers (n, {width})")
            try:
                array = np.asarray(value)
            except (TypeError, ValueError, OverflowError, MemoryError):
                raise self._fail(f"annotations.{key}", kind_of(value), f"numbers (n, {width})") from None
            if len(names) == 0 and array.size == 0:
                array = np.zeros((0, width))
            arrays[key] = self._vector(f"annotations.{key}", array, (len(names), width)).astype(
                array.dtype if array.dtype.kind == "f" else np.float64
            )
        if len(tracks) != len(names):
            raise self._fail("annotations.track_tokens", f"{len(tracks)} entries", f"{len(names)} as names")
        unknown = sorted(set(names) - set(OBJECT_TYPES))
        if unknown:
            raise self._fail("annotations.names", repr(unknown[0]), f"one of {', '.join(OBJECT_TYPES)}")
        return Annotations(arrays["boxes"], arrays["velocity_3d"], tuple(names), tuple(tracks))

    def _cameras(self) -> dict[str, Camera]:
        stored = self._content.get("camera_dict")
        if not isinstance(stored, dict):
            raise self._fail("camera_dict", kind_of(stored), "a dict of eight cameras")
        absent = [name.lower() for name in CAMERAS if name.lower() not in stored]
        if absent:
            raise self._fail("camera_dict", f"without {', '.join(absent)}", "all eight keys (an absent camera is {})")
        cameras = {}
        for name in CAMERAS:
            entry = stored[name.lower()]
            if entry is None or (isinstance(entry, dict) and not entry):
                continue
            if not isinstance(entry, dict) or not isinstance(entry.get("data_path"), str):
                raise self._fail(f"camera_dict.{name.lower()}", kind_of(entry), "a dict with data_path")
            key = f"camera_dict.{name.lower()}."
            cameras[name] = Camera(
                path=inside(entry["data_path"], f"{self._where}: {key}data_path"),
                intrinsics=self._vector(key + "cam_intrinsic", entry.get("cam_intrinsic"), (3, 3)),
                sensor2lidar_rotation=self._vector(
                    key + "sensor2lidar_rotation", entry.get("sensor2lidar_rotation"), (3, 3)
                ),
                sensor2lidar_translation=self._vector(
                    key + "sensor2lidar_translation", entry.get("sensor2lidar_translation"), (3,)
                ),
                distortion=self._vector(key + "distortion", entry.get("distortion"), (5,)),
            )
        return cameras


def _objects(entry: Any, where: str) -> GlobalObjects:
    """A DetectionsTracks in global coordinates; objects that stand carry no velocity."""
    try:
        items = entry.tracked_objects.tracked_objects
        if not isinstance(items, list | tuple):
            raise DataError(f"tracked_objects is a {kind_of(items)}; a list was expected")
        rows = [_object(item) for item in items]
    except (DataError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{where}: {error!s:.300}") from error
    poses = np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, 3)
    velocities = np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 2)
    sizes = np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 3)
    for name, values in (("pose", poses), ("velocity", velocities), ("size", sizes)):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            raise DataError(f"{where}: the {name} of track {rows[bad[0]][4]} is {values[bad[0]].tolist()}, not finite")
    poses[:, 2] = wrap_angle(poses[:, 2])
    return GlobalObjects(poses, velocities, sizes, tuple(row[3] for row in rows), tuple(row[4] for row in rows))


def _object(item: Holder) -> tuple[list[float], list[float], list[float], str, str]:
    box, metadata = item.box, item.metadata
    number = int(item.tracked_object_type.args[0])
    if not 0 <= number < len(OBJECT_TYPES):
        raise DataError(
            f"track {metadata.track_token} is of type {number}; at most {len(OBJECT_TYPES) - 1} was expected"
        )
    velocity = [0.0, 0.0]
    if item.kind == "Agent":
        velocity = [float(item.velocity.x), float(item.velocity.y)]
    pose = [float(box.center.x), float(box.center.y), float(box.center.heading)]
    return (
        pose,
        velocity,
        [float(box.length), float(box.width), float(box.height)],
        OBJECT_TYPES[number],
        str(metadata.track_token),
    )


def _lights(entry: Any, where: str) -> tuple[tuple[str, bool], ...]:
    try:
        return tuple((str(item.lane_connector_id), int(item.status.args[0]) == RED) for item in entry.traffic_lights)
    except (DataError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{where}: {error!s:.300}") from error
