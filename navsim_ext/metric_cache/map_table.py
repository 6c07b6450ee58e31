"""The polygon table of a map: every polygon that any scene on it can need, in one fixed order.

Rows are the roadblocks, lanes, lane connectors, intersections and carparks of the map, each layer in its own order. So
a row number depends on the map alone, not on which scenes were cached, by how many workers or in which order.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import ArrayLike, NDArray

from navsim_ext.maps.drivable import MapKind, layer_of
from navsim_ext.maps.vector_map import VectorMap
from navsim_ext.metric_cache.schema import MetricCacheMismatch, map_folder
from navsim_ext.pdm.polygon_table import ARRAYS, PolygonTable

ROW_ORDER = (
    MapKind.ROADBLOCK,
    MapKind.LANE,
    MapKind.LANE_CONNECTOR,
    MapKind.INTERSECTION,
    MapKind.CARPARK,
)


def map_table(vector_map: VectorMap) -> PolygonTable:
    """The table of a whole map. A polygon of several parts becomes one row: its rings are read by the even-odd rule."""
    rings: list[list[NDArray[np.float64]]] = []
    types: list[int] = []
    ids: list[str] = []
    for kind in ROW_ORDER:
        layer = layer_of(vector_map, kind)
        rings.extend([ring for ring, _ in layer.rings_of(position)] for position in range(len(layer)))
        types.extend([int(kind)] * len(layer))
        ids.extend(layer.fids.tolist())
    return PolygonTable.from_rings(rings, types, ids)


def table_rows(vector_map: VectorMap, kinds: ArrayLike, positions: ArrayLike) -> NDArray[np.int32]:
    """Rows of the features ``positions`` of the layers ``kinds``."""
    first, start = {}, 0
    for kind in ROW_ORDER:
        first[int(kind)] = start
        start += len(layer_of(vector_map, kind))
    offsets = np.array([first[int(kind)] for kind in np.asarray(kinds)], dtype=np.int64)
    return (offsets + np.asarray(positions, dtype=np.int64)).astype(np.int32)


def store_map_table(cache: str | os.PathLike[str], name: str, vector_map: VectorMap) -> PolygonTable:
    """Writes the table of a map into a cache folder, once, or again over a damaged one.

    Several processes may do it at the same time. Raises MetricCacheMismatch when the folder has a table of that name
    with other polygons: two maps of one name.
    """
    table = map_table(vector_map)
    folder = map_folder(cache, name)
    if not PolygonTable.is_intact(folder):
        table.save(folder)
        return table
    stored = PolygonTable.load(folder)
    if not all(np.array_equal(getattr(stored, array), getattr(table, array)) for array in ARRAYS):
        raise MetricCacheMismatch(
            f"{folder} holds another map of the name {name!r} ({len(stored)} polygons, this one has "
            f"{len(table)}): caches of different maps must not share a folder"
        )
    return stored
