"""Distances and collisions of plans in both conventions, on drives whose answers are known."""

import numpy as np
import pytest
from rich.console import Console
from test_readers_nuscenes import RADIUS, tables, write
from test_readers_nuscenes import SPEED as DRIVEN_MPS

from navsim_ext.errors import DataError, TriviumError
from navsim_ext.evaluation.open_loop import (
    COLUMNS,
    LENGTH_M,
    REAR_AXLE_TO_CENTRE_M,
    WIDTH_M,
    measure,
    overlaps,
    score_open_loop,
)
from navsim_ext.frames import to_local
from navsim_ext.readers import open_source
from navsim_ext.runtime.config import compose
from navsim_ext.scene import Annotations, Scene
from navsim_ext.scene_index import build_index

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


def command(nuscenes_root, tmp_path, *changes: str):
    index = tmp_path / "index"
    build_index(open_source(nuscenes_root, "v1.0-mini"), index)
    return compose("score", ["protocol=open_loop", f"data.index={index}", f"data.root={nuscenes_root}",
                             "data.split=v1.0-mini", f"output_dir={tmp_path / 'out'}", *changes])  # fmt: skip


@pytest.fixture
def nuscenes_root(tmp_path):
    return write(tmp_path / "nuscenes", tables())


def test_nuscenes_is_planned_and_measured_without_a_map(nuscenes_root, tmp_path):
    """The recorded drive is at distance 0; constant velocity leaves the curve by what geometry says."""
    scores = score_open_loop(command(nuscenes_root, tmp_path, "planner=human"), Console(quiet=True))
    assert scores["valid"].all()
    np.testing.assert_allclose(scores["l2_mean_3s"], 0.0, atol=1e-5)
    away = command(nuscenes_root, tmp_path, "planner=constant_velocity", f"output_dir={tmp_path / 'cv'}")
    figures = score_open_loop(away, Console(quiet=True)).iloc[0]
    chord, angle = 2 * RADIUS * np.sin(DRIVEN_MPS / RADIUS / 2), 3 * DRIVEN_MPS / RADIUS
    there = RADIUS * np.array([np.sin(angle), 1 - np.cos(angle)])
    assert figures["l2_at_3s"] == pytest.approx(np.hypot(*(there - [3 * chord, 0.0])), abs=1e-2)
    assert (tmp_path / "cv" / "aggregate.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"), [("data.root=null", "give data.root"), ("probes=true", "protocol=open")]
)
def test_options_that_do_not_fit_are_named(nuscenes_root, tmp_path, change, message):
    cfg = command(nuscenes_root, tmp_path, change)
    with pytest.raises(TriviumError, match=message):
        score_open_loop(cfg, Console(quiet=True))
