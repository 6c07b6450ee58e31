"""From a corrected route to a centreline: the lane to start from and the cheapest lane sequence to the route's end.

Reproduces NAVSIM's ``_get_starting_lane`` and ``Dijkstra`` over route lanes (same in v1.1 and v2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.maps.drivable import LANE_KINDS, DrivableMap, MapKind
from navsim_ext.maps.route import Route, RouteError, nearest_vertex
from navsim_ext.maps.vector_map import VectorMap

SEARCH_DEPTH_BLOCKS = 30
START_COST_M = 1.0


@dataclass(frozen=True)
class Centerline:
    """Concatenated baselines from the start of the start lane; joint vertices stand twice."""

    poses: NDArray[np.float64]  # [P,3] x, y, heading
    progress: NDArray[np.float64]  # [P] cumulative chord length [m]
    lanes: tuple[int, ...]  # lane nodes it runs through


def starting_lane(
    vector_map: VectorMap,
    route: Route,
    drivable: DrivableMap,
    rear_axle: NDArray[np.float64],
    center: NDArray[np.float64],
    footprint: shapely.Geometry,
) -> int:
    """Lane node to start from: the best aligned route lane under the rear axle [3]; else the first route lane that
    contains the ego centre [3]; else the one nearest to the ego ``footprint`` (global polygon).

    Raises RouteError for a route without lanes.
    """
    if not route.lanes:
        raise RouteError(f"the corrected route in map {vector_map.location} has no lane")
    on_route = set(route.lanes)
    under: list[int] = []
    for item in drivable.tree.query(shapely.Point(rear_axle[0], rear_axle[1]), predicate="intersects").tolist():
        kind = MapKind(int(drivable.kinds[item]))
        if kind in LANE_KINDS:
            position = int(drivable.positions[item])
            node = position if kind == MapKind.LANE else len(vector_map.lanes) + position
            if node in on_route:
                under.append(node)
    if under:
        errors = [nearest_vertex(vector_map, lane, rear_axle)[1] for lane in under]
        return under[int(np.argmin(errors))]

    polygons = [layer.polygons[position] for layer, position in map(vector_map.lane_node_layer, route.lanes)]
    contains = shapely.contains(polygons, shapely.Point(center[0], center[1]))
    if contains.any():
        return route.lanes[int(np.argmax(contains))]
    return route.lanes[int(np.argmin(shapely.distance(polygons, footprint)))]


def route_centerline(vector_map: VectorMap, route: Route, start_lane: int) -> Centerline:
    """The centreline from ``start_lane`` to any lane of the last of at most 30 route blocks from its block on.

    Where that cannot be reached: to the deepest, then cheapest, lane that was expanded.
    """
    block = int(vector_map.block_of_lane_node[start_lane])
    first = route.blocks.index(block) if block in route.blocks else 0
    last_block = route.blocks[first : first + SEARCH_DEPTH_BLOCKS][-1]
    lanes = search_lanes(vector_map, start_lane, set(route.lanes), set(vector_map.lane_nodes_of_block[last_block]))
    poses = np.concatenate([layer.baseline_of(position) for layer, position in map(vector_map.lane_node_layer, lanes)])
    steps = np.hypot(*np.diff(poses[:, :2], axis=0).T)
    return Centerline(poses, np.concatenate([[0.0], np.cumsum(steps)]), tuple(lanes))


def search_lanes(vector_map: VectorMap, start: int, allowed: set[int], goals: set[int]) -> list[int]:
    """Dijkstra over lane nodes: entering a lane costs its length, the start costs 1, depth counts lanes.

    Next is the least cost, the oldest in the queue on ties; the goal is tested when taken from the queue; a
    cheaper path to a queued lane replaces parent, cost and depth but keeps its place in the queue.
    """
    lengths = vector_map.lane_node_lengths
    parent: dict[int, int | None] = {start: None}
    queue: dict[int, tuple[float, int]] = {start: (START_COST_M, 1)}  # insertion-ordered: lane -> cost, depth
    expanded: dict[int, tuple[float, int]] = {}
    end = None
    while queue:
        lane = min(queue, key=lambda node: queue[node][0])
        cost, depth = queue.pop(lane)
        if lane in goals:
            end = lane
            break
        expanded[lane] = (cost, depth)
        for following in vector_map.lane_successors[lane]:
            if following not in allowed or following in expanded:
                continue
            reached = cost + lengths[following]
            if following not in queue or reached < queue[following][0]:
                parent[following] = lane
                queue[following] = (reached, depth + 1)
    if end is None:
        deepest = max(depth for _, depth in expanded.values())
        candidates = [lane for lane, (_, depth) in expanded.items() if depth == deepest]
        end = min(candidates, key=lambda lane: expanded[lane][0])
    path: list[int] = []
    node: int | None = end
    while node is not None:
        path.append(node)
        node = parent[node]
    return path[::-1]
