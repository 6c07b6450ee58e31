"""Scenes of a test server's split: five raw frames hold two of them, without objects and without a future.

    openscene_meta_datas/*.pkl            second stage, beside ``sensor_blobs``: one pair of scenes a file
    navsim_logs/<split>/*.pkl             first stage: a log of many drives, five frames to a ``scene_token``

Frames [0:4] are the scene before, [1:5] the scene now, 0.5 s later (NAVSIM 2.2, ``dataloader_private.py``). They can be
indexed, planned and submitted; only the server can score them. NAVSIM leaves out a drive of another length without a
word; here it is reported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from navsim_ext import pickles
from navsim_ext.errors import DataError
from navsim_ext.readers.navsim_frames import cameras_of, join_frames, parse_frame, short
from navsim_ext.scene import SYNTHETIC_TOKEN_LENGTH, Scene

META_FOLDER = "openscene_meta_datas"
FRAMES_OF_PAIR = 5
NUM_HISTORY = 4
STARTS = (0, 1)  # of the scene before and of the scene now, among the five frames


def is_cut(frames: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a log is a test server's: no frame has objects, and numbered frames come five to a drive."""
    if any(frame.get("anns") is not None for frame in frames):
        return False
    counts: dict[str, int] = {}
    for frame in frames:
        if not isinstance(frame.get("scene_token"), str) or "frame_idx" not in frame:
            return False
        counts[frame["scene_token"]] = counts.get(frame["scene_token"], 0) + 1
    return max(counts.values(), default=0) == FRAMES_OF_PAIR


def cut_windows(frames: Sequence[Mapping[str, Any]], path: Path) -> tuple[list[list[int]], list[DataError]]:
    """(positions of the four frames of each scene, what is wrong with drives that give none) of a cut log."""
    drives: dict[str, list[int]] = {}
    for position, frame in enumerate(frames):
        drives.setdefault(frame["scene_token"], []).append(position)
    windows, bad = [], []
    for token, positions in drives.items():
        numbers = [frames[position].get("frame_idx") for position in positions]
        where = f"{path}, scene_token {token!s:.40}"
        if any(isinstance(number, bool) or not isinstance(number, int | np.integer) for number in numbers):
            bad.append(DataError(f"{where}: frame_idx is {short(numbers)}; whole numbers were expected"))
        elif len(positions) != FRAMES_OF_PAIR:
            bad.append(
                DataError(f"{where}: {len(positions)} frames; {FRAMES_OF_PAIR} were expected: download the log again")
            )
        else:
            order = [position for _, position in sorted(zip(numbers, positions))]
            windows += [order[start : start + NUM_HISTORY] for start in STARTS]
    return windows, bad


def load_pair(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The five frames of a pair of second-stage scenes. Raises DataError or MissingError naming the file."""
    frames = pickles.load(path)
    if (
        not isinstance(frames, list)
        or len(frames) != FRAMES_OF_PAIR
        or not all(isinstance(frame, dict) for frame in frames)
    ):
        raise DataError(
            f"{path} holds {short(frames)}; a list of {FRAMES_OF_PAIR} frame dictionaries was expected: this is no "
            "pair of a test server's second stage"
        )
    for frame in frames[NUM_HISTORY - 1 :]:
        for key in ("token", "log_name"):
            if not isinstance(frame.get(key), str) or not frame[key]:
                raise DataError(f"{path}: {key} is {short(frame.get(key))}; text was expected")
        if len(frame["token"]) != SYNTHETIC_TOKEN_LENGTH:
            raise DataError(
                f"{path}: token {frame['token']!s:.40} has {len(frame['token'])} characters; a second-stage token "
                f"has {SYNTHETIC_TOKEN_LENGTH}"
            )
    return frames


def read_hidden_scene(path: str | os.PathLike[str], start: int) -> Scene:
    """The scene that begins at frame ``start`` of a pair. Raises DataError at the first broken promise."""
    path, frames = Path(path), load_pair(path)
    indices = range(start, start + NUM_HISTORY)
    window = [parse_frame(frames[index], path, index) for index in indices]
    cameras = cameras_of(frames[indices[-1]], path, indices[-1])
    return join_frames(window, NUM_HISTORY, frames[indices[-1]]["log_name"], "second_stage", cameras)
