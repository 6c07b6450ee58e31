"""The PDM sub-scores once more, slowly and plainly, with shapely and scipy: what the kernels are compared with.

Written from the rules, object by object and step by step, without broad phases, indices or shared arrays. Works on a
metric-cache record and simulated states [41,11].
"""

from __future__ import annotations

import math

import numpy as np
import shapely
from scipy.signal import savgol_filter
from shapely.geometry import LineString, Point, Polygon

from navsim_ext.pdm.ego import HALF_LENGTH, HALF_WIDTH, REAR_AXLE_TO_CENTER

LANES, DRIVABLE, INTERSECTION = (0, 11), (17, 1, 15), 1
AGENTS = (0, 1, 2)


def rectangle(x, y, heading, half_length, half_width):
    u = np.array([math.cos(heading), math.sin(heading)])
    n = np.array([math.cos(heading + math.pi / 2), math.sin(heading + math.pi / 2)])
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return np.array([np.array([x, y]) + (b * half_width * n + a * half_length * u) for a, b in signs])


def observation(scene, version):
    """Per step: {track row: Polygon}; 51 steps for v1, 41 for v2."""
    frames, steps = (11, 51) if version == "v1" else (9, 41)
    maps = [{} for _ in range(steps)]
    for j, sightings in enumerate(scene.track_poses[:, :frames]):
        seen = np.flatnonzero(np.isfinite(sightings[:, 0]))
        if len(seen) == 0:
            continue
        heading = np.unwrap(sightings[seen, 2])
        for step in range(steps):
            time = 0.1 * step
            if len(seen) == 1:
                pose = sightings[seen[0]]
            elif seen[0] * 0.5 <= time <= seen[-1] * 0.5:
                columns = (sightings[seen, 0], sightings[seen, 1], heading)
                pose = [np.interp(time, seen * 0.5, column) for column in columns]
            else:
                continue
            length, width = scene.track_sizes[j, :2]
            maps[step][j] = Polygon(rectangle(*pose, length / 2, width / 2))
    if version == "v2":
        ego = Polygon(ego_box(scene.ego_state))
        over = {j for j, polygon in maps[0].items() if polygon.intersects(ego)}
        maps = [{j: polygon for j, polygon in step.items() if j not in over} for step in maps]
    return maps


def ego_box(state):
    x, y, heading = state[:3]
    center = x + REAR_AXLE_TO_CENTER * math.cos(heading), y + REAR_AXLE_TO_CENTER * math.sin(heading)
    return rectangle(*center, heading, HALF_LENGTH, HALF_WIDTH)


def map_polygons(scene, table):
    """[(type, on route, Polygon)] of the scene's patch."""
    shapes = []
    for row, on_route in zip(scene.map_polygons, scene.map_on_route):
        rings = table.rings(row)
        shapes.append((int(table.types[row]), bool(on_route), Polygon(rings[0], rings[1:])))
    return shapes


def angle_to(state, polygon):
    """Angle between the ego's heading and the polygon's centroid, NaN where rounding lifts the cosine over 1."""
    vector = np.array([polygon.centroid.x - state[0], polygon.centroid.y - state[1]])
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = vector / math.sqrt(vector[0] * vector[0] + vector[1] * vector[1])
        return float(np.arccos(math.cos(state[2]) * unit[0] + math.sin(state[2]) * unit[1]))


def areas(shapes, states):
    """Per step: dict of multiple_lanes, non_drivable, oncoming, center_crossing, rear_crossing."""
    result = []
    for state in states:
        corners = ego_box(state)
        center = state[:2] + REAR_AXLE_TO_CENTER * np.array([math.cos(state[2]), math.sin(state[2])])
        points = np.concatenate([corners, [center], [state[:2]]])
        inside = [(t, r, shapely.contains_xy(p, points[:, 0], points[:, 1])) for t, r, p in shapes]
        lanes = [held[:4] for t, _, held in inside if t in LANES]
        drivable = [held[:4] for t, _, held in inside if t in DRIVABLE]
        result.append(
            {
                "multiple_lanes": sum(held.any() for held in lanes) > 1 and not any(held.all() for held in lanes),
                "non_drivable": not np.any(drivable, axis=0).all() if drivable else True,
                "oncoming": not any(held[4] for t, route, held in inside if t in LANES and route),
                "center_crossing": any(held[4] for t, _, held in inside if t == INTERSECTION),
                "rear_crossing": any(held[5] for t, _, held in inside if t == INTERSECTION),
            }
        )
    return result


def no_collision(scene, maps, states, where):
    score, ignored = 1.0, set()
    for t in range(41):
        corners = ego_box(states[t])
        ego = Polygon(corners)
        for j, polygon in maps[t].items():
            if j in ignored or not ego.intersects(polygon):
                continue
            kind, speed = int(scene.track_types[j]), np.hypot(*scene.track_velocities[j])
            if np.hypot(states[t, 3], states[t, 4]) <= 0.05:
                at_fault = False
            elif kind not in AGENTS or speed <= 0.05:
                at_fault = True
            elif angle_to(states[t], polygon) > np.deg2rad(150):
                at_fault = False
            elif LineString([corners[0], corners[3]]).intersects(polygon):
                at_fault = True
            else:
                at_fault = where[t]["multiple_lanes"] or where[t]["non_drivable"]
            if at_fault:
                score = min(score, 0.0 if kind in AGENTS else 0.5)
            else:
                ignored.add(j)
    return score


def ttc(maps, states, where, version):
    score, ignored = 1.0, set()
    for t in range(41 if version == "v1" else 32):
        speed = np.hypot(states[t, 3], states[t, 4])
        direction = np.array([math.cos(states[t, 2]), math.sin(states[t, 2])])
        for f in (0, 3, 6, 9):
            ego = Polygon(ego_box(states[t]) + direction * speed * (f * 0.1))
            for j, polygon in maps[t + f].items():
                if j in ignored or speed < 5e-3 or not ego.intersects(polygon):
                    continue
                angle = angle_to(states[t], polygon)
                entangled = where[t]["multiple_lanes"] or where[t]["non_drivable"] or where[t]["rear_crossing"]
                if angle < np.deg2rad(30) or (entangled and not angle > np.deg2rad(150)):
                    score = 0.0
                else:
                    ignored.add(j)
    return score


def comfort(headings, ax, ay, lon, v1):
    n = len(headings)
    smooth = lambda x, w: np.round(savgol_filter(x, min(w, n), 2), 8)  # noqa: E731
    derivative = lambda x, w, p, d: np.round(savgol_filter(x, w, p, deriv=d, delta=0.1), 8)  # noqa: E731
    window, long = (n, n) if v1 else (8, 15)
    unwrapped = np.unwrap(headings)
    checks = [
        (smooth(lon, window), -4.05, 2.40),
        (smooth(ay, window), -4.89, 4.89),
        (derivative(smooth(np.hypot(ax, ay), 8), long, 2, 1), -8.37, 8.37),
        (derivative(smooth(lon, 8), long, 2, 1), -4.13, 4.13),
        (derivative(unwrapped, 5, 3, 2), -1.93, 1.93),
        (derivative(unwrapped, 5, 2, 1), -0.95, 0.95),
    ]
    return float(all(((low < values) & (values < high)).all() for values, low, high in checks))


def direction(states, where, v2):
    centers = states[:, :2] + REAR_AXLE_TO_CENTER * np.c_[np.cos(states[:, 2]), np.sin(states[:, 2])]
    steps = np.concatenate([[0.0], np.linalg.norm(np.diff(centers, axis=0), axis=1)])
    counted = [area["oncoming"] and not (v2 and area["center_crossing"]) for area in where]
    steps = np.where(counted, steps, 0.0)
    worst = max(steps[max(0, t - 10) : t + 1].sum() for t in range(41))
    return 1.0 if worst < 2 else 0.5 if worst < 6 else 0.0


def lane_keeping(scene, states, where):
    line, row = LineString(scene.centerline[:, :2]), 0
    for state, area in zip(states, where):
        if area["center_crossing"]:
            continue
        center = state[:2] + REAR_AXLE_TO_CENTER * np.array([math.cos(state[2]), math.sin(state[2])])
        row = row + 1 if Point(center).distance(line) > 0.5 else 0
        if row >= 20:
            return 0.0
    return 1.0


def traffic_lights(scene, table, states):
    for t, state in enumerate(states):
        ego = Polygon(ego_box(state))
        for row, frames in zip(scene.red_polygons, scene.red_frames):
            rings = table.rings(row)
            if frames[t // 5] and ego.intersects(Polygon(rings[0], rings[1:])):
                return 0.0
    return 1.0


def sub_scores(scene, table, states, past):
    """All discrete sub-scores and the raw progress under the names of the result's columns."""
    where = areas(map_polygons(scene, table), states)
    centers = states[:, :2] + REAR_AXLE_TO_CENTER * np.c_[np.cos(states[:, 2]), np.sin(states[:, 2])]
    line = LineString(scene.centerline[:, :2])
    drivable = float(not any(area["non_drivable"] for area in where))
    result = {"progress_m": max(line.project(Point(centers[-1])) - line.project(Point(centers[0])), 0.0)}
    for version in ("v1", "v2"):
        maps = observation(scene, version)
        result[f"{version}_nc"] = no_collision(scene, maps, states, where)
        result[f"{version}_dac"] = drivable
        result[f"{version}_ttc"] = ttc(maps, states, where, version)
        result[f"{version}_ddc"] = direction(states, where, version == "v2")
    result["v2_tlc"] = traffic_lights(scene, table, states)
    result["v2_lk"] = lane_keeping(scene, states, where)
    result["v1_comfort"] = comfort(states[:, 2], states[:, 5], states[:, 6], states[:, 5], True)
    headings, ax, ay = (np.concatenate([past[:, k], states[:, i]]) for k, i in enumerate((2, 5, 6)))
    shift = REAR_AXLE_TO_CENTER * (states[:, 9] ** 2 + states[:, 10])
    lon = ax + np.concatenate([np.zeros(len(past)), shift])
    result["v2_hc"] = comfort(headings, ax, ay, lon, False)
    return result
