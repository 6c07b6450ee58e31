"""Frames of WOD-E2E made up here: a car on a known left curve, small grey pictures, two rated trajectories."""

import io

import numpy as np
from PIL import Image

from navsim_ext.readers.wod_e2e import CAMERA_NAMES, E2EFrame, FrameCamera
from navsim_ext.wod_e2e.messages import picture_path, write_frames

SPEED, RADIUS = 6.0, 40.0  # m/s, m
SIZE = (64, 48)


def ego_at(seconds):
    """[..., 3] x, y, heading of the curve in the ego frame of t = 0."""
    angle = SPEED * np.asarray(seconds) / RADIUS
    return np.stack([RADIUS * np.sin(angle), RADIUS * (1 - np.cos(angle)), angle], axis=-1)


def picture(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", SIZE, (value % 256, 90, 120)).save(stream, "JPEG")
    return stream.getvalue()


def cameras(name: str) -> dict[str, FrameCamera]:
    """Eight cameras 1.5 m up, each looking its own way."""
    made = {}
    for code, camera in CAMERA_NAMES.items():
        turn = 0.7 * (code - 1)
        pose = np.eye(4)
        pose[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        pose[:3, 3] = [1.5, 0.1 * code, 1.5]
        intrinsics = np.array([50.0, 51.0, 32.0, 24.0, 0.1, 0.01, 0.001, 0.002, 0.003])
        made[camera] = FrameCamera(picture_path(name, camera), intrinsics, pose, *SIZE)
    return made


def frame(name: str = "aaaa-000", *, rated: bool = True, hidden: bool = False, intent: int = 2, time_s: float = 0.0):
    past_s, future_s = np.arange(-15, 1) * 0.25, np.arange(1, 21) * 0.25
    past, future = ego_at(past_s), ego_at(future_s)
    speed, turning = np.full(16, SPEED), past[:, 2]
    velocity = np.stack([speed * np.cos(turning), speed * np.sin(turning)], axis=-1)
    acceleration = SPEED**2 / RADIUS * np.stack([-np.sin(turning), np.cos(turning)], axis=-1)
    straight = np.column_stack([SPEED * future_s, np.zeros(20)])
    return E2EFrame(
        id=name,
        time_us=1_700_000_000_000_000 + round(time_s * 1e6),
        intent=intent,
        past=np.column_stack([past[:, :2], np.zeros(16), velocity, acceleration]),
        future=np.zeros((0, 3)) if hidden else np.column_stack([future[:, :2], np.zeros(20)]),
        cameras=cameras(name),
        rated=(future[:, :2].copy(), straight[:18]) if rated else (),
        ratings=np.array([9.0, 3.0]) if rated else np.zeros(0),
    )


def pictures(made: E2EFrame) -> dict[str, bytes]:
    return {camera: picture(7 * number + len(made.id)) for number, camera in enumerate(sorted(made.cameras))}


def sequences(hidden: bool = False) -> list[E2EFrame]:
    """Three frames of one drive and two of another; the last of each is rated."""
    made = [frame(f"aaaa-{k:03d}", rated=k == 2 and not hidden, hidden=hidden, time_s=k / 10) for k in range(3)]
    return made + [frame(f"bbbb-{k:03d}", rated=k == 1 and not hidden, hidden=hidden, intent=1) for k in range(2)]


def write_files(folder, frames=None, hidden: bool = False):
    """The frames spread over two TFRecord files in no order; returns the folder."""
    frames = sequences(hidden) if frames is None else frames
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        part = frames[number::2][::-1]
        write_frames(folder / f"val.tfrecord-{number:05d}-of-00002", [(one, pictures(one)) for one in part])
    return folder
