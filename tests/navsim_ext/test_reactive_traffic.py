"""Reactive traffic: NAVSIM's own tracks, the naive twin on shapely, GEOS's buffers and search trees, and laws."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import shapely
from reactive_naive import simulate_naively
from road_worlds import make_town
from two_stage_golden import golden_groups

from navsim_ext.pdm.ego import NUM_STEPS
from navsim_ext.pdm.memory import MemoryMetricCache
from navsim_ext.pdm.reactive.agents import path_of, traffic_agents
from navsim_ext.pdm.reactive.corridor import buffer_outline
from navsim_ext.pdm.reactive.footprints import area_distance, empty_areas, update_bounds
from navsim_ext.pdm.reactive.idm import DONE, simulate_vehicles
from navsim_ext.pdm.reactive.nearest import tree_nearest
from navsim_ext.pdm.reactive.rails import make_rails
from navsim_ext.pdm.reactive.world import open_world
from navsim_ext.pdm.record import SceneMetricCache
from navsim_ext.pdm.scores import score
from navsim_ext.pdm.traffic_agents import IS_ACTIVE, TrafficAgents

TRACK_M = 1e-8


def angle(difference: np.ndarray) -> np.ndarray:
    return np.abs((difference + np.pi) % (2.0 * np.pi) - np.pi)


def run(agents: TrafficAgents, sizes: np.ndarray, poses: np.ndarray, states: np.ndarray) -> tuple[int, np.ndarray]:
    """(code, poses [41,n,3] with NaN where a vehicle is not shown)."""
    count = len(agents.rows)
    found, present = np.full((NUM_STEPS, count, 3), np.nan), np.zeros((NUM_STEPS, count), dtype=bool)
    code = simulate_vehicles(make_rails(agents, poses, sizes), states, found, present)
    found[~present] = np.nan
    return code, found


def vehicles_of(record: SceneMetricCache) -> tuple[TrafficAgents, np.ndarray, np.ndarray]:
    agents = record.traffic_agents
    return agents, record.track_sizes[agents.rows], record.track_poses[agents.rows, 0]


def test_tracks_are_navsims():
    cache, extra, _ = golden_groups()
    result = score(extra["tokens"].tolist(), extra["poses/slow"], cache, versions=("v2",), keep_states=True)
    states = dict(zip(extra["tokens"].tolist(), result.states))
    checked = 0
    for key in extra:
        if not key.startswith("tracks/"):
            continue
        token = key.removeprefix("tracks/")
        record, rows, ids = cache.load(token), extra[key], extra[f"ids/{token}"].tolist()
        agents, sizes, poses = vehicles_of(record)
        names = [record.track_tokens[row] for row in agents.rows]
        code, found = run(agents, sizes, poses, states[token])
        assert code == DONE
        for step in range(1, NUM_STEPS):
            wanted = rows[rows[:, 0] == step]
            shown = [ids[int(i)] for i in wanted[:, 1]]
            assert set(shown) == {names[i] for i in np.flatnonzero(np.isfinite(found[step, :, 0]))}
            mine = found[step, [names.index(name) for name in shown]]
            assert np.abs(mine[:, :2] - wanted[:, 2:4]).max(initial=0.0) < TRACK_M
            assert angle(mine[:, 2] - wanted[:, 4]).max(initial=0.0) < TRACK_M
            checked += len(shown)
        traffic = open_world(record)  # step 0: the annotation, nothing dropped, nothing interpolated
        first = rows[rows[:, 0] == 0]
        np.testing.assert_allclose(traffic.poses[0, : len(first), :2], first[:, 2:4], rtol=0, atol=1e-9)
    assert checked > 1500


def curved_lane(rng: np.random.Generator) -> np.ndarray:
    """A baseline [P,3] of random curvature with vertices some 0.3 to 2 m apart."""
    steps = rng.uniform(0.3, 2.0, rng.integers(20, 70))
    headings = rng.uniform(-np.pi, np.pi) + np.cumsum(
        steps * rng.normal(0.0, 0.03) + rng.normal(0.0, 0.004, len(steps))
    )
    xy = np.cumsum(steps[:, None] * np.column_stack([np.cos(headings), np.sin(headings)]), axis=0)
    return np.column_stack([xy + rng.uniform(-15.0, 15.0, 2), np.append(headings[1:], headings[-1])])


def random_world(seed: int) -> tuple[TrafficAgents, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    paths = [path_of(curved_lane(rng)) for _ in range(rng.integers(1, 4))]
    count = int(rng.integers(2, 9))
    which = rng.integers(0, len(paths), count)
    sizes = np.column_stack([rng.uniform(3.5, 12.0, count), rng.uniform(1.6, 2.7, count)])
    start, poses = np.zeros((count, 7)), np.zeros((count, 3))
    for i in range(count):
        path = paths[which[i]]
        p = rng.uniform(0.0, path[-1, 3])
        k = min(max(int(np.searchsorted(path[:, 3], p)), 1), len(path) - 1)
        ratio = (p - path[k - 1, 3]) / (path[k, 3] - path[k - 1, 3])
        x, y, heading, _ = path[k - 1] + ratio * (path[k] - path[k - 1])
        limit = rng.choice([0.0, 8.0, 13.9])
        start[i] = p, rng.uniform(0.0, 12.0), limit or 10.0, limit, x, y, heading
        poses[i] = x + rng.normal(), y + rng.normal(), heading
    states = np.zeros((NUM_STEPS, 11))
    speed, heading = rng.uniform(0.0, 12.0), rng.uniform(-np.pi, np.pi)
    states[:, 0] = rng.uniform(-15.0, 15.0) + 0.1 * np.arange(NUM_STEPS) * speed * np.cos(heading)
    states[:, 1] = rng.uniform(-15.0, 15.0) + 0.1 * np.arange(NUM_STEPS) * speed * np.sin(heading)
    states[:, 2], states[:, 3] = heading, speed
    kinds = rng.choice([IS_ACTIVE, IS_ACTIVE, IS_ACTIVE | 2, 2], count).astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum([len(path) for path in paths])])
    agents = TrafficAgents(
        np.arange(count, dtype=np.int32), kinds, which.astype(np.int32), start, offsets, np.concatenate(paths)
    )
    return agents, sizes, poses, states


@pytest.mark.parametrize("seed", range(24))
def test_compiled_equals_naive(seed):
    """Crowded, overlapping worlds on bent lanes: leaders, ties at distance 0, corridor borders."""
    agents, sizes, poses, states = random_world(seed)
    code, found = run(agents, sizes, poses, states)
    assert code == DONE
    for step, shown in enumerate(simulate_naively(agents, sizes, poses, states), start=1):
        assert set(shown) == set(np.flatnonzero(np.isfinite(found[step, :, 0])).tolist()), step
        for i, pose in shown.items():
            # simplifying to 1e-5 m, as NAVSIM does, moves an outline by that much; IDM passes it on
            assert math.dist(pose[:2], found[step, i, :2]) < 2e-4, (step, i)


@pytest.mark.parametrize("seed", range(40))
def test_corridor_is_geos_buffer(seed):
    rng = np.random.default_rng(seed)
    line = curved_lane(rng)[:, :2]
    if seed % 4 == 0:  # vertices closer than the simplification of concave sides
        line = np.sort(np.concatenate([line, line + 4e-3]), axis=0)
    r = rng.uniform(0.7, 1.4)
    ring, points = np.empty((8 * len(line) + 400, 2)), line.copy()
    count = buffer_outline(points, len(line), r, ring)
    assert count > 3
    buffer = shapely.LineString(line).buffer(r, quad_segs=16, cap_style="flat")
    mine = shapely.Polygon(ring[:count])
    if mine.is_valid:  # else it crosses itself inside of the area, which the cleaned buffer does not show
        assert shapely.symmetric_difference(mine, buffer).area < 1e-6 * buffer.area
    for point in rng.uniform(-40.0, 40.0, (50, 2)):  # distances from outside are what decides
        p = shapely.Point(point)
        if not buffer.buffer(1e-6).contains(p):
            mine_distance = shapely.distance(p, shapely.LinearRing(ring[:count]))
            assert abs(mine_distance - shapely.distance(p, buffer)) < 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_ties_fall_as_in_geos_search_tree(seed):
    """Boxes that overlap the query all have the distance 0: only the tree's own order tells which one it names."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 45))
    corners = rng.uniform(-8.0, 8.0, (count, 2))
    boxes = shapely.box(*corners.T, *(corners + rng.uniform(0.5, 9.0, (count, 2))).T)
    query = shapely.box(-2.0, -2.0, 2.0, 2.0) if seed % 3 else shapely.box(20.0, 20.0, 21.0, 21.0)
    wanted = shapely.STRtree(boxes).nearest(query)
    found = tree_nearest(shapely.bounds(boxes), shapely.distance(boxes, query), np.array(query.bounds))
    assert found == wanted


def test_distance_of_areas_is_shapelys():
    rng = np.random.default_rng(3)
    areas = empty_areas(2, 500)
    touching = 0
    for _ in range(150):
        shapes = []
        for k in range(2):
            line = curved_lane(rng)[: rng.integers(2, 12), :2]
            areas.counts[k] = buffer_outline(line.copy(), len(line), 1.0, areas.rings[k])
            x, y = line[0]
            areas.boxes[k] = shapely.get_coordinates(shapely.box(x - 2.0, y - 1.0, x + 2.0, y + 1.0, ccw=True))[:4]
            update_bounds(areas, k)
            corridor = shapely.LineString(line).buffer(1.0, quad_segs=16, cap_style="flat")
            shapes.append(shapely.union(corridor, shapely.Polygon(areas.boxes[k])))
        wanted = shapely.distance(*shapes)
        touching += wanted == 0.0
        assert area_distance(areas, 0, 1, 1e9) == pytest.approx(wanted, abs=1e-9)
    assert 5 < touching < 145


def straight_world(p: list[float], v: list[float], length: float = 400.0, limit: float = 10.0):
    """Vehicles on one straight lane along x, ego far behind it."""
    xs = np.arange(0.0, length + 1.0)
    path = path_of(np.column_stack([xs, np.zeros_like(xs), np.zeros_like(xs)]))
    count = len(p)
    poses = np.column_stack([p, np.zeros(count), np.zeros(count)])
    start = np.column_stack([p, v, np.full(count, limit), np.full(count, limit), poses])
    agents = TrafficAgents(
        np.arange(count, dtype=np.int32), np.ones(count, dtype=np.uint8), np.zeros(count, dtype=np.int32), start,
        np.array([0, len(path)]), path,
    )  # fmt: skip
    states = np.zeros((NUM_STEPS, 11))
    states[:, :2] = 30.0, 50.0
    return agents, np.tile([4.5, 2.0], (count, 1)), poses, states


def test_alone_it_follows_the_idm_equation():
    agents, sizes, poses, states = straight_world([20.0], [4.0])
    _, found = run(agents, sizes, poses, states)
    p, v, end = 20.0, 4.0, agents.path_vertices[-1, 3]
    for step in range(1, NUM_STEPS):
        gap = max(end - p - 2.25, 1.0)
        desired = 1.0 + 1.5 * v + v * v / (2.0 * math.sqrt(2.0))
        p, v = p + 0.1 * v, v + 0.1 * min(max(1.0 - (v / 10.0) ** 4 - (desired / gap) ** 2, -2.0), 1.0)
        assert found[step, 0, 0] == pytest.approx(p, abs=1e-9)


def test_followers_keep_their_order_and_never_overlap():
    agents, sizes, poses, states = straight_world([20.0, 45.0, 70.0, 95.0], [9.0, 7.0, 5.0, 0.0])
    _, found = run(agents, sizes, poses, states)
    gaps = np.diff(found[1:, :, 0], axis=1)
    assert (gaps > 4.5).all()
    assert found[-1, 0, 0] - 20.0 < 9.0 * 4.0  # it brakes


def test_a_vehicle_beyond_100_m_is_taken_out_for_good():
    agents, sizes, poses, states = straight_world([20.0, 300.0], [5.0, 5.0])
    _, found = run(agents, sizes, poses, states)
    assert np.isfinite(found[1:, 0, 0]).all()
    assert np.isnan(found[1:, 1, 0]).all()


def test_ego_ahead_is_followed_from_its_shifted_rectangle():
    """The ego's box is centred at its rear axle: the gap is 1.461 m larger than the true one."""
    agents, sizes, poses, states = straight_world([20.0], [8.0])
    states[:, :2], states[:, 3] = (50.0, 0.0), 0.0
    _, found = run(agents, sizes, poses, states)
    gap = 50.0 - 2.588 - (20.0 + 2.25)
    desired = 1.0 + 1.5 * 8.0 + 64.0 / (2.0 * math.sqrt(2.0))
    change = min(max(1.0 - 0.8**4 - (desired / gap) ** 2, -2.0), 1.0)
    assert found[2, 0, 0] == pytest.approx(20.0 + 0.8 + 0.1 * (8.0 + 0.1 * change), abs=1e-9)


def test_moving_the_world_moves_the_traffic():
    agents, sizes, poses, states = random_world(5)
    shift = np.array([3.0, -7.0])
    moved = agents._replace(start=agents.start.copy(), path_vertices=agents.path_vertices.copy())
    moved.start[:, 4:6] += shift
    moved.path_vertices[:, :2] += shift
    other_states, other_poses = states.copy(), poses.copy()
    other_states[:, :2] += shift
    other_poses[:, :2] += shift
    _, here = run(agents, sizes, poses, states)
    _, there = run(moved, sizes, other_poses, other_states)
    np.testing.assert_allclose(there[..., :2] - shift, here[..., :2], rtol=0, atol=1e-6)


def test_record_without_lanes_says_why_and_loses_no_other():
    cache, extra, _ = golden_groups()
    tokens = extra["tokens"].tolist()[:2]
    old = dataclasses.replace(cache.load(tokens[0]), path_offsets=np.zeros(0, dtype=np.int64))
    records = {tokens[0]: old, tokens[1]: cache.load(tokens[1])}
    mixed = MemoryMetricCache(records, {r.map_location: cache.polygons(r.map_location) for r in records.values()})
    result = score(tokens, extra["poses/slow"][:2], mixed, traffic="reactive")
    assert result.valid.tolist() == [False, True]
    assert "build it again" in result.reason[0]
    assert score(tokens, extra["poses/slow"][:2], mixed, versions=("v2",)).valid.all()  # log replay needs no lanes


def test_traffic_agents_without_vehicles():
    empty = np.zeros((0, 3))
    agents = traffic_agents(make_town(), np.zeros(3), np.zeros(0, dtype=int), empty, empty, empty[:, :2])
    assert len(agents.rows) == 0
    assert agents.path_offsets.tolist() == [0]
