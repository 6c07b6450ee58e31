"""Planar predicates against shapely (GEOS), at UTM magnitudes, with touching and degenerate positions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import shapely
from shapely.geometry import LineString, Point, Polygon

from navsim_ext.errors import DataError
from navsim_ext.pdm.geometry import (
    boxes_intersect,
    distance_to_segment,
    orientation,
    project_on_line,
    segment_intersects_box,
)
from navsim_ext.pdm.map_index import box_intersects_polygon, index_map, polygon_contains
from navsim_ext.pdm.polygon_table import PolygonTable

UTM = np.array([664_627.0, 4_998_104.0])
MIDDLE = np.array([300.0, 400.0])  # of the star polygons


def box(x, y, heading, length, width):
    u = np.array([np.cos(heading), np.sin(heading)])
    n = np.array([-u[1], u[0]])
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return np.array([[x, y] + a * length / 2 * u + b * width / 2 * n for a, b in signs])


@pytest.fixture(scope="module")
def star_polygons():
    """Star-shaped polygons, half of them on an integer grid, a third of them with a hole."""
    rng = np.random.default_rng(3)
    polygons = []
    for k in range(90):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 60)))
        radii = rng.uniform(4, 20, len(angles))
        exterior = np.c_[radii * np.cos(angles), radii * np.sin(angles)]
        exterior = (np.round(exterior) if k % 2 else exterior) + MIDDLE
        hole = np.array([[299.0, 399.0], [301.0, 399.0], [301.0, 401.0], [299.0, 401.0]])
        shape = Polygon(exterior)
        if shape.is_valid and shape.area > 1:
            polygons.append([exterior, hole] if k % 3 == 0 and shape.contains(Polygon(hole)) else [exterior])
    assert sum(len(rings) > 1 for rings in polygons) > 5
    return polygons


@pytest.mark.parametrize("origin", [np.zeros(2), UTM])
def test_boxes_and_segments_agree_with_shapely(origin):
    rng = np.random.default_rng(0)
    touching = 0
    for i in range(3000):
        if i % 2:  # on an integer grid: shared corners and edges are common
            a, b = (box(*rng.integers(-3, 4, 2), 0.0, *(2 * rng.integers(1, 3, 2))) for _ in range(2))
            p, q = rng.integers(-4, 5, (2, 2)).astype(float)
        else:
            a, b = (box(*rng.uniform(-3, 3, 2), rng.uniform(-4, 4), *rng.uniform(0.5, 5, 2)) for _ in range(2))
            p, q = rng.uniform(-5, 5, (2, 2))
        a, b, p, q = a + origin, b + origin, p + origin, q + origin
        shapes = Polygon(a), Polygon(b)
        touching += shapes[0].touches(shapes[1])
        assert boxes_intersect(a, b) == shapes[0].intersects(shapes[1])
        assert segment_intersects_box(*p, *q, b) == LineString([p, q]).intersects(shapes[1])
    assert touching > 50


def test_orientation_is_exact_where_rounding_is_not():
    # a + k (b - a) with representable steps lies on the line; one unit in the last place beside it does not
    ax, ay, bx, by = 664_627.0, 4_998_104.0, 664_627.5, 4_998_105.25
    cx, cy = ax + 3 * (bx - ax), ay + 3 * (by - ay)
    assert orientation(ax, ay, bx, by, cx, cy) == 0
    assert orientation(ax, ay, bx, by, cx, np.nextafter(cy, np.inf)) == 1
    assert orientation(ax, ay, bx, by, cx, np.nextafter(cy, -np.inf)) == -1
    assert orientation(bx, by, ax, ay, cx, np.nextafter(cy, np.inf)) == -1


def test_point_in_polygon_is_the_strict_interior(star_polygons):
    table = PolygonTable.from_rings(
        star_polygons, [0] * len(star_polygons), [str(i) for i in range(len(star_polygons))]
    )
    index = index_map(table)
    rng = np.random.default_rng(1)
    borders = 0
    for q, rings in enumerate(star_polygons):
        shape = Polygon(rings[0], rings[1:])
        vertices = np.concatenate(rings)[:20]
        points = [rng.uniform(-22, 22, (60, 2)) + MIDDLE, rng.integers(-22, 22, (60, 2)) + MIDDLE]
        points = np.concatenate([*points, vertices, (vertices[:-1] + vertices[1:]) / 2])
        expected = shapely.contains_xy(shape, points[:, 0], points[:, 1])
        borders += sum(shape.touches(Point(point)) for point in points)
        assert [polygon_contains(index, q, *point) for point in points] == expected.tolist()
    assert borders > 200


def test_box_meets_polygon_as_in_shapely(star_polygons):
    table = PolygonTable.from_rings(
        star_polygons, [0] * len(star_polygons), [str(i) for i in range(len(star_polygons))]
    )
    index = index_map(table)
    rng = np.random.default_rng(2)
    inside_hole = 0
    for q, rings in enumerate(star_polygons):
        shape = Polygon(rings[0], rings[1:])
        boxes = [box(*(rng.integers(-20, 20, 2) + MIDDLE), 0.0, 4, 2) for _ in range(15)]
        boxes += [box(*(rng.uniform(-20, 20, 2) + MIDDLE), rng.uniform(-4, 4), 4, 2) for _ in range(15)]
        boxes += [box(300, 400, 0.3, 0.5, 0.5)]  # wholly inside a hole, where there is one
        for corners in boxes:
            assert box_intersects_polygon(index, q, corners) == shape.intersects(Polygon(corners))
        inside_hole += len(rings) > 1 and not shape.intersects(Polygon(boxes[-1]))
    assert inside_hole > 5


def test_projection_and_distance_agree_with_shapely_also_at_doubled_joints():
    rng = np.random.default_rng(4)
    line = rng.uniform(-20, 20, (30, 2)) + UTM
    line[10] = line[11]  # lanes meet: a segment of no length
    shape = LineString(line)
    for point in rng.uniform(-25, 25, (300, 2)) + UTM:
        assert project_on_line(line, *point) == pytest.approx(shape.project(Point(point)), abs=1e-8)
        nearest = min(distance_to_segment(*point, *a, *b) for a, b in itertools.pairwise(line))
        assert nearest == pytest.approx(shape.distance(Point(point)), abs=1e-12)


def test_table_refuses_degenerate_rings_and_survives_a_round_trip(tmp_path, star_polygons):
    with pytest.raises(DataError, match="lane 7 is degenerate"):
        PolygonTable.from_rings([[np.array([[0.0, 0.0], [1.0, 0.0]])]], [0], ["lane 7"])
    with pytest.raises(DataError, match="degenerate"):
        PolygonTable.from_rings([[np.array([[0.0, 0.0], [1.0, np.nan], [2.0, 0.0]])]], [0], ["x"])
    table = PolygonTable.from_rings(star_polygons, [17] * len(star_polygons), ["a"] * len(star_polygons))
    table.save(tmp_path / "map")
    again = PolygonTable.load(tmp_path / "map")
    for row in range(len(table)):
        for ring, other in zip(table.rings(row), again.rings(row), strict=True):
            np.testing.assert_array_equal(ring, other)
            np.testing.assert_array_equal(ring[0], ring[-1])
