"""Reads nuPlan's GeoPackage maps into :class:`VectorMap`, once per location, with an array cache on disk.

Layers are stored in EPSG:4326 and re-projected to the UTM zone named in the layer ``meta``, as the nuPlan devkit
does it (geopandas ``to_crs``), so that vertices agree with it bit for bit. Layout:
``<maps_root>/nuplan-maps-v1.0.json`` names the version of each location, ``<location>/<version>/map.gpkg`` is the file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import geopandas
import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray

from navsim_ext.errors import DataError, MissingError
from navsim_ext.files import read_json, reading
from navsim_ext.fingerprint import digest_file
from navsim_ext.maps.layers import NONE, LaneLayer, LineLayer, PolygonLayer, baseline_arrays
from navsim_ext.maps.vector_map import VectorMap, sorted_edges
from navsim_ext.runtime.checksums import check_listed

logger = logging.getLogger(__name__)

MAPS_INDEX = "nuplan-maps-v1.0.json"
CACHE_VARIABLE = "TRIVIUM_MAP_CACHE"
DOWNLOAD = "download the map again"
EDITED = "delete the file and make it again; where you edited it yourself, delete the checksums.json of the maps"
MAX_UNREADABLE_SHARE = 0.1  # of the features of a layer; a map that lacks more is another map


def map_file(maps_root: str | os.PathLike[str], location: str) -> Path:
    """Path of a location's GeoPackage; raises MissingError naming what is not there."""
    root = Path(maps_root)
    index = root / MAPS_INDEX
    if not index.is_file():
        raise MissingError(f"{index} is missing: set data.maps_root or NUPLAN_MAPS_ROOT to the folder of nuPlan maps")
    check_listed(root, index, EDITED)
    versions = read_json(index, EDITED)
    if not isinstance(versions, dict) or not all(isinstance(each, dict) for each in versions.values()):
        raise DataError(f"{index} is no object of locations with their versions: download it again")
    if location not in versions:
        raise MissingError(f"{index} does not list location {location!r}; it has {', '.join(sorted(versions))}")
    path = root / location / str(versions[location].get("version")) / "map.gpkg"
    if not path.is_file():
        raise MissingError(f"{path} is missing: download the map of {location} (version as in {index})")
    return path


def default_cache_dir() -> Path:
    """``$TRIVIUM_MAP_CACHE``, else ``~/.cache/trivium/maps``."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "trivium" / "maps")


def load_map(
    maps_root: str | os.PathLike[str], location: str, cache_dir: str | os.PathLike[str] | None = None
) -> VectorMap:
    """The map of one location, from the array cache if the GeoPackage's digest is known there.

    ``cache_dir`` defaults to :func:`default_cache_dir`. The cache file is written atomically; several processes
    may do it at once. Raises MissingError for absent files, DataError for a GeoPackage without the nuPlan layers.
    """
    path = map_file(maps_root, location)
    check_listed(maps_root, path, EDITED)
    digest = digest_file(path)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    cached = folder / f"{location}-{digest[:24]}.npz"
    try:
        if cached.is_file():
            return VectorMap.load(cached)
    except (DataError, OSError) as error:
        logger.warning("map cache %s is unreadable (%s); it is built again", cached, error)
    vector_map = read_gpkg(path, location, digest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        vector_map.save(cached)
    except OSError as error:  # the home of another user, a full disk: the map is there, the next start reads it again
        logger.warning("the map of %s is not kept (%s): set %s to a folder of yours", location, error, CACHE_VARIABLE)
    return vector_map


def read_gpkg(path: Path, location: str, digest: str = "") -> VectorMap:
    """Reads every layer of one GeoPackage. Features that lack a polygon, a baseline or a partner are dropped with
    a warning that names them: the devkit fails only when such a feature is touched. Raises DataError for a map without
    lanes, and where more than a tenth of a layer would be dropped: on what is left a planner scores too high."""
    with reading(path, DOWNLOAD):
        return _vector_map(path, location, digest)


def _vector_map(path: Path, location: str, digest: str) -> VectorMap:
    present = {str(name) for name, _ in pyogrio.list_layers(path)}
    crs = _projection(path)

    def read(layer: str) -> geopandas.GeoDataFrame:
        if layer not in present:
            raise DataError(f"{path} has no layer {layer!r}; it has {', '.join(sorted(present))}: not a nuPlan map?")
        frame = pyogrio.read_dataframe(path, layer=layer, fid_as_index=True).to_crs(crs)
        frame.index = frame.index.map(str)
        return frame

    def areas(layer: str) -> PolygonLayer:
        frame = _with_polygon(path, read(layer), layer)
        return PolygonLayer.from_shapely(frame.index, frame.geometry.array)

    boundaries = read("boundaries")
    boundary_layer = LineLayer.from_lines(boundaries.index, [shapely.get_coordinates(g) for g in boundaries.geometry])
    roadblocks, connectors_of_blocks = areas("lane_groups_polygons"), read("lane_group_connectors")
    connectors_of_blocks = _with_polygon(path, connectors_of_blocks, "lane_group_connectors")
    block_connectors = PolygonLayer.from_shapely(connectors_of_blocks.index, connectors_of_blocks.geometry.array)

    baselines = read("baseline_paths")
    lane_frame = _with_polygon(path, read("lanes_polygons"), "lanes_polygons")
    if lane_frame.empty:
        raise DataError(f"{path}: layer lanes_polygons holds no lane: the map is empty or damaged, download it again")
    lanes = _lane_layer(
        path,
        lane_frame,
        lane_frame.geometry.array,
        _by_fid(baselines, "lane_fid"),
        _positions(lane_frame["lane_group_fid"], roadblocks),
        boundary_layer,
        lane_frame,
        "lanes_polygons",
    )
    connector_frame = read("lane_connectors")
    shapes = read("gen_lane_connectors_scaled_width_polygons")
    shape_rows = {fid: row for row, fid in reversed(list(enumerate(_fids(shapes["lane_connector_fid"]))))}
    missing = [fid for fid in connector_frame.index if fid not in shape_rows]
    if missing:
        _tell_dropped(path, "lane_connectors", "polygon", missing, len(connector_frame))
        connector_frame = connector_frame.drop(index=missing)
    shapes = shapes.iloc[[shape_rows[fid] for fid in connector_frame.index]]
    lane_connectors = _lane_layer(
        path,
        connector_frame,
        shapes.geometry.array,
        _by_fid(baselines, "lane_connector_fid"),
        _positions(connector_frame["lane_group_connector_fid"], block_connectors),
        boundary_layer,
        shapes,
        "lane_connectors",
    )
    stops = _with_polygon(path, read("stop_polygons"), "stop_polygons")
    return VectorMap(
        location=location,
        label="nuplan",
        lanes=lanes,
        lane_connectors=lane_connectors,
        roadblocks=roadblocks,
        roadblock_connectors=block_connectors,
        lane_edges=_connector_edges(
            connector_frame["exit_lane_fid"], connector_frame["entry_lane_fid"], lanes, lane_connectors
        ),
        block_edges=_connector_edges(
            connectors_of_blocks["from_lane_group_fid"],
            connectors_of_blocks["to_lane_group_fid"],
            roadblocks,
            block_connectors,
        ),
        intersections=areas("intersections"),
        carparks=areas("carpark_areas"),
        generic_drivable_areas=areas("generic_drivable_areas"),
        crosswalks=areas("crosswalks"),
        walkways=areas("walkways"),
        stop_polygons=PolygonLayer.from_shapely(stops.index, stops.geometry.array),
        stop_polygon_types=stops["stop_polygon_type_fid"].to_numpy(np.int64),
        boundaries=boundary_layer,
        boundary_types=boundaries["boundary_type_fid"].to_numpy(np.int64),
        crs=crs,
        source_digest=digest,
    ).validate()


def _projection(path: Path) -> str:
    meta = pyogrio.read_dataframe(path, layer="meta", read_geometry=False)
    rows = meta.loc[meta["key"] == "projectedCoordSystem", "value"]
    if len(rows) != 1:
        raise DataError(f"{path}: layer meta has {len(rows)} rows projectedCoordSystem, 1 was expected")
    return str(rows.iloc[0])


def _with_polygon(path: Path, frame: geopandas.GeoDataFrame, layer: str) -> geopandas.GeoDataFrame:
    usable = frame.geometry.notna() & ~frame.geometry.is_empty
    if not usable.all():
        _tell_dropped(path, layer, "geometry", frame.index[~usable].tolist(), len(frame))
    return frame[usable]


def _tell_dropped(path: Path, layer: str, lacking: str, dropped: Sequence[str], count: int) -> None:
    """Warns of features that cannot be used; raises DataError where they are too many for the map to be itself."""
    if len(dropped) > MAX_UNREADABLE_SHARE * count:
        raise DataError(
            f"{path}: {len(dropped)} of {count} features of layer {layer} have no {lacking} (first: {dropped[0]}), "
            f"at most {MAX_UNREADABLE_SHARE:.0%} may be left out: the map is damaged, download it again"
        )
    logger.warning("%s, layer %s: %d features without %s dropped: %s", path, layer, len(dropped), lacking, dropped[:5])


def _fids(column) -> list[str]:
    """Foreign keys as strings; floats (columns with NaN) lose their ``.0``, NaN becomes the empty string."""
    values = column.to_numpy()
    if values.dtype.kind == "f":
        return ["" if np.isnan(value) else str(int(value)) for value in values]
    return ["" if value is None else str(value) for value in values]


def _positions(column, layer: PolygonLayer) -> NDArray[np.int64]:
    return np.array([layer.index.get(fid, NONE) for fid in _fids(column)], dtype=np.int64)


def _by_fid(baselines: geopandas.GeoDataFrame, column: str) -> dict[str, NDArray[np.float64]]:
    """Baseline vertices by the lane (or connector) they belong to; the first one where there are several."""
    lines: dict[str, NDArray[np.float64]] = {}
    for fid, geometry in zip(_fids(baselines[column]), baselines.geometry.array):
        if fid and fid not in lines and geometry is not None and shapely.get_num_coordinates(geometry) >= 2:
            lines[fid] = shapely.get_coordinates(geometry)
    return lines


def _lane_layer(
    path: Path,
    frame,
    polygons: Sequence,
    lines: dict,
    roadblock: NDArray[np.int64],
    boundaries: LineLayer,
    sides,
    layer: str,
) -> LaneLayer:
    fids = frame.index.tolist()
    has_line = np.array([fid in lines for fid in fids], dtype=bool)
    if not has_line.all():
        dropped = [fid for fid, has in zip(fids, has_line) if not has]
        _tell_dropped(path, layer, "baseline", dropped, len(fids))
    keep = np.flatnonzero(has_line)
    boundary = {
        side: np.array([boundaries.index.get(fid, NONE) for fid in _fids(sides[f"{side}_fid"])], dtype=np.int64)
        for side in ("left_boundary", "right_boundary")
    }
    speed = np.array([np.nan if value is None else value for value in frame["speed_limit_mps"]], dtype=np.float64)
    return LaneLayer.from_shapely(
        [fids[i] for i in keep],
        [polygons[i] for i in keep],
        **baseline_arrays([lines[fids[i]] for i in keep]),
        roadblock=roadblock[keep],
        speed_limit=speed[keep],
        left_boundary=boundary["left_boundary"][keep],
        right_boundary=boundary["right_boundary"][keep],
    )


def _connector_edges(sources, targets, layer: PolygonLayer, connectors: PolygonLayer) -> NDArray[np.int64]:
    """Edges source -> connector -> target; ends that lie outside the map are left out."""
    edges: list[tuple[int, int]] = []
    for fid, source, target in zip(sources.index, _fids(sources), _fids(targets)):
        position = connectors.index.get(fid)
        if position is None:
            continue
        node = len(layer) + position
        if source in layer.index:
            edges.append((layer.index[source], node))
        if target in layer.index:
            edges.append((node, layer.index[target]))
    return sorted_edges(edges)
