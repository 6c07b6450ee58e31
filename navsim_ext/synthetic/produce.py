"""One log from recipe to files: pictures first, then the log pickle, each put in place whole."""

from __future__ import annotations

import functools
import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from navsim_ext.files import write_atomic
from navsim_ext.frames import POSE_INTERVAL_S
from navsim_ext.maps.nuplan_gpkg import load_map
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.rendering.renderer import braking_tracks, camera_rig, render
from navsim_ext.scene import Annotations
from navsim_ext.synthetic.drive import Drive
from navsim_ext.synthetic.log_writer import annotations, encode, frames_of
from navsim_ext.synthetic.manifest import LogRecord
from navsim_ext.synthetic.recipe import FOLDER_OF_PART, HISTORY_FRAMES, Recipe

WORK_FOLDER = ".build"  # half-written files, on the same file system as the data


def produce(recipe: Recipe, folder: Path, index: int) -> LogRecord:
    """Makes log ``index`` with its pictures inside ``folder`` and returns its record."""
    drive = recipe.drive(index)
    name, part = recipe.name_of(index), recipe.part_of(index)
    frames = frames_of(drive, name, recipe.image_size)
    content = encode(frames)
    sensors = folder / "sensor_blobs" / FOLDER_OF_PART[part]
    size, pictures = len(content), 0
    windows = recipe.scenes_of(index)
    if recipe.cameras:
        for frame in recipe.frames_with_pictures(windows):
            for view in recipe.cameras:
                shot = _picture(recipe, drive, frames, folder / "maps", frame, view)
                picture = sensors / frames[frame]["cams"][view]["data_path"]
                write_atomic(picture, shot, workshop=folder / WORK_FOLDER, durable=False)
                size, pictures = size + len(shot), pictures + 1
    log = folder / "navsim_logs" / FOLDER_OF_PART[part] / f"{name}.pkl"
    write_atomic(log, content, workshop=folder / WORK_FOLDER, durable=False)
    return LogRecord(
        index=index,
        name=name,
        part=part,
        location=drive.plan.town.location,
        kind=drive.plan.kind,
        tokens=tuple(frame["token"] for frame in frames[HISTORY_FRAMES - 1 : HISTORY_FRAMES - 1 + windows]),
        attempts=drive.attempts,
        pictures=pictures,
        size=size,
        sha256=hashlib.sha256(content).hexdigest(),
    )


@functools.lru_cache(maxsize=4)
def _vector_map(maps_root: Path, location: str) -> VectorMap:
    return load_map(maps_root, location)


@functools.lru_cache(maxsize=4)
def _rig(size: tuple[int, int]):
    return camera_rig(size)


def _picture(recipe: Recipe, drive: Drive, frames: list, maps: Path, frame: int, view: str) -> bytes:
    return jpeg(picture_of(recipe, maps, drive, frames, frame, view), recipe.jpeg_quality)


def jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """A picture [H,W,3] as the bytes of its file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def picture_of(recipe: Recipe, maps: Path, drive: Drive, frames: list, frame: int, view: str) -> NDArray[np.uint8]:
    """What a camera sees in a frame of a drive; ``frames`` are those of :func:`frames_of`."""
    tracks = frames[frame]["anns"]["track_tokens"]
    window: list[Annotations] = [
        annotations(drive, k, tracks) for k in range(max(frame - HISTORY_FRAMES + 1, 0), frame + 1)
    ]
    pose = drive.ego[frame] + np.append(drive.plan.town.origin, 0.0)
    return render(
        _vector_map(maps, drive.plan.town.location),
        window[-1],
        pose,
        [(str(connector), red) for connector, red in frames[frame]["traffic_lights"]],
        _rig(recipe.image_size)[view],
        recipe.image_size,
        braking=braking_tracks(window, len(window) - 1, POSE_INTERVAL_S),
    )
