"""The map patch around the ego that the scorer sees, in NAVSIM's order (``PDMDrivableMap``).

Everything whose polygon intersects the axis-aligned square of half side 100 m around the ego centre, listed as:
roadblocks; the lanes of those roadblocks; the connectors of the roadblock connectors in range; intersections;
carparks. Lanes come whole, even where they leave the square. Polygons of roadblock connectors and generic drivable
areas are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError
from navsim_ext.maps.layers import PolygonLayer, string_array
from navsim_ext.maps.vector_map import VectorMap

PATCH_HALF_SIDE_M = 100.0


class MapKind(IntEnum):
    """Kind of a patch polygon, in nuPlan's numbering of map layers."""

    LANE = 0
    INTERSECTION = 1
    LANE_CONNECTOR = 11
    CARPARK = 15
    ROADBLOCK = 17


LANE_KINDS = (MapKind.LANE, MapKind.LANE_CONNECTOR)


class EmptyMapPatch(DataError):
    """Nothing of the map is within reach of the ego."""


def layer_of(vector_map: VectorMap, kind: MapKind) -> PolygonLayer:
    """The layer that the polygons of a kind come from."""
    layers = {
        MapKind.ROADBLOCK: vector_map.roadblocks,
        MapKind.LANE: vector_map.lanes,
        MapKind.LANE_CONNECTOR: vector_map.lane_connectors,
        MapKind.INTERSECTION: vector_map.intersections,
        MapKind.CARPARK: vector_map.carparks,
    }
    return layers[kind]


@dataclass(frozen=True)
class DrivableMap:
    """M polygons of a patch, by reference into the layers of a map."""

    vector_map: VectorMap
    kinds: NDArray[np.int64]  # [M] MapKind
    positions: NDArray[np.int64]  # [M] position in the layer of that kind

    def __len__(self) -> int:
        return len(self.kinds)

    @cached_property
    def fids(self) -> NDArray[np.str_]:
        """[M]"""
        return string_array([layer_of(self.vector_map, MapKind(k)).fids[p] for k, p in self._items()])

    @cached_property
    def polygons(self) -> NDArray[np.object_]:
        """[M] shapely polygons."""
        polygons = np.empty(len(self), dtype=object)
        for row, (kind, position) in enumerate(self._items()):
            polygons[row] = layer_of(self.vector_map, MapKind(kind)).polygons[position]
        return polygons

    @cached_property
    def tree(self) -> shapely.STRtree:
        """Search tree over the list; its node capacity decides the order of query results, as in NAVSIM."""
        return shapely.STRtree(self.polygons, node_capacity=10)

    def _items(self) -> list[tuple[int, int]]:
        return list(zip(self.kinds.tolist(), self.positions.tolist()))


def drivable_map(
    vector_map: VectorMap, center: NDArray[np.float64], half_side_m: float = PATCH_HALF_SIDE_M
) -> DrivableMap:
    """The patch around an ego centre [2 or 3]. Raises EmptyMapPatch where the map has nothing within reach."""
    x, y = float(center[0]), float(center[1])
    square = shapely.box(x - half_side_m, y - half_side_m, x + half_side_m, y + half_side_m)
    blocks = vector_map.roadblocks.query(square)
    count = len(vector_map.roadblocks)
    lanes = [lane for block in blocks.tolist() for lane in vector_map.lane_nodes_of_block[block]]
    connectors = [
        lane - len(vector_map.lanes)
        for block in vector_map.roadblock_connectors.query(square).tolist()
        for lane in vector_map.lane_nodes_of_block[count + block]
    ]
    parts = {
        MapKind.ROADBLOCK: blocks,
        MapKind.LANE: np.array(lanes, dtype=np.int64),
        MapKind.LANE_CONNECTOR: np.array(connectors, dtype=np.int64),
        MapKind.INTERSECTION: vector_map.intersections.query(square),
        MapKind.CARPARK: vector_map.carparks.query(square),
    }
    if not sum(len(positions) for positions in parts.values()):
        raise EmptyMapPatch(
            f"map {vector_map.location} has nothing within {half_side_m:.0f} m of ({x:.1f}, {y:.1f}): is the log's "
            "position in the coordinates of this map?"
        )
    kinds = [np.full(len(positions), int(kind), dtype=np.int64) for kind, positions in parts.items()]
    return DrivableMap(vector_map, np.concatenate(kinds), np.concatenate(list(parts.values())))
