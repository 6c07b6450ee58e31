"""Traffic at 10 Hz: every road user follows its path by IDM and stops for what is in its way, compiled with numba.

Longitudinal law (Treiber, Hennecke, Helbing 2000), s = distance along the own path, g = gap, dv = v - v_lead:
  a = a_max (1 - (v/v0)^delta - (s*/g)^2),   s* = s_min + max(0, v T + v dv / (2 sqrt(a_max b))).
The "leader" is the nearest of: any road user whose box reaches into the corridor of the own path (now, or as
predicted shortly ahead: merging cars 1 s, pedestrians 2.5 s), the stop line of a red light, and the stop line of a
junction where somebody with right of way is coming. Right of way uses the town's conflict table: a vehicle waits
while another one is inside a shared zone or arrives before it could be through.
Positions along paths are those of rear axles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from navsim_ext.synthetic.paths import SPACING, Path
from navsim_ext.synthetic.town import Town

STEP_S = 0.1
ALL_RED_S = 3.0
VEHICLE, PEDESTRIAN, BICYCLE, STATIC = 0, 1, 2, 3  # kinds; STATIC does not move and has no path
MIN_CROSSINGS = 5  # columns of the table of junctions, more where a path has more
STOP_SHORT = 1.0  # m between a stop line and a front bumper that waits there


@dataclass
class Population:
    """All road users of a log as arrays over N; index 0 is the ego."""

    kind: NDArray[np.int64]
    start: NDArray[np.float64]  # [N] m along the path
    speed: NDArray[np.float64]  # [N] m/s at the beginning
    size: NDArray[np.float64]  # [N,3] length, width, height
    axle_to_centre: NDArray[np.float64]  # [N] m
    eagerness: NDArray[np.float64]  # [N] factor on the path's speed
    headway: NDArray[np.float64]  # [N] T, s
    acceleration: NDArray[np.float64]  # [N] a_max, m/s^2
    braking: NDArray[np.float64]  # [N] b, m/s^2
    standstill: NDArray[np.float64]  # [N] s_min, m
    jerk: NDArray[np.float64]  # [N] m/s^3, largest change of acceleration (upwards; twice that downwards)
    depart: NDArray[np.float64]  # [N] s before which it does not move (pedestrians)
    kerb: NDArray[np.float64]  # [N] m along a pedestrian's path where it waits for a gap; < 0 for nowhere
    event: NDArray[np.float64]  # [N,4] from s, to s, speed m/s, braking m/s^2: a driver slowing on its own
    pose: NDArray[np.float64]  # [N,3] of STATIC users


@dataclass(frozen=True)
class Signals:
    """Two-phase signals: phase p of node n is green during [offset + p (green + all-red), + green) of its cycle."""

    offset: NDArray[np.float64]  # [nodes] s
    green: NDArray[np.float64]  # [nodes] s


@dataclass(frozen=True)
class Motion:
    """What happened, at every step: centre poses, speeds, accelerations, positions along the path."""

    pose: NDArray[np.float64]  # [T,N,3] centre x, y, heading
    speed: NDArray[np.float64]  # [T,N]
    acceleration: NDArray[np.float64]  # [T,N]
    s: NDArray[np.float64]  # [T,N]
    waiting: NDArray[np.bool_]  # [T,N] held at its stop line in the step before


def simulate(town: Town, paths: list[Path | None], users: Population, signals: Signals, steps: int) -> Motion:
    """Runs ``steps`` steps of STEP_S; state 0 is the initial one."""
    tables = pack(paths)
    crossings, connectors = pack_crossings(paths)
    node = np.array([c.node for c in town.connectors], dtype=np.int64)
    phase = np.array([c.phase for c in town.connectors], dtype=np.int64)
    result = _run(
        steps,
        *tables,
        crossings,
        connectors,
        node,
        phase,
        signals.offset,
        signals.green,
        town.conflicts.pointer,
        town.conflicts.other,
        town.conflicts.zone,
        town.conflicts.gives_way,
        users.kind,
        users.start,
        users.speed,
        users.size,
        users.axle_to_centre,
        users.eagerness,
        users.headway,
        users.acceleration,
        users.braking,
        users.standstill,
        users.jerk,
        users.depart,
        users.kerb,
        users.event,
        users.pose,
        0,
        np.zeros(len(paths)),
        np.zeros(len(paths), dtype=np.bool_),
        np.zeros(len(paths), dtype=np.bool_),
        np.zeros((len(paths), 3)),
    )
    return Motion(*result)


def pack(paths: list[Path | None]) -> tuple[NDArray, NDArray, NDArray]:
    """(poses [P,3], speeds [P], offsets [N+1]) of all paths, end to end."""
    counts = [0 if path is None else len(path.xy) for path in paths]
    poses = np.concatenate([np.column_stack([p.xy, p.heading]) for p in paths if p is not None])
    speeds = np.concatenate([p.speed for p in paths if p is not None])
    return poses, speeds, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def pack_crossings(paths: list[Path | None]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """([N,X,2] start and end along the path, [N,X] connector) of the junctions of all paths; 1e9 and -1 for none."""
    most = max([MIN_CROSSINGS, *(len(path.crossings) + 1 for path in paths if path is not None)])
    crossings = np.full((len(paths), most, 2), 1e9)
    connectors = np.full((len(paths), most), -1, dtype=np.int64)
    for i, path in enumerate(paths):
        for k, crossing in enumerate(path.crossings if path else ()):
            crossings[i, k] = crossing.start, crossing.end
            connectors[i, k] = crossing.connector
    return crossings, connectors


@dataclass
class Resumed:
    """Where the law goes on: the state of N road users at step ``begin`` of its clock."""

    begin: int
    s: NDArray[np.float64]  # [N] m along the path
    speed: NDArray[np.float64]  # [N] m/s
    acceleration: NDArray[np.float64]  # [N]
    waiting: NDArray[np.bool_]  # [N]
    external: NDArray[np.bool_]  # [N] driven by somebody else: seen, reacted to, and not moved but straight on
    pose: NDArray[np.float64]  # [N,3] centre poses of the external ones; others stand on their paths


def resume(law: Mapping[str, NDArray], state: Resumed, steps: int) -> Motion:
    """Goes on for ``steps`` steps with the tables of ``TrafficScene.law``; state 0 of the result is the given one."""
    user = {key.removeprefix("user_"): value for key, value in law.items() if key.startswith("user_")}
    result = _run(
        steps, law["path_pose"], law["path_speed"], law["path_start"], law["crossings"], law["crossing_connector"],
        law["connector_node"], law["connector_phase"], law["signal_offset"], law["signal_green"], law["conflict_start"],
        law["conflict_other"], law["conflict_zone"], law["conflict_gives_way"], user["kind"], state.s, state.speed,
        user["size"], user["axle_to_centre"], user["eagerness"], user["headway"], user["acceleration"],
        user["braking"], user["standstill"], user["jerk"], user["depart"], user["kerb"], user["event"], user["pose"],
        state.begin, state.acceleration, state.waiting, state.external, state.pose,
    )  # fmt: skip
    return Motion(*result)


def project(law: Mapping[str, NDArray], row: int, pose: NDArray[np.float64], near: float) -> float:
    """m along a road user's path nearest to its rear axle, searched from 10 m behind ``near`` to 40 m ahead of it."""
    axle = law["user_axle_to_centre"][row]
    x, y = pose[0] - axle * np.cos(pose[2]), pose[1] - axle * np.sin(pose[2])
    first, last = law["path_start"][row], law["path_start"][row + 1]
    along, _, _ = _project(law["path_pose"], first, last, max(near - 10.0, 0.0), near + 40.0, x, y)
    return float(along)


@njit(cache=True)
def is_green(t, node, phase, offset, green):
    """Whether a signal phase shows green at time t [s]; phase -1 (no signal) always does."""
    if phase < 0:
        return True
    period = green[node] + ALL_RED_S
    into = (t - offset[node] - phase * period) % (2.0 * period)
    return into < green[node]


@njit(cache=True)
def _at(poses, first, last, s):
    """Pose at distance s of the path poses[first:last], extended straight on beyond its end."""
    position = s / SPACING
    index = int(np.floor(position))
    count = last - first
    if index < 0:
        index = 0
    if index > count - 2:
        index = count - 2
    f = position - index
    a, b = poses[first + index], poses[first + index + 1]
    x = a[0] + f * (b[0] - a[0])
    y = a[1] + f * (b[1] - a[1])
    g = min(f, 1.0)
    return x, y, a[2] + g * (b[2] - a[2])


@njit(cache=True)
def _project(poses, first, last, s_from, s_to, x, y):
    """(distance along the path, lateral offset, path heading) of the path pose nearest to a point in [s_from, s_to]."""
    low = max(first, first + int(s_from / SPACING))
    high = min(last - 1, first + int(s_to / SPACING))
    best, best_d = low, 1e18
    i = low
    while i <= high:
        d = (poses[i, 0] - x) ** 2 + (poses[i, 1] - y) ** 2
        if d < best_d:
            best, best_d = i, d
        i += 4
    for i in range(max(low, best - 3), min(high, best + 3) + 1):
        d = (poses[i, 0] - x) ** 2 + (poses[i, 1] - y) ** 2
        if d < best_d:
            best, best_d = i, d
    h = poses[best, 2]
    dx, dy = x - poses[best, 0], y - poses[best, 1]
    along = np.cos(h) * dx + np.sin(h) * dy
    return (best - first) * SPACING + along, -np.sin(h) * dx + np.cos(h) * dy, h


@njit(cache=True)
def _time_to_cover(distance, v, a):
    """Seconds to drive a distance from speed v with acceleration a up to 9 m/s; negative distances take none."""
    if distance <= 0.0:
        return 0.0
    top = max(9.0, v)
    ramp = (top * top - v * v) / (2.0 * a)
    if distance <= ramp:
        return (-v + np.sqrt(v * v + 2.0 * a * distance)) / a
    return (top - v) / a + (distance - ramp) / top


@njit(cache=True)
def _run(
    steps, poses, path_speed, pointer, crossings, connectors, node_of, phase_of, offset, green, conflict_pointer,
    conflict_other, conflict_zone, conflict_yield, kind, start, speed, size, axle, eagerness, headway, a_max, b_comf,
    s_min, jerk, depart, kerb, event, static_pose, begin, begin_a, begin_waiting, external, external_pose,
):  # fmt: skip
    n = len(kind)
    out_pose = np.zeros((steps + 1, n, 3))
    out_v = np.zeros((steps + 1, n))
    out_a = np.zeros((steps + 1, n))
    out_s = np.zeros((steps + 1, n))
    out_waiting = np.zeros((steps + 1, n), dtype=np.bool_)
    s, v, a = start.copy(), speed.copy(), begin_a.copy()
    x, y, h = np.zeros(n), np.zeros(n), np.zeros(n)
    upcoming = np.zeros(n, dtype=np.int64)  # crossing that an agent is in or comes to next
    waiting = begin_waiting.copy()  # held at its stop line in the last step
    command = np.zeros(n)
    for i in range(n):
        if kind[i] == STATIC:
            x[i], y[i], h[i] = static_pose[i]
    for step in range(steps + 1):
        t = (begin + step) * STEP_S
        for i in range(n):
            if kind[i] == STATIC:
                continue
            if external[i]:  # driven by somebody else: straight on from where it is
                h[i] = external_pose[i, 2]
                x[i] = external_pose[i, 0] + step * STEP_S * v[i] * np.cos(h[i])
                y[i] = external_pose[i, 1] + step * STEP_S * v[i] * np.sin(h[i])
                rear = s[i] + axle[i] - 0.5 * size[i, 0]
                while upcoming[i] < crossings.shape[1] - 1 and rear > crossings[i, upcoming[i], 1]:
                    upcoming[i] += 1
                continue
            px, py, ph = _at(poses, pointer[i], pointer[i + 1], s[i])
            h[i] = ph
            x[i] = px + axle[i] * np.cos(ph)
            y[i] = py + axle[i] * np.sin(ph)
            rear = s[i] + axle[i] - 0.5 * size[i, 0]
            while upcoming[i] < crossings.shape[1] - 1 and rear > crossings[i, upcoming[i], 1]:
                upcoming[i] += 1
        for i in range(n):
            out_pose[step, i] = x[i], y[i], h[i]
            out_v[step, i], out_a[step, i], out_s[step, i] = v[i], a[i], s[i]
            out_waiting[step, i] = waiting[i]
        if step == steps:
            break
        for i in range(n):
            if kind[i] == STATIC or external[i]:
                command[i] = 0.0
            elif kind[i] == PEDESTRIAN:
                command[i] = _walk(
                    i, t, n, s, v, x, y, h, kind, size, axle, depart, kerb, pointer, poses, path_speed, eagerness
                )
            else:
                command[i], waiting[i] = _drive(
                    i, t, n, s, v, a, x, y, h, poses, path_speed, pointer, crossings, connectors, node_of, phase_of,
                    offset, green, conflict_pointer, conflict_other, conflict_zone, conflict_yield, kind, size, axle,
                    eagerness, headway, a_max, b_comf, s_min, event, upcoming, waiting, kerb, depart,
                )  # fmt: skip
        for i in range(n):
            if kind[i] == STATIC:
                continue
            if external[i]:
                s[i] += v[i] * STEP_S
                continue
            change = command[i] - a[i]
            a[i] += min(max(change, -2.0 * jerk[i] * STEP_S), jerk[i] * STEP_S)
            if v[i] + a[i] * STEP_S < 0.0:
                a[i] = -v[i] / STEP_S
            s[i] += v[i] * STEP_S + 0.5 * a[i] * STEP_S**2
            v[i] = max(0.0, v[i] + a[i] * STEP_S)
            if v[i] < 0.02 and command[i] <= 0.0:
                v[i] = 0.0
                a[i] = 0.0
    return out_pose, out_v, out_a, out_s, out_waiting


@njit(cache=True)
def _walk(i, t, n, s, v, x, y, h, kind, size, axle, depart, kerb, pointer, poses, path_speed, eagerness):
    """Acceleration of a pedestrian: walk at own speed, wait at the kerb while a car could not stop any more."""
    wanted = path_speed[pointer[i]] * eagerness[i]
    if t < depart[i] or s[i] > (pointer[i + 1] - pointer[i] - 2) * SPACING:
        wanted = 0.0
    elif kerb[i] >= 0.0 and kerb[i] - 0.8 < s[i] <= kerb[i] + 0.2:
        for j in range(n):
            if kind[j] != VEHICLE or v[j] < 0.5:
                continue
            mx, my, _ = _at(poses, pointer[i], pointer[i + 1], kerb[i] + 4.0)
            ahead = np.cos(h[j]) * (mx - x[j]) + np.sin(h[j]) * (my - y[j]) - 0.5 * size[j, 0] - 1.5
            side = -np.sin(h[j]) * (mx - x[j]) + np.cos(h[j]) * (my - y[j])
            if abs(side) < 8.0 and -size[j, 0] - 2.0 < ahead and v[j] * v[j] > 2.0 * 2.2 * max(ahead, 0.1):
                wanted = 0.0
    return (wanted - v[i]) / 0.5


@njit(cache=True)
def _drive(
    i, t, n, s, v, a, x, y, h, poses, path_speed, pointer, crossings, connectors, node_of, phase_of, offset, green,
    conflict_pointer, conflict_other, conflict_zone, conflict_yield, kind, size, axle, eagerness, headway, a_max,
    b_comf, s_min, event, upcoming, waiting, kerb, depart,
):  # fmt: skip
    """(wanted acceleration, is it held at its stop line) of a driver or cyclist."""
    first, last = pointer[i], pointer[i + 1]
    front = s[i] + axle[i] + 0.5 * size[i, 0]
    index = min(max(int(s[i] / SPACING), 0), last - first - 1)
    wanted = max(path_speed[first + index] * eagerness[i], 0.1)
    exponent = 4.0 if i > 0 else 8.0
    if v[i] <= wanted:
        best = a_max[i] * (1.0 - (v[i] / wanted) ** exponent)
    else:
        best = max(-1.2 * (v[i] - wanted), -b_comf[i])
    if event[i, 0] <= t < event[i, 1] and v[i] > event[i, 2]:
        best = min(best, -event[i, 3])
    elif event[i, 0] <= t < event[i, 1]:
        best = min(best, 0.0)
    look = 12.0 + 4.5 * v[i]
    lead_gap, lead_v = 1e9, 0.0
    for j in range(n):
        if j == i:
            continue
        dx, dy = x[j] - x[i], y[j] - y[i]
        if dx * dx + dy * dy > (look + 8.0) ** 2:
            continue
        gap, speed = _in_corridor(i, j, t, s, v, x, y, h, poses, pointer, kind, size, axle, look, kerb, depart)
        if gap < 1e8 and (gap < lead_gap or (gap < lead_gap + 6.0 and speed < lead_v - 2.0)):
            lead_gap, lead_v = gap, speed
    if lead_gap < 1e8:
        best = min(best, _follow(v[i], lead_gap, lead_v, headway[i], a_max[i], b_comf[i], s_min[i]))
    k = upcoming[i]
    held = False
    if connectors[i, k] >= 0 and front < crossings[i, k, 0] + 0.5:
        stop_gap = crossings[i, k, 0] - STOP_SHORT - front
        if stop_gap < look:
            held = _must_wait(
                i, k, t, n, s, v, stop_gap, crossings, connectors, node_of, phase_of, offset, green, conflict_pointer,
                conflict_other, conflict_zone, conflict_yield, kind, size, axle, upcoming, waiting,
            )  # fmt: skip
            needed = v[i] * v[i] / (2.0 * max(stop_gap + STOP_SHORT, 0.05))
            if held and needed > (3.2 if i == 0 else 4.5):
                held = False
            if held:
                best = min(best, _stop_at(v[i], stop_gap, a_max[i], b_comf[i]))
    limit = -6.0 if i > 0 else -5.0
    return max(best, limit), held


@njit(cache=True)
def _follow(v, gap, lead_v, headway, a_max, b, s_min):
    wish = s_min + max(0.0, v * headway + v * (v - lead_v) / (2.0 * np.sqrt(a_max * b)))
    return a_max * (1.0 - (wish / max(gap, 0.1)) ** 2)


@njit(cache=True)
def _stop_at(v, gap, a_max, b):
    """Stop at a line: free while v^2/(2 gap) is far below b, then about constant braking, a little firmer if late."""
    if gap < 0.6:
        return -max(2.0, v * v / 0.6)
    if v < 0.4:
        return 0.4 - v
    needed = v * v / (2.0 * gap)
    calm, firm = 0.35 * b, 0.55 * b
    if needed < calm:
        return a_max if gap > 4.0 else 0.0
    if needed < firm:
        return a_max - (needed - calm) / (firm - calm) * (a_max + needed)
    return -needed * (1.0 + 0.35 * (needed - firm) / b)


@njit(cache=True)
def _in_corridor(i, j, t, s, v, x, y, h, poses, pointer, kind, size, axle, look, kerb, depart):
    """(gap, speed along the path) of road user j as an obstacle on the path of i; gap 1e9 if it is not in the way."""
    first, last = pointer[i], pointer[i + 1]
    front = axle[i] + 0.5 * size[i, 0]
    from_s = s[i] + axle[i] * 0.5
    along, lateral, heading = _project(poses, first, last, from_s, s[i] + front + look, x[j], y[j])
    difference = h[j] - heading
    cos, sin = np.cos(difference), np.sin(difference)
    if kind[j] == PEDESTRIAN:
        half_along, half_across = 0.4, 0.4
    else:
        half_along = abs(cos) * 0.5 * size[j, 0] + abs(sin) * 0.5 * size[j, 1]
        half_across = abs(sin) * 0.5 * size[j, 0] + abs(cos) * 0.5 * size[j, 1]
    gap = along - half_along - s[i] - front
    if along + half_along < s[i] + axle[i] or gap > look:
        return 1e9, 0.0
    reach = 0.5 * size[i, 1] + half_across + 0.3
    forward = v[j] * cos
    if abs(lateral) < reach:
        return max(gap, 0.05), max(forward, 0.0) if cos > 0.0 else 0.0
    speed = v[j]
    horizon = 1.0
    if kind[j] == PEDESTRIAN:
        horizon = 2.6
        reach += 0.35
        if kerb[j] >= 0.0 and speed < 0.6 and kerb[j] - 1.6 < s[j] <= kerb[j] + 0.3 and t > depart[j] - 1.5:
            speed = 1.5  # stands at the kerb and wants to cross
            horizon = 3.2
    elif cos < 0.7:
        return 1e9, 0.0  # crossing traffic is a matter of right of way
    moved = lateral + speed * sin * horizon
    if abs(moved) < reach or lateral * moved < 0.0:
        return max(gap, 0.05), max(forward, 0.0) if cos > 0.0 else 0.0
    return 1e9, 0.0


@njit(cache=True)
def _must_wait(
    i, k, t, n, s, v, stop_gap, crossings, connectors, node_of, phase_of, offset, green, conflict_pointer,
    conflict_other, conflict_zone, conflict_yield, kind, size, axle, upcoming, waiting,
):  # fmt: skip
    """Red light, somebody inside a shared zone, or somebody with right of way who would arrive too early."""
    c = connectors[i, k]
    if not is_green(t, node_of[c], phase_of[c], offset, green):
        return True
    line = crossings[i, k, 0]
    my_front, my_rear = s[i] + axle[i] + 0.5 * size[i, 0] - line, s[i] + axle[i] - 0.5 * size[i, 0] - line
    for j in range(n):
        if j == i or (kind[j] != VEHICLE and kind[j] != BICYCLE):
            continue
        m = upcoming[j]
        other = connectors[j, m]
        if other < 0 or node_of[other] != node_of[c]:
            continue
        row = -1
        for r in range(conflict_pointer[c], conflict_pointer[c + 1]):
            if conflict_other[r] == other:
                row = r
                break
        if row < 0:
            continue
        zone = conflict_zone[row]
        other_line = crossings[j, m, 0]
        front, rear = s[j] + axle[j] + 0.5 * size[j, 0] - other_line, s[j] + axle[j] - 0.5 * size[j, 0] - other_line
        if rear > zone[3] + 0.5:
            continue
        inside = front > 0.3
        if not inside:
            if not conflict_yield[row] or front < -60.0:
                continue
            if not is_green(t, node_of[other], phase_of[other], offset, green):
                continue
            if waiting[j] and v[j] < 0.5:
                continue
        pace = max(v[j], 2.5) if inside else max(v[j], 3.0)
        clears = (zone[3] - rear) / pace
        arrives = (zone[2] - front) / pace
        my_arrival = _time_to_cover(zone[0] - my_front, v[i], 1.5)
        my_exit = _time_to_cover(zone[1] - my_rear, v[i], 1.3)
        if clears + 0.8 < my_arrival and v[j] > 1.5:
            continue
        if arrives > my_exit + 1.2:
            continue
        return True
    return False
