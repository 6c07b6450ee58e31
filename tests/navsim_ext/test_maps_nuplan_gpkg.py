"""nuPlan GeoPackages: vertices as the real NAVSIM has them, the array cache, and files that are not what they seem."""

from __future__ import annotations

import json
import shutil

import geopandas
import numpy as np
import pyogrio
import pytest
import shapely
from golden_scenes import SETS, GoldenSet, golden_folder, unpack_small

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.maps import nuplan_gpkg
from navsim_ext.maps.drivable import MapKind, layer_of
from navsim_ext.maps.nuplan_gpkg import load_map, read_gpkg

SHAPES = "gen_lane_connectors_scaled_width_polygons"


@pytest.mark.parametrize("name", SETS)
def test_vertices_equal_those_of_the_reference_caches(name, reference, tmp_path):
    golden = GoldenSet(golden_folder(name, reference, tmp_path), tmp_path)
    compared = 0
    for token in golden.tokens:
        expected = golden.expected(token)
        vector_map = golden.maps[str(expected["map_name"])]
        off = expected["map_off"]
        for i, (fid, kind) in enumerate(zip(expected["map_tokens"], expected["map_types"])):
            layer = layer_of(vector_map, MapKind(int(kind)))
            ((ring, is_hole),) = layer.rings_of(layer.index_of(str(fid)))
            assert not is_hole
            np.testing.assert_array_equal(ring, expected["map_xy"][off[i] : off[i + 1]])
            compared += 1
    assert compared >= 30 * len(golden.tokens)


@pytest.fixture(scope="module")
def maps_root(tmp_path_factory):
    """The maps of the committed set: one location."""
    return unpack_small(tmp_path_factory.mktemp("small")) / "dataset" / "maps"


def test_the_second_load_reads_only_the_array_cache(maps_root, tmp_path, monkeypatch):
    first = load_map(maps_root, "us-ma-boston", tmp_path)
    monkeypatch.setattr(nuplan_gpkg, "read_gpkg", lambda *_: pytest.fail("the GeoPackage was read again"))
    second = load_map(maps_root, "us-ma-boston", tmp_path)
    np.testing.assert_array_equal(second.lanes.xy, first.lanes.xy)
    assert second.source_digest == first.source_digest
    assert second.label == "nuplan"


def test_a_damaged_cache_file_is_built_again(maps_root, tmp_path, caplog):
    first = load_map(maps_root, "us-ma-boston", tmp_path)
    (cached,) = tmp_path.glob("*.npz")
    cached.write_bytes(cached.read_bytes()[:5000])
    np.testing.assert_array_equal(load_map(maps_root, "us-ma-boston", tmp_path).lanes.xy, first.lanes.xy)
    assert "built again" in caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(maps_root, tmp_path, caplog, monkeypatch):
    """The home of another user: the map is read all the same, and the message names the variable."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIVIUM_MAP_CACHE", str(tmp_path / "file" / "maps"))
    first = load_map(maps_root, "us-ma-boston", tmp_path / "good")
    np.testing.assert_array_equal(load_map(maps_root, "us-ma-boston").lanes.xy, first.lanes.xy)
    assert "set TRIVIUM_MAP_CACHE" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no map", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_map_is_named(maps_root, tmp_path, content):
    root = tmp_path / "maps"
    shutil.copytree(maps_root, root)
    file = nuplan_gpkg.map_file(root, "us-ma-boston")
    file.write_bytes(content)
    with pytest.raises(TriviumError, match=r"map\.gpkg"):
        load_map(root, "us-ma-boston", tmp_path / "cache")
    file.write_bytes(nuplan_gpkg.map_file(maps_root, "us-ma-boston").read_bytes()[:-20_000])
    with pytest.raises(TriviumError, match=r"map\.gpkg"):
        load_map(root, "us-ma-boston", tmp_path / "cache")


def test_a_changed_map_is_another_cache_entry(maps_root, tmp_path):
    load_map(maps_root, "us-ma-boston", tmp_path)
    root = tmp_path / "changed"
    shutil.copytree(maps_root, root)
    file = nuplan_gpkg.map_file(root, "us-ma-boston")
    with open(file, "r+b") as stream:  # the GeoPackage's user version: content unchanged, digest not
        stream.seek(92)
        stream.write(b"\0\0\0\7")
    load_map(root, "us-ma-boston", tmp_path)
    assert len(list(tmp_path.glob("us-ma-boston-*.npz"))) == 2


def test_holes_survive_reading(maps_root, tmp_path):
    file = tmp_path / "map.gpkg"
    shutil.copy(nuplan_gpkg.map_file(maps_root, "us-ma-boston"), file)
    frame = pyogrio.read_dataframe(file, layer="carpark_areas", fid_as_index=True)
    outer = frame.geometry.iloc[0]
    frame.loc[frame.index[0], "geometry"] = shapely.Polygon(
        outer.exterior, [shapely.affinity.scale(outer, 0.3, 0.3).exterior]
    )
    pyogrio.write_dataframe(frame, file, layer="carpark_areas", append=False)
    holed = read_gpkg(file, "us-ma-boston").carparks
    whole = load_map(maps_root, "us-ma-boston", tmp_path).carparks
    assert [hole for _, hole in holed.rings_of(0)] == [False, True]
    assert holed.polygons[0].area == pytest.approx(whole.polygons[0].area * (1 - 0.09), rel=1e-3)


def test_a_lane_without_baseline_is_dropped_with_a_warning(maps_root, tmp_path, caplog):
    file = tmp_path / "map.gpkg"
    shutil.copy(nuplan_gpkg.map_file(maps_root, "us-ma-boston"), file)
    frame = pyogrio.read_dataframe(file, layer="baseline_paths", fid_as_index=True)
    gone = int(frame["lane_fid"].dropna().iloc[0])
    pyogrio.write_dataframe(frame[frame["lane_fid"] != gone], file, layer="baseline_paths", append=False)
    read = read_gpkg(file, "us-ma-boston")
    assert str(gone) not in read.lanes.index
    assert f"layer lanes_polygons: 1 features without baseline dropped: ['{gone}']" in caplog.text
    assert len(read.lane_edges) < len(load_map(maps_root, "us-ma-boston", tmp_path).lane_edges)


@pytest.mark.parametrize(
    ("layer", "column", "share", "message"),
    [
        ("baseline_paths", "lane_fid", 1.0, "of layer lanes_polygons have no baseline"),
        ("baseline_paths", "lane_fid", 0.3, "of layer lanes_polygons have no baseline"),
        ("baseline_paths", "lane_connector_fid", 1.0, "of layer lane_connectors have no baseline"),
        (SHAPES, "lane_connector_fid", 1.0, "of layer lane_connectors have no polygon"),
        ("lanes_polygons", None, 1.0, "layer lanes_polygons holds no lane"),
    ],
)
def test_a_map_that_lacks_its_lanes_is_refused(maps_root, tmp_path, layer, column, share, message):
    """What is left of it would score planners higher than the map does."""
    file = tmp_path / "map.gpkg"
    shutil.copy(nuplan_gpkg.map_file(maps_root, "us-ma-boston"), file)
    frame = pyogrio.read_dataframe(file, layer=layer, fid_as_index=True)
    rows = frame.index if column is None else frame.index[frame[column].notna()]
    gone = rows[: round(share * len(rows))]
    pyogrio.write_dataframe(frame.drop(index=gone), file, layer=layer, append=False)
    with pytest.raises(DataError, match=message):
        read_gpkg(file, "us-ma-boston")


def test_what_is_missing_is_named(maps_root, tmp_path):
    with pytest.raises(MissingError, match=r"nuplan-maps-v1\.0\.json is missing"):
        load_map(tmp_path, "us-ma-boston")
    with pytest.raises(MissingError, match=r"does not list location 'mars'; it has .*us-ma-boston"):
        load_map(maps_root, "mars")
    (tmp_path / "nuplan-maps-v1.0.json").write_text(json.dumps({"us-ma-boston": {"version": "1"}}))
    with pytest.raises(MissingError, match=r"us-ma-boston/1/map\.gpkg is missing"):
        load_map(tmp_path, "us-ma-boston")
    file = tmp_path / "us-ma-boston" / "1" / "map.gpkg"
    file.parent.mkdir(parents=True)
    meta = geopandas.pd.DataFrame({"key": ["projectedCoordSystem"], "value": ["EPSG:32619"]})
    pyogrio.write_dataframe(geopandas.GeoDataFrame(meta, geometry=[shapely.Point(0, 0)], crs=4326), file, layer="meta")
    with pytest.raises(DataError, match="no layer 'boundaries'"):
        load_map(tmp_path, "us-ma-boston", tmp_path)
