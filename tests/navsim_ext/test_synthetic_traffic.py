"""Traffic: car following against its equilibrium, lights, right of way, pedestrians; the checks of the expert."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import shapely
import shapely.affinity

from navsim_ext.synthetic import expert
from navsim_ext.synthetic.cast import Cast
from navsim_ext.synthetic.paths import COMFORT_BRAKING, SPACING, comfortable_speed, follow, random_route
from navsim_ext.synthetic.town import make_town, stream
from navsim_ext.synthetic.traffic import ALL_RED_S, STEP_S, Signals, is_green, simulate

TOWN = make_town("us-ma-boston", 0)
LONG_LANE = max(TOWN.lanes, key=lambda lane: len(lane.baseline))


def cast_with(ego_start: float = 5.0, ego_speed: float = 5.0, green: float = 1e6) -> Cast:
    """An ego on a long lane and straight on, with every signal green for phase 0 and 1 alike far in the future."""
    count = len(TOWN.nodes)
    cast = Cast(TOWN, stream("test"), Signals(np.zeros(count), np.full(count, green)))
    turns = random_route(TOWN, stream("route"), LONG_LANE.index, 150.0)
    cast.add_ego(follow(TOWN, LONG_LANE.index, turns), ego_start, ego_speed)
    return cast


def test_a_follower_settles_at_the_equilibrium_gap():
    """IDM at constant speed: gap = (s_min + v T) / sqrt(1 - (v/v0)^delta), delta = 8 for the ego."""
    cast = cast_with(ego_speed=4.0)
    limit = float(cast.paths[0].speed[60])
    leader = cast.add_car(cast.paths[0], 40.0, 4.0, size=(4.7, 1.9, 1.5), eagerness=4.0 / limit)
    motion = simulate(TOWN, cast.paths, cast.pack(), cast.signals, 250)
    v = motion.speed[-1, 0]
    gap = motion.s[-1, leader] + cast.rows[leader]["axle"] - 4.7 / 2 - motion.s[-1, 0] - 1.461 - 5.176 / 2
    index = int(motion.s[-1, 0] / SPACING)
    wanted = (2.2 + v * 1.1) / np.sqrt(1.0 - (v / cast.paths[0].speed[index]) ** 8)
    assert v == pytest.approx(motion.speed[-1, leader], abs=0.05)
    assert gap == pytest.approx(wanted, rel=0.05)


def test_a_free_driver_reaches_the_limit_and_keeps_it():
    cast = cast_with(ego_speed=1.0)
    motion = simulate(TOWN, cast.paths, cast.pack(), cast.signals, 140)
    limits = cast.paths[0].speed[(motion.s[:, 0] / SPACING).astype(int)]
    assert (motion.speed[:, 0] <= limits + 0.5).all()
    assert motion.speed[:, 0].max() > 0.93 * limits.max()


def test_signals_never_show_green_to_both_phases_and_pause_in_between():
    offset, green = np.array([3.7]), np.array([9.0])
    times = np.arange(0.05, 48.0, 0.1)  # two whole cycles of 2 (9 + 3) s
    shown = np.array([[is_green(t, 0, phase, offset, green) for phase in (0, 1)] for t in times])
    assert not shown.all(axis=1).any()
    assert shown.mean(axis=0) == pytest.approx(2 * [9.0 / (2 * (9.0 + ALL_RED_S))], abs=1e-9)
    changes = np.flatnonzero(np.any(np.diff(shown.astype(int), axis=0), axis=1))
    assert {round(gap * 0.1, 6) for gap in np.diff(changes)} == {9.0, ALL_RED_S}
    assert is_green(3.7, 0, 0, offset, green)
    assert not is_green(3.6, 0, 0, offset, green)
    assert is_green(0.0, 0, -1, offset, green)


def signal_approach(green_after: float):
    """Ego 45 m before a signal that turns green for it after ``green_after`` seconds."""
    connector = next(c for c in TOWN.connectors if c.phase == 0 and c.turn == "straight")
    count = len(TOWN.nodes)
    signals = Signals(np.zeros(count), np.full(count, 20.0))
    signals.offset[connector.node] = green_after
    cast = Cast(TOWN, stream("test"), signals)
    route = [connector.index, *random_route(TOWN, stream("route"), connector.to_lane, 60.0)]
    path = follow(TOWN, connector.from_lane, route)
    cast.add_ego(path, path.crossings[0].start - 45.0, 8.0)
    return simulate(TOWN, cast.paths, cast.pack(), signals, 160), path.crossings[0].start, cast


def test_red_stops_before_the_line_and_green_lets_go():
    motion, line, _ = signal_approach(green_after=11.0)
    front = motion.s[:, 0] + 1.461 + 5.176 / 2
    at_green = int(11.0 / STEP_S)
    assert front[:at_green].max() < line
    assert line - front[at_green] < 3.0
    assert motion.speed[at_green - 5, 0] < 0.1
    assert motion.acceleration[:at_green, 0].min() > -expert.MAX_BRAKING
    assert front[-1] > line + 5.0


def test_late_green_saves_the_stop():
    motion, line, _ = signal_approach(green_after=3.0)
    assert motion.speed[:, 0].min() > 3.0
    assert motion.s[-1, 0] > line


def test_expert_check_finds_a_red_light_and_a_collision():
    motion, _, cast = signal_approach(green_after=11.0)
    assert expert.fault(cast, motion, 0) is None
    shifted = motion.s.copy()
    shifted[:, 0] += 8.0  # the same drive, but over the line
    ran = dataclasses.replace(motion, s=shifted)
    assert expert.fault(cast, ran, 0) == "red light"
    end = motion.pose[100, 0]
    cast.add_static("vehicle", end, (4.0, 1.8, 1.5))
    pose = np.concatenate([motion.pose, np.broadcast_to(end, (len(motion.pose), 1, 3))], axis=1)
    struck = dataclasses.replace(motion, pose=pose, speed=np.pad(motion.speed, ((0, 0), (0, 1))))
    assert expert.fault(cast, struck, 0) == "collision"


def test_cars_let_a_pedestrian_cross():
    crosswalk = next(c for c in TOWN.crosswalks if c.node < 0)
    lane = next(lane for lane in TOWN.lanes if lane.road == crosswalk.road)
    count = len(TOWN.nodes)
    cast = Cast(TOWN, stream("walk"), Signals(np.zeros(count), np.full(count, 1e6)))
    path = follow(TOWN, lane.index, random_route(TOWN, stream("route"), lane.index, 80.0))
    reach = path.xy[: int(path.crossings[0].start / SPACING)]
    place = SPACING * int(np.hypot(*(reach - crosswalk.ends.mean(axis=0)).T).argmin())
    cast.add_ego(path, place - 38.0, 8.0)
    walker = cast.add_crossing_pedestrian(crosswalk.ends, 1.5)
    motion = simulate(TOWN, cast.paths, cast.pack(), cast.signals, 160)
    assert expert.fault(cast, motion, 0) is None
    assert motion.speed[:, 0].min() < 2.0
    walked = motion.pose[-1, walker, :2] - crosswalk.ends[1]
    assert np.hypot(*walked) < 6.0  # has reached the far side
    assert motion.s[-1, 0] > place  # and the car has driven on


def test_speed_profile_can_be_driven():
    """Between neighbouring poses the speed falls by no more than braking allows, and never exceeds sqrt(a/|kappa|)."""
    random = np.random.default_rng(0)
    curvature = np.convolve(random.normal(0.0, 0.1, 400), np.ones(9) / 9, mode="same")
    speed = comfortable_speed(np.full(400, 11.0), curvature, 2.5)
    assert (speed**2 * np.abs(curvature) <= 2.5 + 1e-9).all()
    assert (speed[:-1] ** 2 - speed[1:] ** 2 <= 2 * COMFORT_BRAKING * SPACING + 1e-9).all()
    assert speed.max() <= 11.0


def test_overlap_agrees_with_shapely():
    random = np.random.default_rng(1)
    a, b = random.uniform(-4, 4, (400, 3)), random.uniform(-4, 4, (400, 3))
    size_a, size_b = random.uniform(0.5, 5.0, (400, 2)), random.uniform(0.5, 5.0, (400, 2))

    def polygon(pose, size):
        box = shapely.box(-size[0] / 2, -size[1] / 2, size[0] / 2, size[1] / 2)
        turned = shapely.affinity.rotate(box, pose[2], origin=(0, 0), use_radians=True)
        return shapely.affinity.translate(turned, pose[0], pose[1])

    exact = [polygon(a[i], size_a[i]).intersects(polygon(b[i], size_b[i])) for i in range(400)]
    assert expert.overlap(a, size_a, b, size_b).tolist() == exact
    assert 50 < sum(exact) < 350
