"""nuScenes' own tables, written here: a car that drives a known curve past known objects comes back as it was drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.frames import to_global, to_local
from navsim_ext.readers import NuScenes, SceneFilter, open_source
from navsim_ext.readers.source import NothingSelected
from navsim_ext.scene_index import build_index

COUNT, SPEED, RADIUS = 14, 6.0, 40.0  # keyframes at 2 Hz; m/s; m
LIDAR_AT, CAMERA_AT = np.array([0.94, 0.0, 1.84]), np.array([1.7, 0.1, 1.5])
FORWARD = [0.5, -0.5, 0.5, -0.5]  # camera axes x right, y down, z forward, seen from the car
UPRIGHT_LIDAR = [np.cos(-np.pi / 4), 0.0, 0.0, np.sin(-np.pi / 4)]  # nuScenes' lidar looks to the right


def yaw(angle: float) -> list[float]:
    return [float(np.cos(angle / 2)), 0.0, 0.0, float(np.sin(angle / 2))]


def ego_at(seconds: float) -> np.ndarray:
    """[3] a left curve of RADIUS from a place far from the origin, as nuScenes' maps have it."""
    angle = SPEED * seconds / RADIUS
    return to_global(np.array([RADIUS * np.sin(angle), RADIUS * (1 - np.cos(angle)), angle]), [600.0, 1600.0, 0.7])


def tables() -> dict[str, list[dict]]:
    """One scene with a lead car that keeps 12 m ahead on the same curve, a cone, and a car seen once."""
    made: dict[str, list[dict]] = {name: [] for name in ("sample", "sample_data", "ego_pose", "sample_annotation")}
    made["scene"] = [{"token": "s", "name": "scene-0061", "log_token": "l", "first_sample_token": "k0"}]
    made["log"] = [{"token": "l", "location": "singapore-onenorth"}]
    made["sensor"] = [{"token": "tl", "channel": "LIDAR_TOP"}, {"token": "tc", "channel": "CAM_FRONT"},
                      {"token": "tr", "channel": "RADAR_FRONT"}]  # fmt: skip
    made["calibrated_sensor"] = [
        {"token": "cl", "sensor_token": "tl", "translation": LIDAR_AT.tolist(), "rotation": UPRIGHT_LIDAR,
         "camera_intrinsic": []},
        {"token": "cc", "sensor_token": "tc", "translation": CAMERA_AT.tolist(), "rotation": FORWARD,
         "camera_intrinsic": [[1266.0, 0.0, 816.0], [0.0, 1266.0, 491.0], [0.0, 0.0, 1.0]]},
        {"token": "cr", "sensor_token": "tr", "translation": [3.4, 0, 0.5], "rotation": yaw(0.0),
         "camera_intrinsic": []},
    ]  # fmt: skip
    made["category"] = [{"token": "a", "name": "vehicle.car"}, {"token": "b", "name": "movable_object.trafficcone"},
                        {"token": "c", "name": "vehicle.motorcycle"}]  # fmt: skip
    made["instance"] = [{"token": "lead", "category_token": "a"}, {"token": "cone", "category_token": "b"},
                        {"token": "once", "category_token": "c"}]  # fmt: skip

    def pose(token: str, seconds: float) -> None:
        x, y, heading = ego_at(seconds)
        made["ego_pose"].append({"token": token, "translation": [x, y, 0.0], "rotation": yaw(heading)})

    def box(k: int, instance: str, at: np.ndarray, size: list[float]) -> None:
        made["sample_annotation"].append({"sample_token": f"k{k}", "instance_token": instance,
            "translation": [at[0], at[1], size[2] / 2], "rotation": yaw(at[2]), "size": size})  # fmt: skip

    for k in range(COUNT):
        time, late = k * 0.5, k * 0.5 + 0.04  # the camera fires 40 ms after the lidar
        made["sample"].append({"token": f"k{k}", "scene_token": "s", "timestamp": 1_532_402_927_000_000 + k * 500_000})
        pose(f"pl{k}", time)
        pose(f"pc{k}", late)
        for kind, ego, name in (("cl", f"pl{k}", f"sweep{k}.bin"), ("cc", f"pc{k}", f"CAM_FRONT/{k}.jpg"),
                                ("cr", "nowhere", "radar.pcd")):  # fmt: skip
            made["sample_data"].append({"sample_token": f"k{k}", "ego_pose_token": ego, "calibrated_sensor_token": kind,
                                        "filename": f"samples/{name}", "is_key_frame": True})  # fmt: skip
        made["sample_data"].append({"sample_token": f"k{k}", "ego_pose_token": "sweep", "calibrated_sensor_token": "cl",
                                    "filename": "sweeps/x.bin", "is_key_frame": False})  # fmt: skip
        box(k, "lead", ego_at(time + 2.0), [1.9, 4.6, 1.6])
        box(k, "cone", np.array([610.0, 1610.0, 0.0]), [0.4, 0.4, 0.8])
    box(3, "once", np.array([620.0, 1605.0, 1.0]), [0.8, 2.1, 1.4])
    made["sample"].reverse()  # tables are in no order
    return made


def write(root: Path, made: dict[str, list[dict]]) -> Path:
    (root / "v1.0-mini").mkdir(parents=True, exist_ok=True)
    for name, rows in made.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "nuscenes", tables())


def test_a_known_drive_comes_back(root):
    source = open_source(root, "v1.0-mini", scene_filter=SceneFilter(num_future=8))
    assert isinstance(source, NuScenes)
    assert source.tokens == ["k3", "k4", "k5"]  # windows of 4 + 8 of 14 keyframes
    scene = source.scene("k4")
    driven = np.stack([ego_at((k - 4) * 0.5 + 2.0) for k in range(1, 13)])
    np.testing.assert_allclose(scene.ego_global, driven, atol=1e-9)
    np.testing.assert_allclose(scene.future_poses(8), to_local(driven[4:], driven[3]), atol=1e-9)
    chord = 2 * RADIUS * np.sin(SPEED / RADIUS / 2)  # what a second of the curve moves the car, straight on
    np.testing.assert_allclose(scene.ego_dynamics[scene.now], [chord, 0.0, 0.0, chord**2 / RADIUS], atol=2e-3)
    assert scene.commands[scene.now].argmax() == 0  # left
    assert (scene.map_location, scene.log_name, scene.roadblock_ids) == ("singapore-onenorth", "scene-0061", ())


def test_objects_are_in_the_ego_frame_with_velocities_of_their_own(root):
    scene = open_source(root, "v1.0-mini", scene_filter=SceneFilter(num_future=8)).scene("k3")
    now = scene.annotations[scene.now]
    assert dict(zip(now.track_tokens, now.names, strict=True)) == {
        "lead": "vehicle", "cone": "traffic_cone", "once": "bicycle",
    }  # fmt: skip
    lead = now.track_tokens.index("lead")
    x, y, heading = to_local(ego_at(1.5 + 2.0), ego_at(1.5))
    np.testing.assert_allclose(now.boxes[lead], [x, y, 0.8, 4.6, 1.9, 1.6, heading], atol=1e-9)  # length before width
    chord = 2 * RADIUS * np.sin(SPEED / RADIUS / 2)
    expected = chord * np.array([np.cos(heading), np.sin(heading), 0.0])
    np.testing.assert_allclose(now.velocities[lead], expected, atol=1e-9)
    np.testing.assert_array_equal(now.velocities[[i for i in range(3) if i != lead]], 0.0)


def test_a_camera_is_where_the_car_was_when_it_fired(root):
    scene = open_source(root, "v1.0-mini", scene_filter=SceneFilter(num_future=8)).scene("k3")
    camera = scene.cameras["CAM_F0"]
    assert (camera.path, list(scene.cameras)) == ("samples/CAM_FRONT/3.jpg", ["CAM_F0"])
    moved = to_local(ego_at(1.54), ego_at(1.5))
    rotation = np.array([[np.cos(moved[2]), -np.sin(moved[2]), 0], [np.sin(moved[2]), np.cos(moved[2]), 0], [0, 0, 1]])
    at = rotation @ CAMERA_AT + [moved[0], moved[1], 0.0]  # in the ego frame of the lidar's instant
    in_ego = scene.lidar2ego @ [*camera.sensor2lidar_translation, 1.0]
    np.testing.assert_allclose(in_ego[:3], at, atol=1e-9)
    looks = scene.lidar2ego[:3, :3] @ camera.sensor2lidar_rotation @ [0.0, 0.0, 1.0]
    np.testing.assert_allclose(looks, rotation @ [1.0, 0.0, 0.0], atol=1e-9)


def test_the_index_of_a_version_is_built_and_pictures_are_asked_for(root, tmp_path):
    index = build_index(open_source(root, "v1.0-mini"), tmp_path / "index")
    assert (len(index), index.logs, index.camera_path(0, 0)) == (1, ("scene-0061",), "samples/CAM_FRONT/3.jpg")
    with pytest.raises(MissingError, match="download the pictures"):
        open_source(root, "v1.0-mini", required_cameras=["CAM_F0"]).scenes_of("scene-0061")
    source = open_source(root, "v1.0-mini")
    scene = source.scene("k3")
    with pytest.raises(DataError, match="protocol=open_loop"):
        source.map_for(scene)


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("ego_pose", "rotation", [2.0, 0.0, 0.0, 0.0], "length 2.0000"),
        ("ego_pose", "translation", [1.0, float("nan"), 0.0], "3 finite numbers"),
        ("sample_annotation", "size", [1.0, "x", 2.0], "3 finite numbers"),
        ("sample_data", "filename", "../../etc/passwd", "out of its folder"),
        ("sample_data", "ego_pose_token", "gone", "not in ego_pose.json"),
    ],
)
def test_a_bad_row_spoils_its_windows_alone(root, table, key, value, message):
    made = tables()
    for row in made[table]:
        if row.get("sample_token") == "k1" or row.get("token") in ("pl1", "pc1"):
            row[key] = value
    write(root, made)
    window = SceneFilter(num_history=2, num_future=4)
    with pytest.raises(DataError, match=message) as error:
        open_source(root, "v1.0-mini", scene_filter=window).scenes_of("scene-0061")
    assert "k1" in str(error.value)
    left = open_source(root, "v1.0-mini", scene_filter=window, skip_bad=True)
    assert left.tokens == [f"k{k}" for k in range(3, 10)]
    assert left.report.entries


@pytest.mark.parametrize(
    ("table", "content", "error"),
    [
        ("sample", "{}", DataError),
        ("sample", '[{"token": "k0", "scene_token": "s", "timestamp": "now"}]', DataError),
        ("scene", "[1, 2]", DataError),
        ("category", "[{", CorruptFile),
        ("instance", None, MissingError),
    ],
)
def test_a_damaged_table_is_named(root, table, content, error):
    path = root / "v1.0-mini" / f"{table}.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=table):
        open_source(root, "v1.0-mini").scenes_of("scene-0061")


def test_nothing_selected_is_an_error(root):
    with pytest.raises(MissingError, match="scene-0001"):
        open_source(root, "v1.0-mini", scene_filter=SceneFilter(log_names=["scene-0001"]))
    with pytest.raises(NothingSelected):
        len(open_source(root, "v1.0-mini", scene_filter=SceneFilter(num_future=40)))
