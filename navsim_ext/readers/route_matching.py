"""The route that was driven: poses matched to the lane graph (Viterbi), then the roadblocks along the match.

Legend: F frames, C candidate lanes of a frame. Cost of a pose on a lane: (distance / 1.5 m)^2 / 2 + (heading
difference / 0.4 rad)^2 / 2. Cost of a step: 0 on the same lane or to a successor, 0.5 through one lane in between,
1 to a lane of the same roadblock, JUMP otherwise.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.frames import wrap_angle
from navsim_ext.maps.vector_map import VectorMap

REACH_M = 4.0
HEADING_RAD = np.radians(60.0)
JUMP = 15.0
CONTINUE_M = 220.0
MAX_GAP_BLOCKS = 12


def match_lanes(vector_map: VectorMap, poses: NDArray[np.float64]) -> list[int]:
    """Lane node of each pose [F,3] that has a lane near it, one entry per matched pose."""
    lines = [_baseline(vector_map, node)[:, :2] for node in range(vector_map.num_lane_nodes)]
    tree = shapely.STRtree([shapely.LineString(line) for line in lines])
    frames: list[dict[int, float]] = []
    for pose in poses:
        near = tree.query(shapely.Point(pose[:2]), predicate="dwithin", distance=REACH_M)
        costs = {int(node): cost for node in near if (cost := _cost(vector_map, int(node), pose)) < np.inf}
        if costs:
            frames.append(costs)
    if not frames:
        return []
    best = dict(frames[0])
    back: list[dict[int, int]] = []
    for costs in frames[1:]:
        step: dict[int, tuple[float, int]] = {
            node: min((best[before] + _step(vector_map, before, node), before) for before in best) for node in costs
        }
        back.append({node: before for node, (_, before) in step.items()})
        best = {node: step[node][0] + cost for node, cost in costs.items()}
    node = min(best, key=lambda node: best[node])
    matched = [node]
    for previous in reversed(back):
        node = previous[node]
        matched.append(node)
    return matched[::-1]


def _baseline(vector_map: VectorMap, node: int) -> NDArray[np.float64]:
    layer, position = vector_map.lane_node_layer(node)
    return layer.baseline_of(position)


def _cost(vector_map: VectorMap, node: int, pose: NDArray[np.float64]) -> float:
    poses = _baseline(vector_map, node)
    line = shapely.LineString(poses[:, :2])
    distance = line.distance(shapely.Point(pose[:2]))
    nearest = poses[np.linalg.norm(poses[:, :2] - pose[:2], axis=1).argmin()]
    turn = abs(float(wrap_angle(nearest[2] - pose[2])))
    return np.inf if turn > HEADING_RAD else 0.5 * (distance / 1.5) ** 2 + 0.5 * (turn / 0.4) ** 2


def _step(vector_map: VectorMap, before: int, node: int) -> float:
    following = vector_map.lane_successors[before]
    if before == node or node in following:
        return 0.0
    if any(node in vector_map.lane_successors[between] for between in following):
        return 0.5
    same_block = vector_map.block_of_lane_node[before] == vector_map.block_of_lane_node[node] >= 0
    return 1.0 if same_block else JUMP


def route_of(vector_map: VectorMap, poses: NDArray[np.float64]) -> tuple[str, ...]:
    """Fids of the roadblocks and connectors that were driven, joined where a gap can be bridged, and on from there.

    The continuation takes the straightest successor, CONTINUE_M far or to the end of the map. Empty when no pose lies
    on a lane.
    """
    matched = match_lanes(vector_map, poses)
    blocks: list[int] = []
    for node in matched:
        block = int(vector_map.block_of_lane_node[node])
        if block >= 0 and (not blocks or blocks[-1] != block):
            blocks += [*(_bridge(vector_map, blocks[-1], block) if blocks else []), block]
    length, node = 0.0, matched[-1] if matched else -1
    while matched and length < CONTINUE_M:
        heading = _baseline(vector_map, node)[-1, 2]
        following = vector_map.lane_successors[node]
        if not following:
            break
        node = min(following, key=lambda k: abs(float(wrap_angle(_baseline(vector_map, k)[-1, 2] - heading))))
        length += float(vector_map.lane_node_lengths[node])
        block = int(vector_map.block_of_lane_node[node])
        if block in blocks:
            break  # a loop
        if block >= 0:
            blocks.append(block)
    return tuple(vector_map.block_node_fid(block) for block in blocks)


def _bridge(vector_map: VectorMap, start: int, goal: int) -> list[int]:
    """Blocks strictly between two blocks on the shortest way (by count); empty when they touch or none is found."""
    parents: dict[int, int] = {start: start}
    queue = deque([(start, 0)])
    while queue:
        block, depth = queue.popleft()
        if block == goal:
            way = []
            while block != start:
                block = parents[block]
                way.append(block)
            return way[-2::-1]
        if depth < MAX_GAP_BLOCKS:
            for following in vector_map.block_successors[block]:
                if following not in parents:
                    parents[following] = block
                    queue.append((following, depth + 1))
    return []
