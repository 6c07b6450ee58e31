"""What is wrong in a recording, the report of a store, and the picture of a scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
import shapely
from PIL import Image

from navsim_ext.errors import DataError
from navsim_ext.traffic import picture
from navsim_ext.traffic import report as report_module
from navsim_ext.traffic.codes import LightState, PieceKind
from navsim_ext.traffic.findings import Overlap, box_corners, off_road, overlaps
from navsim_ext.traffic.report import report
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from tests.navsim_ext.traffic_worlds import street, street_values


def test_overlaps_are_those_of_the_polygons():
    """Random boxes against shapely, pair by pair and step by step."""
    rng = np.random.default_rng(0)
    values = street_values()
    scene = street(
        **values | {
            "xy": rng.uniform(-4.0, 4.0, (4, 31, 2)), "heading": rng.uniform(-3.0, 3.0, (4, 31)),
            "valid": (rng.random((4, 31)) < 0.8) | (np.arange(31) == 10), "dt": 10.0,
        }
    )  # fmt: skip
    boxes = [[shapely.Polygon(box) for box in track] for track in box_corners(scene)]
    expected = []
    for i in range(4):
        for j in range(i + 1, 4):
            both = scene.valid[i] & scene.valid[j]
            touch = [t for t in range(31) if both[t] and boxes[i][t].intersects(boxes[j][t])]
            if touch:
                expected.append(Overlap(int(scene.agent_id[i]), int(scene.agent_id[j]), touch[0], len(touch)))
    assert expected
    assert overlaps(scene) == expected


def test_a_clean_street_has_no_overlap_and_only_the_parked_car_is_off_the_road():
    scene = street()
    assert overlaps(scene) == []
    (found,) = off_road(scene)
    assert (found.agent, found.since, found.steps) == (4, 0, 31)
    assert found.farthest_m == pytest.approx(5.0 + 0.9 - 3.5, abs=0.01)


def test_a_drivable_area_decides_where_there_is_one_and_without_any_nothing_is_said():
    values = street_values()
    kinds = values["piece_kind"].copy()
    kinds[6] = PieceKind.DRIVABLE_AREA  # the crosswalk's polygon: x 10 ... 14
    names = {found.agent for found in off_road(street(piece_kind=kinds))}
    assert names == {7, 3, 4}
    kinds[[3, 4, 6]] = PieceKind.LINE_SOLID, PieceKind.LINE_SOLID, PieceKind.CROSSWALK
    assert off_road(street(piece_kind=kinds)) is None


def test_who_leaves_the_map_is_not_called_off_the_road():
    values = street_values()
    values["xy"][1] = [5000.0, 0.0] + 0.1 * np.arange(31)[:, None]  # far beyond all edges
    values["xy"][3] = [5.0, -6.0]
    (found,) = off_road(street(**values))
    assert found.agent == 4


@pytest.fixture
def store(tmp_path):
    scenes = [street(id=f"s{k}", notes={"odd": k + 1}) for k in range(4)]
    write_scenes(tmp_path / "store", iter(scenes), fingerprint_of({}))
    return tmp_path / "store"


def test_a_report_counts_and_lists_and_goes_on_after_a_kill(store, tmp_path, monkeypatch):
    summary = report(store, tmp_path / "r")
    lines = (tmp_path / "r" / "scenes.jsonl").read_bytes()
    first = json.loads(lines.splitlines()[1])
    assert (first["agents"], first["vehicles"], first["pedestrians"], first["tracks_with_gaps"]) == (4, 3, 1, 1)
    assert (first["lone_observations"], first["moving"], first["vehicles_off_road"], first["moving_off_road"]) == (
        0,
        2,
        1,
        0,
    )
    assert first["off_road"][0]["agent"] == 4
    assert summary["totals"]["agents"] == 16
    assert summary["notes"] == {"odd": 10}
    told = []
    real = report_module.describe
    monkeypatch.setattr(report_module, "describe", lambda scene: (told.append(scene.id), real(scene))[1])
    for cut in (len(lines) - 20, len(lines.splitlines(keepends=True)[0]) + 5, 3):
        (tmp_path / "r" / "scenes.jsonl").write_bytes(lines[:cut])
        assert report(store, tmp_path / "r") == summary
        assert (tmp_path / "r" / "scenes.jsonl").read_bytes() == lines
    assert told == ["s3", "s0", "s1", "s2", "s3", "s0", "s1", "s2", "s3"]
    few = report(store, tmp_path / "few", count=2, num_workers=2)
    assert few["totals"]["scenes"] == 2
    assert (tmp_path / "few" / "scenes.jsonl").read_bytes() == b"".join(lines.splitlines(keepends=True)[:3])
    assert "share" in str([column.header for column in report_module.table(summary).columns])


def test_a_report_of_another_store_is_refused(store, tmp_path):
    report(store, tmp_path / "r")
    write_scenes(tmp_path / "other", iter([street(id="x")]), fingerprint_of({"other": 1}))
    with pytest.raises(DataError, match="another store"):
        report(tmp_path / "other", tmp_path / "r")


def colour_at(image: np.ndarray, scene, point, reach_m: float) -> tuple[int, ...]:
    """Colour where a local point is drawn."""
    size = len(image)
    x, y = (np.asarray(point) - scene.pose[scene.ego, scene.now, :2]) * size / (2 * reach_m)
    return tuple(int(v) for v in image[round(size / 2 - y), round(size / 2 + x)])


def test_a_picture_shows_everybody_where_they_are():
    scene = street()
    image = picture.birds_eye(scene, reach_m=40.0, size=400)
    assert image.shape == (400, 400, 3)
    ego = scene.pose[0, scene.now, :2] - [1.8, 0.0]
    assert np.abs(np.subtract(colour_at(image, scene, ego, 40.0), picture.EGO)).max() < 12
    car = scene.pose[1, scene.now, :2] + [1.5, 0.3]  # drives towards -x: its nose is on the left
    assert np.abs(np.subtract(colour_at(image, scene, car, 40.0), picture.KINDS[0])).max() < 40
    assert max(colour_at(image, scene, scene.piece(3)[8], 40.0)) < 180  # the road's edge
    light = picture.birds_eye(street(light_state=np.full((2, 31), LightState.GO, np.uint8)), reach_m=60.0, size=400)
    red, green, _ = colour_at(light, scene, scene.light_stop[0], 60.0)
    assert green > red
    with pytest.raises(DataError, match="no step 31"):
        picture.birds_eye(scene, 31)


def test_the_picture_command_writes_a_png(store, tmp_path, monkeypatch):
    output = tmp_path / "p.png"
    monkeypatch.setattr("sys.argv", ["x", f"scenes={store}", "scene=s2", f"output={output}", "size=200"])
    monkeypatch.chdir(tmp_path)
    picture.main()
    with Image.open(output) as image:
        assert image.size == (200, 200)
