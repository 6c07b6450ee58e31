"""Laws of the scorer under fuzzing: no crash, a rigid motion changes nothing, what is far away does not matter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from navsim_ext.metric_cache.scene_record import with_closed_scores
from navsim_ext.pdm import score
from navsim_ext.pdm.columns import COLUMNS_ALONE
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.record import encode_text
from navsim_ext.pdm.resident import prepare
from navsim_ext.pdm.reward import PUBLISHED_REWARD

GOLDEN = Path(__file__).parents[1] / "golden" / "pdm" / "scenes.npz"
BOUNDED = [name for name in COLUMNS_ALONE if name not in ("progress_m", "v2_ec") and not name.endswith("_s")]
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def golden():
    return MemoryMetricCache.load_npz(GOLDEN)


def one_scene(scene, table):
    return MemoryMetricCache({scene.token: scene}, {scene.map_location: table})


numbers = st.one_of(
    st.floats(-60, 60, allow_subnormal=False),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-300, 1e6, np.pi, -np.pi, 2 * np.pi, 1e18]),
)


@FUZZ
@given(poses=arrays(np.float64, (3, 8, 3), elements=numbers), which=st.integers(0, 7))
def test_any_numbers_give_scores_in_range_or_a_reason(golden, poses, which):
    cache, _ = golden
    token = cache.tokens[which]
    result = score([token] * 3, poses, cache, reward=PUBLISHED_REWARD, threads=1)
    finite = np.isfinite(poses).all(axis=(1, 2))
    assert not result.valid[~finite].any()
    for row in range(3):
        assert bool(result.reason[row]) != bool(result.valid[row])
        values = [result[name][row] for name in BOUNDED]
        if result.valid[row]:
            assert all(0.0 <= value <= 1.0 for value in values)
            assert result.progress_m[row] >= 0.0
        else:
            assert np.isnan(values).all()


@FUZZ
@given(
    seed=st.integers(0, 2**31),
    ego=arrays(np.float64, 4, elements=st.floats(-15, 15)),
    which=st.integers(0, 7),
)
def test_any_scene_gives_scores_in_range(golden, seed, ego, which):
    """Tracks of any kind anywhere, also on top of the ego, any logged speed."""
    cache, stored = golden
    scene = cache.load(cache.tokens[which])
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 8))
    here = np.array([*scene.ego_state[:2], 0.0])
    poses = rng.normal(0, 12, (count, 11, 3)) + here
    poses[rng.random((count, 11)) < 0.5] = np.nan
    poses[:, int(rng.integers(0, 11))] = here
    state = scene.ego_state.copy()
    state[3:7] = ego
    scene = dataclasses.replace(
        scene,
        ego_state=state,
        track_poses=poses,
        track_velocities=rng.normal(0, 5, (count, 2)),
        track_sizes=rng.uniform(0.01, 20, (count, 3)),
        track_types=np.sort(rng.integers(0, 7, count)).astype(np.int8),
        text=encode_text(route_lane_ids=[], route_roadblock_ids=[], track_tokens=[str(i) for i in range(count)]),
    ).validate()
    trajectories = stored[f"poses/{scene.token}"][:4]
    result = score([scene.token] * 4, trajectories, one_scene(scene, cache.polygons(scene.map_location)), threads=1)
    assert result.valid.all()
    for name in BOUNDED:
        if name != "reward":
            assert ((result[name] >= 0.0) & (result[name] <= 1.0)).all()


def moved(scene, table, angle, shift):
    """The whole scene turned about the ego and shifted."""
    cos, sin = np.cos(angle), np.sin(angle)
    pivot = scene.ego_state[:2]

    def xy(points):
        return (points - pivot) @ np.array([[cos, sin], [-sin, cos]]) + pivot + shift

    def poses(values):
        heading = (values[..., 2:3] + angle + np.pi) % (2 * np.pi) - np.pi
        return np.concatenate([xy(values[..., :2]), heading, values[..., 3:]], axis=-1)

    velocities = scene.track_velocities @ np.array([[cos, sin], [-sin, cos]])
    turned = dataclasses.replace(
        scene,
        ego_state=poses(scene.ego_state),
        past_states=poses(scene.past_states),
        centerline=poses(scene.centerline),
        track_poses=poses(scene.track_poses),
        track_velocities=velocities,
        pdm_closed=poses(scene.pdm_closed),
    )
    other = PolygonTable(xy(np.array(table.xy)), table.ring_offsets, table.polygon_rings, table.types, table.ids)
    return with_closed_scores(turned, prepare(turned, other)), other


@FUZZ
@given(
    angle=st.floats(-3, 3),
    shift=st.tuples(st.floats(-3e4, 3e4), st.floats(-3e4, 3e4)),
    which=st.integers(0, 7),
)
def test_a_rigid_motion_of_the_scene_changes_nothing(golden, angle, shift, which):
    cache, stored = golden
    scene = cache.load(cache.tokens[which])
    table = cache.polygons(scene.map_location)
    names = stored[f"names/{scene.token}"]
    # lively trajectories: of one that follows an object exactly ahead the last bit decides (arccos over 1)
    chosen = np.flatnonzero(np.isin(names, ["heading_noise", "pos_noise", "lat+1.2", "random_smooth", "lat-0.5"]))
    assert len(chosen) >= 4
    trajectories = stored[f"poses/{scene.token}"][chosen]
    tokens = [scene.token] * len(chosen)
    reference = score(tokens, trajectories, cache, threads=1)
    result = score(tokens, trajectories, one_scene(*moved(scene, table, angle, np.array(shift))), threads=1)
    for name in COLUMNS_ALONE[: COLUMNS_ALONE.index("reward")]:
        np.testing.assert_allclose(result[name], reference[name], rtol=0, atol=1e-6, err_msg=name)


@FUZZ
@given(
    direction=st.floats(-np.pi, np.pi),
    distance=st.floats(250, 1e5),
    kind=st.integers(0, 6),
    which=st.integers(0, 7),
)
def test_a_box_that_is_never_near_changes_nothing(golden, direction, distance, kind, which):
    cache, stored = golden
    scene = cache.load(cache.tokens[which])
    place = scene.ego_state[:2] + distance * np.array([np.cos(direction), np.sin(direction)])
    row = int(np.searchsorted(scene.track_types, kind, side="right"))
    pose = np.broadcast_to([*place, direction], (11, 3))
    with_box = dataclasses.replace(
        scene,
        track_poses=np.insert(scene.track_poses, row, pose, axis=0),
        track_velocities=np.insert(scene.track_velocities, row, [1.0, 0.0], axis=0),
        track_sizes=np.insert(scene.track_sizes, row, [4.0, 2.0, 1.5], axis=0),
        track_types=np.insert(scene.track_types, row, kind),
    )
    tokens, trajectories = [scene.token] * 30, stored[f"poses/{scene.token}"]
    # the fastest of the golden trajectories comes 190 m far
    result = score(tokens, trajectories, one_scene(with_box, cache.polygons(scene.map_location)), threads=1)
    np.testing.assert_array_equal(result.values, score(tokens, trajectories, cache, threads=1).values)


@FUZZ
@given(which=st.integers(0, 7), seed=st.integers(0, 2**31))
def test_a_score_does_not_depend_on_its_batch(golden, which, seed):
    """EP is relative to PDM-Closed alone: neighbours in the batch have no influence, unlike in NAVSIM."""
    cache, stored = golden
    token = cache.tokens[which]
    rng = np.random.default_rng(seed)
    rows = rng.choice(30, 6, replace=False)
    trajectories = stored[f"poses/{token}"][rows]
    together = score([token] * 6, trajectories, cache, threads=1)
    alone = score([token], trajectories[2:3], cache, threads=1)
    np.testing.assert_array_equal(together.values[2], alone.values[0])
