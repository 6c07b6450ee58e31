"""One map location as plain arrays: the structure that readers fill and that routing, scoring and rendering use.

Two graphs share one numbering each: *lane nodes* are the lanes (0 .. L-1) followed by the lane connectors
(L .. L+C-1); *block nodes* are the roadblocks (0 .. R-1) followed by the roadblock connectors (R .. R+K-1).
Edges are (from, to) in the direction of travel, sorted by source and then by layer order of the target.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.errors import DataError
from navsim_ext.files import atomic_stream, reading
from navsim_ext.maps.layers import LaneLayer, LineLayer, PolygonLayer

FORMAT = "trivium-vector-map-2"  # 1 may hold maps that lack most of a layer
REBUILT = "delete it, it will be rebuilt"
LABELS = ("nuplan", "approx")
STOP_TRAFFIC_LIGHT = 2  # nuPlan's stop_polygon_type_fid of a stop line that belongs to a traffic light


@dataclass(frozen=True)
class VectorMap:
    """A map location. ``label`` is "nuplan" for the original and "approx" for a reconstruction; scores carry it."""

    location: str
    label: str
    lanes: LaneLayer
    lane_connectors: LaneLayer
    roadblocks: PolygonLayer
    roadblock_connectors: PolygonLayer
    lane_edges: NDArray[np.int64]  # [E,2] lane nodes (from, to)
    block_edges: NDArray[np.int64]  # [F,2] block nodes (from, to)
    intersections: PolygonLayer = field(default_factory=PolygonLayer.empty)
    carparks: PolygonLayer = field(default_factory=PolygonLayer.empty)
    generic_drivable_areas: PolygonLayer = field(default_factory=PolygonLayer.empty)
    crosswalks: PolygonLayer = field(default_factory=PolygonLayer.empty)
    walkways: PolygonLayer = field(default_factory=PolygonLayer.empty)
    stop_polygons: PolygonLayer = field(default_factory=PolygonLayer.empty)
    stop_polygon_types: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [stop_polygons]
    boundaries: LineLayer = field(default_factory=lambda: LineLayer.from_lines([], []))
    boundary_types: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # [boundaries]
    crs: str = ""  # e.g. "EPSG:32619"; empty for a local frame
    source_digest: str = ""  # SHA-256 of the file that it was read from, if any

    @property
    def num_lane_nodes(self) -> int:
        return len(self.lanes) + len(self.lane_connectors)

    @property
    def num_block_nodes(self) -> int:
        return len(self.roadblocks) + len(self.roadblock_connectors)

    @cached_property
    def lane_node_by_fid(self) -> dict[str, int]:
        """Lane node by fid; where a lane and a connector share a fid, the lane."""
        connectors = {fid: len(self.lanes) + i for fid, i in self.lane_connectors.index.items()}
        return connectors | self.lanes.index

    @cached_property
    def block_node_by_fid(self) -> dict[str, int]:
        """Block node by fid; where a roadblock and a connector share a fid, the roadblock."""
        connectors = {fid: len(self.roadblocks) + i for fid, i in self.roadblock_connectors.index.items()}
        return connectors | self.roadblocks.index

    def lane_node_fid(self, node: int) -> str:
        layer, position = self.lane_node_layer(node)
        return str(layer.fids[position])

    def block_node_fid(self, node: int) -> str:
        count = len(self.roadblocks)
        return str(self.roadblocks.fids[node] if node < count else self.roadblock_connectors.fids[node - count])

    def lane_node_layer(self, node: int) -> tuple[LaneLayer, int]:
        """(layer, position in it) of a lane node."""
        count = len(self.lanes)
        return (self.lanes, node) if node < count else (self.lane_connectors, node - count)

    @cached_property
    def lane_successors(self) -> list[list[int]]:
        """Outgoing lane nodes of each lane node, in layer order."""
        return _adjacency(self.num_lane_nodes, self.lane_edges)

    @cached_property
    def block_successors(self) -> list[list[int]]:
        """Outgoing block nodes of each block node, in layer order."""
        return _adjacency(self.num_block_nodes, self.block_edges)

    @cached_property
    def block_predecessors(self) -> list[list[int]]:
        """Incoming block nodes of each block node, in layer order."""
        return _adjacency(self.num_block_nodes, self.block_edges[:, ::-1])

    @cached_property
    def block_of_lane_node(self) -> NDArray[np.int64]:
        """[lane nodes] block node that a lane node belongs to, -1 for none."""
        connectors = self.lane_connectors.roadblock
        return np.concatenate([self.lanes.roadblock, np.where(connectors >= 0, connectors + len(self.roadblocks), -1)])

    @cached_property
    def lane_nodes_of_block(self) -> list[list[int]]:
        """Lane nodes of each block node, in layer order."""
        members: list[list[int]] = [[] for _ in range(self.num_block_nodes)]
        for node, block in enumerate(self.block_of_lane_node.tolist()):
            if block >= 0:
                members[block].append(node)
        return members

    @cached_property
    def lane_node_lengths(self) -> NDArray[np.float64]:
        """[lane nodes] baseline lengths [m]."""
        return np.concatenate([self.lanes.lengths, self.lane_connectors.lengths])

    def bounds(self) -> tuple[float, float, float, float]:
        """(min x, min y, max x, max y) of lanes and connectors [m]; raises DataError for a map without any."""
        xy = np.concatenate([self.lanes.xy, self.lane_connectors.xy])
        if not len(xy):
            raise DataError(f"map {self.location} has no lane")
        return (*xy.min(axis=0).tolist(), *xy.max(axis=0).tolist())

    def validate(self) -> VectorMap:
        """Returns self; raises DataError naming the location and the field at the first broken promise."""
        if self.label not in LABELS:
            raise DataError(f"map {self.location} has label {self.label!r}; one of {LABELS} was expected")
        checks = (
            ("lane_edges", self.lane_edges, self.num_lane_nodes),
            ("block_edges", self.block_edges, self.num_block_nodes),
        )
        for name, edges, nodes in checks:
            if edges.ndim != 2 or edges.shape[1] != 2 or edges.dtype != np.int64:
                raise DataError(f"map {self.location}: {name} is {edges.dtype}{edges.shape}, int64[E,2] was expected")
            if len(edges) and (edges.min() < 0 or edges.max() >= nodes):
                raise DataError(f"map {self.location}: {name} names node {edges.max()} of {nodes}")
        members = (
            ("lanes", self.lanes.roadblock, len(self.roadblocks)),
            ("lane_connectors", self.lane_connectors.roadblock, len(self.roadblock_connectors)),
        )
        for name, roadblock, count in members:
            if len(roadblock) and (roadblock.min() < -1 or roadblock.max() >= count):
                raise DataError(f"map {self.location}: {name} belong to roadblock {roadblock.max()} of {count}")
        if len(self.stop_polygon_types) != len(self.stop_polygons):
            raise DataError(f"map {self.location}: stop_polygon_types does not fit stop_polygons")
        if len(self.boundary_types) != len(self.boundaries):
            raise DataError(f"map {self.location}: boundary_types does not fit boundaries")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the map as one array file (npz, no pickles), atomically."""
        with atomic_stream(path) as stream:
            np.savez(stream, format=np.array(FORMAT), **_flatten(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VectorMap:
        """Reads what :meth:`save` wrote; raises DataError for a damaged file or one of another format."""
        with reading(path, REBUILT, DataError):
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            found = str(arrays.pop("format", "none"))
            if found != FORMAT:
                raise DataError(f"{path} has format {found!r}, {FORMAT!r} was expected: {REBUILT}")
            return _unflatten(arrays).validate()


def sorted_edges(edges: ArrayLike) -> NDArray[np.int64]:
    """[E,2] unique edges sorted by source, then target, as VectorMap wants them."""
    pairs = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    return np.unique(pairs, axis=0) if len(pairs) else pairs


def _adjacency(nodes: int, edges: NDArray[np.int64]) -> list[list[int]]:
    neighbours: list[list[int]] = [[] for _ in range(nodes)]
    for source, target in sorted(edges.tolist()):
        neighbours[source].append(target)
    return neighbours


_LAYERS: dict[str, type] = {
    "lanes": LaneLayer,
    "lane_connectors": LaneLayer,
    "roadblocks": PolygonLayer,
    "roadblock_connectors": PolygonLayer,
    "intersections": PolygonLayer,
    "carparks": PolygonLayer,
    "generic_drivable_areas": PolygonLayer,
    "crosswalks": PolygonLayer,
    "walkways": PolygonLayer,
    "stop_polygons": PolygonLayer,
    "boundaries": LineLayer,
}


def _flatten(vector_map: VectorMap) -> dict[str, NDArray]:
    arrays: dict[str, NDArray] = {}
    for item in fields(vector_map):
        value = getattr(vector_map, item.name)
        if item.name in _LAYERS:
            arrays |= {f"{item.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
        else:
            arrays[item.name] = np.asarray(value)
    return arrays


def _unflatten(arrays: dict[str, NDArray]) -> VectorMap:
    values: dict[str, Any] = {}
    for item in fields(VectorMap):
        if item.name in _LAYERS:
            kind = _LAYERS[item.name]
            values[item.name] = kind(**{part.name: arrays[f"{item.name}.{part.name}"] for part in fields(kind)})
        else:
            value = arrays[item.name]
            values[item.name] = str(value) if value.ndim == 0 else value
    return VectorMap(**values)
