"""PDM-Closed's parts against analytic solutions and library functions, and the quirks that its records carry."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d

from navsim_ext.errors import DataError
from navsim_ext.pdm.closed import idm
from navsim_ext.pdm.closed.forecast import forecast
from navsim_ext.pdm.closed.path import ProposalPath
from navsim_ext.pdm.closed.rollout import Rollout, ego_boxes, ego_centers
from navsim_ext.pdm.observation import ObjectsNow

ORIGIN = np.array([664_000.0, 3_998_000.0, 0.0])
STRAIGHT = ORIGIN + np.column_stack([np.arange(0.0, 200.0, 2.0), np.zeros(100), np.zeros(100)])


def objects(*rows: tuple[int, float, float, float, float]) -> ObjectsNow:
    """(type, x ahead, y left, heading, speed along it) relative to ORIGIN; 4 m x 2 m."""
    array = np.array(rows, dtype=np.float64).reshape(-1, 5)
    poses = ORIGIN + array[:, 1:4]
    velocities = array[:, 4:5] * np.column_stack([np.cos(array[:, 3]), np.sin(array[:, 3])])
    sizes = np.tile([4.0, 2.0, 1.5], (len(array), 1))
    return ObjectsNow(poses, velocities, sizes, array[:, 0].astype(np.int8), tuple(f"t{i}" for i in range(len(array))))


def world(*rows, red: list | None = None, ego=ORIGIN):
    return forecast(objects(*rows), ego_centers(ego), shapely.Polygon(ego_boxes(ego)), red or [])


def ego_state(speed: float, x: float = 20.0) -> np.ndarray:
    return np.array([ORIGIN[0] + x, ORIGIN[1], 0.0, speed, *[0.0] * 7])


def test_path_interpolates_as_scipy_does_also_over_doubled_vertices():
    rng = np.random.default_rng(1)
    xy = np.cumsum(rng.uniform(0.2, 2.0, (40, 2)), axis=0)
    poses = np.column_stack([xy, rng.uniform(-0.5, 0.5, 40)])
    poses = np.insert(poses, 20, poses[20], axis=0)  # joint vertex, twice
    path = ProposalPath(poses)
    reference = interp1d(path.progress, path.poses, axis=0)
    s = np.concatenate([rng.uniform(0, path.progress[-1], 500), path.progress[1:]])
    np.testing.assert_allclose(path.interpolate(s), reference(s), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(path.interpolate(np.array([-5.0])), path.interpolate(np.array([0.0])))
    np.testing.assert_allclose(path.interpolate(np.array([1e9]))[0, :2], poses[-1, :2])


def test_headings_are_interpolated_the_short_way_round():
    path = ProposalPath(np.array([[0.0, 0, 3.0], [1.0, 0, -3.0]]))
    heading = path.interpolate(np.array([0.5]))[0, 2]
    assert abs(abs(heading) - np.pi) < 1e-9


def test_positive_offset_is_left():
    np.testing.assert_allclose(ProposalPath(STRAIGHT).offset(1.0).poses[:, 1] - STRAIGHT[:, 1], 1.0)


def test_corridor_falls_back_to_a_piece_of_the_line_between_two_vertices():
    path = ProposalPath(np.array([[0.0, 0, 0], [100.0, 0, 0], [101.0, 0, 0]]))
    corridor = path.corridor(10.0, 12.0, 1.0)
    np.testing.assert_allclose(corridor.bounds, [9.0, -1.0, 13.0, 1.0])


def test_idm_settles_at_its_target_speed_and_at_its_following_distance():
    target = np.array([10.0])
    s, v = np.zeros(1), np.zeros(1)
    for _ in range(3000):
        s, v = idm.step(s, v, np.array([[1e9, 0.0, 0.0]]), target)
    np.testing.assert_allclose(v, target, rtol=1e-6)
    s, v, lead = np.zeros(1), np.full(1, 5.0), 50.0
    for _ in range(5000):
        lead += 0.5
        s, v = idm.step(s, v, np.array([[lead, 5.0, 0.0]]), target)
    np.testing.assert_allclose(v, 5.0, atol=1e-6)
    equilibrium = (1.0 + 1.5 * 5.0) / np.sqrt(1 - 0.5**10)  # zero acceleration solved for the gap
    np.testing.assert_allclose(lead + 0.5 - s, equilibrium, atol=1e-6)  # the leader moves first


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 30), st.floats(0.1, 30), st.floats(-50, 200), st.floats(0, 20))
def test_idm_acceleration_stays_within_its_limits(v, target, lead, lead_speed):
    _, after = idm.step(np.zeros(1), np.array([v]), np.array([[lead, lead_speed, 0.0]]), np.array([target]))
    assert -0.3 - 1e-12 <= after[0] - v <= 0.15 + 1e-12


def test_every_moving_proposal_brakes_at_the_limit_in_its_first_step():
    rollout = Rollout(STRAIGHT, ego_state(8.0), 10.0, world())
    np.testing.assert_allclose(rollout.idm[:, 1, 1], 8.0 - 0.3)
    assert (rollout.leaders[:, 1] == 0).all()
    assert (rollout.idm[4, 5:41, 1] > 7.7).all()  # and only in its first


def test_free_proposals_see_the_end_of_the_path_as_leader():
    rollout = Rollout(STRAIGHT, ego_state(8.0), np.nan, world())
    np.testing.assert_allclose(rollout.target_speeds, 15.0 * np.array([0.2, 0.4, 0.6, 0.8, 1.0]))
    for lateral, path in enumerate(rollout.paths):
        np.testing.assert_allclose(rollout.leaders[5 * lateral, 2], [path.length, 0.0, 2.588])


def test_stale_fields_leak_between_the_proposals_of_one_path():
    """A car cuts in between the slow and the fast proposals: the slow ones have it ahead, the fast ones passed it. The
    speed that a slow proposal wrote stays in the record of the later, free ones."""
    cutting_in = (0, 24.0, 6.0, -1.2, 2.5)
    rollout = Rollout(STRAIGHT, ego_state(5.0), 20.0, world(cutting_in))
    slow, fast = rollout.leaders[0], rollout.leaders[4]
    time = next(t for t in range(2, 41, 2) if fast[t, 2] > 0 and slow[t, 2] == 0)
    assert slow[time, 1] == pytest.approx(2.5 * np.cos(1.2))
    assert fast[time, 1] == slow[time, 1]  # free, yet it carries the other's speed
    assert fast[time, 0] == pytest.approx(rollout.paths[0].length)


def test_a_red_light_stops_and_has_no_speed():
    polygon = shapely.box(ORIGIN[0] + 40, ORIGIN[1] - 2, ORIGIN[0] + 50, ORIGIN[1] + 2)
    rollout = Rollout(STRAIGHT, ego_state(8.0), 10.0, world(red=[("c", polygon)]))
    front = 20.0 + 4.049
    np.testing.assert_allclose(rollout.leaders[0, 2, 0] - rollout.idm[0, 1, 0], 40 - front - 0.8, atol=1e-6)
    assert rollout.leaders[0, 2, 1] == 0.0
    stopped = rollout.poses[:, 40, 0] - ORIGIN[0] + 4.049
    assert (stopped < 40.0).all()


def test_a_red_light_is_ignored_only_when_the_ego_is_wholly_inside():
    inside = shapely.box(ORIGIN[0] - 10, ORIGIN[1] - 10, ORIGIN[0] + 30, ORIGIN[1] + 10)
    touching = shapely.box(ORIGIN[0] + 3, ORIGIN[1] - 10, ORIGIN[0] + 30, ORIGIN[1] + 10)
    assert world(red=[("a", inside), ("b", touching)]).collided.tolist() == [True, False]


def test_objects_that_touch_the_ego_are_ignored():
    inside, ahead = (0, 3.0, 0.0, 0.0, 0.0), (0, 30.0, 0.0, 0.0, 0.0)
    assert world(inside, ahead).collided.tolist() == [True, False]


def test_list_order_and_caps():
    rng = np.random.default_rng(3)
    crowd = [(kind, *rng.uniform(-60, 60, 2), 0.0, 1.0) for kind in (2, 1, 0, 4, 3, 6) for _ in range(60)]
    seen = world(*crowd)
    static, vehicles, pedestrians, bicycles = seen.types[:50], seen.types[50:100], seen.types[100:125], seen.types[125:]
    assert set(static.tolist()) <= {3, 4, 5, 6}
    assert (vehicles == 0).all()
    assert (pedestrians == 1).all()
    assert (bicycles == 2).all()
    assert len(bicycles) == 10
    distance = np.hypot(*(seen.centers - ego_centers(ORIGIN)[:2]).T)
    for group in (slice(0, 50), slice(50, 100), slice(100, 125), slice(125, 135)):
        assert (np.diff(distance[group]) >= 0).all()


def test_objects_beyond_100_m_are_unknown():
    assert world((0, 99.0, 0.0, 0.0, 0.0), (0, 103.0, 0.0, 0.0, 0.0)).tokens == ("t0",)


def test_reversing_objects_move_against_their_heading():
    forward, backward = (0, 30.0, 20.0, 0.3, 4.0), (0, 30.0, -20.0, 0.3, -4.0)
    seen = world(forward, backward)
    order = [seen.tokens.index("t0"), seen.tokens.index("t1")]
    np.testing.assert_allclose(seen.displacement[order[0]], 4 * np.array([np.cos(0.3), np.sin(0.3)]))
    np.testing.assert_allclose(seen.displacement[order[1]], -4 * np.array([np.cos(0.3), np.sin(0.3)]))
    moved = seen.corners_over_time[25, order[0]] - seen.corners_over_time[0, order[0]]
    np.testing.assert_allclose(moved, 5.0 * seen.displacement[order[0]] * np.ones((4, 1)), atol=1e-9)


def test_a_speed_limit_that_is_not_positive_is_refused():
    with pytest.raises(DataError, match="speed limit"):
        Rollout(STRAIGHT, ego_state(8.0), 0.0, world())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_an_object_that_is_never_near_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    near = [(0, rng.uniform(20, 90), rng.uniform(-4, 4), rng.uniform(-3, 3), rng.uniform(0, 8)) for _ in range(6)]
    far = (0, -60.0, 70.0, 0.0, 0.0)
    alone = Rollout(STRAIGHT, ego_state(8.0), 10.0, world(*near))
    both = Rollout(STRAIGHT, ego_state(8.0), 10.0, world(*near, far))
    np.testing.assert_array_equal(both.poses, alone.poses)
