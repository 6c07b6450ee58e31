"""The replayed traffic of a scene: 2 Hz sightings -> boxes at 10 Hz, for v1 (51 steps) and v2 (41 steps) at once.

Source: NAVSIM ``metric_cache_processor.py`` (interpolation, single sightings), v2.2's log-replay policy (tracks that
overlap the ego at t = 0 are dropped). Rules, per track:
* frame k stands at 0.5 k s; between its first and last sighting it moves linearly (x, y, unwrapped heading), gaps
  included; outside it is absent;
* seen in exactly one frame of the version's horizon, it stands there unmoved at every step.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from navsim_ext.metric_cache.schema import NUM_FRAMES_V2, SceneMetricCache
from navsim_ext.pdm.compiled import kernel
from navsim_ext.pdm.ego import (
    HALF_LENGTH,
    HALF_WIDTH,
    HEADING,
    NUM_STEPS,
    REAR_AXLE_TO_CENTER,
    X,
    Y,
    box_corners,
    unwrap_correction,
)
from navsim_ext.pdm.geometry import boxes_intersect
from navsim_ext.pdm.traffic import V1, V2, Traffic, make_traffic, object_box

STEPS_PER_FRAME = 5
NUM_STEPS_V1 = 51  # v1 needs 0 ... 5 s, v2 0 ... 4 s


def replay(scene: SceneMetricCache) -> Traffic:
    """Traffic of a scene. Presence bits tell the versions apart; tracks over the ego at t = 0 are ignored in v2."""
    source, poses, presence = replay_tracks(scene.track_poses)
    red_presence = np.zeros((NUM_STEPS_V1, len(scene.red_polygons)), dtype=np.uint8)
    for step in range(NUM_STEPS):
        red_presence[step] = np.where(scene.red_frames[:, step // STEPS_PER_FRAME], V2, 0)
    velocities = scene.track_velocities[source]
    traffic = make_traffic(
        poses,
        scene.track_sizes[source],
        scene.track_types[source],
        np.hypot(velocities[:, 0], velocities[:, 1]),
        presence=presence,
        red_polygons=scene.red_polygons,
        red_presence=red_presence,
    )
    return traffic._replace(ignored=_overlapping(traffic, np.ascontiguousarray(scene.ego_state)))


def replayed_boxes(scene: SceneMetricCache, version: str) -> NDArray[np.float64]:
    """Corners [T,n,4,2] of a version's observation (v1: T = 51, v2: 41), NaN where absent: for inspection and tests."""
    source, poses, presence = replay_tracks(scene.track_poses)
    steps, bit = (NUM_STEPS_V1, V1) if version == "v1" else (NUM_STEPS, V2)
    traffic = make_traffic(poses, scene.track_sizes[source], scene.track_types[source], np.zeros(len(source)))
    corners = np.full((steps, len(scene.track_types), 4, 2), np.nan)
    for m in range(steps):
        for j in np.flatnonzero(presence[m] & bit):
            object_box(traffic, m, j, corners[m, source[j]])
    return corners


def replay_tracks(
    sightings: NDArray[np.float64],
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.uint8]]:
    """Sightings [n,11,3] (NaN: not seen) -> rows' tracks [n'], poses [51,n',3], presence bits [51,n'].

    A track that v2 sees once, but v1 more often, stands still in one version and moves in the other: it gets two rows.
    """
    seen = np.isfinite(sightings[:, :, 0])
    twice = np.flatnonzero((seen[:, :NUM_FRAMES_V2].sum(axis=1) == 1) & (seen.sum(axis=1) > 1))
    source = np.concatenate([np.arange(len(sightings)), twice])
    rows = np.array(sightings, dtype=np.float64)[source]
    bits = np.full(len(rows), V1 | V2, dtype=np.uint8)
    bits[twice], bits[len(sightings) :] = V1, V2
    rows[len(sightings) :, NUM_FRAMES_V2:] = np.nan
    return source, *_replay_rows(rows, bits)


@kernel
def _replay_rows(rows, bits):
    count, frames = rows.shape[0], rows.shape[1]
    poses = np.full((NUM_STEPS_V1, count, 3), np.nan)
    presence = np.zeros((NUM_STEPS_V1, count), dtype=np.uint8)
    for j in range(count):
        first, last, last_v2 = -1, -1, -1
        for k in range(frames):
            if not math.isnan(rows[j, k, 0]):
                if first < 0:
                    first = k
                last = k
                if k < NUM_FRAMES_V2:
                    last_v2 = k
        if first < 0:
            continue
        if first == last:  # one sighting: it stands at every step; v2 does not know of it when it lies beyond 4 s
            present = bits[j] if last_v2 >= 0 else bits[j] & V1
            for step in range(NUM_STEPS_V1):
                _place(poses[step, j], rows[j, first, 0], rows[j, first, 1], rows[j, first, 2])
                presence[step, j] = present
            continue
        _move(rows[j], first, last, poses[:, j])
        for step in range(first * STEPS_PER_FRAME, last * STEPS_PER_FRAME + 1):
            presence[step, j] = bits[j] if step <= last_v2 * STEPS_PER_FRAME else bits[j] & V1
    return poses, presence


@kernel
def _place(pose, x: float, y: float, heading: float) -> None:
    pose[0], pose[1], pose[2] = x, y, math.atan2(math.sin(heading), math.cos(heading))


@kernel
def _move(sightings, first: int, last: int, poses) -> None:
    """Linear interpolation between successive sightings of one track, first and last included.

    A step that falls on a sighting is computed from the interval before it, as scipy's ``interp1d`` does.
    """
    low, correction = first, 0.0
    low_heading = sightings[first, 2]
    begin = first * STEPS_PER_FRAME
    for high in range(first + 1, last + 1):
        if math.isnan(sightings[high, 0]):
            continue
        correction = unwrap_correction(sightings[low, 2], sightings[high, 2], correction)
        high_heading = sightings[high, 2] + correction
        span = high * 0.5 - low * 0.5
        for step in range(begin, high * STEPS_PER_FRAME + 1):
            elapsed = step * 0.1 - low * 0.5
            x = (sightings[high, 0] - sightings[low, 0]) / span * elapsed + sightings[low, 0]
            y = (sightings[high, 1] - sightings[low, 1]) / span * elapsed + sightings[low, 1]
            _place(poses[step], x, y, (high_heading - low_heading) / span * elapsed + low_heading)
        low, low_heading, begin = high, high_heading, high * STEPS_PER_FRAME + 1


@kernel
def _overlapping(traffic, ego_state):
    """[n] bit V2 for objects whose box at step 0 touches the ego's footprint now."""
    ignored = np.zeros(len(traffic.radii), dtype=np.uint8)
    heading = ego_state[HEADING]
    ego, box = np.empty((4, 2)), np.empty((4, 2))
    box_corners(
        ego_state[X] + REAR_AXLE_TO_CENTER * math.cos(heading),
        ego_state[Y] + REAR_AXLE_TO_CENTER * math.sin(heading),
        heading,
        HALF_LENGTH,
        HALF_WIDTH,
        ego,
    )
    for j in range(len(ignored)):
        if traffic.presence[0, j] & V2:
            object_box(traffic, 0, j, box)
            if boxes_intersect(ego, box):
                ignored[j] = V2
    return ignored
