"""Kinematics, contact and distances of the moving world: against naive twins, analytic solutions and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.closed_loop import contact, distance_grid, kinematics
from navsim_ext.closed_loop.lane_grid import LaneGrid, LaneGrids
from navsim_ext.traffic import road_edges


def random_boxes(seed: int, B: int, N: int, spread: float = 40.0):
    random = torch.Generator().manual_seed(seed)
    pose = torch.rand(B, N, 3, generator=random) * torch.tensor([spread, spread, 6.3])
    size = 0.5 + torch.rand(B, N, 2, generator=random) * torch.tensor([6.0, 2.5])
    return pose, size


def polygon(pose, size):
    x, y, h = (float(v) for v in pose)
    l, w = 0.5 * float(size[0]), 0.5 * float(size[1])
    corners = [(l, w), (-l, w), (-l, -w), (l, -w)]
    c, s = math.cos(h), math.sin(h)
    return shapely.Polygon([(x + c * a - s * b, y + s * a + c * b) for a, b in corners])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_contact_equals_polygon_intersection_and_is_symmetric(seed):
    pose, size = random_boxes(seed, 1, 16, 25.0)
    there = torch.ones(1, 16, dtype=torch.bool)
    found = contact.find_contacts(contact.planes(pose[:, :, None]), size, contact.circumradius(there, size))
    pairs = {(i, j) for _, i, j, _ in found.pairs.tolist()}
    assert pairs == {(j, i) for i, j in pairs}
    boxes = [polygon(p, s) for p, s in zip(pose[0], size[0])]
    for i in range(16):
        for j in range(i):
            depth = boxes[i].intersection(boxes[j]).area
            gap = boxes[i].distance(boxes[j])
            if depth > 1e-3 or gap > 1e-3:  # not within rounding of touching
                assert ((i, j) in pairs) == (depth > 0.0)
    assert torch.equal(found.touching[0, :, 0], torch.tensor([any(i == a for a, _ in pairs) for i in range(16)]))


def test_contact_does_not_depend_on_order_or_batch():
    pose, size = random_boxes(3, 4, 24)
    token = torch.linspace(0.2, 1.0, 5)
    local = torch.zeros(4, 24, 5, 3)
    local[..., 0], local[..., 2] = 4.0 * token, 0.3 * token
    poses = kinematics.compose(pose, local)
    there = torch.ones(4, 24, dtype=torch.bool)
    there[:, 5] = False

    def run(poses, size, there):
        return contact.find_contacts(contact.planes(poses), size, contact.circumradius(there, size))

    whole = run(poses, size, there)
    assert whole.touching.any()
    assert not whole.touching[:, 5].any()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(poses[:, order], size[:, order], there[:, order]).touching, whole.touching[:, order])
    for b in range(4):
        alone = run(poses[b : b + 1], size[b : b + 1], there[b : b + 1])
        assert torch.equal(alone.touching[0], whole.touching[b])


def test_full_size_boxes_touch_where_shrunken_ones_would_not():
    a, b = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([4.55, 0.0, 0.0])
    size = torch.tensor([4.6, 1.9])
    assert bool(contact.boxes_touch(a, size, b, size))
    assert not bool(contact.boxes_touch(a, 0.7 * size, b, 0.7 * size))
    assert not bool(contact.boxes_touch(a, size, torch.tensor([4.65, 0.0, 0.0]), size))
    assert not bool(contact.boxes_touch(a, size, torch.tensor([0.0, 1.95, 0.0]), size))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_time_to_contact_is_when_the_moved_boxes_first_touch(seed):
    pose, size = random_boxes(seed, 200, 2, 15.0)
    random = torch.Generator().manual_seed(seed + 1)
    velocity = torch.randn(200, 2, 2, generator=random) * 5.0
    found = contact.time_to_contact(pose, velocity, size, torch.ones(200, 2, dtype=torch.bool), 3.0)
    assert torch.equal(found[:, 0], found[:, 1])
    found = found[:, 0]

    def touch(at, grown=0.0):  # [200,...] seconds
        moved = pose.view(200, 2, *[1] * (at.dim() - 1), 3).expand(200, 2, *at.shape[1:], 3).clone()
        moved[..., :2] += velocity.view(200, 2, *[1] * (at.dim() - 1), 2) * at[:, None, ..., None]
        wide = (size + grown).view(200, 2, *[1] * (at.dim() - 1), 2)
        return contact.boxes_touch(moved[:, 0], wide[:, 0], moved[:, 1], wide[:, 1])

    hits = found.isfinite()
    assert hits.any()
    assert touch(found.nan_to_num(posinf=0.0), 2e-3)[hits].all()
    times = torch.linspace(0.0, 3.0, 121).expand(200, -1)
    assert not (touch(times) & (times < (found - 1e-3)[:, None])).any()


def test_token_verlet_and_bicycle_agree_on_straight_motion_and_on_standing():
    pose = torch.tensor([[3.0, -2.0, 0.7], [1.0, 1.0, -2.0]], dtype=torch.float64)
    speed = torch.tensor([8.0, 0.0], dtype=torch.float64)
    times = 0.1 * torch.arange(1, 6, dtype=torch.float64)
    local = torch.zeros(2, 5, 3, dtype=torch.float64)
    local[..., 0] = speed[:, None] * times
    by_token = kinematics.compose(pose, local)
    direction = torch.stack((torch.cos(pose[:, 2]), torch.sin(pose[:, 2])), -1)
    by_verlet = kinematics.verlet(pose, 0.5 * speed[:, None] * direction, torch.zeros(2, 2, dtype=torch.float64))
    length = torch.tensor([4.6, 4.6], dtype=torch.float64)
    by_bicycle, speeds = kinematics.bicycle(pose, speed, length, torch.zeros(2).double(), torch.zeros(2).double())
    assert torch.allclose(by_token, by_verlet, atol=1e-12)
    assert torch.allclose(by_token, by_bicycle, atol=1e-12)
    assert torch.allclose(speeds, speed[:, None].expand(2, 5))
    assert torch.allclose(kinematics.relative(pose, by_token), local, atol=1e-12)


def test_bicycle_drives_the_analytic_circle_and_stops_without_reversing():
    steering, v, L = 0.3, 6.0, 0.6 * 4.6
    slip = math.atan(0.5 * math.tan(steering))
    radius = L / (math.cos(slip) * math.tan(steering))
    length = torch.tensor([4.6], dtype=torch.float64)
    pose = torch.tensor([[0.0, 0.0, -slip]], dtype=torch.float64)  # the centre sets out along x
    track = []
    speed = torch.tensor([v], dtype=torch.float64)
    for _ in range(8):
        poses, speeds = kinematics.bicycle(
            pose, speed, length, torch.tensor([steering], dtype=torch.float64), torch.zeros(1).double()
        )
        track.append(poses[0])
        pose, speed = poses[:, -1], speeds[:, -1]
    track = torch.cat(track)
    distance = torch.hypot(track[:, 0], track[:, 1] - radius)
    assert torch.allclose(distance, torch.full_like(distance, abs(radius)), atol=1e-9)
    assert math.isclose(float(track[-1, 2]) + slip, v * 4.0 / radius, rel_tol=1e-9)
    poses, speeds = kinematics.bicycle(
        torch.zeros(1, 3).double(),
        torch.tensor([2.0]).double(),
        length,
        torch.tensor([0.0]).double(),
        torch.tensor([-5.0]).double(),
    )
    assert speeds[0].min() == 0.0
    assert math.isclose(float(poses[0, -1, 0]), 2.0**2 / 10.0, abs_tol=1e-9)  # v^2 / (2 b)
    assert (torch.diff(poses[0, :, 0]) >= 0).all()


def test_verlet_is_second_order_and_keeps_heading_when_slow():
    pose = torch.zeros(1, 3)
    d, a = torch.tensor([[4.0, 0.0]]), torch.tensor([[-2.0, 1.0]])
    poses = kinematics.verlet(pose, d, a)
    assert torch.allclose(poses[0, -1, :2], d[0] + 0.25 * a[0])
    assert torch.allclose(kinematics.verlet_acceleration(d, poses[:, -1, :2]), a, atol=1e-6)
    assert poses[0, -1, 2] > 0.0
    slow = kinematics.verlet(torch.tensor([[0.0, 0.0, 1.2]]), torch.tensor([[0.1, 0.0]]), torch.zeros(1, 2))
    assert torch.all(slow[0, :, 2] == 1.2)
    backwards = kinematics.verlet(torch.tensor([[0.0, 0.0, 3.1]]), torch.tensor([[-4.0, -0.4]]), torch.zeros(1, 2))
    assert abs(float(backwards[0, -1, 2]) - 3.1) < 0.3  # continuous over pi


def ring(points, inward=False):
    return [np.array(points[::-1] if inward else points, float)]


SQUARE = [(0.0, 0.0), (20.0, 0.0), (20.0, 20.0), (0.0, 20.0)]  # counter-clockwise: its inside lies on the left


def test_signed_distance_is_exact_and_knows_the_side_at_corners():
    random = np.random.default_rng(0)
    points = random.uniform(-15, 35, (4000, 2))
    square = shapely.Polygon(SQUARE)
    exact = shapely.distance(shapely.boundary(square), shapely.points(points))
    sign = np.where(shapely.contains_xy(square, *points.T), 1.0, -1.0)
    found = road_edges.signed_distance_to_edges(points, ring(SQUARE), [True])
    assert np.abs(found - sign * exact).max() < 0.021
    near = exact < road_edges.REACH_M
    assert np.abs(found - sign * exact)[near].max() < 1e-9
    assert np.allclose(road_edges.signed_distance_to_edges(points, ring(SQUARE, True), [True]), -found)
    areas = road_edges.signed_distance_to_areas(
        points, [np.array([*SQUARE[:2], (20.0, 12.0), (0.0, 12.0)]), np.array([(0.0, 12.0), (20.0, 12.0), *SQUARE[2:]])]
    )
    assert np.abs(areas - sign * exact)[near].max() < 0.03  # the seam at y = 12 is no border


@pytest.mark.parametrize("seed", range(3))
def test_a_grid_of_distances_equals_asking_every_segment_at_every_node(seed):
    """Long and short segments, lines that cross and end, edges beyond the grid: exact near, signs and all."""
    random = np.random.default_rng(seed)
    lines = [np.cumsum(random.normal(0, step, (9, 2)), axis=0) + random.uniform(-25, 25, 2) for step in (1, 4, 15, 3)]
    lines += ring([(-50.0, -50.0), (55.0, -48.0), (52.0, 60.0), (-47.0, 51.0)])
    closed = [False] * 4 + [True]
    origin, shape = np.array([-30.0, -20.0]), (90, 70)
    found = road_edges.edge_grid(lines, closed, origin, 0.5, shape)
    x, y = np.meshgrid(origin[0] + 0.5 * np.arange(70), origin[1] + 0.5 * np.arange(90))
    drawn = shapely.MultiLineString([*lines[:4], shapely.LinearRing(lines[4])])
    exact = shapely.distance(drawn, shapely.points(x, y))
    near = exact <= road_edges.REACH_M
    assert near.any()
    assert (~near).any()
    assert np.abs(np.abs(found) - exact)[near].max() < 1e-9
    assert (np.abs(found) - exact).min() > -1e-9
    assert (np.abs(found) - exact).max() < 0.05
    asked = road_edges.signed_distance_to_edges(np.stack([x, y], -1).reshape(-1, 2), lines, closed).reshape(shape)
    same = np.abs(np.abs(asked) - exact) < 1e-6
    assert (np.sign(found) == np.sign(asked))[same].mean() > 0.995  # two edges as near as each other may disagree


def test_distance_grid_interpolates_within_a_fraction_of_its_cell_and_says_what_it_does_not_know():
    grid = distance_grid.Grid.build(ring(SQUARE), [True], [], np.array([0.0, 0.0]), np.array([20.0, 20.0]))
    other = distance_grid.Grid.build(ring(SQUARE), [True], [], np.array([-9.0, -3.0]), np.array([40.0, 20.0]))
    stacked = distance_grid.DistanceGrids.stack([grid, other], "cpu")
    random = np.random.default_rng(1)
    points = random.uniform(-6, 26, (2, 3000, 2))
    x, y = (torch.from_numpy(points[..., k].astype(np.float32))[:, None] for k in (0, 1))
    found = stacked.at(x, y, torch.tensor([0, 1])).numpy()[:, 0]
    square = shapely.Polygon(SQUARE)
    for s in (0, 1):
        exact = shapely.distance(shapely.boundary(square), shapely.points(points[s]))
        exact = np.where(shapely.contains_xy(square, *points[s].T), exact, -exact)
        assert np.abs(found[s] - exact).max() < 0.25 * distance_grid.CELL_M
        far_from_corners = np.abs(np.abs(points[s] - 10.0).min(1) - 0.0) < 8.0
        assert np.abs(found[s] - exact)[far_from_corners & (np.abs(exact) < 1.5)].max() < 1e-4
    alone = distance_grid.DistanceGrids.stack([other], "cpu").at(x[1:], y[1:], torch.tensor([0])).numpy()
    assert np.array_equal(alone[0, 0], found[1])
    outside = stacked.at(torch.tensor([[[-200.0]], [[500.0]]]), torch.zeros(2, 1, 1), torch.tensor([0, 1]))
    assert outside.isnan().all()
    nothing = distance_grid.Grid.build([], [], [], np.zeros(2), np.ones(2))
    assert np.isnan(nothing.values).all()


def test_lane_grid_knows_direction_and_offset_of_every_lane_below():
    east = np.stack([np.linspace(-20, 20, 9), np.zeros(9)], -1)
    north = np.stack([np.zeros(9), np.linspace(-20, 20, 9)], -1)
    grids = LaneGrids.stack([LaneGrid.build([east, north], np.array([-25.0, -25.0]), np.array([25.0, 25.0]))], "cpu")
    scene = torch.zeros(1, dtype=torch.long)
    points = torch.tensor([[10, 0.6], [0.3, 12], [0.2, 0.4], [15, 15]])
    x, y = points[None, None, :, 0], points[None, None, :, 1]

    def against(heading):
        heading = torch.full((1, 1, 4), heading)
        wrong, valid = grids.against(x, y, torch.cos(heading), torch.sin(heading), scene)
        assert valid[0, 0].tolist() == [True, True, True, False]
        return wrong[0, 0].tolist()

    assert against(0.5) == [False, False, False, False]  # within 90 degrees of both lanes
    assert against(3.0) == [True, False, False, False]  # the lane to the north still counts where both lie
    assert against(-2.3) == [True, True, True, False]
    found = grids.offset_at(torch.tensor([[[10.0, 10.0, 15.0]]]), torch.tensor([[[0.6, -1.3, 15.0]]]), scene)[0, 0]
    assert torch.allclose(found[:2], torch.tensor([0.6, -1.3]), atol=1e-5)
    assert found[2].isnan()


@pytest.mark.parametrize("N", [7, 8, 24])
def test_true_rows_are_those_of_nonzero(N):
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(N)) < 0.07
    assert torch.equal(contact.true_rows(mask.view(-1)), mask.view(-1).nonzero()[:, 0])
