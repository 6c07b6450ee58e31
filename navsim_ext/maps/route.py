"""Route correction: the recorded list of roadblocks, made to start where the ego is, linked and free of loops.

Reproduces ``route_roadblock_correction`` of NAVSIM's PDM planner (v1.1 and v2.2 are the same). Its breadth-first
search keeps no visited set: a block is queued again at every depth, and the parent of (block, depth) is overwritten
by the last writer, so among equally short paths the one through the last enumerated parent is returned. Enumerating
that queue grows exponentially with branching; :func:`search_blocks` gets the same path in polynomial time from the
first and the last position of each block in the queue of each depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.frames import wrap_angle
from navsim_ext.maps.vector_map import VectorMap

CANDIDATE_RADIUS_M = 1.0  # half side of the square around the rear axle
MAX_HEADING_ERROR_RAD = np.pi / 4
MAX_DISPLACEMENT_M = 3.0
BACKWARD_DEPTH = 15
FORWARD_DEPTH = 30
FORWARD_TARGETS = 3  # the forward search aims at the first three route blocks
LOOP_OVERLAP_M2 = 1.0


class RouteError(DataError):
    """No usable route: the scene cannot be cached or scored."""


@dataclass(frozen=True)
class Route:
    """A corrected route."""

    blocks: tuple[int, ...]  # block nodes in driving order
    lanes: tuple[int, ...]  # lane nodes of all blocks, in order: what "on route" means to the scorer

    @classmethod
    def from_blocks(cls, vector_map: VectorMap, blocks: Iterable[int]) -> Route:
        unique = tuple(dict.fromkeys(blocks))
        lanes = dict.fromkeys(lane for block in unique for lane in vector_map.lane_nodes_of_block[block])
        return cls(unique, tuple(lanes))


def corrected_route(vector_map: VectorMap, rear_axle: NDArray[np.float64], roadblock_ids: Sequence[str]) -> Route:
    """The route that PDM-Closed drives and that decides which lanes are on route.

    ``rear_axle`` [3] global pose; ``roadblock_ids`` as recorded. Raises RouteError for an empty list, for an id that
    the map does not have, and where the map has no roadblock near or far.
    """
    if not len(roadblock_ids):
        raise RouteError("the scene has no route (roadblock_ids is empty)")
    unknown = [fid for fid in roadblock_ids if str(fid) not in vector_map.block_node_by_fid]
    if unknown:
        raise RouteError(f"route roadblocks {unknown[:5]} are not in map {vector_map.location}")
    route = list(dict.fromkeys(vector_map.block_node_by_fid[str(fid)] for fid in roadblock_ids))
    start, candidates = starting_block(vector_map, rear_axle, set(route))
    if start not in route:
        route = _join_start(vector_map, route, start, candidates)
    route = _join_links(vector_map, route)
    return Route.from_blocks(vector_map, _cut_loops(vector_map, route))


def starting_block(
    vector_map: VectorMap, rear_axle: NDArray[np.float64], on_route: set[int]
) -> tuple[int, tuple[int, ...]]:
    """(block the ego is in, all candidates for it). A block stands once per accepted lane in the candidates."""
    x, y = rear_axle[:2].tolist()
    square = shapely.box(x - CANDIDATE_RADIUS_M, y - CANDIDATE_RADIUS_M, x + CANDIDATE_RADIUS_M, y + CANDIDATE_RADIUS_M)
    count = len(vector_map.roadblocks)
    near = [
        *vector_map.roadblocks.query(square).tolist(),
        *(vector_map.roadblock_connectors.query(square) + count).tolist(),
    ]
    if not near:
        for first, layer in ((0, vector_map.roadblocks), (count, vector_map.roadblock_connectors)):
            if len(layer):
                near.append(first + int(np.argmin(shapely.distance(layer.polygons, shapely.Point(x, y)))))
    if not near:
        raise RouteError(f"map {vector_map.location} has no roadblock at all")

    accepted: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    nearest: list[float] = []
    for block in near:
        best = np.inf
        for lane in vector_map.lane_nodes_of_block[block]:
            displacement, error = nearest_vertex(vector_map, lane, rear_axle)
            best = min(best, displacement)
            if error < MAX_HEADING_ERROR_RAD and displacement < MAX_DISPLACEMENT_M:
                accepted[block in on_route].append((displacement, block))
        nearest.append(best)
    for candidates in (accepted[True], accepted[False]):
        if candidates:
            best = int(np.argmin([displacement for displacement, _ in candidates]))
            return candidates[best][1], tuple(block for _, block in candidates)
    return near[int(np.argmin(nearest))], tuple(near)


def nearest_vertex(vector_map: VectorMap, lane: int, pose: NDArray[np.float64]) -> tuple[float, float]:
    """(distance [m], |heading error| [rad]) of the baseline vertex of a lane node that is nearest to a pose [3]."""
    layer, position = vector_map.lane_node_layer(lane)
    baseline = layer.baseline_of(position)
    squared = ((baseline[:, :2] - pose[:2]) ** 2).sum(axis=-1)
    vertex = int(np.argmin(squared**0.5))
    return float(squared[vertex] ** 0.5), float(np.abs(wrap_angle(baseline[vertex, 2] - pose[2])))


def search_blocks(
    successors: Sequence[Sequence[int]], start: int, targets: Iterable[int], max_depth: int
) -> list[int] | None:
    """Path of block nodes from ``start`` to the first target taken from the queue, or None.

    Depth 1 is the start itself; targets are accepted at depth <= ``max_depth``. See the module docstring for
    which of several shortest paths it is. Per depth two orders of the same blocks are kept: by first position in
    the queue (decides which target is met first) and by last position (decides who wrote the parent last).
    """
    wanted = set(targets)
    parents: list[dict[int, int]] = [{}]  # per depth: parent by block
    by_first, by_last = [start], [start]
    for depth in range(1, max_depth + 1):
        goal = next((block for block in by_first if block in wanted), None)
        if goal is not None:
            path = [goal]
            for level in range(depth - 1, 0, -1):
                path.append(parents[level][path[-1]])
            return path[::-1]
        last_writer: dict[int, int] = {}
        next_last: list[int] = []
        for block in reversed(by_last):
            for successor in reversed(successors[block]):
                if successor not in last_writer:
                    last_writer[successor] = block
                    next_last.append(successor)
        if not next_last:
            return None
        parents.append(last_writer)
        by_first = list(dict.fromkeys(successor for block in by_first for successor in successors[block]))
        by_last = next_last[::-1]
    return None


def _join_start(vector_map: VectorMap, route: list[int], start: int, candidates: Sequence[int]) -> list[int]:
    """Puts the way from the ego's block in front of a route that does not contain it, where one is found."""
    backward = search_blocks(vector_map.block_predecessors, route[0], candidates, BACKWARD_DEPTH)
    if backward is not None:
        return backward[:0:-1] + route
    forward = search_blocks(vector_map.block_successors, start, route[:FORWARD_TARGETS], FORWARD_DEPTH)
    if forward is not None:
        return forward + route[route.index(forward[-1]) + 1 :]
    return route


def _join_links(vector_map: VectorMap, route: list[int]) -> list[int]:
    """Fills the gaps between neighbours that are not linked; a gap that cannot be filled stays."""
    joined = [route[0]]
    for block, following in itertools.pairwise(route):
        if block not in vector_map.block_predecessors[following]:
            path = search_blocks(vector_map.block_successors, block, [following], FORWARD_DEPTH)
            joined.extend(path[1:-1] if path else [])
        joined.append(following)
    return joined


def _cut_loops(vector_map: VectorMap, route: list[int]) -> list[int]:
    """Ends the route before the first roadblock connector that overlaps an earlier one by more than 1 m2."""
    count = len(vector_map.roadblocks)
    earlier: list[shapely.Geometry] = []
    for index, block in enumerate(route):
        if block < count:
            continue
        polygon = vector_map.roadblock_connectors.polygons[block - count]
        if any(kept.intersection(polygon).area > LOOP_OVERLAP_M2 for kept in earlier):
            return route[:index]
        earlier.append(polygon)
    return route
