"""One frame dictionary of an OpenScene log -> checked arrays; a window of frames -> Scene.

Every check names file, frame, key, the value found, the value expected and the remedy. Arrays keep the float type of
the log (NAVSIM's scores depend on it); ``ego_dynamic_state`` becomes float32 as in NAVSIM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import quaternion_to_heading
from navsim_ext.scene import CAMERAS, COMMANDS, MAP_LOCATIONS, OBJECT_TYPES, Annotations, Camera, Scene

QUATERNION_TOLERANCE = 1e-3  # of the squared norm; beyond it the rotation was not one
_QUATERNION_EXACT = 1e-14  # pyquaternion, which NAVSIM uses, leaves quaternions this close to 1 as they are
_DEPLOYED_ALIASES = {"las_vegas": "us-nv-las-vegas-strip"}  # also known to NAVSIM's scenario class
_OBJECT_TYPES = frozenset(OBJECT_TYPES)
_CAMERA_SHAPES = {
    "cam_intrinsic": (3, 3),
    "sensor2lidar_rotation": (3, 3),
    "sensor2lidar_translation": (3,),
    "distortion": (5,),
}


@dataclass(frozen=True)
class Frame:
    """One frame of a log; see :class:`navsim_ext.scene.Scene` for units and frames."""

    token: str
    log_name: str  # as the frame states it; empty where it does not
    timestamp_us: int
    map_location: str
    roadblock_ids: tuple[str, ...]
    traffic_lights: tuple[tuple[str, bool], ...]
    annotations: Annotations
    ego_global: NDArray[np.float64]  # [3]
    ego_dynamics: NDArray[np.float32]  # [4]
    command: NDArray[np.float32]  # [4]
    lidar2ego: NDArray[np.float64]  # [4,4]


class _Fields:
    """Checked access to the keys of one frame."""

    def __init__(self, content: Mapping[str, Any], path: Path, index: int) -> None:
        self._content = content
        self._where = f"{path}, frame {index} (token {content.get('token')})"

    def fail(self, key: str, found: Any, expected: str, remedy: str = "repair or remove the log") -> DataError:
        return DataError(f"{self._where}: {key} is {found}; {expected} was expected: {remedy}")

    def get(self, key: str, content: Mapping[str, Any] | None = None, prefix: str = "") -> Any:
        content = self._content if content is None else content
        if key not in content:
            raise self.fail(prefix + key, "absent", f"one of the keys {sorted(map(str, content))} with that name")
        return content[key]

    def vector(self, key: str, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise self.fail(key, repr(value), f"numbers of shape {shape}") from None
        if array.shape != shape:
            raise self.fail(key, f"of shape {array.shape}", f"shape {shape}")
        if not np.isfinite(array).all():
            raise self.fail(key, array.tolist(), "finite values")
        return array

    def rotation(self, key: str, value: Any) -> NDArray[np.float64]:
        """Unit quaternion (w, x, y, z)."""
        quaternion = self.vector(key, value, (4,))
        square = float(quaternion @ quaternion)
        if abs(square - 1.0) > QUATERNION_TOLERANCE:
            raise self.fail(key, f"{quaternion.tolist()} of norm {square**0.5:.6g}", "a unit quaternion (norm 1)")
        return quaternion / square**0.5 if abs(1.0 - square) > _QUATERNION_EXACT else quaternion


def parse_frame(content: Mapping[str, Any], path: Path, index: int) -> Frame:
    """Checks and converts frame ``index`` of the log file ``path``; raises DataError at the first broken promise."""
    fields = _Fields(content, path, index)
    token, timestamp = fields.get("token"), fields.get("timestamp")
    if not isinstance(token, str) or not token:
        raise fields.fail("token", repr(token), "a string of 16 hexadecimal characters")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | np.integer):
        raise fields.fail("timestamp", repr(timestamp), "integer microseconds")
    location = fields.get("map_location")
    location = _DEPLOYED_ALIASES.get(location, location)
    if location not in MAP_LOCATIONS:
        raise fields.fail("map_location", repr(location), f"one of {', '.join(MAP_LOCATIONS)}")
    translation = fields.vector("ego2global_translation", fields.get("ego2global_translation"), (3,))
    rotation = fields.rotation("ego2global_rotation", fields.get("ego2global_rotation"))
    dynamics = fields.vector("ego_dynamic_state", fields.get("ego_dynamic_state"), (4,))
    command = fields.vector("driving_command", fields.get("driving_command"), (len(COMMANDS),))
    if sorted(command.tolist()) != [0.0] * (len(COMMANDS) - 1) + [1.0]:
        raise fields.fail("driving_command", command.tolist(), f"a one-hot of {COMMANDS}")
    return Frame(
        token=token,
        log_name=str(content.get("log_name") or ""),
        timestamp_us=int(timestamp),
        map_location=location,
        roadblock_ids=tuple(str(block) for block in fields.get("roadblock_ids")),
        traffic_lights=_traffic_lights(fields),
        annotations=_annotations(fields),
        ego_global=np.array([translation[0], translation[1], quaternion_to_heading(rotation)]),
        ego_dynamics=dynamics.astype(np.float32),
        command=command.astype(np.float32),
        lidar2ego=_lidar2ego(content, fields),
    )


def _traffic_lights(fields: _Fields) -> tuple[tuple[str, bool], ...]:
    lights = fields.get("traffic_lights")
    try:
        return tuple((str(connector), bool(is_red)) for connector, is_red in lights)
    except (TypeError, ValueError):
        raise fields.fail("traffic_lights", repr(lights)[:80], "a list of (lane connector id, is red)") from None


def _annotations(fields: _Fields) -> Annotations:
    content = fields.get("anns")
    keys = ("gt_boxes", "gt_names", "gt_velocity_3d", "instance_tokens", "track_tokens")
    values = {key: fields.get(key, content, "anns.") for key in keys}
    lengths = {key: len(value) for key, value in values.items()}
    if len(set(lengths.values())) != 1:
        raise fields.fail("anns", f"of lengths {lengths}", "five arrays of equal length")
    count = lengths["gt_boxes"]
    arrays = {}
    for key, width in (("gt_boxes", 7), ("gt_velocity_3d", 3)):
        array = np.asarray(values[key])
        if count == 0:
            array = np.zeros((0, width), dtype=array.dtype if array.dtype.kind == "f" else np.float64)
        if array.shape != (count, width) or array.dtype.kind not in "fiu":
            raise fields.fail(f"anns.{key}", f"of shape {array.shape}, {array.dtype}", f"numbers ({count}, {width})")
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0, 0])
            track = values["track_tokens"][row]
            raise fields.fail(f"anns.{key}[{row}] of track {track}", array[row].tolist(), "finite values")
        arrays[key] = array
    names = tuple(str(name) for name in values["gt_names"])
    unknown = sorted(set(names) - _OBJECT_TYPES)
    if unknown:
        raise fields.fail("anns.gt_names", repr(unknown[0]), f"one of {', '.join(OBJECT_TYPES)}")
    tracks = tuple(str(token) for token in values["track_tokens"])
    return Annotations(arrays["gt_boxes"], arrays["gt_velocity_3d"], names, tracks)


def _lidar2ego(content: Mapping[str, Any], fields: _Fields) -> NDArray[np.float64]:
    """[4,4] from translation and rotation; identity for logs that do not carry it (NAVSIM does not read it)."""
    matrix = np.eye(4)
    if "lidar2ego_rotation" in content:
        w, x, y, z = fields.rotation("lidar2ego_rotation", content["lidar2ego_rotation"])
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    if "lidar2ego_translation" in content:
        matrix[:3, 3] = fields.vector("lidar2ego_translation", content["lidar2ego_translation"], (3,))
    return matrix


def cameras_of(content: Mapping[str, Any], path: Path, index: int) -> dict[str, Camera]:
    """The cameras of a frame by name of CAMERAS; empty where a log carries none (test servers hide them)."""
    fields = _Fields(content, path, index)
    cameras = {}
    stored = content.get("cams") or {}
    for name in (name for name in CAMERAS if name in stored):
        prefix = f"cams.{name}."
        arrays = {
            key: fields.vector(prefix + key, fields.get(key, stored[name], prefix), shape)
            for key, shape in _CAMERA_SHAPES.items()
        }
        cameras[name] = Camera(
            path=str(fields.get("data_path", stored[name], prefix)),
            intrinsics=arrays["cam_intrinsic"],
            sensor2lidar_rotation=arrays["sensor2lidar_rotation"],
            sensor2lidar_translation=arrays["sensor2lidar_translation"],
            distortion=arrays["distortion"],
        )
    return cameras


def join_frames(
    frames: Sequence[Frame], num_history: int, log_name: str, split: str, cameras: Mapping[str, Camera]
) -> Scene:
    """The Scene of a window of frames, validated. Raises DataError for frames of several drives or maps."""
    now = frames[num_history - 1]
    for name in ("log_name", "map_location"):
        if len(found := {getattr(frame, name) for frame in frames}) > 1:
            raise DataError(
                f"log {log_name}, scene {now.token}: its frames are of {name} {sorted(found)}; one was expected: split "
                "the file into its drives (skip_bad=true leaves such windows out)"
            )
    return Scene(
        token=now.token,
        log_name=log_name,
        map_location=now.map_location,
        num_history=num_history,
        frame_tokens=tuple(frame.token for frame in frames),
        timestamps_us=np.array([frame.timestamp_us for frame in frames], dtype=np.int64),
        ego_global=np.stack([frame.ego_global for frame in frames]),
        ego_dynamics=np.stack([frame.ego_dynamics for frame in frames]),
        commands=np.stack([frame.command for frame in frames]),
        roadblock_ids=now.roadblock_ids,
        annotations=tuple(frame.annotations for frame in frames),
        traffic_lights=tuple(frame.traffic_lights for frame in frames),
        cameras=cameras,
        split=split,
        lidar2ego=now.lidar2ego,
    ).validate()
