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
from navsim_ext.pdm.record import NUM_FRAMES_V2, SceneMetricCache
from navsim_ext.pdm.traffic import AGENT_TYPES, STOPPED_SPEED, V1, V2, Traffic, object_box, swept_bounds

STEPS_PER_FRAME = 5
NUM_STEPS_V1 = 51  # v1 needs 0 ... 5 s, v2 0 ... 4 s
STEPS_V1 = np.arange(NUM_STEPS_V1)
FRAME_OF_STEP = np.arange(NUM_STEPS) // STEPS_PER_FRAME  # [41] the frame whose lights hold at a step of v2
LAST_AGENT_TYPE = max(AGENT_TYPES)


def replay(scene: SceneMetricCache) -> Traffic:
    """Traffic of a scene. Presence bits tell the versions apart; tracks over the ego at t = 0 are ignored in v2."""
    _, poses, presence, half_sizes, radii, is_agent, is_stopped = _replay(
        np.array(scene.track_poses),
        np.array(scene.track_sizes),
        np.array(scene.track_velocities),
        np.array(scene.track_types),
    )
    red_presence = np.zeros((NUM_STEPS_V1, len(scene.red_polygons)), dtype=np.uint8)
    if len(scene.red_polygons):
        red_presence[:NUM_STEPS] = scene.red_frames.T[FRAME_OF_STEP] * np.uint8(V2)
    traffic = Traffic(
        poses=poses,
        half_sizes=half_sizes,
        radii=radii,
        swept=swept_bounds(poses, presence, radii),
        presence=presence,
        ignored=np.zeros(len(radii), dtype=np.uint8),
        is_agent=is_agent,
        is_stopped=is_stopped,
        red_polygons=np.array(scene.red_polygons),
        red_presence=red_presence,
        map_of_step=STEPS_V1,
        unwrapped=True,
    )
    _ignore_overlapping(traffic, np.array(scene.ego_state))
    return traffic


def replayed_boxes(scene: SceneMetricCache, version: str) -> NDArray[np.float64]:
    """Corners [T,n,4,2] of a version's observation (v1: T = 51, v2: 41), NaN where absent: for inspection and tests.

    Tracks over the ego at t = 0 are still there: v2 drops them only when it scores.
    """
    steps, bit = (NUM_STEPS_V1, V1) if version == "v1" else (NUM_STEPS, V2)
    traffic = replay(scene)
    source = replayed_tracks(scene)
    corners = np.full((steps, len(scene.track_types), 4, 2), np.nan)
    for m in range(steps):
        for j in np.flatnonzero(traffic.presence[m] & bit):
            object_box(traffic, m, j, corners[m, source[j]])
    return corners


def replayed_tracks(scene: SceneMetricCache) -> NDArray[np.int64]:
    """[n'] the scene's track that each object of ``replay`` is."""
    return _rows(np.array(scene.track_poses))[0]


@kernel
def _rows(sightings):
    """Objects of the replay: (track [n'], version bits [n']).

    A track that v2 sees once, but v1 more often, stands still in one version and moves in the other: it becomes two
    objects, one for each.
    """
    count, frames = sightings.shape[0], sightings.shape[1]
    source, bits = np.empty(2 * count, dtype=np.int64), np.empty(2 * count, dtype=np.uint8)
    extra = count
    for j in range(count):
        seen, seen_v2 = 0, 0
        for k in range(frames):
            if not math.isnan(sightings[j, k, 0]):
                seen += 1
                seen_v2 += k < NUM_FRAMES_V2
        source[j], bits[j] = j, V1 | V2
        if seen_v2 == 1 and seen > 1:
            bits[j] = V1
            source[extra], bits[extra] = j, V2
            extra += 1
    return source[:extra].copy(), bits[:extra].copy()


@kernel
def _replay(sightings, sizes, velocities, types):
    """Sightings [n,11,3] and what is constant per track -> the arrays of Traffic for n' objects over 51 maps."""
    source, bits = _rows(sightings)
    count, frames = len(source), sightings.shape[1]
    poses = np.full((NUM_STEPS_V1, count, 3), np.nan)
    presence = np.zeros((NUM_STEPS_V1, count), dtype=np.uint8)
    half_sizes, radii = np.empty((count, 2)), np.empty(count)
    is_agent, is_stopped = np.empty(count, dtype=np.bool_), np.empty(count, dtype=np.bool_)
    for row in range(count):
        j = source[row]
        half_sizes[row, 0], half_sizes[row, 1] = sizes[j, 0] / 2.0, sizes[j, 1] / 2.0
        radii[row] = math.hypot(half_sizes[row, 0], half_sizes[row, 1])
        is_agent[row] = types[j] <= LAST_AGENT_TYPE
        speed = math.hypot(velocities[j, 0], velocities[j, 1])
        is_stopped[row] = not is_agent[row] or speed <= STOPPED_SPEED
        horizon = NUM_FRAMES_V2 if bits[row] == V2 else frames
        first, last, last_v2 = -1, -1, -1
        for k in range(horizon):
            if not math.isnan(sightings[j, k, 0]):
                if first < 0:
                    first = k
                last = k
                if k < NUM_FRAMES_V2:
                    last_v2 = k
        if first < 0:
            continue
        if first == last:  # one sighting: it stands at every step; v2 does not know of it when it lies beyond 4 s
            present = bits[row] if last_v2 >= 0 else bits[row] & V1
            for step in range(NUM_STEPS_V1):
                poses[step, row] = sightings[j, first]
                presence[step, row] = present
            continue
        _move(sightings[j], first, last, poses[:, row])
        for step in range(first * STEPS_PER_FRAME, last * STEPS_PER_FRAME + 1):
            presence[step, row] = bits[row] if step <= last_v2 * STEPS_PER_FRAME else bits[row] & V1
    return source, poses, presence, half_sizes, radii, is_agent, is_stopped


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
            poses[step, 0], poses[step, 1] = x, y
            poses[step, 2] = (high_heading - low_heading) / span * elapsed + low_heading
        low, low_heading, begin = high, high_heading, high * STEPS_PER_FRAME + 1


@kernel
def _ignore_overlapping(traffic, ego_state) -> None:
    """Sets bit V2 of ``ignored`` for objects whose box at step 0 touches the ego's footprint now."""
    heading = ego_state[HEADING]
    x = ego_state[X] + REAR_AXLE_TO_CENTER * math.cos(heading)
    y = ego_state[Y] + REAR_AXLE_TO_CENTER * math.sin(heading)
    ego, box = np.empty((4, 2)), np.empty((4, 2))
    box_corners(x, y, heading, HALF_LENGTH, HALF_WIDTH, ego)
    for j in range(len(traffic.radii)):
        if not traffic.presence[0, j] & V2:
            continue
        reach = traffic.radii[j] + (HALF_LENGTH + HALF_WIDTH)  # more than the half diagonal of the ego
        if math.hypot(traffic.poses[0, j, 0] - x, traffic.poses[0, j, 1] - y) > reach:
            continue
        object_box(traffic, 0, j, box)
        if boxes_intersect(ego, box):
            traffic.ignored[j] = V2
