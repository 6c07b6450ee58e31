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
from navsim_ext.files import inside
from navsim_ext.frames import quaternion_to_heading
from navsim_ext.scene import CAMERAS, COMMANDS, MAP_LOCATIONS, OBJECT_TYPES, Annotations, Camera, Scene

QUATERNION_TOLERANCE = 1e-3  # of the squared norm; beyond it the rotation was not one
LATEST_US = 1 << 53  # the year 2255; integers that floats hold exactly
LARGEST = 1e7  # m: beyond it a coordinate is no place on a map
_QUATERNION_EXACT = 1e-14  # pyquaternion, which NAVSIM uses, leaves quaternions this close to 1 as they are
_DEPLOYED_ALIASES = {"las_vegas": "us-nv-las-vegas-strip"}  # also known to NAVSIM's scenario class
NO_OBJECTS = Annotations(np.zeros((0, 7)), np.zeros((0, 3)), (), ())  # of frames that hide theirs: see Scene.annotated
_IDENTITY = np.eye(4)
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
    annotations: Annotations | None  # None: the split hides them
    ego_global: NDArray[np.float64]  # [3]
    ego_dynamics: NDArray[np.float32]  # [4]
    command: NDArray[np.float32]  # [4]
    lidar2ego: NDArray[np.float64]  # [4,4]


class _Fields:
    """Checked access to the keys of one frame."""

    def __init__(self, content: Mapping[str, Any], path: Path, index: int) -> None:
        self._content = content
        self._where = f"{path}, frame {index} (token {content.get('token')!s:.40})"

    def fail(self, key: str, found: Any, expected: str, remedy: str = "repair or remove the log") -> DataError:
        return DataError(f"{self._where}: {key} is {found!s:.200}; {expected} was expected: {remedy}")

    def get(self, key: str, content: Mapping[str, Any] | None = None, prefix: str = "") -> Any:
        content = self._content if content is None else content
        if not isinstance(content, Mapping):
            raise self.fail(prefix.rstrip("."), short(content), "a dictionary")
        if key not in content:
            raise self.fail(
                prefix + key, "absent", f"one of the keys {sorted(map(str, content))!s:.200} with that name"
            )
        return content[key]

    def optional(self, key: str) -> Any:
        """The value, None where there is none."""
        return self._content.get(key)

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        """A list of ids: texts, or the integers that some converters write."""
        if not is_list(value) or getattr(value, "ndim", 1) != 1:
            raise self.fail(key, short(value), "a list of texts")
        bad = [entry for entry in value if type(entry) is not str and not _is_id(entry)]
        if bad:
            raise self.fail(key, f"a list with {short(bad[0])}", "a list of texts")
        return tuple(map(str, value))

    def vector(self, key: str, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
        try:
            array = np.asarray(value)
            if array.dtype.kind not in "fiu":
                raise TypeError("no numbers")
            array = array.astype(np.float64, copy=False)
        except (TypeError, ValueError, OverflowError, MemoryError, RecursionError):
            raise self.fail(key, short(value), f"numbers of shape {shape}") from None
        if array.shape != shape:
            raise self.fail(key, f"of shape {array.shape}", f"shape {shape}")
        if not all(-LARGEST <= number <= LARGEST for number in array.ravel().tolist()):  # for so few, faster than numpy
            finite = np.isfinite(array).all()
            raise self.fail(key, array.tolist(), f"values within {LARGEST:g}" if finite else "finite values")
        return array

    def rotation(self, key: str, value: Any) -> NDArray[np.float64]:
        """Unit quaternion (w, x, y, z)."""
        quaternion = self.vector(key, value, (4,))
        square = float(quaternion @ quaternion)
        if abs(square - 1.0) > QUATERNION_TOLERANCE:
            raise self.fail(key, f"{quaternion.tolist()} of norm {square**0.5:.6g}", "a unit quaternion (norm 1)")
        return quaternion / square**0.5 if abs(1.0 - square) > _QUATERNION_EXACT else quaternion


def _is_id(entry: Any) -> bool:
    return isinstance(entry, str | int | np.integer) and not isinstance(entry, bool)


def is_list(value: Any) -> bool:
    """A list, tuple, or array of at least one dimension."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def short(value: Any) -> str:
    """What a wrong value is, in a few words, however large it is."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    if isinstance(value, list | tuple | dict | set | frozenset) and len(value) > 4:
        return f"a {type(value).__name__} of {len(value)} elements"
    return f"{value!r:.60}"


def parse_frame(content: Mapping[str, Any], path: Path, index: int) -> Frame:
    """Checks and converts frame ``index`` of the log file ``path``; raises DataError at the first broken promise."""
    fields = _Fields(content, path, index)
    token, timestamp = fields.get("token"), fields.get("timestamp")
    if not isinstance(token, str) or not token:
        raise fields.fail("token", short(token), "a string of 16 hexadecimal characters")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | np.integer):
        raise fields.fail("timestamp", short(timestamp), "integer microseconds")
    if not 0 <= timestamp < LATEST_US:
        raise fields.fail("timestamp", timestamp, "microseconds since 1970")
    location = fields.get("map_location")
    location = _DEPLOYED_ALIASES.get(location, location) if isinstance(location, str) else location
    if not isinstance(location, str) or location not in MAP_LOCATIONS:
        raise fields.fail("map_location", short(location), f"one of {', '.join(MAP_LOCATIONS)}")
    translation = fields.vector("ego2global_translation", fields.get("ego2global_translation"), (3,))
    rotation = fields.rotation("ego2global_rotation", fields.get("ego2global_rotation"))
    dynamics = fields.vector("ego_dynamic_state", fields.get("ego_dynamic_state"), (4,))
    command = fields.vector("driving_command", fields.get("driving_command"), (len(COMMANDS),))
    if sorted(command.tolist()) != [0.0] * (len(COMMANDS) - 1) + [1.0]:
        raise fields.fail("driving_command", command.tolist(), f"a one-hot of {COMMANDS}")
    return Frame(
        token=token,
        log_name=_log_name(fields, content.get("log_name")),
        timestamp_us=int(timestamp),
        map_location=location,
        roadblock_ids=fields.texts("roadblock_ids", fields.get("roadblock_ids")),
        traffic_lights=_traffic_lights(fields),
        annotations=_annotations(fields),
        ego_global=np.array([translation[0], translation[1], quaternion_to_heading(rotation)]),
        ego_dynamics=dynamics.astype(np.float32),
        command=command.astype(np.float32),
        lidar2ego=_lidar2ego(content, fields),
    )


def _log_name(fields: _Fields, name: Any) -> str:
    """Frames need not state it."""
    if name is not None and not isinstance(name, str):
        raise fields.fail("log_name", short(name), "a text")
    return name or ""


def _traffic_lights(fields: _Fields) -> tuple[tuple[str, bool], ...]:
    lights = fields.get("traffic_lights")
    if not is_list(lights):
        raise fields.fail("traffic_lights", short(lights), "a list of (lane connector id, is red)")
    for light in lights:
        pair = is_list(light) and len(light) == 2
        if not pair or not isinstance(light[0], str | int | np.integer) or not _is_flag(light[1]):
            raise fields.fail(
                "traffic_lights", f"{short(lights)} with {short(light)}", "a list of (lane connector id, is red)"
            )
    return tuple((str(connector), bool(is_red)) for connector, is_red in lights)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or (isinstance(value, int | np.integer) and value in (0, 1))


def _annotations(fields: _Fields) -> Annotations | None:
    """None for a frame that has none: test servers hide them."""
    content = fields.optional("anns")
    if content is None:
        return None
    keys = ("gt_boxes", "gt_names", "gt_velocity_3d", "instance_tokens", "track_tokens")
    values = {key: fields.get(key, content, "anns.") for key in keys}
    for key, value in values.items():
        if not is_list(value):
            raise fields.fail(f"anns.{key}", short(value), "an array with one row for each object")
    lengths = {key: len(value) for key, value in values.items()}
    if len(set(lengths.values())) != 1:
        raise fields.fail("anns", f"of lengths {lengths}", "five arrays of equal length")
    count = lengths["gt_boxes"]
    arrays = {}
    for key, width in (("gt_boxes", 7), ("gt_velocity_3d", 3)):
        try:
            array = np.asarray(values[key])
        except (TypeError, ValueError, OverflowError, MemoryError) as error:
            raise fields.fail(f"anns.{key}", short(values[key]), f"numbers ({count}, {width})") from error
        if count == 0:
            array = np.zeros((0, width), dtype=array.dtype if array.dtype.kind == "f" else np.float64)
        if array.shape != (count, width) or array.dtype.kind not in "fiu":
            raise fields.fail(f"anns.{key}", f"of shape {array.shape}, {array.dtype}", f"numbers ({count}, {width})")
        largest = np.abs(array.astype(np.float64, copy=False)).max(initial=0.0)  # NaN where there is one
        if not largest <= LARGEST:
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                row = int(bad[0, 0])
                track = values["track_tokens"][row]
                raise fields.fail(f"anns.{key}[{row}] of track {track!s:.40}", array[row].tolist(), "finite values")
            raise fields.fail(f"anns.{key}", f"up to {largest:g}", f"metres and m/s within {LARGEST:g}")
        arrays[key] = array
    if count and (arrays["gt_boxes"][:, 3:6] < 0).any():
        raise fields.fail("anns.gt_boxes", "of negative size", "lengths, widths and heights of at least 0")
    names = fields.texts("anns.gt_names", values["gt_names"])
    unknown = sorted(set(names) - _OBJECT_TYPES)
    if unknown:
        raise fields.fail("anns.gt_names", repr(unknown[0]), f"one of {', '.join(OBJECT_TYPES)}")
    tracks = fields.texts("anns.track_tokens", values["track_tokens"])
    return Annotations(arrays["gt_boxes"], arrays["gt_velocity_3d"], names, tracks)


def _lidar2ego(content: Mapping[str, Any], fields: _Fields) -> NDArray[np.float64]:
    """[4,4] from translation and rotation; identity for logs that do not carry it (NAVSIM does not read it)."""
    matrix = _IDENTITY.copy()
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
    stored = content.get("cams")
    stored = {} if stored is None else stored
    if not isinstance(stored, Mapping):
        raise fields.fail("cams", short(stored), "a dictionary of cameras by name")
    for name in (name for name in CAMERAS if name in stored):
        prefix = f"cams.{name}."
        arrays = {
            key: fields.vector(prefix + key, fields.get(key, stored[name], prefix), shape)
            for key, shape in _CAMERA_SHAPES.items()
        }
        cameras[name] = Camera(
            path=_picture_path(fields, prefix, stored[name]),
            intrinsics=arrays["cam_intrinsic"],
            sensor2lidar_rotation=arrays["sensor2lidar_rotation"],
            sensor2lidar_translation=arrays["sensor2lidar_translation"],
            distortion=arrays["distortion"],
        )
    return cameras


def _picture_path(fields: _Fields, prefix: str, camera: Mapping[str, Any]) -> str:
    """Relative to the sensor root and below it: a log must not lead to other files of the machine."""
    path = fields.get("data_path", camera, prefix)
    try:
        return inside(path, f"{prefix}data_path")
    except DataError as error:
        raise fields.fail(f"{prefix}data_path", short(path), "a relative path below the sensor root") from error


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
    hidden = [frame for frame in frames if frame.annotations is None]
    if hidden and len(hidden) < len(frames):
        raise DataError(
            f"log {log_name}, scene {now.token}: anns is absent in {len(hidden)} of {len(frames)} frames (first: "
            f"{hidden[0].token}); all or none was expected: repair or remove the log"
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
        annotations=tuple(NO_OBJECTS if frame.annotations is None else frame.annotations for frame in frames),
        annotated=not hidden,
        traffic_lights=tuple(frame.traffic_lights for frame in frames),
        cameras=cameras,
        split=split,
        lidar2ego=now.lidar2ego,
    ).validate()
