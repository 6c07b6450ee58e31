"""Distances and collisions of plans in both conventions, on drives whose answers are known."""

import numpy as np
import pytest

from navsim_ext.errors import DataError
from navsim_ext.evaluation.open_loop import COLUMNS, LENGTH_M, REAR_AXLE_TO_CENTRE_M, WIDTH_M, measure, overlaps
from navsim_ext.frames import to_local
from navsim_ext.scene import Annotations, Scene

SPEED, FUTURE, HISTORY = 4.0, 8, 4


def scene(*, at: tuple[float, float], name: str = "vehicle", size=(4.0, 2.0), heading: float = 0.3) -> Scene:
    """A straight drive at SPEED with one object that stands at ``at``, in the ego frame of now, all the time."""
    frames = HISTORY + FUTURE
    along = SPEED * 0.5 * (np.arange(frames) - HISTORY + 1)
    ego = np.column_stack([along * np.cos(heading) + 5e5, along * np.sin(heading) + 4e6, np.full(frames, heading)])
    now = ego[HISTORY - 1]
    c, s = np.cos(heading), np.sin(heading)
    place = np.array([now[0] + c * at[0] - s * at[1], now[1] + s * at[0] + c * at[1], heading])
    seen = []
    for pose in ego:
        x, y, yaw = to_local(place, pose)
        seen.append(Annotations(np.array([[x, y, 0.8, *size, 1.5, yaw]]), np.zeros((1, 3)), (name,), ("one",)))
    return Scene(
        token="t",
        log_name="log",
        map_location="boston-seaport",
        num_history=HISTORY,
        frame_tokens=tuple(f"f{k}" for k in range(frames)),
        timestamps_us=np.arange(frames) * 500_000,
        ego_global=ego,
        ego_dynamics=np.zeros((frames, 4), np.float32),
        commands=np.tile(np.eye(4, dtype=np.float32)[1], (frames, 1)),
        roadblock_ids=(),
        annotations=tuple(seen),
        traffic_lights=((),) * frames,
        cameras={},
    ).validate()


def straight(speed: float, lateral: float = 0.0) -> np.ndarray:
    return np.column_stack([speed * 0.5 * np.arange(1, FUTURE + 1), np.full(FUTURE, lateral), np.zeros(FUTURE)])


def test_the_driven_path_is_at_distance_zero_and_hits_nothing():
    figures = measure(straight(SPEED), scene(at=(10.0, 8.0)))
    assert set(figures) == set(COLUMNS)
    np.testing.assert_allclose(list(figures.values()), 0.0, atol=1e-8)


def test_both_conventions_of_distance():
    """A plan that is 1 m/s too fast is k m off after k s; the mean over the poses up to then is half a pose more."""
    figures = measure(straight(SPEED + 1.0), scene(at=(60.0, 30.0)))
    for k in (1, 2, 3):
        assert figures[f"l2_at_{k}s"] == pytest.approx(k)
        assert figures[f"l2_mean_{k}s"] == pytest.approx(np.mean([0.5 * f for f in range(1, 2 * k + 1)]))


def test_collisions_are_told_at_the_pose_where_the_boxes_meet():
    """A plan at 6 m/s along y = 3 m reaches a parked car's rear exactly after 1.5 s; the driven path passes it."""
    front = REAR_AXLE_TO_CENTRE_M + LENGTH_M / 2
    there = scene(at=(9.0 + front + 2.0 - 1e-6, 3.0))
    plan = straight(6.0, lateral=3.0)
    assert overlaps(plan, there).tolist() == [False, False, True, True, True, False, False, False]
    figures = measure(plan, there)
    assert [figures[f"collision_at_{k}s"] for k in (1, 2, 3)] == [0.0, 1.0, 0.0]
    assert [figures[f"collision_mean_{k}s"] for k in (1, 2, 3)] == [0.0, 0.5, 0.5]


@pytest.mark.parametrize(("aside", "hit"), [(-1e-6, True), (1e-3, False)])
def test_boxes_meet_at_their_sides(aside, hit):
    lateral = (WIDTH_M + 2.0) / 2 + aside
    assert overlaps(straight(SPEED), scene(at=(10.0, lateral))).any() == hit


def test_what_the_recorded_car_overlaps_too_is_left_out():
    figures = measure(straight(SPEED), scene(at=(9.0, 0.0)))
    assert np.isnan(figures["collision_at_2s"])
    assert figures["collision_mean_2s"] == 0.0


def test_a_cone_is_no_road_user():
    assert not overlaps(straight(SPEED), scene(at=(9.0, 0.0), name="traffic_cone")).any()


@pytest.mark.parametrize(
    ("plan", "message"),
    [(straight(4.0)[:5], "5 poses"), (np.full((8, 3), np.nan), "not finite")],
)
def test_plans_that_cannot_be_measured_are_refused(plan, message):
    with pytest.raises(DataError, match=message):
        measure(plan, scene(at=(30.0, 9.0)))
