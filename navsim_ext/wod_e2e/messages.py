"""``E2EDFrame`` messages <-> E2EFrame, from a table of field numbers.

Deviation of what is written: float fields are stored in 32 bits, as the format has them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.pictures import stored_kind
from navsim_ext.readers.wod_e2e import CAMERA_NAMES, FUTURE, PAST, E2EFrame, FrameCamera, name_parts
from navsim_ext.traffic.messages import fill, message_types, parse
from navsim_ext.traffic.source import checked
from navsim_ext.traffic.tfrecord import write_records

TABLE = {
    "E2EDFrame": "1 frame:Frame, 5 future_states:States, 6 past_states:States, 7 intent:int32, "
    "8 preference_trajectories*:States",
    "States": "1 pos_x**:float, 2 pos_y**:float, 3 pos_z**:float, 4 vel_x**:float, 5 vel_y**:float, 6 accel_x**:float, "
    "7 accel_y**:float, 8 preference_score:float",
    "Frame": "1 context:Context, 2 timestamp_micros:int64, 4 images*:Image",
    "Context": "1 name:string, 2 camera_calibrations*:Calibration",
    "Image": "1 name:int32, 2 image:bytes",
    "Calibration": "1 name:int32, 2 intrinsic*:double, 3 extrinsic:Transform, 4 width:int32, 5 height:int32",
    "Transform": "1 transform*:double",
}
MESSAGES = message_types("trivium.wod_e2e", TABLE)
PAST_FIELDS = ("pos_x", "pos_y", "pos_z", "vel_x", "vel_y", "accel_x", "accel_y")
NOT_RATED = -1.0
CODES = {name: code for code, name in CAMERA_NAMES.items()}


def picture_path(name: str, camera: str) -> str:
    """Where the picture of a frame goes, relative to the unpacked folder."""
    sequence, number = name_parts(name)
    return f"pictures/{sequence}/{number:06d}_{camera}.jpg"


def frame_of(data: bytes, where: str) -> tuple[E2EFrame, dict[str, bytes]]:
    """(frame, JPEG by camera) of a serialized ``E2EDFrame``.

    Raises DataError naming ``where`` for bytes that are none, a frame without cameras or calibration, an unknown intent
    or camera, points of another number than the format has, values that are not finite, ratings out of range.
    """
    message = parse(MESSAGES["E2EDFrame"], data, where)
    try:
        return checked(where, lambda: _frame(message, f"{where}, frame {message.frame.context.name!r:.80}"))
    except DataError as error:
        raise error if str(error).startswith(where) else DataError(f"{where}: {error}") from error


def _frame(message: Message, where: str) -> tuple[E2EFrame, dict[str, bytes]]:
    name = message.frame.context.name
    name_parts(name)
    calibrations = {one.name: one for one in message.frame.context.camera_calibrations}
    pictures: dict[str, bytes] = {}
    cameras: dict[str, FrameCamera] = {}
    for image in message.frame.images:
        camera = CAMERA_NAMES.get(image.name)
        if camera is None or camera in cameras:
            raise DataError(
                f"{where}: a picture of camera {image.name}; 1 to {len(CAMERA_NAMES)}, each once, was expected"
            )
        if image.name not in calibrations:
            raise DataError(f"{where}: camera {image.name} ({camera}) has a picture and no calibration")
        kind = stored_kind(image.image)
        if kind != "JPEG":
            raise DataError(f"{where}: the picture of {camera} is a {kind}; JPEG was expected")
        pictures[camera] = image.image
        cameras[camera] = _calibrated(calibrations[image.name], picture_path(name, camera), f"{where}: {camera}")
    rated, ratings = [], []
    for one in message.preference_trajectories:
        if one.HasField("preference_score") and one.preference_score != NOT_RATED:
            rated.append(_columns(one, ("pos_x", "pos_y"), len(one.pos_x), f"{where}: rated trajectory {len(rated)}"))
            ratings.append(one.preference_score)
    future = len(message.future_states.pos_x)
    frame = E2EFrame(
        id=name,
        time_us=message.frame.timestamp_micros,
        intent=message.intent,
        past=_columns(message.past_states, PAST_FIELDS, PAST, f"{where}: past_states", optional=("pos_z",)),
        future=_columns(
            message.future_states,
            PAST_FIELDS[:3],
            FUTURE if future else 0,
            f"{where}: future_states",
            optional=("pos_z",),
        ),
        cameras=cameras,
        rated=tuple(rated),
        ratings=np.array(ratings, np.float64),
    )
    return frame.validate(), pictures


def _columns(
    states: Message, names: tuple[str, ...], points: int, where: str, optional: tuple[str, ...] = ()
) -> NDArray[np.float64]:
    """[points, fields]; an optional field that is absent is 0."""
    columns = []
    for name in names:
        values = np.array(getattr(states, name), np.float64)
        if not len(values) and name in optional:
            values = np.zeros(points)
        if len(values) != points:
            raise DataError(f"{where}: {name} has {len(values)} points; {points} were expected")
        if not np.isfinite(values).all():
            raise DataError(f"{where}: {name} has a value that is not finite")
        columns.append(values)
    return np.column_stack(columns)


def _calibrated(message: Message, path: str, where: str) -> FrameCamera:
    transform = np.array(message.extrinsic.transform, np.float64)
    if transform.shape != (16,):
        raise DataError(f"{where}: extrinsic has {len(transform)} numbers; 16 were expected")
    return FrameCamera(path, np.array(message.intrinsic), transform.reshape(4, 4), message.width, message.height)


def message_of(frame: E2EFrame, pictures: Mapping[str, bytes]) -> Message:
    """The message of a frame and its pictures (JPEG by camera); raises DataError for a frame that breaks a promise."""
    frame.validate()
    message = fill(MESSAGES["E2EDFrame"](), intent=frame.intent)
    message.frame.timestamp_micros = frame.time_us
    message.frame.context.name = frame.id
    for name in sorted(frame.cameras, key=CODES.__getitem__):
        camera = frame.cameras[name]
        fill(message.frame.images.add(), name=CODES[name], image=pictures[name])
        one = fill(
            message.frame.context.camera_calibrations.add(), name=CODES[name], width=camera.width, height=camera.height
        )
        one.intrinsic.extend(camera.intrinsics.tolist())
        one.extrinsic.transform.extend(camera.to_vehicle.ravel().tolist())
    _extend(message.past_states, PAST_FIELDS, frame.past)
    if len(frame.future):
        _extend(message.future_states, PAST_FIELDS[:3], frame.future)
    for path, rating in zip(frame.rated, frame.ratings.tolist(), strict=True):
        _extend(fill(message.preference_trajectories.add(), preference_score=rating), ("pos_x", "pos_y"), path)
    return message


def _extend(states: Any, names: tuple[str, ...], values: NDArray[np.float64]) -> None:
    for name, column in zip(names, values.T, strict=True):
        getattr(states, name).extend(column.tolist())


def write_frames(path: str | os.PathLike[str], frames: Iterable[tuple[E2EFrame, Mapping[str, bytes]]]) -> int:
    """Writes frames with their pictures as one TFRecord file, atomically; returns how many."""
    return write_records(path, (message_of(*one).SerializeToString(deterministic=True) for one in frames))
