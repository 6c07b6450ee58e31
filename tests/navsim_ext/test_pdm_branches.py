"""Compiled scorer == naive scorer, on scenes made to go through every branch of the rules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pdm_naive
import pytest

from navsim_ext.pdm.columns import COLUMNS, NUM_COLUMNS
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.polygon_table import PolygonTable
from navsim_ext.pdm.record import NUM_FRAMES, NUM_FRAMES_V2
from navsim_ext.pdm.resident import prepare
from navsim_ext.pdm.reward import NO_REWARD
from navsim_ext.pdm.scorer import score_trajectories

GOLDEN = Path(__file__).parents[1] / "golden" / "pdm" / "scenes.npz"
DISCRETE = (
    "v1_nc", "v1_dac", "v1_ttc", "v1_comfort", "v1_ddc",
    "v2_nc", "v2_dac", "v2_ddc", "v2_tlc", "v2_ttc", "v2_lk", "v2_hc",
)  # fmt: skip
NUM_CASES = 36


@pytest.fixture(scope="module")
def golden():
    return MemoryMetricCache.load_npz(GOLDEN)


def with_holes(table, rng):
    """A hole, a quarter of the extent wide, in the middle of every third polygon that can take one."""
    polygons = []
    for row in range(len(table)):
        rings = table.rings(row)
        low, high = rings[0].min(axis=0), rings[0].max(axis=0)
        middle, quarter = (low + high) / 2, (high - low) / 8
        square = middle + quarter * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        inside = pdm_naive.Polygon(rings[0]).contains(pdm_naive.Polygon(square))
        polygons.append([*rings, square] if inside and rng.random() < 0.3 else rings)
    return PolygonTable.from_rings(polygons, table.types, table.ids)


def crowded(scene, rng):
    """Objects of all types near the ego's way, some seen once, with gaps, only late, or only beyond v2's horizon."""
    count = 14
    along = rng.uniform(-8, 45, count)
    heading = scene.ego_state[2]
    way = heading + rng.choice([0.0, 0.0, np.pi, np.pi / 2, rng.uniform(-3, 3)], count)
    speed = np.where(rng.random(count) < 0.3, 0.0, rng.uniform(0, 12, count))
    start = scene.ego_state[:2] + np.c_[along * np.cos(heading), along * np.sin(heading)]
    start += rng.normal(0, 2.5, (count, 1)) * [[-np.sin(heading), np.cos(heading)]]
    times = np.arange(NUM_FRAMES) * 0.5
    poses = np.empty((count, NUM_FRAMES, 3))
    poses[..., 0] = start[:, :1] + np.cos(way)[:, None] * speed[:, None] * times
    poses[..., 1] = start[:, 1:] + np.sin(way)[:, None] * speed[:, None] * times
    poses[..., 2] = (way[:, None] + rng.normal(0, 0.3, (count, NUM_FRAMES)) + np.pi) % (2 * np.pi) - np.pi
    seen = rng.random((count, NUM_FRAMES)) < 0.85
    seen[0] = np.arange(NUM_FRAMES) == 3  # once
    seen[1] = np.isin(np.arange(NUM_FRAMES), [2, 9])  # once for v2, twice for v1, with a gap across
    seen[2] = np.isin(np.arange(NUM_FRAMES), [1, 5])  # a gap
    seen[3] = np.arange(NUM_FRAMES) >= NUM_FRAMES_V2  # v1 only
    seen[4] = np.arange(NUM_FRAMES) == 10  # once, v1 only
    seen[5] = np.isin(np.arange(NUM_FRAMES), [8, 9])  # once for v2, at its last frame
    seen[6:][~seen[6:].any(axis=1), 0] = True
    poses[~seen] = np.nan
    types = np.sort(rng.integers(0, 7, count)).astype(np.int8)
    velocities = np.where((types < 3)[:, None], np.c_[speed * np.cos(way), speed * np.sin(way)], 0.0)
    sizes = np.c_[rng.uniform(0.3, 8, count), rng.uniform(0.3, 3, count), np.ones(count)]
    return dataclasses.replace(
        scene, track_poses=poses, track_velocities=velocities, track_sizes=sizes, track_types=types
    )


def altered(scene, table, rng, case):
    """A scene of its own kind for each case: speed of the ego, crowd, lights, route, holes."""
    state = scene.ego_state.copy()
    state[3:7] = [rng.choice([0.0, 0.03, -2.0, 4.0, 9.0, 15.0]), rng.normal(0, 0.3), rng.normal(), rng.normal()]
    red = np.flatnonzero(table.types == 11)
    chosen = rng.choice(red, min(2, len(red)), replace=False).astype(np.int32)
    scene = dataclasses.replace(
        scene,
        ego_state=state,
        red_polygons=chosen,
        red_frames=rng.random((len(chosen), NUM_FRAMES_V2)) < 0.4,
        map_on_route=scene.map_on_route if case % 3 else rng.random(len(scene.map_on_route)) < 0.3,
    )
    return (crowded(scene, rng) if case % 4 else scene), (with_holes(table, rng) if case % 2 else table)


def test_kernels_equal_the_naive_scorer_in_every_branch(golden):
    cache, arrays = golden
    values = {name: set() for name in DISCRETE}
    holes = reversed_ego = stopped = dropped = 0
    for case in range(NUM_CASES):
        rng = np.random.default_rng(case)
        token = cache.tokens[case % len(cache)]
        record = cache.load(token)
        scene, table = altered(record, cache.polygons(record.map_location), rng, case)
        ready = prepare(scene, table)
        pick = rng.choice(len(arrays[f"poses/{token}"]), 3, replace=False)
        poses = arrays[f"poses/{token}"][pick] * rng.choice([1.0, 0.02, -0.5, 1.3])
        rows, states = np.full((3, NUM_COLUMNS), np.nan), np.empty((3, 41, 11))
        score_trajectories(poses, 0.5, ready, 3, NO_REWARD, rows, states)
        for row, trajectory in zip(rows, states):
            expected = pdm_naive.sub_scores(scene, table, trajectory, ready.past)
            for name in DISCRETE:
                found = row[COLUMNS.index(name)]
                assert found == expected[name], f"case {case}, {name}: {found}, naively {expected[name]}"
                values[name].add(found)
            assert row[COLUMNS.index("progress_m")] == pytest.approx(expected["progress_m"], abs=1e-8)
            reversed_ego += (trajectory[:, 3] < -0.05).any()
            stopped += (np.abs(trajectory[:, 3]) < 0.05).any()
        holes += len(table.polygon_rings) - 1 < table.polygon_rings[-1]
        dropped += ready.traffic.ignored.any()
    for name in DISCRETE:
        wanted = {0.0, 0.5, 1.0} if name.endswith(("_nc", "_ddc")) else {0.0, 1.0}
        assert values[name] == wanted, f"{name} took only {values[name]}"
    assert min(holes, reversed_ego, stopped, dropped) > 3


def test_single_sightings_gaps_and_horizons(golden):
    """The presence rules one by one, on a record with one track each."""
    from navsim_ext.pdm.log_replay import replayed_boxes

    scene = crowded(golden[0].load(golden[0].tokens[0]), np.random.default_rng(0))
    boxes = {version: replayed_boxes(scene, version) for version in ("v1", "v2")}
    present = {version: np.isfinite(corners[:, :, 0, 0]) for version, corners in boxes.items()}
    steps = {"v1": np.arange(51), "v2": np.arange(41)}
    assert present["v1"][:, 0].all()
    assert present["v2"][:, 0].all()
    np.testing.assert_array_equal(boxes["v1"][:41, 0], boxes["v2"][:, 0])
    assert (boxes["v1"][:, 0] == boxes["v1"][0, 0]).all()  # seen once: unmoved
    np.testing.assert_array_equal(present["v1"][:, 1], (steps["v1"] >= 10) & (steps["v1"] <= 45))  # moves over the gap
    assert present["v2"][:, 1].all()
    assert (boxes["v2"][:, 1] == boxes["v2"][0, 1]).all()  # and stands in v2
    np.testing.assert_allclose(boxes["v1"][10, 1], boxes["v2"][10, 1], atol=1e-8)
    np.testing.assert_array_equal(present["v1"][:, 2], (steps["v1"] >= 5) & (steps["v1"] <= 25))
    np.testing.assert_array_equal(present["v1"][:, 3], steps["v1"] >= 45)
    assert not present["v2"][:, 3].any()
    assert present["v1"][:, 4].all()
    assert not present["v2"][:, 4].any()
    np.testing.assert_array_equal(present["v1"][:, 5], (steps["v1"] >= 40) & (steps["v1"] <= 45))
    assert present["v2"][:, 5].all()
    for version in ("v1", "v2"):
        naive = pdm_naive.observation(scene, version)
        if version == "v1":
            assert [sorted(step) for step in naive] == [np.flatnonzero(row).tolist() for row in present["v1"]]
        for step in (0, 7, 23, 40):
            for j, polygon in naive[step].items():
                np.testing.assert_allclose(boxes[version][step, j], polygon.exterior.coords[:4], atol=1e-8)


def test_an_object_exactly_ahead_may_be_neither_ahead_nor_behind():
    """arccos of a cosine that rounding lifted over 1 is NaN in NAVSIM: both questions are answered with no."""
    from navsim_ext.pdm.collisions import AHEAD_ANGLE, BEHIND_ANGLE, relative_angle

    assert np.isnan(relative_angle(5.0, 5.0, 0.3, 5.0, 5.0))  # the same point
    assert relative_angle(0.0, 0.0, 0.0, 7.0, 0.0) == 0.0
    rng = np.random.default_rng(0)
    angles = []
    for heading in rng.uniform(-np.pi, np.pi, 2000):
        distance = rng.uniform(3, 40)
        angles.append(relative_angle(0.0, 0.0, heading, distance * np.cos(heading), distance * np.sin(heading)))
    angles = np.array(angles)
    lost = np.isnan(angles)
    assert 0.0 < lost.mean() < 0.5  # it does happen, and not always
    assert not (angles[lost] < AHEAD_ANGLE).any()
    assert not (angles[lost] > BEHIND_ANGLE).any()
    assert (angles[~lost] < AHEAD_ANGLE).all()
