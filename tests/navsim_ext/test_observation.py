"""What a scene's log says to the scorer: frames of reference, gaps, single sightings, red lights, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from navsim_ext.errors import DataError
from navsim_ext.frames import to_local
from navsim_ext.pdm import observation
from navsim_ext.scene import Annotations, Scene

EGO = np.array([664_000.0, 3_998_000.0, 2.3])  # drives 5 m/s


def annotations(objects: dict[str, tuple[str, list[float], list[float]]]) -> Annotations:
    """{track: (type, [x, y, yaw] in the ego frame, [vx, vy])}"""
    boxes = np.array([[x, y, 0.0, 4.0, 2.0, 1.5, yaw] for _, (x, y, yaw), _ in objects.values()]).reshape(-1, 7)
    velocities = np.array([[*v, 0.0] for _, _, v in objects.values()]).reshape(-1, 3)
    return Annotations(boxes, velocities, tuple(kind for kind, _, _ in objects.values()), tuple(objects))


def scene_of(frames: list[Annotations], lights: dict[int, tuple[tuple[str, bool], ...]] | None = None) -> Scene:
    """14 frames, ego driving straight; ``frames`` are those from now on."""
    count = 14
    seconds = (np.arange(count) - 3) * 0.5
    ego = np.column_stack(
        [EGO[0] + 5 * seconds * np.cos(EGO[2]), EGO[1] + 5 * seconds * np.sin(EGO[2]), np.full(count, EGO[2])]
    )
    empty = annotations({})
    return Scene(
        token="0" * 16,
        log_name="log",
        map_location="us-ma-boston",
        num_history=4,
        frame_tokens=tuple(f"{i:016x}" for i in range(count)),
        timestamps_us=(1_600_000_000_000_000 + seconds * 1e6).astype(np.int64),
        ego_global=ego,
        ego_dynamics=np.tile(np.array([5.0, 0.0, 0.1, 0.0], dtype=np.float32), (count, 1)),
        commands=np.tile(np.array([0, 1, 0, 0], dtype=np.float32), (count, 1)),
        roadblock_ids=("1",),
        annotations=(empty,) * 3 + tuple(frames) + (empty,) * (count - 3 - len(frames)),
        traffic_lights=tuple((lights or {}).get(frame - 3, ()) for frame in range(count)),
        cameras={},
    )


def test_boxes_and_velocities_turn_with_the_ego_of_their_own_frame():
    scene = scene_of([annotations({"a": ("vehicle", [10.0, 2.0, 0.5], [3.0, 1.0])})] * 11)
    tracks = observation.tracks(scene)
    for k in range(11):
        np.testing.assert_allclose(to_local(tracks.poses[0, k], scene.ego_global[3 + k]), [10.0, 2.0, 0.5], atol=1e-9)
    cos, sin = np.cos(EGO[2]), np.sin(EGO[2])
    np.testing.assert_allclose(tracks.velocities[0], [3 * cos - sin, 3 * sin + cos], atol=1e-12)


def test_only_vehicles_pedestrians_and_bicycles_keep_a_velocity():
    kinds = ("vehicle", "pedestrian", "bicycle", "traffic_cone", "barrier", "czone_sign", "generic_object")
    scene = scene_of([annotations({kind: (kind, [i, 0.0, 0.0], [2.0, 0.0]) for i, kind in enumerate(kinds)})])
    tracks = observation.tracks(scene)
    speeds = np.hypot(*tracks.velocities.T)
    np.testing.assert_allclose(speeds, [2, 2, 2, 0, 0, 0, 0], atol=1e-12)
    assert list(tracks.types) == list(range(7))


def test_rows_are_sorted_by_type_then_by_first_sighting():
    first = annotations({"cone": ("traffic_cone", [1.0, 0, 0], [0, 0]), "late": ("vehicle", [2.0, 0, 0], [0, 0])})
    second = annotations({"early": ("vehicle", [3.0, 0, 0], [0, 0]), **{"late": ("vehicle", [2.0, 0, 0], [0, 0])}})
    assert observation.tracks(scene_of([first, second])).tokens == ("late", "early", "cone")


def test_a_gap_and_the_size_of_the_first_sighting_are_kept():
    here = annotations({"a": ("vehicle", [10.0, 0.0, 0.0], [1.0, 0.0])})
    bigger = replace(here, boxes=here.boxes * np.array([1, 1, 1, 2, 2, 2, 1]), velocities=here.velocities * 9)
    tracks = observation.tracks(scene_of([here, annotations({}), bigger]))
    np.testing.assert_array_equal(np.isfinite(tracks.poses[0, :, 0]), [True, False, True] + [False] * 8)
    np.testing.assert_array_equal(tracks.sizes[0], [4.0, 2.0, 1.5])
    np.testing.assert_allclose(np.hypot(*tracks.velocities[0]), 1.0)


def test_a_track_twice_in_a_frame_is_refused():
    twice = annotations({"a": ("vehicle", [1.0, 0, 0], [0, 0]), "b": ("vehicle", [2.0, 0, 0], [0, 0])})
    scene = scene_of([replace(twice, track_tokens=("a", "a"))])
    with pytest.raises(DataError, match="track a stands more than once in frame 3"):
        observation.tracks(scene)


def test_a_window_that_is_too_short_is_refused():
    scene = scene_of([])
    short = replace(scene, timestamps_us=scene.timestamps_us[:12], annotations=scene.annotations[:12])
    with pytest.raises(DataError, match="8 instants after now are known, 9 are needed"):
        observation.tracks(short)


def test_red_lights_hold_from_frame_to_frame_and_only_on_the_route():
    lights = {
        0: (("c1", True), ("off", True), ("c2", False)),
        1: (("c1", False),),
        8: (("c2", True),),
        9: (("c1", True),),
    }
    fids, frames = observation.red_connectors(scene_of([], lights), {"c1", "c2"})
    assert fids == ["c1", "c2"]
    np.testing.assert_array_equal(frames, [[True] + [False] * 8, [False] * 8 + [True]])


def test_ego_state_carries_the_log_and_no_steering():
    states = observation.ego_states(scene_of([]))
    assert states.shape == (4, 11)
    np.testing.assert_allclose(states[-1, :3], EGO, atol=1e-9)
    np.testing.assert_array_equal(states[-1, 3:], np.array([5, 0, np.float32(0.1), 0, 0, 0, 0, 0], dtype=np.float64))


def test_human_poses_are_nan_where_the_log_ends():
    scene = scene_of([])
    ends = replace(scene, timestamps_us=scene.timestamps_us[:10], ego_global=scene.ego_global[:10])
    poses = observation.human_poses(ends)
    np.testing.assert_allclose(poses[:6, 0], 2.5 * np.arange(1, 7), atol=1e-8)
    assert np.isnan(poses[6:]).all()
