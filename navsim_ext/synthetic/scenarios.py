"""What a log is about: for each kind of situation, where the ego comes from and who plays which part.

Times count from the start of the simulation. A log's windows have their "now" around ``Plan.focus_s``; every
situation is laid out so that what the ego has to react to is under way, and can be seen, by then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from navsim_ext.synthetic import roads
from navsim_ext.synthetic.cast import Cast
from navsim_ext.synthetic.intersections import Connector
from navsim_ext.synthetic.paths import SPACING, LaneChange, Path, follow, random_route
from navsim_ext.synthetic.town import Lane, Town
from navsim_ext.synthetic.traffic import ALL_RED_S, STOP_SHORT, Signals

EGO_FRONT = 4.049  # m from rear axle to front bumper
EGO_DRIVES = {"lateral_acceleration": 3.0, "inset": EGO_FRONT**2 / 4.0}  # m/s^2, m^2: half of the front's swing
SHORT_S = 8.0  # s, duration that the lengths of routes below are made for
TOP_SPEED = 13.0  # m/s that nobody exceeds
_STOPPED_AT = STOP_SHORT + EGO_FRONT  # m between the ego's rear axle and the stop line when it waits there


@dataclass(frozen=True)
class Plan:
    """One log to be made. ``warm_up_s`` is simulated before the first frame; the middle "now" is at ``focus_s``."""

    town: Town
    kind: str
    warm_up_s: float
    duration_s: float
    focus_s: float

    def beyond(self, length: float) -> float:
        """m of route that a drive of this duration needs where one of SHORT_S needs ``length``."""
        return length + TOP_SPEED * max(self.duration_s - SHORT_S, 0.0)


class Unsuitable(Exception):
    """This town has no place, or the dice gave no room, for the situation asked for."""


def stage(plan: Plan, random: np.random.Generator) -> Cast:
    """The cast of a log of kind ``plan.kind``; raises Unsuitable when this draw does not work out."""
    town = plan.town
    count = len(town.nodes)
    signals = Signals(random.uniform(0.0, 30.0, size=count), random.uniform(9.0, 14.0, size=count))
    cast = Cast(town, random, signals)
    SITUATIONS[plan.kind](plan, cast)
    cast.principals = len(cast)
    return cast


def populate(plan: Plan, cast: Cast, track: np.ndarray) -> None:
    """Everybody who is there by chance: background traffic, parked cars, walkers. ``track`` [n,2]: the ego's way."""
    random = cast.random
    ego_lanes = {lane for lane, _ in cast.paths[0].lanes}
    around = track[len(track) // 2]
    drive = TOP_SPEED * (plan.warm_up_s + plan.duration_s) + 60.0
    cast.add_background(around, 85.0, ego_lanes, float(random.uniform(0.008, 0.022)), drive)
    cast.add_parked(track, 45.0)
    cast.add_walkers(track, 40.0, int(random.integers(2, 7)))


# Ego routes


def _lane_before(cast: Cast, lane: int) -> tuple[int, list[int]]:
    """(first lane, connectors so far) of a route that comes to ``lane`` from a random lane before it."""
    into = [c for c in cast.town.connectors if c.to_lane == lane]
    chosen = into[int(cast.random.integers(len(into)))]
    return chosen.from_lane, [chosen.index]


def _ego_through(plan: Plan, cast: Cast, connector: Connector) -> tuple[Path, float]:
    """(ego path that takes a connector, distance of that connector's stop line along it)."""
    first, turns = _lane_before(cast, connector.from_lane)
    after = random_route(cast.town, cast.random, connector.to_lane, plan.beyond(70.0))
    path = follow(cast.town, first, [*turns, connector.index, *after], **EGO_DRIVES)
    return path, path.crossings[1].start


def _back_in_time(path: Path, s: float, seconds: float) -> float:
    """Where a free driver is ``seconds`` before being at ``s``."""
    steps = int(round(seconds / 0.1))
    for _ in range(steps):
        s -= 0.1 * float(path.speed[max(min(int(s / SPACING), len(path.speed) - 1), 0)])
    return s


def _drive_up_to(plan: Plan, cast: Cast, path: Path, place: float, slow: float = 1.0) -> None:
    """The ego on its way so that, undisturbed, it is at ``place`` [m along its path] at the focus time."""
    start = _back_in_time(path, place, plan.focus_s * slow)
    if start < 2.0:
        raise Unsuitable("the approach is too short")
    speed = float(path.speed[int(start / SPACING)]) * float(cast.random.uniform(0.8, 1.0)) * slow
    cast.add_ego(path, start, speed)


def _pick(cast: Cast, wanted: Callable[[Connector], bool]) -> Connector:
    options = [c for c in cast.town.connectors if wanted(c)]
    if not options:
        raise Unsuitable("no such connector")
    return options[int(cast.random.integers(len(options)))]


def _pick_lane(cast: Cast, wanted: Callable[[Lane], bool]) -> Lane:
    options = [lane for lane in cast.town.lanes if wanted(lane)]
    if not options:
        raise Unsuitable("no such lane")
    return options[int(cast.random.integers(len(options)))]


def _set_green(cast: Cast, node: int, phase: int, start: float) -> None:
    """The signal of a node turns green for ``phase`` at ``start`` [s]."""
    period = cast.signals.green[node] + ALL_RED_S
    cast.signals.offset[node] = (start - phase * period) % (2.0 * period)


def _green_throughout(plan: Plan, cast: Cast, connector: Connector) -> None:
    """Green for the ego during the whole log, or as good as: it began before and ends late."""
    if connector.phase >= 0:
        cast.signals.green[connector.node] = plan.warm_up_s + plan.duration_s + 3.0
        _set_green(cast, connector.node, connector.phase, -1.0)


def _red_until(plan: Plan, cast: Cast, connector: Connector, until: float) -> None:
    """Red for the connector from the start until ``until`` [s]; the other phase is green most of that time."""
    cast.signals.green[connector.node] = max(until - ALL_RED_S + 1.0, 9.0)
    _set_green(cast, connector.node, connector.phase, until)


def _cross_traffic(plan: Plan, cast: Cast, node: int, arm: int, first_at: float, count: int) -> None:
    """Cars on the arms beside ``arm`` that go through the node one after another from ``first_at`` [s] on."""
    arms = len(cast.town.nodes[node].arms)
    beside = {a for a in range(arms) if (cast.town.nodes[node].phases[a]) != cast.town.nodes[node].phases[arm]}
    options = [c for c in cast.town.connectors if c.node == node and c.from_arm in beside and c.turn != "right"]
    if not options:
        return
    used: dict[int, float] = {}
    for _ in range(count):
        connector = options[int(cast.random.integers(len(options)))]
        first, turns = _lane_before(cast, connector.from_lane)
        after = random_route(cast.town, cast.random, connector.to_lane, plan.beyond(130.0))
        path = follow(cast.town, first, [*turns, connector.index, *after])
        line = path.crossings[1].start
        at = used.get(connector.from_lane, first_at) + float(cast.random.uniform(0.3, 1.6))
        used[connector.from_lane] = at + 1.8
        start = _back_in_time(path, line, at)
        if start > 2.0:
            cast.add_car(path, start, float(path.speed[int(start / SPACING)]) * 0.95)


def _queue(cast: Cast, path: Path, line: float, count: int) -> float:
    """Standing cars before a stop line on a path; returns how far the tail is behind the line [m]."""
    tail = STOP_SHORT
    for _ in range(count):
        size = (4.7, 1.9, 1.5) if cast.random.random() < 0.7 else (5.0, 2.0, 1.8)
        start = line - tail - size[0] * (0.27 + 0.5)
        cast.add_car(path, start, 0.0, size=size, eagerness=0.95)
        tail += size[0] + float(cast.random.uniform(1.9, 2.8))
    return tail


# Situations


def _turn(plan: Plan, cast: Cast) -> None:
    """Left or right at a junction with nothing in the way at first; sometimes somebody crosses the exit on foot."""
    connector = _pick(cast, lambda c: c.turn != "straight" and cast.town.nodes[c.node].kind != "roundabout")
    _green_throughout(plan, cast, connector)
    path, line = _ego_through(plan, cast, connector)
    _drive_up_to(plan, cast, path, line + float(cast.random.uniform(-12.0, 9.0)))
    if cast.random.random() < 0.3:
        _exit_pedestrian(plan, cast, connector)


def _exit_pedestrian(plan: Plan, cast: Cast, connector: Connector) -> None:
    for crosswalk in cast.town.crosswalks:
        if crosswalk.node == connector.node and crosswalk.arm == connector.to_arm:
            ends = crosswalk.ends if cast.random.random() < 0.5 else crosswalk.ends[::-1]
            cast.add_crossing_pedestrian(ends, plan.focus_s + float(cast.random.uniform(-2.0, 1.0)))


def _start(plan: Plan, cast: Cast) -> None:
    """Waiting at a red light, alone or in a queue; it turns green about now."""
    connector = _pick(cast, lambda c: c.phase >= 0)
    turns_green = plan.focus_s + float(cast.random.uniform(-2.8, -0.4))
    _red_until(plan, cast, connector, turns_green)
    path, line = _ego_through(plan, cast, connector)
    cars = int(cast.random.choice([0, 0, 0, 1, 1, 2]))
    back = STOP_SHORT
    cast.add_ego(path, line - _STOPPED_AT, 0.0)
    if cars:
        back = _queue(cast, path, line, cars)
        cast.rows[0]["start"] = line - back - EGO_FRONT
    _cross_traffic(plan, cast, connector.node, connector.from_arm, 1.0, 2)


def _red(plan: Plan, cast: Cast) -> None:
    """Coming up to a red light while others cross."""
    connector = _pick(cast, lambda c: c.phase >= 0)
    _red_until(plan, cast, connector, plan.focus_s + float(cast.random.uniform(4.5, 7.0)))
    path, line = _ego_through(plan, cast, connector)
    _drive_up_to(plan, cast, path, line - EGO_FRONT - float(cast.random.uniform(10.0, 38.0)))
    _cross_traffic(plan, cast, connector.node, connector.from_arm, plan.focus_s + 0.5, 6)


def _late_green(plan: Plan, cast: Cast) -> None:
    """Slowing for a red light that turns green just in time."""
    connector = _pick(cast, lambda c: c.phase >= 0)
    _red_until(plan, cast, connector, plan.focus_s + float(cast.random.uniform(-1.6, 0.4)))
    path, line = _ego_through(plan, cast, connector)
    _drive_up_to(plan, cast, path, line - EGO_FRONT - float(cast.random.uniform(2.0, 14.0)))


def _standing_queue(plan: Plan, cast: Cast) -> None:
    """Standing cars before a red light, some of which start to move."""
    connector = _pick(cast, lambda c: c.phase >= 0)
    _red_until(plan, cast, connector, plan.focus_s + float(cast.random.uniform(-2.5, 3.5)))
    path, line = _ego_through(plan, cast, connector)
    cars = int(cast.random.integers(1, 4))
    reserve = len(cast)
    _drive_up_to(plan, cast, path, line - 6.5 * cars - EGO_FRONT - float(cast.random.uniform(10.0, 26.0)))
    _queue(cast, path, line, cars)
    if cast.rows[reserve]["start"] + 30.0 > cast.rows[reserve + 1]["start"] + 25.0:
        raise Unsuitable("the queue reaches back to the ego")


def _leader(plan: Plan, cast: Cast) -> None:
    """A car ahead brakes, by a little or to a stop, and may go on again."""
    lane = _pick_lane(cast, lambda x: roads.arc_lengths(x.baseline)[-1] > 80.0)
    path, line = _ego_on(plan, cast, lane.index)
    _keep_green(plan, cast, path)
    _drive_up_to(plan, cast, path, line - float(cast.random.uniform(35.0, 65.0)))
    ego = cast.rows[0]
    gap = float(cast.random.uniform(7.0, 14.0)) + 0.6 * ego["speed"]
    begins = plan.focus_s + float(cast.random.uniform(-2.2, -0.2))
    slow_to = float(cast.random.choice([0.0, 0.0, 2.0, 4.0, 5.0]))
    lasts = float(cast.random.uniform(3.0, 7.0)) if slow_to == 0.0 else float(cast.random.uniform(1.5, 4.0))
    event = (begins, begins + lasts, slow_to, float(cast.random.uniform(2.2, 3.8)))
    cast.add_car(path, ego["start"] + EGO_FRONT + gap + 1.2, ego["speed"], eagerness=0.97, event=event)


def _ego_on(plan: Plan, cast: Cast, lane: int) -> tuple[Path, float]:
    """(ego path over the whole of a lane, distance of that lane's end along it)."""
    first, turns = _lane_before(cast, lane)
    after = random_route(cast.town, cast.random, lane, plan.beyond(70.0))
    path = follow(cast.town, first, [*turns, *after], **EGO_DRIVES)
    return path, path.crossings[1].start


def _keep_green(plan: Plan, cast: Cast, path: Path) -> None:
    for crossing in path.crossings:
        _green_throughout(plan, cast, cast.town.connectors[crossing.connector])


def _pedestrian(plan: Plan, cast: Cast) -> None:
    """Somebody crosses the road at a crosswalk between junctions."""
    options = [c for c in cast.town.crosswalks if c.node < 0]
    if not options:
        raise Unsuitable("no mid-block crosswalk")
    crosswalk = options[int(cast.random.integers(len(options)))]
    lane = _pick_lane(cast, lambda x: x.road == crosswalk.road)
    path, line = _ego_on(plan, cast, lane.index)
    _keep_green(plan, cast, path)
    middle = crosswalk.ends.mean(axis=0)
    reach = path.xy[: int((line + 5.0) / SPACING)]
    place = SPACING * int(np.hypot(*(reach - middle).T).argmin())
    _drive_up_to(plan, cast, path, place - EGO_FRONT - float(cast.random.uniform(12.0, 26.0)))
    ends = crosswalk.ends if cast.random.random() < 0.5 else crosswalk.ends[::-1]
    for late in np.cumsum(cast.random.uniform(0.0, 2.0, size=int(cast.random.integers(1, 3)))):
        cast.add_crossing_pedestrian(ends, plan.focus_s - 2.0 + float(late))


def _cut_in(plan: Plan, cast: Cast) -> None:
    """On a road of two lanes, a slower car from the other lane moves over in front of the ego."""
    lane = _pick_lane(cast, lambda x: cast.town.roads[x.road].lanes == 2)
    path, line = _ego_on(plan, cast, lane.index)
    _keep_green(plan, cast, path)
    place = line - float(cast.random.uniform(40.0, 60.0))
    _drive_up_to(plan, cast, path, place)
    ego = cast.rows[0]
    other = cast.town.lane_at(lane.group, 1 - lane.lane_index)
    begin = float(roads.arc_lengths(lane.baseline)[-1]) - (line - place) + float(cast.random.uniform(7.0, 16.0))
    side = 1 if other.lane_index == 1 else -1
    if begin < 5.0:
        raise Unsuitable("the lane change would begin before the lane")
    change = LaneChange(begin, float(cast.random.uniform(22.0, 32.0)), side)
    after = random_route(cast.town, cast.random, lane.index, plan.beyond(150.0))
    cutter = follow(cast.town, other.index, after, change=change)
    pace = ego["speed"] * float(cast.random.uniform(0.78, 0.93))
    start = begin + float(cast.random.uniform(4.0, 8.0)) - pace * plan.focus_s
    if start < 3.0:
        raise Unsuitable("the other car would start before its lane")
    cast.add_car(cutter, start, pace, eagerness=pace / float(cutter.speed[int(start / SPACING)]))


def _bend(plan: Plan, cast: Cast) -> None:
    """A road that bends while the ego drives on it."""

    def bent(lane: Lane) -> bool:
        heading = roads.headings(lane.baseline)
        return abs(heading[-1] - heading[0]) > 0.9

    lane = _pick_lane(cast, bent)
    path, line = _ego_on(plan, cast, lane.index)
    _keep_green(plan, cast, path)
    begin = path.crossings[0].end
    inside = slice(int(begin / SPACING), int(line / SPACING))
    bend = begin + SPACING * float(np.flatnonzero(np.abs(path.curvature[inside]) > 0.01)[0])
    _drive_up_to(plan, cast, path, bend + float(cast.random.uniform(-14.0, 18.0)))


def _roundabout(plan: Plan, cast: Cast) -> None:
    """Into a roundabout, giving way to whoever is in it."""
    connector = _pick(cast, lambda c: cast.town.nodes[c.node].kind == "roundabout")
    path, line = _ego_through(plan, cast, connector)
    _drive_up_to(plan, cast, path, line + float(cast.random.uniform(-16.0, 8.0)))
    if cast.random.random() < 0.6:
        others = [c for c in cast.town.connectors if c.node == connector.node and c.from_arm != connector.from_arm]
        for _ in range(int(cast.random.integers(1, 4))):
            other = others[int(cast.random.integers(len(others)))]
            first, turns = _lane_before(cast, other.from_lane)
            after = random_route(cast.town, cast.random, other.to_lane, plan.beyond(130.0))
            way = follow(cast.town, first, [*turns, other.index, *after])
            start = _back_in_time(way, way.crossings[1].start, plan.focus_s + float(cast.random.uniform(-3.0, 2.0)))
            if start > 2.0 and all(
                np.hypot(*(cast.position(i) - way.xy[int(start / SPACING)])) > 9.0 for i in range(len(cast))
            ):
                cast.add_car(way, start, float(way.speed[int(start / SPACING)]))


def _give_way(plan: Plan, cast: Cast) -> None:
    """Out of a minor road, or left across oncoming traffic, when there is a gap."""
    connector = _pick(
        cast, lambda c: cast.town.nodes[c.node].kind == "give_way" and c.priority >= 1 and c.turn != "straight"
    )
    path, line = _ego_through(plan, cast, connector)
    _drive_up_to(plan, cast, path, line - EGO_FRONT - float(cast.random.uniform(2.0, 20.0)))
    _cross_traffic(plan, cast, connector.node, connector.from_arm, plan.focus_s - 1.0, int(cast.random.integers(1, 4)))


def _cyclist(plan: Plan, cast: Cast) -> None:
    """A cyclist ahead in the same lane."""
    lane = _pick_lane(cast, lambda x: roads.arc_lengths(x.baseline)[-1] > 80.0)
    path, line = _ego_on(plan, cast, lane.index)
    _keep_green(plan, cast, path)
    _drive_up_to(plan, cast, path, line - float(cast.random.uniform(40.0, 70.0)))
    ego = cast.rows[0]
    pace = float(cast.random.uniform(3.0, 4.6))
    gap = (ego["speed"] - pace) * plan.focus_s * 0.8 + float(cast.random.uniform(8.0, 16.0))
    first = cast.paths[0].lanes[0][0]
    turns = [crossing.connector for crossing in path.crossings]
    way = follow(cast.town, first, turns, lateral_offset=-0.7)
    cast.add_cyclist(way, ego["start"] + EGO_FRONT + gap, pace)


def _double_parked(plan: Plan, cast: Cast) -> None:
    """A car stands in the right lane of two; the ego changes to the left lane."""
    lane = _pick_lane(cast, lambda x: cast.town.roads[x.road].lanes == 2 and x.lane_index == 1 and len(x.baseline) > 60)
    length = float(roads.arc_lengths(lane.baseline)[-1])
    if length < 12.0 + 55.0:
        raise Unsuitable("the lane is too short to change out of it")
    change = LaneChange(float(cast.random.uniform(12.0, length - 55.0)), float(cast.random.uniform(24.0, 30.0)), 1)
    left = cast.town.lane_at(lane.group, 0)
    after = random_route(cast.town, cast.random, left.index, plan.beyond(70.0))
    path = follow(cast.town, lane.index, after, **EGO_DRIVES, change=change)
    _keep_green(plan, cast, path)
    place = change.start + float(cast.random.uniform(-8.0, 6.0))
    start = _back_in_time(path, place, plan.focus_s)
    begin_speed = float(path.speed[0])
    if start < 1.0:  # the lane begins later than the drive: start slower
        start, begin_speed = 1.0, max(begin_speed * 0.6, 3.0)
    cast.add_ego(path, start, begin_speed)
    at = change.start + change.length + float(cast.random.uniform(0.0, 6.0))
    pose = lane.baseline[min(int(at), len(lane.baseline) - 1)]
    heading = roads.headings(lane.baseline)[min(int(at), len(lane.baseline) - 1)]
    size = (4.7, 1.9, 1.5) if cast.random.random() < 0.7 else (7.5, 2.4, 3.0)
    shifted = pose + 0.3 * roads.unit(heading - np.pi / 2)
    cast.add_static("vehicle", np.append(shifted, heading), size)


def _cruise(plan: Plan, cast: Cast) -> None:
    """Straight on, with or without somebody ahead."""
    connector = _pick(cast, lambda c: c.turn == "straight" and cast.town.nodes[c.node].kind != "roundabout")
    _green_throughout(plan, cast, connector)
    path, line = _ego_through(plan, cast, connector)
    _drive_up_to(plan, cast, path, line + float(cast.random.uniform(-35.0, 10.0)))
    if cast.random.random() < 0.5:
        ego = cast.rows[0]
        start = ego["start"] + 18.0 + ego["speed"]
        cast.add_car(path, start, float(path.speed[int(start / SPACING)]) * 0.9)


SITUATIONS: dict[str, Callable[[Plan, Cast], None]] = {
    "turn": _turn,
    "start": _start,
    "red": _red,
    "late_green": _late_green,
    "queue": _standing_queue,
    "leader": _leader,
    "pedestrian": _pedestrian,
    "cut_in": _cut_in,
    "bend": _bend,
    "roundabout": _roundabout,
    "give_way": _give_way,
    "cyclist": _cyclist,
    "double_parked": _double_parked,
    "cruise": _cruise,
}
