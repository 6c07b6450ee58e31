"""Route correction, start lane, centreline and map patch: equal to NAVSIM's, and laws that need no reference."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest
import shapely
from golden_scenes import REST, SETS, GoldenSet, golden_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.frames import to_global
from navsim_ext.maps.centerline import route_centerline, search_lanes, starting_lane
from navsim_ext.maps.drivable import EmptyMapPatch, drivable_map
from navsim_ext.maps.layers import LaneLayer, PolygonLayer
from navsim_ext.maps.route import Route, RouteError, corrected_route, search_blocks
from navsim_ext.maps.vector_map import VectorMap, sorted_edges


@pytest.mark.parametrize("name", SETS)
def test_equal_to_navsim_on_every_golden_scene(name, reference, tmp_path):
    golden = GoldenSet(golden_folder(name, reference, tmp_path), tmp_path)
    for token in golden.tokens:
        expected = golden.expected(token)
        vector_map = golden.maps[str(expected["map_name"])]
        ego, center = expected["ego_state11"][:3], expected["ego_center_se2"]
        route = corrected_route(vector_map, ego, expected["route_block_ids_input"].tolist())
        assert [vector_map.block_node_fid(b) for b in route.blocks] == expected["route_block_ids_corrected"].tolist()
        assert [vector_map.lane_node_fid(n) for n in route.lanes] == expected["route_lane_ids"].tolist()
        patch = drivable_map(vector_map, center)
        assert patch.fids.tolist() == expected["map_tokens"].tolist()
        np.testing.assert_array_equal(patch.kinds, expected["map_types"])
        footprint = shapely.Polygon(expected["ego_footprint"])
        start = starting_lane(vector_map, route, patch, ego, center, footprint)
        centerline = route_centerline(vector_map, route, start)
        np.testing.assert_allclose(centerline.poses, expected["centerline_se2"], rtol=0, atol=REST)
        np.testing.assert_allclose(centerline.progress, expected["centerline_progress"], rtol=0, atol=REST)


def queue_search(successors, start, targets, max_depth):
    """NAVSIM's breadth-first search as it is written: a queue with markers, no visited set, parents overwritten."""
    queue = deque([start, None])
    parent = {(start, 1): None}
    depth = 1
    while queue:
        block = queue.popleft()
        if depth > max_depth:
            return None
        if block is None:
            depth += 1
            queue.append(None)
            if queue[0] is None:
                return None
            continue
        if block in targets:
            path = [block]
            while parent[path[-1], depth] is not None:
                path.append(parent[path[-1], depth])
                depth -= 1
            return path[::-1]
        for following in successors[block]:
            queue.append(following)
            parent[following, depth + 1] = block
    return None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_polynomial_search_returns_the_path_of_the_exponential_queue(data):
    count = data.draw(st.integers(2, 9))
    edges = data.draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=2 * count))
    successors = [sorted(target for source, target in edges if source == node) for node in range(count)]
    targets = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=3))
    depth = data.draw(st.integers(1, 7))
    assert search_blocks(successors, 0, targets, depth) == queue_search(successors, 0, targets, depth)


def test_the_last_enumerated_parent_wins_among_equally_short_paths():
    diamond = [[1, 2], [3], [3], []]
    assert search_blocks(diamond, 0, [3], 30) == [0, 2, 3]


def test_a_failing_search_on_a_dense_graph_ends_at_once():
    """The queue of the original would grow to 8^30 entries here."""
    dense = [list(range(8)) for _ in range(8)]
    assert search_blocks(dense, 0, [99], 30) is None


def rectangle(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def road(lanes: int = 5, length: float = 20.0, gap: float = 10.0) -> VectorMap:
    """A straight road along x: ``lanes`` roadblocks of one lane each, joined by connectors; block i has fid str(i)."""
    pitch = length + gap
    lane_polygons = [[rectangle(i * pitch, -2, i * pitch + length, 2)] for i in range(lanes)]
    link_polygons = [[rectangle(i * pitch + length, -2, (i + 1) * pitch, 2)] for i in range(lanes - 1)]
    lines = [[[i * pitch + s, 0.0] for s in np.linspace(0, length, 11)] for i in range(lanes)]
    links = [[[i * pitch + length + s, 0.0] for s in np.linspace(0, gap, 6)] for i in range(lanes - 1)]
    names, link_names = [str(i) for i in range(lanes)], [f"{i}>{i + 1}" for i in range(lanes - 1)]
    edges = sorted_edges([pair for i in range(lanes - 1) for pair in ((i, lanes + i), (lanes + i, i + 1))])
    return VectorMap(
        location="road",
        label="approx",
        lanes=LaneLayer.from_arrays([f"lane{n}" for n in names], lane_polygons, lines, range(lanes)),
        lane_connectors=LaneLayer.from_arrays([f"lane{n}" for n in link_names], link_polygons, links, range(lanes - 1)),
        roadblocks=PolygonLayer.from_rings(names, lane_polygons),
        roadblock_connectors=PolygonLayer.from_rings(link_names, link_polygons),
        lane_edges=edges,
        block_edges=edges,
    ).validate()


def blocks_of(vector_map: VectorMap, route: Route) -> list[str]:
    return [vector_map.block_node_fid(block) for block in route.blocks]


AT_START = np.array([5.0, 0.0, 0.0])


@pytest.mark.parametrize(
    "recorded",
    [
        ["0", "0>1", "1", "1>2", "2"],
        ["0", "1", "2"],  # connectors missing
        ["0", "0>1", "0", "1", "1>2", "2"],  # repeated
        ["1", "1>2", "2"],  # starts ahead of the ego
        ["2"],  # far ahead
    ],
)
def test_damaged_routes_are_repaired(recorded):
    vector_map = road()
    assert blocks_of(vector_map, corrected_route(vector_map, AT_START, recorded)) == ["0", "0>1", "1", "1>2", "2"]


def test_a_gap_that_cannot_be_joined_stays():
    vector_map = road()
    assert blocks_of(vector_map, corrected_route(vector_map, np.array([35.0, 0.0, 0.0]), ["1", "0"])) == ["1", "0"]


def test_an_ego_far_from_any_road_is_searched_from_the_nearest_block_of_each_layer():
    """Both the nearest roadblock and the nearest connector are goals; the connector is met first, as in NAVSIM."""
    vector_map = road()
    far = np.array([5.0, 300.0, 1.0])
    assert blocks_of(vector_map, corrected_route(vector_map, far, ["1"])) == ["0>1", "1"]


def test_a_loop_ends_the_route_before_the_crossing():
    straight = road(lanes=3)
    polygons = [[rectangle(20, -2, 30, 2)], [rectangle(22, -2, 60, 2)]]  # the second crosses the first
    crossed = VectorMap(
        **{
            **{field: getattr(straight, field) for field in straight.__dataclass_fields__},
            "roadblock_connectors": PolygonLayer.from_rings(["0>1", "1>2"], polygons),
        }
    )
    assert blocks_of(crossed, corrected_route(crossed, AT_START, ["0", "0>1", "1", "1>2", "2"])) == ["0", "0>1", "1"]


def test_routes_that_cannot_be_used_are_named():
    vector_map = road()
    with pytest.raises(RouteError, match="no route"):
        corrected_route(vector_map, AT_START, [])
    with pytest.raises(RouteError, match=r"\['nowhere'\] are not in map road"):
        corrected_route(vector_map, AT_START, ["0", "nowhere"])
    block, no_lanes, none = (
        PolygonLayer.from_rings(["0"], [[rectangle(0, 0, 1, 1)]]),
        LaneLayer.empty(),
        sorted_edges([]),
    )
    empty = VectorMap("void", "approx", no_lanes, no_lanes, block, PolygonLayer.empty(), none, none)
    route = corrected_route(empty, AT_START, ["0"])
    with pytest.raises(RouteError, match="has no lane"):
        starting_lane(empty, route, drivable_map(empty, AT_START), AT_START, AT_START, shapely.Point(5, 0))


def test_an_empty_patch_is_named():
    with pytest.raises(EmptyMapPatch, match=r"nothing within 100 m of \(5000\.0, 0\.0\)"):
        drivable_map(road(), np.array([5000.0, 0.0]))


def test_centreline_runs_from_the_start_lane_and_doubles_joints():
    vector_map = road(lanes=3)
    route = corrected_route(vector_map, AT_START, ["0", "0>1", "1", "1>2", "2"])
    centerline = route_centerline(vector_map, route, 0)
    assert [vector_map.lane_node_fid(n) for n in centerline.lanes] == ["lane0", "lane0>1", "lane1", "lane1>2", "lane2"]
    assert centerline.progress[-1] == pytest.approx(80.0)
    assert (np.diff(centerline.progress) == 0).sum() == 4
    np.testing.assert_array_equal(centerline.poses[0], [0.0, 0.0, 0.0])


def test_a_dead_end_gives_the_deepest_lane():
    vector_map = road(lanes=4)
    allowed = {0, 1, 4}  # lane0, lane1, lane0>1: lane3 cannot be reached
    assert search_lanes(vector_map, 0, allowed, goals={3}) == [0, 4, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 10))
def test_lane_search_is_as_cheap_as_any_enumerated_path(seed, count):
    """Against all simple paths of a random graph."""
    rng = np.random.default_rng(seed)
    lines = [[[0.0, 0.0], [float(rng.uniform(1, 50)), 0.0]] for _ in range(count)]
    edges = sorted_edges([(i, j) for i in range(count) for j in range(count) if i != j and rng.random() < 0.35])
    vector_map = VectorMap(
        "graph", "approx", LaneLayer.from_arrays([str(i) for i in range(count)], [[rectangle(0, 0, 1, 1)]] * count,
        lines, [-1] * count), LaneLayer.empty(), PolygonLayer.empty(), PolygonLayer.empty(), edges, sorted_edges([]),
    )  # fmt: skip
    goal = count - 1
    lengths = vector_map.lane_node_lengths

    def cheapest(path: list[int]) -> float:
        if path[-1] == goal:
            return sum(lengths[node] for node in path[1:])
        return min(
            (cheapest([*path, n]) for n in vector_map.lane_successors[path[-1]] if n not in path), default=np.inf
        )

    best = cheapest([0])
    found = search_lanes(vector_map, 0, set(range(count)), {goal})
    if np.isfinite(best):
        assert found[0] == 0
        assert found[-1] == goal
        assert all(b in vector_map.lane_successors[a] for a, b in itertools.pairwise(found))
        assert sum(lengths[node] for node in found[1:]) == pytest.approx(best)
    else:
        assert found[-1] != goal


@settings(max_examples=20, deadline=None)
@given(st.floats(-np.pi, np.pi), st.floats(-100, 100), st.floats(-100, 100))
def test_the_start_lane_moves_with_the_scene(heading, x, y):
    """A rigid motion of map and ego changes nothing but coordinates."""
    frame = np.array([x, y, heading])
    still = road()

    def move(xy: np.ndarray) -> np.ndarray:
        return to_global(np.column_stack([xy, np.zeros(len(xy))]), frame)[:, :2]

    lanes = LaneLayer.from_arrays(
        still.lanes.fids,
        [[move(still.lanes.rings_of(i)[0][0])] for i in range(5)],
        [move(still.lanes.baseline_of(i)[:, :2]) for i in range(5)],
        still.lanes.roadblock,
    )
    moved = VectorMap(**{**{f: getattr(still, f) for f in still.__dataclass_fields__}, "lanes": lanes})
    ego = to_global(np.array([35.0, 0.5, 0.1]), frame)
    route = Route.from_blocks(moved, range(5))
    tree_patch = drivable_map(moved, ego, half_side_m=500.0)
    assert moved.lane_node_fid(starting_lane(moved, route, tree_patch, ego, ego, shapely.Point(ego[:2]))) == "lane1"
