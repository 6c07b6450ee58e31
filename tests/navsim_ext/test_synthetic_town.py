"""The town: drivable geometry, a consistent lane graph, right of way, and the map on disk."""

from __future__ import annotations

import hashlib

import numpy as np
import pyogrio
import pytest
import shapely

from navsim_ext.maps.nuplan_gpkg import load_map
from navsim_ext.scene import MAP_LOCATIONS
from navsim_ext.synthetic import gpkg_writer, roads
from navsim_ext.synthetic.fids import Fids
from navsim_ext.synthetic.town import LANE_WIDTH, make_town

TOWNS = [(location, seed) for location in MAP_LOCATIONS for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    root = tmp_path_factory.mktemp("maps")
    gpkg_writer.write_maps(root, 0)
    return root


@pytest.mark.parametrize("angle", [0.05, -0.7, np.pi / 2, -np.pi / 2, 2.0])
def test_connection_meets_both_poses_with_continuous_curvature(angle):
    start, end = np.array([3.0, -2.0]), np.array([3.0, -2.0]) + 20.0 * roads.unit(0.4) + 20.0 * roads.unit(0.4 + angle)
    line = roads.connect(start, 0.4, end, 0.4 + angle, 0.25)
    heading = roads.headings(line)
    assert np.allclose(line[0], start)
    assert np.allclose(line[-1], end)
    assert heading[0] == pytest.approx(0.4, abs=0.03)
    assert heading[-1] == pytest.approx(0.4 + angle, abs=0.03)
    curvature = np.gradient(heading, roads.arc_lengths(line))
    assert np.abs(np.diff(curvature)).max() < 0.03  # per 0.25 m: no corner
    assert abs(curvature[0]) < 0.03
    assert abs(curvature[-1]) < 0.03


def test_offset_of_a_circle_is_a_circle():
    angle = np.linspace(0.0, np.pi, 400)
    circle = 30.0 * np.column_stack([np.cos(angle), np.sin(angle)])  # counter-clockwise: left is inside
    inside = roads.offset(circle, 2.0)
    assert np.allclose(np.hypot(*inside.T), 28.0, atol=1e-3)


@pytest.mark.parametrize(("location", "seed"), TOWNS)
def test_lane_graph_is_connected_geometry(location, seed):
    town = make_town(location, seed)
    assert {node.kind for node in town.nodes} == {"signal", "give_way", "roundabout"}
    assert all(town.successors)  # no lane is a dead end
    assert {c.to_lane for c in town.connectors} == {lane.index for lane in town.lanes}  # every lane can be reached
    for connector in town.connectors:
        before, after = town.lanes[connector.from_lane], town.lanes[connector.to_lane]
        assert np.allclose(connector.baseline[0], before.baseline[-1])
        assert np.allclose(connector.baseline[-1], after.baseline[0])
        jump = roads.headings(connector.baseline)[[0, -1]] - [
            roads.headings(before.baseline)[-1],
            roads.headings(after.baseline)[0],
        ]
        assert np.abs((jump + np.pi) % (2 * np.pi) - np.pi).max() < 0.09  # a vertex per metre
        curvature = np.gradient(roads.headings(connector.baseline), roads.arc_lengths(connector.baseline))
        assert np.abs(curvature).max() < 1 / 6.0  # a car can drive it


@pytest.mark.parametrize(("location", "seed"), TOWNS)
def test_every_lane_lies_on_drivable_ground(location, seed):
    town = make_town(location, seed)
    layers = gpkg_writer.layers_of(town)
    ground = shapely.union_all(
        [row["geometry"] for name in ("lane_groups_polygons", "intersections", "carpark_areas") for row in layers[name]]
    )
    for piece in (*town.lanes, *town.connectors):
        outside = shapely.LineString(piece.baseline).buffer(1.3, cap_style="flat").difference(ground)
        assert outside.area < 0.05, (location, seed, type(piece).__name__, piece.index)
    for name, rows in layers.items():
        for row in rows:
            assert row["geometry"].is_valid, (name, row["fid"])


def test_right_of_way_is_antisymmetric_and_by_rule():
    town = make_town("us-ma-boston", 0)
    table = town.conflicts
    yields = {
        (c, int(table.other[k])): bool(table.gives_way[k])
        for c in range(len(town.connectors))
        for k in range(table.pointer[c], table.pointer[c + 1])
    }
    assert yields
    for (a, b), gives_way in yields.items():
        assert yields[b, a] is not gives_way
        first, second = town.connectors[a], town.connectors[b]
        kind = town.nodes[first.node].kind
        if kind != "roundabout" and first.turn == "left" and second.turn == "straight" and first.phase == second.phase:
            assert gives_way or first.priority < second.priority


def test_towns_depend_on_seed_and_location_alone():
    make_town.cache_clear()
    first = make_town("sg-one-north", 5)
    make_town.cache_clear()
    again = make_town("sg-one-north", 5)
    assert all(np.array_equal(a.baseline, b.baseline) for a, b in zip(first.lanes, again.lanes))
    other = make_town("sg-one-north", 6)
    assert not np.array_equal(first.nodes[0].position, other.nodes[0].position)
    with pytest.raises(ValueError, match="atlantis"):
        make_town("atlantis", 0)


def test_map_bytes_follow_from_the_seed(maps, tmp_path):
    town = make_town("us-ma-boston", 0)
    gpkg_writer.write_gpkg(town, tmp_path / "map.gpkg")
    first = gpkg_writer.map_path(maps, "us-ma-boston").read_bytes()
    assert hashlib.sha256((tmp_path / "map.gpkg").read_bytes()).digest() == hashlib.sha256(first).digest()


def test_map_reads_back_as_the_town(maps):
    town = make_town("us-pa-pittsburgh-hazelwood", 0)
    fids, vector_map = Fids(town), load_map(maps, town.location)
    assert len(vector_map.lanes) == len(town.lanes)
    assert len(vector_map.lane_connectors) == len(town.connectors)
    edges = {(vector_map.lane_node_fid(a), vector_map.lane_node_fid(b)) for a, b in vector_map.lane_edges}
    for lane in town.lanes:
        node = vector_map.lanes.index_of(str(fids.lane(lane.index)))
        assert np.abs(vector_map.lanes.baseline_of(node)[:, :2] - town.origin - lane.baseline).max() < 1e-5
        assert vector_map.lanes.speed_limit[node] == lane.speed
    for connector in town.connectors:
        middle = str(fids.connector(connector.index))
        assert (str(fids.lane(connector.from_lane)), middle) in edges
        assert (middle, str(fids.lane(connector.to_lane))) in edges
    assert len(edges) == 2 * len(town.connectors)
    area = vector_map.lanes.polygons[0].area
    assert area == pytest.approx(LANE_WIDTH * vector_map.lanes.lengths[0], rel=0.05)


def test_layers_and_columns_are_those_of_nuplan(maps, reference):
    golden = reference("golden/navsim/dataset/maps") / "us-ma-boston" / "9.12.1817" / "map.gpkg"
    mine = gpkg_writer.map_path(maps, "us-ma-boston")
    assert set(pyogrio.list_layers(mine)[:, 0]) == set(pyogrio.list_layers(golden)[:, 0])
    for layer, kind in pyogrio.list_layers(golden):
        wanted, found = pyogrio.read_info(golden, layer=layer), pyogrio.read_info(mine, layer=layer)
        types = dict(zip(wanted["fields"], wanted["dtypes"]))
        have = dict(zip(found["fields"], found["dtypes"]))
        assert {name: have.get(name) for name in types} == types or layer == "boundaries", layer
        assert set(types) == set(have), layer
        assert found["geometry_type"] == kind
        assert found["crs"] == wanted["crs"]
