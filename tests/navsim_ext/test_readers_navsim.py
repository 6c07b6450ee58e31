"""NAVSIM logs: windows, tokens, filters, and one clear error for each kind of bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from scene_worlds import make_frame, token, write_log

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.readers import NavsimLogs, NothingSelected, SceneFilter, open_source
from navsim_ext.readers.source import SceneSource
from navsim_ext.scene_index import build_index


@pytest.mark.parametrize("dataset", ["golden/navsim", "golden/navsim_real"])
def test_finds_the_tokens_of_the_reference_sets(reference, dataset):
    root = reference(f"{dataset}/dataset")
    index = json.loads((root / "index.json").read_text())
    source = open_source(root, "trainval", scene_filter=SceneFilter(frame_interval=1))
    wanted = [token for log in index["logs"] for token in log["tokens"]]
    if dataset == "golden/navsim":
        assert sorted(source.tokens) == sorted(wanted)
    else:  # this set lists a selection; its logs hold more windows
        logs = {log["log"]: log for log in index["logs"]}
        found = {name: [scene.token for scene in scenes] for name, scenes in source.logs()}
        for name, tokens in found.items():
            assert len(tokens) == logs[name]["n_frames"] - 13
            assert [tokens[now - 3] for now in logs[name]["now_frames"]] == logs[name]["tokens"]


def test_scene_equals_what_the_reference_exported(reference):
    root = reference("golden/navsim")
    source = NavsimLogs(root / "dataset", "trainval")
    for name in source.tokens:
        golden = np.load(root / "metric_cache" / f"{name}_v11.npz")
        scene = source.scene(name)
        np.testing.assert_allclose(scene.ego_global[scene.now], golden["ego_state11"][:3], atol=2e-9)
        np.testing.assert_array_equal(scene.ego_dynamics[scene.now], golden["ego_state11"][3:7].astype(np.float32))
        assert scene.timestamps_us[scene.now] == golden["ego_time_us"]
        np.testing.assert_allclose(scene.future_poses(8), golden["gt_future_poses"], atol=2e-6)
        np.testing.assert_allclose(scene.history_poses(), golden["gt_history_poses"], atol=2e-6)


@pytest.mark.parametrize(("count", "interval"), [(14, 1), (15, 1), (31, 3), (31, None), (13, 1), (30, 7)])
def test_windows_are_those_of_navsim(tmp_path, count, interval):
    write_log(tmp_path, [make_frame(i) for i in range(count)])
    source = NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(frame_interval=interval))
    step = interval or 14
    wanted = [token(start + 3) for start in range(0, count, step) if start + 14 <= count]
    if not wanted:
        with pytest.raises(NothingSelected, match="0 scenes"):
            len(source)
        return
    assert isinstance(source, SceneSource)
    assert source.tokens == wanted
    scene = source.scene(wanted[-1])
    first = scene.frame_tokens.index(scene.token)
    assert (first, len(scene.frame_tokens), scene.num_future) == (3, 14, 10)
    assert scene.traffic_lights[0] == (("17", True), ("18", False))
    np.testing.assert_allclose(np.diff(scene.ego_global[:, 2]), 0.1, atol=1e-12)
    assert scene.annotations[0].boxes.dtype == np.float32


def test_route_history_horizon_and_limits(tmp_path):
    frames = [make_frame(i) for i in range(20)]
    frames[5]["roadblock_ids"] = []
    write_log(tmp_path, frames)
    write_log(tmp_path, [make_frame(i, "log-b") for i in range(20)], "log-b")
    read = lambda **fields: NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(**fields))  # noqa: E731
    assert token(5) not in read().tokens
    assert token(5) in read(has_route=False).tokens
    assert len(read(num_history=2, num_future=4, has_route=False)) == 2 * 15
    assert read(log_names=["log-b"]).tokens == [token(i, "log-b") for i in range(3, 10)]
    assert read(max_scenes=3).tokens == [token(i) for i in (3, 4, 6)]
    assert read(tokens=[token(9, "log-b"), token(4)]).tokens == [token(4), token(9, "log-b")]


def test_yaml_filter_in_navsims_format(tmp_path):
    path = tmp_path / "navtrain.yaml"
    content = {
        "_target_": "navsim.common.dataclasses.SceneFilter",
        "_convert_": "all",
        "num_history_frames": 4,
        "num_future_frames": 10,
        "frame_interval": 1,
        "has_route": True,
        "max_scenes": None,
        "log_names": ["a", "b"],
        "tokens": None,
        "include_synthetic_scenes": False,
    }
    path.write_text(yaml.safe_dump(content))
    assert SceneFilter.from_yaml(path) == SceneFilter(log_names=("a", "b"))
    path.write_text(yaml.safe_dump({**content, "frame_intervall": 2}))
    with pytest.raises(DataError, match=r"navtrain\.yaml.*frame_intervall.*2"):
        SceneFilter.from_yaml(path)
    path.write_text(yaml.safe_dump({**content, "include_synthetic_scenes": True}))
    with pytest.raises(DataError, match="include_synthetic_scenes"):
        SceneFilter.from_yaml(path)


def bad_annotations(**changes) -> dict:
    return {"anns": make_frame(0)["anns"] | changes}


BAD_FRAMES = {
    "unknown map": ({"map_location": "de-berlin"}, r"map_location.*'de-berlin'.*us-ma-boston"),
    "unequal arrays": (bad_annotations(track_tokens=["t0"]), r"anns.*'gt_boxes': 2.*'track_tokens': 1.*equal length"),
    "nan pose": ({"ego2global_translation": np.array([1.0, np.nan, 0.0])}, r"ego2global_translation.*nan.*finite"),
    "quaternion": ({"ego2global_rotation": np.array([1.0, 0, 0, 0.5])}, r"ego2global_rotation.*norm 1\.118.*norm 1"),
    "nan box": (bad_annotations(gt_boxes=np.full((2, 7), np.nan)), r"gt_boxes\[0\] of track t0.*nan"),
    "unknown object": (bad_annotations(gt_names=["vehicle", "dragon"]), r"gt_names.*'dragon'.*pedestrian"),
    "command": ({"driving_command": np.array([0, 1, 1, 0])}, r"driving_command.*\[0.0, 1.0, 1.0, 0.0\].*one-hot"),
    "dynamics": ({"ego_dynamic_state": [1.0, 2.0]}, r"ego_dynamic_state.*\(2,\).*\(4,\)"),
    "lights": ({"traffic_lights": [3]}, r"traffic_lights.*\[3\].*is red"),
    "time": ({"timestamp": 1.5}, r"timestamp.*1\.5.*microseconds"),
    "camera": ({"cams": {"CAM_F0": {"data_path": "x"}}}, r"cams\.CAM_F0\.cam_intrinsic.*absent"),
}


@pytest.mark.parametrize("kind", BAD_FRAMES)
def test_bad_frame_names_file_frame_key_and_both_values(tmp_path, kind):
    changes, pattern = BAD_FRAMES[kind]
    frames = [make_frame(i) for i in range(20)]
    frames[4] = make_frame(4, **changes)
    write_log(tmp_path, frames)
    with pytest.raises(DataError, match=rf"log-a\.pkl, frame 4 .*{pattern}"):
        len(NavsimLogs(tmp_path, "mini"))
    source = NavsimLogs(tmp_path, "mini", skip_bad=True, report_path=tmp_path / "out" / "skipped.json")
    spoiled = {token(now) for now in range(3, 10) if now - 3 <= 4 <= now + 10}
    if kind == "camera":  # only the pictures of the frame now matter
        spoiled = {token(4)}
    assert set(source.tokens) == {token(now) for now in range(3, 10)} - spoiled
    report = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert report["skipped"] == len(report["entries"]) >= 1
    assert report["entries"][0]["frame"] == 4
    assert report["counts"] == {"DataError": len(report["entries"])}


def test_absent_key_names_it(tmp_path):
    frames = [make_frame(i) for i in range(14)]
    frames[2]["roadblock_ids"] = ["a", None]
    write_log(tmp_path, frames)
    with pytest.raises(DataError, match=r"frame 2 .*roadblock_ids is a list with None"):
        len(NavsimLogs(tmp_path, "mini"))
    del frames[2]["roadblock_ids"]
    write_log(tmp_path, frames)
    with pytest.raises(DataError, match=r"frame 2 .*roadblock_ids is absent"):
        len(NavsimLogs(tmp_path, "mini"))


def test_truncated_log_is_skipped_whole_and_nothing_left_is_an_error(tmp_path):
    path = write_log(tmp_path, [make_frame(i, "log-b") for i in range(14)], "log-b")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"log-b\.pkl is truncated"):
        len(NavsimLogs(tmp_path, "mini"))
    with pytest.raises(NothingSelected, match=r"0 scenes.*1 bad.*DamagedPickle.*skipped\.json"):
        len(NavsimLogs(tmp_path, "mini", skip_bad=True, report_path=tmp_path / "skipped.json"))
    write_log(tmp_path, [make_frame(i) for i in range(14)])
    assert NavsimLogs(tmp_path, "mini", skip_bad=True).tokens == [token(3)]


def test_token_twice(tmp_path):
    write_log(tmp_path, [make_frame(i) for i in range(14)])
    write_log(tmp_path, [make_frame(i) for i in range(14)], "log-b")
    with pytest.raises(DataError, match=rf"log-b\.pkl: token {token(3)}.*second.*log-a"):
        len(NavsimLogs(tmp_path, "mini"))
    assert NavsimLogs(tmp_path, "mini", skip_bad=True).tokens == [token(3)]
    with pytest.raises(DataError, match="'x' 2 times"):
        SceneFilter(tokens=["x", "y", "x"])


def test_filters_that_match_nothing(tmp_path):
    write_log(tmp_path, [make_frame(i) for i in range(14)])
    with pytest.raises(MissingError, match=r"none of the 1 logs.*'log-z'.*'log-a'"):
        NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(log_names=["log-z"]))
    with pytest.raises(NothingSelected):
        len(NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(tokens=["0" * 16])))
    with pytest.raises(MissingError, match=r"1 of 2 tokens.*first: 0000"):
        len(NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(tokens=[token(3), "0" * 16])))
    with pytest.raises(MissingError, match="split 'trainval'"):
        NavsimLogs(tmp_path, "trainval")
    with pytest.raises(MissingError, match="not among the 1 scenes"):
        NavsimLogs(tmp_path, "mini").scene("nope")
    with pytest.raises(MissingError, match="navsim_logs"):
        open_source(tmp_path / "nowhere", "mini")


def test_missing_picture(tmp_path):
    write_log(tmp_path, [make_frame(i) for i in range(15)])
    picture = tmp_path / "sensor_blobs" / "mini" / "log-a" / "CAM_F0" / "4.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"jpeg")
    with pytest.raises(MissingError, match=r"cams\.CAM_F0\.data_path 'log-a/CAM_F0/3\.jpg'.*sensor"):
        len(NavsimLogs(tmp_path, "mini", required_cameras=["CAM_F0"]))
    source = NavsimLogs(tmp_path, "mini", required_cameras=["CAM_F0"], skip_bad=True)
    assert source.tokens == [token(4)]
    assert source.report.counts == {"MissingError": 1}


def test_unwritable_report_folder(tmp_path):
    write_log(tmp_path, [make_frame(i) for i in range(14)])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"report .*cannot be written"):
        len(NavsimLogs(tmp_path, "mini", skip_bad=True, report_path=tmp_path / "file" / "skipped.json"))


def two_drives(frames):
    """The rest of the file is another drive, as when several logs are joined into one pickle."""
    for frame in frames[10:]:
        frame["log_name"] = "log-b"


def gap(frames):
    for frame in frames[10:]:
        frame["timestamp"] += 60_000_000


def one_frame_missing(frames):
    del frames[10]


def unordered(frames):
    frames[9], frames[10] = frames[10], frames[9]


def teleport(frames):
    for frame in frames[10:]:
        frame["ego2global_translation"] = frame["ego2global_translation"] + np.array([3_000.0, 0.0, 0.0])


def another_map(frames):
    for frame in frames[10:]:
        frame["map_location"] = "sg-one-north"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_drives, r"frames are of log_name \['log-a', 'log-b'\]; one was expected"),
        (gap, r"60\.500 s lie between its frames \d+ and \d+; 0\.5 s within 0\.25 s"),
        (one_frame_missing, r"1\.000 s lie between its frames"),
        (unordered, "time stamps do not increase"),
        (teleport, r"moves 300\d\.\d m in the 0\.500 s between its frames"),
        (another_map, "frames are of map_location"),
    ],
)
def test_a_window_is_one_drive_at_2_hz(tmp_path, change, message):
    """No window reaches over the break: refused by name, or left out and counted; the others are as before."""
    frames = [make_frame(i) for i in range(24)]
    write_log(tmp_path / "whole", frames)
    whole = NavsimLogs(tmp_path / "whole", "mini", scene_filter=SceneFilter(num_history=2, num_future=4))
    targets = {scene.token: scene.future_poses(4) for _, found in whole.logs() for scene in found}
    change(frames)
    write_log(tmp_path, frames)
    with pytest.raises(DataError, match=message):
        list(NavsimLogs(tmp_path, "mini").logs())
    source = NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(num_history=2, num_future=4), skip_bad=True)
    scenes = [scene for _, found in source.logs() for scene in found]
    assert source.report.entries
    assert len(scenes) + len(source.report.entries) == len(frames) - 5
    for scene in scenes:
        np.testing.assert_array_equal(scene.future_poses(4), targets[scene.token])


def test_jitter_of_a_sweep_is_no_gap(tmp_path):
    times = [1_600_000_000_000_000 + 500_000 * i + 50_000 * (i % 2) for i in range(14)]
    write_log(tmp_path, [make_frame(i, timestamp=time) for i, time in enumerate(times)])
    assert len(NavsimLogs(tmp_path, "mini")) == 1


def test_a_split_that_hides_objects_and_future_is_indexed(tmp_path):
    """Test servers give five frames without annotations; half of them hidden is damage."""
    frames = [make_frame(i) for i in range(5)]
    for frame in frames:
        del frame["anns"]
    write_log(tmp_path, frames)
    source = NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(num_future=0))
    scenes = source.scenes_of("log-a")
    assert [(scene.annotated, scene.num_future) for scene in scenes] == [(False, 0)] * 2
    build_index(source, tmp_path / "index")
    sample = SceneDataset(tmp_path / "index", horizon=None)[1]
    assert sample.target is None
    np.testing.assert_allclose(sample.history[0], scenes[1].history_poses(), atol=1e-6)
    with pytest.raises(DataError, match="0 future"):
        SceneDataset(tmp_path / "index", horizon=8)
    frames[2] = make_frame(2)
    write_log(tmp_path, frames)
    with pytest.raises(DataError, match="anns is absent in 3 of 4 frames"):
        NavsimLogs(tmp_path, "mini", scene_filter=SceneFilter(num_future=0)).scenes_of("log-a")


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x.jpg", "log-a/../../x", "", 3, None])
def test_camera_paths_stay_below_the_sensor_root(tmp_path, path):
    frame = make_frame(3)
    frame["cams"]["CAM_L0"]["data_path"] = path
    write_log(tmp_path, [make_frame(i) if i != 3 else frame for i in range(14)])
    with pytest.raises(DataError, match=r"CAM_L0\.data_path.*below the sensor root"):
        NavsimLogs(tmp_path, "mini").scenes_of("log-a")
