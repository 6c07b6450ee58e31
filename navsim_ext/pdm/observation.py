"""What a scene's log says to the scorer: ego states, tracks at 2 Hz, red lights (NAVSIM ``metric_cache_processor``).

Legend: K = 11 frames 0, 0.5 ... 5 s from now on (the first 9 are NAVSIM 2.2's horizon), n tracks, r red connectors.
The record is at 2 Hz, so that both scorer versions share it; :mod:`navsim_ext.pdm.log_replay` makes the 10 Hz world
of either version from it. Frame k is placed at 0.5 k s; the recorded time stamps of the future are not used, as in
NAVSIM. Only vehicles, pedestrians and bicycles keep a velocity; all other types stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import rotate, wrap_angle
from navsim_ext.pdm.ego import state_from_pose
from navsim_ext.pdm.record import NUM_FRAMES, NUM_FRAMES_V2
from navsim_ext.scene import OBJECT_TYPES, Scene

MOVING_TYPES = frozenset(OBJECT_TYPES.index(name) for name in ("vehicle", "pedestrian", "bicycle"))
TYPE_NUMBER = {name: number for number, name in enumerate(OBJECT_TYPES)}


@dataclass(frozen=True, eq=False)
class ObjectsNow:
    """Annotated objects of one frame in the global frame, in the order of the log."""

    poses: NDArray[np.float64]  # [n,3] box centre x, y, heading
    velocities: NDArray[np.float64]  # [n,2] m/s, 0 for types that stand
    sizes: NDArray[np.float64]  # [n,3] length, width, height
    types: NDArray[np.int8]  # [n]
    tokens: tuple[str, ...]  # n


@dataclass(frozen=True, eq=False)
class Tracks:
    """Tracks over K frames; rows sorted by type, then by first sighting. See ``SceneMetricCache`` for the fields."""

    poses: NDArray[np.float64]  # [n,K,3], NaN where not seen
    velocities: NDArray[np.float64]  # [n,2] of the first sighting
    sizes: NDArray[np.float64]  # [n,3] of the first sighting
    types: NDArray[np.int8]  # [n]
    tokens: tuple[str, ...]  # n


def ego_states(scene: Scene) -> NDArray[np.float64]:
    """[H,11] logged ego states up to now, in the order of ``SceneMetricCache.ego_state``."""
    history = zip(scene.ego_global[: scene.num_history], scene.ego_dynamics[: scene.num_history])
    return np.stack([state_from_pose(pose, dynamics) for pose, dynamics in history])


def objects_at(scene: Scene, frame: int) -> ObjectsNow:
    """The annotations of one frame in the global frame: R(h) p + t, h + yaw, R(h) v (no ego-motion compensation).

    Raises DataError when a track stands twice in the frame: NAVSIM would interpolate between the two.
    """
    annotations = scene.annotations[frame]
    count = len(annotations.names)
    if len(set(annotations.track_tokens)) != count:
        twice = next(t for t in annotations.track_tokens if annotations.track_tokens.count(t) > 1)
        raise DataError(
            f"log {scene.log_name}, scene {scene.token}: track {twice} stands more than once in frame {frame}; "
            "track tokens must be unique within a frame"
        )
    types = np.array([TYPE_NUMBER[name] for name in annotations.names], dtype=np.int8)
    ego = scene.ego_global[frame]
    boxes = np.asarray(annotations.boxes, dtype=np.float64).reshape(count, 7)
    moving = np.isin(types, list(MOVING_TYPES))[:, None]
    return ObjectsNow(
        poses=np.column_stack([rotate(boxes[:, :2], ego[2]) + ego[:2], wrap_angle(boxes[:, 6] + ego[2])]),
        velocities=np.where(moving, rotate(np.asarray(annotations.velocities, np.float64)[:, :2], ego[2]), 0.0),
        sizes=boxes[:, 3:6].copy(),
        types=types,
        tokens=annotations.track_tokens,
    )


def objects_after(scene: Scene, k: int) -> ObjectsNow:
    """The objects 0.5 k s after now in the global frame: those of a frame, or the later ones of a second-stage scene.

    Raises DataError when the scene knows nothing of that instant, or hides its objects.
    """
    frame = scene.now + k
    if not scene.annotated:
        raise DataError(
            f"log {scene.log_name}, scene {scene.token}: this split hides its objects (a test server's); it can be "
            "indexed and planned, but only the server can score it"
        )
    if frame < len(scene.timestamps_us):
        return objects_at(scene, frame)
    later = frame - len(scene.timestamps_us)
    if later >= len(scene.later_objects):
        known = len(scene.timestamps_us) + len(scene.later_objects) - scene.num_history
        raise DataError(
            f"log {scene.log_name}, scene {scene.token}: {known} instants after now are known, {k} are needed for "
            "scoring: read it with more future frames, or repair its extended detections"
        )
    objects = scene.later_objects[later]
    if len(set(objects.track_tokens)) != len(objects.track_tokens):
        raise DataError(
            f"log {scene.log_name}, scene {scene.token}: a track stands more than once {0.5 * k:g} s after now; track "
            "tokens must be unique within an instant"
        )
    types = np.array([TYPE_NUMBER[name] for name in objects.names], dtype=np.int8)
    moving = np.isin(types, list(MOVING_TYPES))[:, None]
    return ObjectsNow(
        objects.poses, np.where(moving, objects.velocities, 0.0), objects.sizes, types, objects.track_tokens
    )


def tracks(scene: Scene, frames: int = NUM_FRAMES) -> Tracks:
    """Tracks of ``frames`` instants from now on (11: to 5 s; 9: to 4 s, NAVSIM 2.2 alone), NaN after them.

    Raises DataError when the scene ends before.
    """
    rows: dict[str, int] = {}
    sightings: list[tuple[int, int, NDArray[np.float64]]] = []
    first: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]] = []  # type, velocity, size
    for k in range(frames):
        objects = objects_after(scene, k)
        for i, token in enumerate(objects.tokens):
            if token not in rows:
                rows[token] = len(rows)
                first.append((int(objects.types[i]), objects.velocities[i], objects.sizes[i]))
            sightings.append((rows[token], k, objects.poses[i]))
    poses = np.full((len(rows), NUM_FRAMES, 3), np.nan)
    for row, k, pose in sightings:
        poses[row, k] = pose
    types = np.array([kind for kind, _, _ in first], dtype=np.int8)
    order = np.argsort(types, kind="stable")
    tokens = list(rows)
    return Tracks(
        poses=poses[order],
        velocities=np.array([velocity for _, velocity, _ in first]).reshape(-1, 2)[order],
        sizes=np.array([size for _, _, size in first]).reshape(-1, 3)[order],
        types=types[order],
        tokens=tuple(tokens[row] for row in order),
    )


def red_connectors(scene: Scene, route_connectors: set[str]) -> tuple[list[str], NDArray[np.bool_]]:
    """Connectors on the route that are red at some time: (fids [r], red at frame k [r,9]).

    ``route_connectors``: lanes and connectors of the *uncorrected* route's roadblocks. Each status holds from its
    frame until the next one, so steps 5k ... 5k+4 (NAVSIM 2.2; 1.1 stores none).
    """
    red: dict[str, list[int]] = {}
    lights = (scene.traffic_lights + scene.later_lights)[scene.now : scene.now + NUM_FRAMES_V2]  # past the end: none
    for k, statuses in enumerate(lights):
        for connector, is_red in statuses:
            if is_red and connector in route_connectors:
                red.setdefault(connector, []).append(k)
    frames = np.zeros((len(red), NUM_FRAMES_V2), dtype=bool)
    for row, ks in enumerate(red.values()):
        frames[row, ks] = True
    return list(red), frames


def human_poses(scene: Scene, count: int = 8) -> NDArray[np.float64]:
    """[count,3] driven poses after now in the ego frame; NaN where the log ends before, and in the second stage, which
    no human drove."""
    poses = np.full((count, 3), np.nan)
    if scene.is_synthetic:
        return poses
    available = min(count, scene.num_future)
    poses[:available] = scene.future_poses(available)
    return poses
