"""Second-stage pickles: what NAVSIM writes is read; everything else is refused by name."""

from __future__ import annotations

import pickle
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from two_stage_golden import FOLDER, golden_groups

from navsim_ext import pickles
from navsim_ext.errors import DataError, MissingError
from navsim_ext.pdm import observation
from navsim_ext.pickles import Holder, RefusedObject
from navsim_ext.readers import second_stage, second_stage_folder
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.readers.second_stage import STAND_INS, SecondStageScenes, read_scene, scan

PICKLES = FOLDER / "pickles"
VARIANTS = ("posix", "inline_future", "no_lights")


@pytest.mark.parametrize("variant", VARIANTS)
def test_scenes_as_navsim_wrote_them(variant):
    scene = read_scene(PICKLES / f"{variant}.pkl")
    assert len(scene.token) == 17
    assert scene.is_synthetic
    assert scene.num_history == 4
    assert len(scene.original_token) == 16
    assert scene.ego_global.dtype == np.float64
    assert scene.ego_dynamics.dtype == np.float32
    frames = 12 if variant == "inline_future" else 4
    assert len(scene.frame_tokens) == frames
    assert len(scene.later_objects) == {"posix": 10, "inline_future": 0, "no_lights": 8}[variant]
    assert (len(scene.later_lights) == 0) == (variant != "posix")
    assert scene.cameras["CAM_F0"].path.startswith(scene.log_name)
    assert scene.cameras["CAM_F0"].path.endswith(".jpg")
    tracks = observation.tracks(scene, 9)  # 4 s of traffic are known either way
    assert np.isfinite(tracks.poses).all(axis=-1).any(axis=1).all()
    assert np.isnan(observation.human_poses(scene)).all()  # nobody drove it


def thawed(value):
    """Holders as plain namespaces, so that a test may change them; ``frozen`` pickles them under devkit names."""
    if isinstance(value, Holder):
        return types.SimpleNamespace(
            kind=value.kind, args=value.args, fields={k: thawed(v) for k, v in value.fields.items()}
        )
    if isinstance(value, dict):
        return {key: thawed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [thawed(item) for item in value]
    return value


def content_of(variant: str = "inline_future") -> dict:
    """A scene without devkit objects, as plain containers."""
    return thawed(pickles.load(PICKLES / f"{variant}.pkl", also_allowed=STAND_INS))


def written(content: dict, path: Path) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL))
    return path


def test_an_unchanged_copy_is_read(tmp_path):
    scene = read_scene(written(content_of(), tmp_path / "another_name.pkl"))
    assert scene.token == read_scene(PICKLES / "inline_future.pkl").token


def set_in(content, keys, value):
    for key in keys[:-1]:
        content = content[key]
    if value is KeyError:
        del content[keys[-1]]
    else:
        content[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["frames", 3, "camera_dict", "cam_b0"], KeyError, "cam_b0"),
        (["frames", 3, "camera_dict"], None, "camera_dict"),
        (["frames", 3, "camera_dict", "cam_b0"], np.zeros(3), "a dict with data_path"),
        (["frames", 3, "camera_dict", "cam_f0", "data_path"], "../../x.jpg", "data_path"),
        (["frames", 3, "annotations", "names"], np.array(5.0), "a list of texts"),
        (["frames", 3, "annotations", "track_tokens"], 7, "a list of texts"),
        (["scene_metadata", "num_history_frames"], np.zeros(2), "history frames"),
        (["scene_metadata", "map_name"], np.zeros(2), "map_name"),
        (["frames", 3, "token"], "short", "initial_token"),
        (["frames", 2, "ego_status", "ego_pose"], np.array([0.0, np.nan, 0.0]), "ego_pose"),
        (["frames", 2, "ego_status", "driving_command"], np.array([1, 1, 0, 0]), "one-hot"),
        (["frames", 1, "annotations", "names"], ["vehicle"] * 3, "boxes"),
        (["frames", 1, "annotations", "velocity_3d"], KeyError, "velocity_3d"),
        (["frames", 0, "timestamp"], "now", "timestamp"),
        (["frames", 0, "traffic_lights"], [1, 2], "traffic_lights"),
        (["frames"], [], "at least 4"),
        (["frames"], "text", "at least 4"),
        (["scene_metadata", "map_name"], "atlantis", "atlantis"),
        (["scene_metadata", "log_name"], KeyError, "log_name"),
        (["scene_metadata"], KeyError, "no second-stage scene"),
        (["extended_detections_tracks"], {"a": 1}, "extended detections"),
        (["extended_detections_tracks"], [5], "extended detections 0"),
        (["extended_traffic_light_data"], [5], "extended lights 0"),
    ],
)
def test_broken_promises_are_named(tmp_path, keys, value, message):
    content = content_of()
    set_in(content, keys, value)
    path = written(content, tmp_path / "broken.pkl")
    with pytest.raises(DataError, match=message) as error:
        read_scene(path)
    assert "broken.pkl" in str(error.value)


def test_other_classes_are_refused(tmp_path):
    content = content_of()
    content["frames"][0]["surprise"] = np.random.default_rng(0)
    with pytest.raises(RefusedObject, match="numpy"):
        read_scene(written(content, tmp_path / "hostile.pkl"))


def test_absent_extended_detections_cannot_be_scored_but_read(tmp_path):
    content = content_of()
    del content["frames"][4:]
    content["extended_detections_tracks"] = None
    scene = read_scene(written(content, tmp_path / "cut.pkl"))
    with pytest.raises(DataError, match="0 instants after now are known"):
        observation.tracks(scene, 9)


def test_lights_past_the_end_are_none():
    scene = read_scene(PICKLES / "no_lights.pkl")
    every = {connector for frame in scene.traffic_lights for connector, _ in frame}
    _, red = observation.red_connectors(scene, every)
    assert not red[:, 1:].any()


def test_a_folder_of_scenes(tmp_path):
    second_stage.scan.cache_clear()
    folder = tmp_path / "navhard_two_stage" / "synthetic_scene_pickles"
    folder.mkdir(parents=True)
    for variant in VARIANTS:
        shutil.copy(PICKLES / f"{variant}.pkl", folder / f"{variant}.pkl")
    (folder / "torn.pkl").write_bytes((PICKLES / "posix.pkl").read_bytes()[:500])
    found, bad = scan(str(folder))
    assert len(found) == 3
    assert [Path(path).name for path, _ in bad] == ["torn.pkl"]
    root = second_stage_folder(tmp_path, "any_name")
    assert root.name == "navhard_two_stage"
    scenes = SecondStageScenes(root, None, skip_bad=True)
    assert len(scenes) == 3
    assert scenes.report.counts == {"DamagedPickle": 1}
    chosen = found[0]
    one = SecondStageScenes(root, None, scene_filter=SceneFilter(log_names=[chosen.log_name], tokens=[chosen.token]))
    assert one.tokens == [chosen.token]
    assert one.scene(chosen.token).log_name == chosen.log_name
    blind = SecondStageScenes(root, None, scene_filter=one.scene_filter, required_cameras=["CAM_F0"])
    with pytest.raises(MissingError, match="download the sensor blobs"):
        list(blind.logs())


def test_where_the_second_stage_is(tmp_path):
    with pytest.raises(MissingError, match="second stage"):
        second_stage_folder(tmp_path, "navhard")
    for name in ("warmup_two_stage", "navhard_two_stage"):
        (tmp_path / name / "synthetic_scene_pickles").mkdir(parents=True)
    with pytest.raises(DataError, match="several second stages"):
        second_stage_folder(tmp_path, "other")
    assert second_stage_folder(tmp_path, "navhard_two_stage").name == "navhard_two_stage"
    assert second_stage_folder(tmp_path, "x", tmp_path / "warmup_two_stage").name == "warmup_two_stage"
    with pytest.raises(MissingError, match=r"no \*\.pkl"):
        scan(str(tmp_path / "navhard_two_stage" / "synthetic_scene_pickles"))


def test_second_stage_records_know_nobody_drove_them():
    cache, _, split = golden_groups()
    for token in split.second_stage_tokens:
        record = cache.load(token)
        assert record.versions == ("v2",)
        assert np.isnan(record.human_sub_scores).all()


def test_an_index_of_the_second_stage(tmp_path):
    """Planning needs no future: the index of second-stage scenes has histories, commands and pictures, no targets."""
    from navsim_ext.scene_index import build_index

    second_stage.scan.cache_clear()
    folder = tmp_path / "navhard_two_stage" / "synthetic_scene_pickles"
    folder.mkdir(parents=True)
    for variant in VARIANTS:
        shutil.copy(PICKLES / f"{variant}.pkl", folder / f"{variant}.pkl")
    source = SecondStageScenes(folder.parent, None, scene_filter=SceneFilter(num_future=0))
    index = build_index(source, tmp_path / "index")
    assert len(index) == 3
    assert index.arrays["history"].shape == (3, 4, 3)
    assert index.arrays["target"].shape == (3, 0, 3)
    scene = source.scene(source.tokens[0])
    np.testing.assert_allclose(index.arrays["status"][0], scene.status())
    assert index.camera_path(0, 0) == scene.cameras["CAM_F0"].path
