"""VectorMap: ragged polygons with holes, graphs, round trip through one array file, and every broken promise named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely

from navsim_ext.errors import DataError, MissingError
from navsim_ext.maps.layers import LaneLayer, LineLayer, PolygonLayer, polyline_headings
from navsim_ext.maps.vector_map import VectorMap, sorted_edges


def square(x: float, y: float, side: float) -> np.ndarray:
    return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]])


def small_map() -> VectorMap:
    """lane a -> connector c -> lane b; roadblock of a has a hole."""
    lanes = LaneLayer.from_arrays(
        ["a", "b"],
        [[square(0, 0, 10)], [square(20, 0, 10)]],
        [[[0, 5], [10, 5]], [[20, 5], [25, 5], [30, 6]]],
        roadblock=[0, 1],
        speed_limit=[10.0, np.nan],
    )
    connectors = LaneLayer.from_arrays(["c"], [[square(10, 0, 10)]], [[[10, 5], [20, 5]]], roadblock=[0])
    return VectorMap(
        location="toy",
        label="approx",
        lanes=lanes,
        lane_connectors=connectors,
        roadblocks=PolygonLayer.from_rings(["r0", "r1"], [[square(0, 0, 10), square(2, 2, 1)], [square(20, 0, 10)]]),
        roadblock_connectors=PolygonLayer.from_rings(["k0"], [[square(10, 0, 10)]]),
        lane_edges=sorted_edges([[2, 1], [0, 2]]),
        block_edges=sorted_edges([[0, 2], [2, 1]]),
        boundaries=LineLayer.from_lines(["l"], [[[0, 0], [30, 0]]]),
        boundary_types=np.array([3]),
        stop_polygons=PolygonLayer.from_rings(["s"], [[square(9, 0, 1)]]),
        stop_polygon_types=np.array([2]),
    ).validate()


def test_round_trip_keeps_every_array_and_the_file_is_the_same_each_time(tmp_path):
    original = small_map()
    original.save(tmp_path / "a.npz")
    original.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = VectorMap.load(tmp_path / "a.npz")
    for name in ("lanes", "lane_connectors", "roadblocks", "boundaries", "stop_polygons"):
        for field, value in vars(getattr(original, name)).items():
            if isinstance(value, np.ndarray) and value.dtype != object:
                np.testing.assert_array_equal(getattr(getattr(loaded, name), field), value, err_msg=f"{name}.{field}")
    assert (loaded.location, loaded.label) == ("toy", "approx")
    np.testing.assert_array_equal(loaded.lane_edges, original.lane_edges)
    assert not list(tmp_path.glob(".*tmp"))


def test_polygons_have_their_holes():
    polygons = small_map().roadblocks.polygons
    assert polygons[0].area == pytest.approx(99.0)
    assert not polygons[0].contains(shapely.Point(2.5, 2.5))
    assert polygons[1].area == pytest.approx(100.0)


def test_multipolygons_keep_their_parts_and_holes_apart():
    ring = shapely.Polygon(square(0, 0, 10), [square(1, 1, 2)])
    two = shapely.MultiPolygon([ring, shapely.Polygon(square(20, 0, 5))])
    layer = PolygonLayer.from_shapely(["m", "p"], [two, shapely.Polygon(square(40, 0, 1))])
    assert layer.polygons[0].equals(two)
    assert layer.polygons[1].area == pytest.approx(1.0)
    assert [hole for _, hole in layer.rings_of(0)] == [False, True, False]


def test_query_returns_layer_order():
    count = 200
    layer = PolygonLayer.from_rings([str(i) for i in range(count)], [[square(i % 7, i % 5, 1)] for i in range(count)])
    assert layer.query(shapely.box(-1, -1, 20, 20)).tolist() == list(range(count))
    assert layer.query(shapely.box(100, 100, 101, 101)).size == 0


def test_graphs_and_memberships():
    vector_map = small_map()
    assert vector_map.lane_successors == [[2], [], [1]]
    assert vector_map.block_successors == [[2], [], [1]]
    assert vector_map.block_predecessors == [[], [2], [0]]
    assert vector_map.lane_nodes_of_block == [[0], [1], [2]]
    assert [vector_map.lane_node_fid(node) for node in range(3)] == ["a", "b", "c"]
    assert vector_map.lane_node_lengths[1] == pytest.approx(5 + np.hypot(5, 1))
    assert vector_map.bounds() == (0.0, 0.0, 30.0, 10.0)


def test_headings_point_along_the_line_and_the_last_repeats():
    np.testing.assert_allclose(polyline_headings(np.array([[0.0, 0], [1, 1], [1, 2]])), np.pi * np.array([1, 2, 2]) / 4)
    with pytest.raises(DataError, match="two or more"):
        polyline_headings(np.zeros((1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "made-up"}, "made-up"),
        ({"lane_edges": np.array([[0, 9]])}, "names node 9 of 3"),
        ({"block_edges": np.array([[0.0, 1.0]])}, "int64"),
        ({"stop_polygon_types": np.array([1, 2])}, "stop_polygon_types"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(small_map(), **change).validate()


def test_degenerate_polygons_and_lanes_are_refused_by_name():
    with pytest.raises(DataError, match=r"bad.*fewer than 3"):
        PolygonLayer.from_rings(["ok", "bad"], [[square(0, 0, 1)], [[[0, 0], [1, 1]]]])
    with pytest.raises(DataError, match=r"bad.*finite"):
        PolygonLayer.from_rings(["ok", "bad"], [[square(0, 0, 1)], [square(np.nan, 0, 1)]])
    with pytest.raises(DataError, match="lonely is nothing"):
        PolygonLayer.from_shapely(["lonely"], [shapely.Polygon()])
    with pytest.raises(DataError, match="is LineString"):
        PolygonLayer.from_shapely(["line"], [shapely.LineString([(0, 0), (1, 1)])])
    with pytest.raises(DataError, match="speed_limit"):
        LaneLayer.from_arrays(["a"], [[square(0, 0, 1)]], [[[0, 0], [1, 0]]], [0], speed_limit=[1.0, 2.0])
    with pytest.raises(MissingError, match="no fid 'zzz'"):
        small_map().lanes.index_of("zzz")


def test_a_file_of_another_format_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", format=np.array("something else"))
    with pytest.raises(DataError, match="something else"):
        VectorMap.load(tmp_path / "x.npz")
