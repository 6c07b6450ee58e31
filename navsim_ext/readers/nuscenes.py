"""nuScenes in its own tables (v1.0): keyframes at 2 Hz with six cameras and boxes.

One scene of nuScenes (20 s, some 40 keyframes) is one log; a sample is a frame and its token, 32 characters, the token.
Frame of the ego car: nuScenes' own, the middle of the rear axle, x forward, y left: nothing is moved. Velocities and
accelerations are differences of positions over neighbouring keyframes; the tables hold none.

    v_k = (p_k+1 - p_k-1) / (t_k+1 - t_k-1), one-sided at the ends; a_k the same of v; objects alike, by their instance.

What nuScenes lacks: routes (``has_route`` of a filter is not looked at), states of traffic lights, and, in these
tables, lanes. So there are no PDM scores; ``navsim_ext.evaluation.score protocol=open_loop`` measures the distance to
the driven path, and collisions. The command is taken from the driven path, 20 m ahead, as for ScenarioNet's scenes.

Format: https://www.nuscenes.org/nuscenes, schema of v1.0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.files import inside, reading
from navsim_ext.frames import rotate, wrap_angle
from navsim_ext.readers.log_files import LogFiles
from navsim_ext.readers.scenarionet_tracks import command_of
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.source import SkipReport
from navsim_ext.scene import Annotations, Camera, Scene

if TYPE_CHECKING:
    from navsim_ext.maps.vector_map import VectorMap

CAMERA_NAMES = {
    "CAM_FRONT": "CAM_F0",
    "CAM_FRONT_LEFT": "CAM_L0",
    "CAM_FRONT_RIGHT": "CAM_R0",
    "CAM_BACK_LEFT": "CAM_L1",
    "CAM_BACK_RIGHT": "CAM_R1",
    "CAM_BACK": "CAM_B0",
}
LIDAR = "LIDAR_TOP"
CATEGORIES = (  # beginning of nuScenes' category, kind of a Scene; the first that fits
    ("vehicle.bicycle", "bicycle"),
    ("vehicle.motorcycle", "bicycle"),
    ("vehicle.", "vehicle"),
    ("human.pedestrian", "pedestrian"),
    ("movable_object.trafficcone", "traffic_cone"),
    ("movable_object.barrier", "barrier"),
)
STATIC = frozenset({"traffic_cone", "barrier", "generic_object"})
NEIGHBOUR_S = 1.5  # an object that was not seen for longer has no velocity from that side
REMEDY = "copy the metadata of this version again"
FIELDS: dict[str, dict[str, type]] = {
    "scene": {"token": str, "name": str, "log_token": str, "first_sample_token": str},
    "log": {"token": str, "location": str},
    "sample": {"token": str, "scene_token": str, "timestamp": int},
    "sample_data": {"sample_token": str, "ego_pose_token": str, "calibrated_sensor_token": str, "filename": str,
                    "is_key_frame": bool},
    "ego_pose": {"token": str, "translation": list, "rotation": list},
    "calibrated_sensor": {"token": str, "sensor_token": str, "translation": list, "rotation": list,
                          "camera_intrinsic": list},
    "sensor": {"token": str, "channel": str},
    "sample_annotation": {"sample_token": str, "instance_token": str, "translation": list, "rotation": list,
                          "size": list},
    "instance": {"token": str, "category_token": str},
    "category": {"token": str, "name": str},
}  # fmt: skip


def is_nuscenes(root: str | os.PathLike[str], split: str) -> bool:
    """Whether ``root/split`` holds nuScenes' tables (``split`` is the version: v1.0-mini, v1.0-trainval)."""
    return bool(split) and (Path(root) / split / "sample_data.json").is_file()


class _Box(NamedTuple):
    """One annotation, global: middle [3], heading, length, width, height, its object and kind."""

    middle: NDArray[np.float64]
    heading: float
    size: NDArray[np.float64]
    track: str
    kind: str


@dataclass(frozen=True)
class _Sample:
    token: str
    time_us: int
    ego: NDArray[np.float64]  # [4,4] ego car of the lidar's instant -> global
    lidar2ego: NDArray[np.float64]  # [4,4]
    cameras: Mapping[str, Camera]
    boxes: Mapping[str, _Box]  # by object

    @property
    def pose(self) -> NDArray[np.float64]:
        """[3] rear axle x, y, heading, global."""
        return np.array([*self.ego[:2, 3], np.arctan2(self.ego[1, 0], self.ego[0, 0])])


class NuScenes(LogFiles):
    """Scenes of ``root/split`` (``split``: the version's folder) with pictures below ``root``.

    ``scene_filter``: ``log_names`` are nuScenes' scene names (scene-0061); a list of them makes the official validation
    split. The tables are read once, some 3 GB of memory for the whole of trainval while they are.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        scene_filter: SceneFilter | None = None,
        required_cameras: Sequence[str] = (),
        skip_bad: bool = False,
        report_path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root, self.split = Path(root), split
        self.sensor_root = self.root
        self.required_cameras = tuple(required_cameras)
        self._folder_of_tables = self.root / split
        report = SkipReport(skip_bad, Path(report_path) if report_path is not None else None)
        scenes = self._table("scene")
        locations = {row["token"]: row["location"] for row in self._table("log")}
        self._scenes = {row["name"]: (row["token"], locations.get(row["log_token"], "")) for row in scenes}
        if len(self._scenes) < len(scenes):
            raise DataError(f"{self._folder_of_tables / 'scene.json'} names a scene twice: {REMEDY}")
        place = self._folder_of_tables / "scene.json"
        super().__init__(
            self._folder_of_tables, dict.fromkeys(sorted(self._scenes), place), scene_filter or SceneFilter(), report
        )
        self._samples: dict[str, list[_Sample | DataError]] | None = None

    def scenes_of(self, log_name: str) -> list[Scene]:
        if self._samples is None:
            self._samples = self._read_samples()
        samples = self._samples.get(self._scenes[log_name][0], [])
        wanted = None if self.scene_filter.tokens is None else set(self.scene_filter.tokens)
        size, history = self.scene_filter.num_frames, self.scene_filter.num_history
        scenes = []
        for start in range(0, len(samples) - size + 1, self.scene_filter.stride):
            now = samples[start + history - 1]
            if wanted is not None and (isinstance(now, DataError) or now.token not in wanted):
                continue
            try:
                for sample in samples[start : start + size]:
                    if isinstance(sample, DataError):
                        raise sample
                scenes.append(self._scene(log_name, samples, start))
            except TriviumError as error:
                self.report.add(error, log_name=log_name, frame=start + history - 1)
        self.report.write()
        return scenes

    def map_for(self, scene: Scene) -> VectorMap:
        """Raises DataError: these tables have no lanes."""
        return self._no_map(scene)

    def _no_map(self, scene: Scene) -> NoReturn:
        raise DataError(
            f"scene {scene.token} of {self._folder_of_tables} has no map that PDM scores could use: nuScenes' tables "
            "hold no lanes. navsim_ext.evaluation.score protocol=open_loop measures its plans"
        )

    def _scene(self, log_name: str, samples: Sequence[Any], start: int) -> Scene:
        """The window that begins at sample ``start``; every sample of it is intact."""
        history = self.scene_filter.num_history
        window: list[_Sample] = list(samples[start : start + self.scene_filter.num_frames])
        drive = [sample for sample in samples if isinstance(sample, _Sample)]
        first = drive.index(window[0])
        poses = np.stack([sample.pose for sample in drive])
        times = np.array([sample.time_us for sample in drive]) * 1e-6
        velocity = _difference(poses[:, :2], times)
        acceleration = _difference(velocity, times)
        part = slice(first, first + len(window))
        heading = poses[part, 2]
        dynamics = np.column_stack([rotate(velocity[part], -heading), rotate(acceleration[part], -heading)])
        now = window[history - 1]
        for name in self.required_cameras:
            if name not in now.cameras:
                raise DataError(f"sample {now.token} of {log_name} has cameras {sorted(now.cameras)}, not {name}")
            if not (self.sensor_root / now.cameras[name].path).is_file():
                raise MissingError(f"sample {now.token} of {log_name}: {now.cameras[name].path!r} is not in "
                                   f"{self.sensor_root}: download the pictures of this version")  # fmt: skip
        return Scene(
            token=now.token,
            log_name=log_name,
            map_location=self._scenes[log_name][1],
            num_history=history,
            frame_tokens=tuple(sample.token for sample in window),
            timestamps_us=np.array([sample.time_us for sample in window], dtype=np.int64),
            ego_global=poses[part],
            ego_dynamics=dynamics.astype(np.float32),
            commands=np.stack([command_of(poses[k:, :2], poses[k]) for k in range(first, first + len(window))]),
            roadblock_ids=(),
            annotations=tuple(_annotations(drive, k) for k in range(first, first + len(window))),
            traffic_lights=((),) * len(window),
            cameras=now.cameras,
            split=self.split,
            lidar2ego=now.lidar2ego,
        ).validate()

    def _read_samples(self) -> dict[str, list[_Sample | DataError]]:
        """Samples by scene token, by time. A bad one is kept as its error: it spoils only the windows around it."""
        channels = {row["token"]: row["channel"] for row in self._table("sensor")}
        sensors = {row["token"]: row for row in self._table("calibrated_sensor")}
        kinds = {row["token"]: _kind(row["name"]) for row in self._table("category")}
        kind_of = {row["token"]: kinds.get(row["category_token"], "generic_object") for row in self._table("instance")}
        data: dict[str, dict[str, dict]] = {}
        needed = set()
        for row in self._table("sample_data"):
            sensor = sensors.get(row["calibrated_sensor_token"])
            if row["is_key_frame"] and sensor is not None:
                channel = channels.get(sensor["sensor_token"], "")
                if channel == LIDAR or channel in CAMERA_NAMES:
                    data.setdefault(row["sample_token"], {})[channel] = row
                    needed.add(row["ego_pose_token"])
        poses = {row["token"]: row for row in self._table("ego_pose") if row["token"] in needed}
        boxes: dict[str, list[dict]] = {}
        for row in self._table("sample_annotation"):
            boxes.setdefault(row["sample_token"], []).append(row)
        by_scene: dict[str, list[tuple[int, _Sample | DataError]]] = {}
        for row in self._table("sample"):
            try:
                sample = _sample(row, data.get(row["token"], {}), sensors, poses, boxes.get(row["token"], []), kind_of)
            except DataError as error:
                sample = DataError(f"{self._folder_of_tables}, sample {row['token']}: {error}")
            by_scene.setdefault(row["scene_token"], []).append((row["timestamp"], sample))
        return {scene: [sample for _, sample in sorted(rows, key=lambda pair: pair[0])]
                for scene, rows in by_scene.items()}  # fmt: skip

    def _table(self, name: str) -> list[dict[str, Any]]:
        """Rows of one table, with the fields that are read of the right types."""
        path = self._folder_of_tables / f"{name}.json"
        if not path.is_file():
            raise MissingError(f"{path} is missing: data.split must be a folder of nuScenes' tables (v1.0-mini), and "
                               f"{REMEDY}")  # fmt: skip
        with reading(path, REMEDY):
            rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise DataError(f"{path} holds a {type(rows).__name__}; a list of rows was expected: {REMEDY}")
        for number, row in enumerate(rows):
            for key, kind in FIELDS[name].items():
                value = row.get(key) if isinstance(row, dict) else None
                if type(value) is not kind:
                    raise DataError(f"{path}, row {number}: {key} is {value!r:.60}; {kind.__name__} was expected")
        return rows


def _sample(
    row: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
    sensors: Mapping[str, Mapping[str, Any]],
    poses: Mapping[str, Mapping[str, Any]],
    boxes: Sequence[Mapping[str, Any]],
    kind_of: Mapping[str, str],
) -> _Sample:
    """One keyframe. Raises DataError for what it lacks."""
    if LIDAR not in data:
        raise DataError(f"no keyframe of {LIDAR}: without it the pose of the ego car is not known")
    lidar = data[LIDAR]
    ego = _transform(_row(poses, lidar["ego_pose_token"], "ego_pose"))
    lidar2ego = _transform(_row(sensors, lidar["calibrated_sensor_token"], "calibrated_sensor"))
    cameras = {}
    for channel, name in CAMERA_NAMES.items():
        if channel not in data:
            continue
        picture = data[channel]
        sensor = _row(sensors, picture["calibrated_sensor_token"], "calibrated_sensor")
        taken = _transform(_row(poses, picture["ego_pose_token"], "ego_pose"))  # the car has moved since the lidar
        sensor2lidar = np.linalg.inv(ego @ lidar2ego) @ taken @ _transform(sensor)
        cameras[name] = Camera(
            path=inside(picture["filename"], "sample_data.filename"),
            intrinsics=_numbers(sensor["camera_intrinsic"], (3, 3), "camera_intrinsic"),
            sensor2lidar_rotation=sensor2lidar[:3, :3],
            sensor2lidar_translation=sensor2lidar[:3, 3],
            distortion=np.zeros(5),  # nuScenes' pictures are rectified
        )
    found = {}
    for box in boxes:
        width, length, height = _numbers(box["size"], (3,), "sample_annotation.size")  # nuScenes' order
        track = box["instance_token"]
        pose = _transform(box)
        heading = float(np.arctan2(pose[1, 0], pose[0, 0]))
        size = np.array([length, width, height])
        found[track] = _Box(pose[:3, 3], heading, size, track, kind_of.get(track, "generic_object"))
    return _Sample(row["token"], row["timestamp"], ego, lidar2ego, cameras, found)


def _row(table: Mapping[str, Mapping[str, Any]], token: str, name: str) -> Mapping[str, Any]:
    if token not in table:
        raise DataError(f"{name} {token!r:.60} is not in {name}.json")
    return table[token]


def _transform(row: Mapping[str, Any]) -> NDArray[np.float64]:
    """[4,4] of a translation and a quaternion (w, x, y, z). Raises DataError for one that is no rotation."""
    quaternion = _numbers(row["rotation"], (4,), "rotation")
    length = float(np.linalg.norm(quaternion))
    if abs(length - 1.0) > 1e-3:
        raise DataError(f"rotation {quaternion.tolist()} has length {length:.4f}; a unit quaternion was expected")
    w, x, y, z = quaternion / length
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = _numbers(row["translation"], (3,), "translation")
    return matrix


def _numbers(value: Any, shape: tuple[int, ...], name: str) -> NDArray[np.float64]:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    if array.shape != shape or not np.isfinite(array).all():
        raise DataError(f"{name} is {value!r:.80}; {' x '.join(map(str, shape))} finite numbers were expected")
    return array


def _kind(category: str) -> str:
    return next((kind for start, kind in CATEGORIES if category.startswith(start)), "generic_object")


def _difference(values: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n,2] rates over the neighbours, one-sided at the ends."""
    before, after = np.maximum(np.arange(len(times)) - 1, 0), np.minimum(np.arange(len(times)) + 1, len(times) - 1)
    return (values[after] - values[before]) / np.maximum(times[after] - times[before], 1e-6)[:, None]


def _annotations(drive: Sequence[_Sample], k: int) -> Annotations:
    """Objects of sample ``k`` in its ego frame (turned by its heading; nuScenes' slopes are below 2 degrees)."""
    sample = drive[k]
    pose, height = sample.pose, sample.ego[2, 3]
    boxes, velocities = [], []
    for box in sample.boxes.values():
        xy = rotate(box.middle[:2] - pose[:2], -pose[2])
        boxes.append([*xy, box.middle[2] - height, *box.size, float(wrap_angle(box.heading - pose[2]))])
        velocities.append([*rotate(_object_velocity(drive, k, box), -pose[2]), 0.0])
    return Annotations(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 7),
        velocities=np.array(velocities, dtype=np.float64).reshape(-1, 3),
        names=tuple(box.kind for box in sample.boxes.values()),
        track_tokens=tuple(sample.boxes),
    )


def _object_velocity(drive: Sequence[_Sample], k: int, box: _Box) -> NDArray[np.float64]:
    """[2] m/s over the neighbouring keyframes in which the object is seen; 0 for static kinds and single sightings."""
    if box.kind in STATIC:
        return np.zeros(2)
    near = [s for s in drive[max(k - 1, 0) : k + 2]
            if box.track in s.boxes and abs(s.time_us - drive[k].time_us) <= NEIGHBOUR_S * 1e6]  # fmt: skip
    first, last = near[0], near[-1]
    if first is last:
        return np.zeros(2)
    moved = last.boxes[box.track].middle[:2] - first.boxes[box.track].middle[:2]
    return moved / ((last.time_us - first.time_us) * 1e-6)
