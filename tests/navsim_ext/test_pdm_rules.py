"""One rule a test, on a world made by hand: a straight road east, one lane, objects where the rule wants them."""

from __future__ import annotations

import numpy as np
import pytest

from navsim_ext.pdm import score
from navsim_ext.pdm.ego import REAR_AXLE_TO_CENTER, state_from_pose
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.polygon_table import CARPARK_AREA, INTERSECTION, LANE, ROADBLOCK, PolygonTable
from navsim_ext.pdm.record import SceneMetricCache, encode_text

TIMES = np.arange(1, 9) * 0.5
VEHICLE, PEDESTRIAN, CONE = 0, 1, 3
SPEED = 8.0


def rectangle(x0, y0, x1, y1):
    return [np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=float)]


def track(x, y=0.0, vx=0.0, vy=0.0, kind=VEHICLE, size=(4.0, 2.0), heading=0.0):
    """An object at (x, y) now, moving straight at (vx, vy), seen in all frames."""
    seconds = np.arange(11) * 0.5
    poses = np.c_[x + vx * seconds, y + vy * seconds, np.full(11, heading)]
    return {"poses": poses, "velocity": [vx, vy] if kind < 3 else [0.0, 0.0], "size": (*size, 1.5), "kind": kind}


def world(*tracks, speed=SPEED, polygons=None, on_route=None, red=None, progress=30.0):
    """Ego at the origin heading east; road x -100 ... 200, y -4 ... 4, one lane on the route."""
    if polygons is None:
        polygons = [(ROADBLOCK, rectangle(-100, -4, 200, 4)), (LANE, rectangle(-100, -4, 200, 4))]
    on_route = [kind == LANE for kind, _ in polygons] if on_route is None else on_route
    shapes = polygons + ([(LANE, red)] if red is not None else [])
    table = PolygonTable.from_rings([rings for _, rings in shapes], [kind for kind, _ in shapes], ["p"] * len(shapes))
    tracks = sorted(tracks, key=lambda entry: entry["kind"])
    times = 1_600_000_000_000_000 + np.array([-1_500_000, -1_000_000, -500_000, 0])
    states = np.stack([state_from_pose([speed * s, 0, 0], [speed, 0, 0, 0]) for s in (-1.5, -1.0, -0.5, 0.0)])
    scene = SceneMetricCache(
        token="t", log_name="l", map_location="m", map_label="nuplan",
        time_us=int(times[-1]), ego_state=states[-1], past_time_us=times, past_states=states,
        human_poses=np.zeros((8, 3)),
        centerline=np.c_[np.linspace(-100, 200, 61), np.zeros(61), np.zeros(61)],
        map_polygons=np.arange(len(polygons), dtype=np.int32), map_on_route=np.array(on_route, dtype=bool),
        track_poses=np.array([entry["poses"] for entry in tracks]).reshape(-1, 11, 3),
        track_velocities=np.array([entry["velocity"] for entry in tracks]).reshape(-1, 2),
        track_sizes=np.array([entry["size"] for entry in tracks]).reshape(-1, 3),
        track_types=np.array([entry["kind"] for entry in tracks], dtype=np.int8),
        red_polygons=np.array([len(polygons)] if red is not None else [], dtype=np.int32),
        red_frames=np.ones((1 if red is not None else 0, 9), dtype=bool),
        pdm_closed=np.zeros((2, 51, 3)), pdm_closed_index=np.zeros(2, dtype=np.int8),
        pdm_progress=np.full(2, progress), pdm_multiplier=np.ones(2), human_sub_scores=np.ones(8),
        text=encode_text(route_lane_ids=[], route_roadblock_ids=[], track_tokens=["o"] * len(tracks)),
    ).validate()  # fmt: skip
    return MemoryMetricCache({"t": scene}, {"m": table})


def drive(cache, x=None, y=None, heading=None):
    """Scores one trajectory; by default straight on at SPEED."""
    x = SPEED * TIMES if x is None else x
    poses = np.c_[x, np.zeros(8) if y is None else y, np.zeros(8) if heading is None else heading]
    result = score(["t"], poses[None], cache)
    assert result.valid[0], result.reason[0]
    return {name: result[name][0] for name in ("v1_nc", "v1_ttc", "v1_dac", "v1_ddc", "v1_comfort", "v1_ep", "pdms_v1",
            "v2_nc", "v2_ttc", "v2_ddc", "v2_lk", "v2_tlc", "v2_hc", "v2_ep", "epdms_v2_no_ec",
            "progress_m")}  # fmt: skip


def test_an_empty_straight_road_is_perfect():
    scores = drive(world())
    assert scores["progress_m"] == pytest.approx(4 * SPEED, abs=1e-6)
    assert scores["pdms_v1"] == scores["epdms_v2_no_ec"] == 1.0


@pytest.mark.parametrize(
    ("obstacle", "nc"),
    [
        (track(25.0), 0.0),  # a standing vehicle
        (track(25.0, kind=PEDESTRIAN, size=(0.6, 0.6)), 0.0),
        (track(25.0, kind=CONE, size=(0.5, 0.5)), 0.5),  # static things cost half
        (track(20.0, vx=3.0), 0.0),  # a slower one: hit with the front
        (track(25.0, y=6.0), 1.0),  # beside the road
        (track(-30.0, vx=20.0), 1.0),  # run into from behind: not at fault
        (track(25.0, vx=SPEED), 1.0),  # as fast as we are
    ],
)
def test_who_is_at_fault(obstacle, nc):
    scores = drive(world(obstacle))
    assert scores["v1_nc"] == scores["v2_nc"] == nc


def test_a_side_contact_is_at_fault_only_between_lanes_or_off_the_road():
    # the other car moves into our left side, level with the rear axle, at our own speed
    intruder = track(0.5, y=5.0, vx=SPEED, vy=-2.0, size=(2.0, 1.0))
    wide = [(ROADBLOCK, rectangle(-100, -9, 200, 9)), (LANE, rectangle(-100, -9, 200, 9))]
    split = [wide[0], (LANE, rectangle(-100, 0, 200, 9)), (LANE, rectangle(-100, -9, 200, 0))]
    outside = [(ROADBLOCK, rectangle(-100, -0.5, 200, 9)), wide[1]]
    assert drive(world(intruder, polygons=wide))["v1_nc"] == 1.0
    assert drive(world(intruder, polygons=split))["v1_nc"] == 0.0
    scores = drive(world(intruder, polygons=outside))
    assert (scores["v1_nc"], scores["v1_dac"]) == (0.0, 0.0)


def test_a_standing_ego_is_never_at_fault():
    scores = drive(world(track(-30.0, vx=-0.0, vy=0.0), track(12.0, vx=-5.0), speed=0.0), x=np.zeros(8))
    assert scores["v1_nc"] == 1.0
    assert scores["v1_ttc"] == 1.0


def test_ttc_looks_sideways_only_in_an_intersection():
    """A car that rubs along our left side from the start, at 35 degrees: neither ahead nor behind."""
    road = [(ROADBLOCK, rectangle(-100, -20, 200, 20)), (LANE, rectangle(-100, -20, 200, 20))]
    rubbing = track(2.0, y=1.4, vx=SPEED, size=(1.0, 1.0))
    beside = track(2.0, y=2.6, vx=SPEED, size=(1.0, 1.0))
    around_us = [*road, (INTERSECTION, rectangle(-50, -20, 200, 20))]
    far_ahead = [*road, (INTERSECTION, rectangle(60, -20, 200, 20))]
    for polygons, expected in ((road, 1.0), (around_us, 0.0), (far_ahead, 1.0)):
        assert drive(world(rubbing, polygons=polygons))["v1_ttc"] == expected
        assert drive(world(beside, polygons=polygons))["v1_ttc"] == 1.0
        assert drive(world(rubbing, polygons=polygons))["v2_ttc"] == 1.0  # v2 drops who touches us at t = 0
    crossing = track(11.0, y=-9.0, vy=9.0, size=(1.0, 1.0))
    assert drive(world(crossing, polygons=road))["v1_ttc"] == 0.0  # ahead of us when the boxes would meet


def test_ttc_in_v2_ends_before_its_observation_does():
    """An object that is met only beyond 4 s counts in v1, whose observation lasts 5 s, and not in v2."""
    late = track(4 * SPEED + REAR_AXLE_TO_CENTER + 2.588 + 2.0 + 2.0)
    scores = drive(world(late))
    assert (scores["v1_nc"], scores["v2_nc"]) == (1.0, 1.0)
    assert scores["v1_ttc"] == 0.0
    assert scores["v2_ttc"] == 1.0


@pytest.mark.parametrize(("length", "ddc"), [(1.5, 1.0), (4.0, 0.5), (40.0, 0.0)])
def test_distance_driven_off_the_route_within_a_second(length, ddc):
    start = 10.0
    road = [
        (ROADBLOCK, rectangle(-100, -4, 200, 4)),
        (LANE, rectangle(-100, -4, start, 4)),
        (LANE, rectangle(start, -4, start + length, 4)),
        (LANE, rectangle(start + length, -4, 200, 4)),
    ]
    cache = world(polygons=road, on_route=[False, True, False, True])
    assert drive(cache)["v1_ddc"] == drive(cache)["v2_ddc"] == ddc
    with_crossing = [*road, (INTERSECTION, rectangle(start - 2, -4, start + length + 2, 4))]
    scores = drive(world(polygons=with_crossing, on_route=[False, True, False, True, False]))
    assert scores["v1_ddc"] == ddc
    assert scores["v2_ddc"] == 1.0  # v2 leaves intersections out


def test_lane_keeping_needs_two_seconds_beside_the_line():
    aside = lambda amount: np.full(8, amount)  # noqa: E731
    assert drive(world(), y=aside(0.3))["v2_lk"] == 1.0
    assert drive(world(), y=aside(1.5))["v2_lk"] == 0.0
    brief = np.array([0.0, 0.0, 0.0, 1.2, 0.0, 0.0, 0.0, 0.0])
    assert drive(world(), y=brief)["v2_lk"] == 1.0
    road = [(ROADBLOCK, rectangle(-100, -4, 200, 4)), (LANE, rectangle(-100, -4, 200, 4))]
    crossing = [*road, (INTERSECTION, rectangle(-100, -4, 200, 4))]
    assert drive(world(polygons=crossing), y=aside(1.5))["v2_lk"] == 1.0


def test_red_connectors_and_carparks():
    assert drive(world(red=rectangle(20, -4, 30, 4)))["v2_tlc"] == 0.0
    assert drive(world(red=rectangle(60, -4, 70, 4)))["v2_tlc"] == 1.0
    assert drive(world(red=rectangle(-1, -4, 5, 4)))["v2_tlc"] == 0.0  # it stood in it from the start
    park = [(CARPARK_AREA, rectangle(-100, -4, 200, 4)), (LANE, rectangle(-100, -4, 200, 4))]
    assert drive(world(polygons=park))["v1_dac"] == 1.0
    lane_only = [(LANE, rectangle(-100, -4, 200, 4))]
    assert drive(world(polygons=lane_only))["v1_dac"] == 0.0  # a lane alone is no drivable area


def test_progress_is_relative_to_the_reference_above_five_metres():
    assert drive(world(progress=64.0))["v1_ep"] == pytest.approx(0.5, abs=1e-8)
    assert drive(world(progress=10.0))["v1_ep"] == 1.0
    still = drive(world(speed=0.0, progress=3.0), x=np.zeros(8))
    assert (still["v1_ep"], still["v2_ep"]) == (1.0, 1.0)  # both short of 5 m
    crash = drive(world(track(25.0), progress=3.0))
    assert crash["v1_ep"] == 0.0
    assert crash["pdms_v1"] == 0.0
    half = drive(world(track(25.0, kind=CONE, size=(0.5, 0.5)), progress=64.0))
    assert half["v1_ep"] == pytest.approx(0.25, abs=1e-8)  # v1 halves the progress along with NC
    assert half["v2_ep"] == pytest.approx(0.5, abs=1e-8)  # v2 does not


def test_comfort_bounds():
    assert drive(world())["v1_comfort"] == 1.0
    brake = drive(world(), x=np.cumsum(np.maximum(SPEED - 6.5 * TIMES, 0.0) * 0.5))
    assert (brake["v1_comfort"], brake["v2_hc"]) == (0.0, 0.0)
    wiggle = drive(world(), y=1.5 * np.sin(TIMES * 4), heading=0.8 * np.cos(TIMES * 4))
    assert (wiggle["v1_comfort"], wiggle["v2_hc"]) == (0.0, 0.0)
