"""Recorded drives and the logs written from them: an expert's drive in every situation, read back as it was."""

from __future__ import annotations

import itertools
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import shapely

from navsim_ext.frames import POSE_INTERVAL_S, to_global, wrap_angle
from navsim_ext.maps.nuplan_gpkg import load_map
from navsim_ext.readers.navsim_logs import NavsimLogs
from navsim_ext.readers.scene_filter import SceneFilter
from navsim_ext.scene import COMMANDS
from navsim_ext.synthetic import expert
from navsim_ext.synthetic.drive import NoDrive, record
from navsim_ext.synthetic.fids import Fids
from navsim_ext.synthetic.gpkg_writer import write_maps
from navsim_ext.synthetic.log_writer import encode, frames_of, log_name
from navsim_ext.synthetic.scenarios import SITUATIONS, Plan, Unsuitable, stage
from navsim_ext.synthetic.town import make_town

TOWN = make_town("us-nv-las-vegas-strip", 0)


def plan(kind: str) -> Plan:
    return Plan(TOWN, kind, warm_up_s=3.0, duration_s=8.0, focus_s=5.25)


@pytest.fixture(scope="module")
def drives():
    return {kind: record(plan(kind), "test", kind) for kind in SITUATIONS}


@pytest.mark.parametrize("kind", sorted(SITUATIONS))
def test_the_ego_drives_like_an_expert(drives, kind):
    drive = drives[kind]
    assert drive.ego.shape == (17, 3)
    speed, acceleration = drive.ego_dynamics[:, 0], drive.ego_dynamics[:, 2]
    assert speed.min() >= 0.0
    assert -expert.MAX_BRAKING <= acceleration.min()
    assert acceleration.max() <= expert.MAX_ACCELERATION
    # The distance driven between frames fits the mean speed, and the car moves where it points.
    step = np.diff(drive.ego[:, :2], axis=0)
    distance = np.hypot(*step.T)
    assert distance == pytest.approx(0.5 * (speed[1:] + speed[:-1]) * POSE_INTERVAL_S, abs=0.2)
    moving = distance > 0.5
    course = np.arctan2(step[:, 1], step[:, 0])
    middle = drive.ego[:-1, 2] + 0.5 * wrap_angle(np.diff(drive.ego[:, 2]))
    assert np.abs(wrap_angle(course - middle))[moving].max(initial=0.0) < 0.06
    # Nobody is touched in any frame.
    size = np.array([drive.cast.rows[member]["size"][:2] for member in drive.members]).reshape(-1, 2)
    ego_size = np.array(drive.cast.rows[0]["size"][:2])
    for pose, objects in zip(drive.ego, drive.objects):
        centre = np.append(pose[:2] + 1.461 * np.array([np.cos(pose[2]), np.sin(pose[2])]), pose[2])
        assert not expert.overlap(np.tile(centre, (len(objects), 1)), ego_size, objects, size).any()


def test_situations_contain_what_they_are_called(drives):
    assert np.ptp(np.unwrap(drives["turn"].ego[:, 2])) > 0.5
    assert np.ptp(np.unwrap(drives["bend"].ego[:, 2])) > 0.5
    assert drives["start"].ego_dynamics[0, 0] < 0.5
    assert drives["start"].ego_dynamics[-1, 0] > 2.0
    assert drives["red"].ego_dynamics[:, 2].min() < -0.8
    assert drives["leader"].braking.any()
    assert "pedestrian" in [drives["pedestrian"].cast.names[m] for m in drives["pedestrian"].members]
    assert "bicycle" in [drives["cyclist"].cast.names[m] for m in drives["cyclist"].members]
    lanes = [TOWN.lanes[lane] for lane, _ in drives["double_parked"].cast.paths[0].lanes]
    assert lanes[0].group == lanes[1].group
    assert lanes[0].lane_index != lanes[1].lane_index


def test_a_drive_follows_from_its_key():
    first, again, other = (record(plan("queue"), "same", n) for n in (1, 1, 2))
    assert np.array_equal(first.ego, again.ego)
    assert np.array_equal(first.objects, again.objects)
    assert first.ego.shape == other.ego.shape
    assert not np.array_equal(first.ego, other.ego)


def test_a_lane_too_short_for_the_change_is_unsuitable():
    """In this town one lane of 66.6 m is long enough to be chosen and too short to change out of."""
    town = make_town("us-pa-pittsburgh-hazelwood", 3)
    ended = Counter()
    for draw in range(200):
        try:
            stage(Plan(town, "double_parked", 3.0, 8.0, 5.25), np.random.default_rng(draw))
            ended["staged"] += 1
        except Unsuitable as reason:
            ended[str(reason)] += 1
    assert ended["staged"] > 0
    assert ended["the lane is too short to change out of it"] > 0


def test_an_impossible_situation_says_what_was_tried(monkeypatch):
    monkeypatch.setattr(expert, "fault", lambda *_: "braking")
    with pytest.raises(NoDrive, match=r"'cruise' drive in town us-nv-las-vegas-strip.*braking"):
        record(plan("cruise"), "never")


@pytest.fixture(scope="module")
def dataset(drives, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_maps(root / "maps", 0)
    (root / "navsim_logs/trainval").mkdir(parents=True)
    names = {}
    for index, (kind, drive) in enumerate(drives.items()):
        names[kind] = log_name(0, index)
        content = encode(frames_of(drive, names[kind], (960, 540)))
        (root / f"navsim_logs/trainval/{names[kind]}.pkl").write_bytes(content)
    return root, names


def test_logs_read_back_as_the_drives(dataset, drives):
    root, names = dataset
    source = NavsimLogs(root, "trainval", maps_root=root / "maps", scene_filter=SceneFilter())
    tokens = source.tokens
    assert len(tokens) == len(set(tokens)) == 4 * len(names)
    assert all(re.fullmatch("[0-9a-f]{16}", token) for token in tokens)
    fids = Fids(TOWN)
    for kind, name in names.items():
        drive = drives[kind]
        for window, scene in enumerate(source.scenes_of(name)):
            frames = slice(window, window + 14)
            assert np.abs(scene.ego_global[:, :2] - TOWN.origin - drive.ego[frames, :2]).max() < 1e-6
            assert np.abs(wrap_angle(scene.ego_global[:, 2] - drive.ego[frames, 2])).max() < 1e-9
            assert np.allclose(scene.ego_dynamics, drive.ego_dynamics[frames], atol=1e-5)
            assert set(np.diff(scene.timestamps_us)) == {500_000}
            objects, now = scene.annotations[scene.now], window + 3
            globally = to_global(objects.boxes[:, [0, 1, 6]].astype(float), scene.ego_global[scene.now])
            wanted = drive.objects[now]
            assert np.abs(globally[:, :2] - TOWN.origin - wanted[:, :2]).max() < 1e-4
            assert np.abs(wrap_angle(globally[:, 2] - wanted[:, 2])).max() < 1e-4
            speeds = np.hypot(*objects.velocities[:, :2].T)
            assert np.allclose(speeds, drive.speeds[now], atol=1e-4)
            assert np.array_equal(objects.boxes[:, 2], objects.boxes[:, 5] / 2)  # everything stands on the ground
            by_fid = {str(fids.connector(c.index)): c.index for c in TOWN.connectors}
            for connector, red in scene.traffic_lights[scene.now]:
                assert red is not bool(drive.green[now, by_fid[connector]])


def test_route_is_connected_and_starts_under_the_ego(dataset):
    root, names = dataset
    source = NavsimLogs(root, "trainval", maps_root=root / "maps", scene_filter=SceneFilter())
    vector_map = load_map(root / "maps", TOWN.location)
    for name in names.values():
        scene = source.scenes_of(name)[0]
        blocks = [vector_map.block_node_by_fid[block] for block in scene.roadblock_ids]
        assert len(blocks) >= 3
        for a, b in itertools.pairwise(blocks):
            assert b in vector_map.block_successors[a]
        first = source.scenes_of(name)[0].ego_global[0, :2]
        polygons = [*vector_map.roadblocks.polygons, *vector_map.roadblock_connectors.polygons]
        assert polygons[blocks[0]].distance(shapely.Point(first)) < 0.1


def test_command_names_the_turn(drives, dataset):
    root, names = dataset
    source = NavsimLogs(root, "trainval", maps_root=root / "maps", scene_filter=SceneFilter())
    path = drives["turn"].cast.paths[0]
    turn = TOWN.connectors[path.crossings[1].connector].turn
    said = [COMMANDS[int(scene.commands[scene.now].argmax())] for scene in source.scenes_of(names["turn"])]
    assert turn in said
    turned = np.unwrap(drives["turn"].ego[:, 2])
    assert (turned[-1] > turned[0]) == (turn == "left")
    straight = source.scenes_of(names["cruise"])[0]
    assert COMMANDS[int(straight.commands[straight.now].argmax())] == "straight"


def test_frames_have_the_keys_and_types_of_openscene(dataset, reference):
    root, names = dataset
    golden_log = sorted((reference("golden/navsim/dataset") / "navsim_logs/trainval").glob("*.pkl"))[0]
    golden = pickle.loads(golden_log.read_bytes())[3]
    mine = pickle.loads((root / f"navsim_logs/trainval/{names['turn']}.pkl").read_bytes())[3]

    def shape(value):
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        if isinstance(value, np.ndarray):
            kind = value.dtype.kind
            return ("array", kind, tuple("N" if n not in (2, 3, 4, 5, 7, 18) else n for n in value.shape))
        return type(value).__name__

    for frame in (golden, mine):
        for key in ("gt_boxes", "gt_velocity_3d"):  # N objects
            frame["anns"][key] = frame["anns"][key][:0]
        frame["anns"]["gt_names"] = frame["anns"]["gt_names"][:0]
    assert shape(mine) == shape(golden)
    assert set(golden) == set(mine)


def test_log_names_are_unique_and_in_order():
    names = [log_name(3, index) for index in range(5000)]
    assert len(set(names)) == 5000
    assert names == sorted(names)
