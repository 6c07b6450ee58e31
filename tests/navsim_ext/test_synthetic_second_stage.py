"""The synthetic second stage: the law goes on as recorded, others react, the formats are NAVSIM's, builds resume."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from reference_data import reference_path
from rich.console import Console
from test_synthetic_build import recipe

from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation.two_stage import Trajectories, evaluate
from navsim_ext.evaluation.two_stage_file import read_planners
from navsim_ext.evaluation.two_stage_planner import score_two_stages, summary_rows
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.frames import to_global
from navsim_ext.metric_cache import build as cache_build
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.pickles import Holder
from navsim_ext.readers import NavsimLogs, SceneFilter, SecondStageScenes, read_split
from navsim_ext.readers.second_stage import _load, scan
from navsim_ext.runtime.config import compose
from navsim_ext.scene_index import build_index
from navsim_ext.synthetic import second_stage
from navsim_ext.synthetic.build import build
from navsim_ext.synthetic.drive import FRAME_STEPS
from navsim_ext.synthetic.rollouts import SHIFT_OVER_M, Temper, beside, go_on, on_their_way, usable

NAME = "synthetic_two_stage"
WORLD = [
    "scenes=24",
    "recipe.cameras=[CAM_F0]",
    "recipe.image_size=[96,54]",
    "recipe.qa=false",
    "recipe.test_share=0.5",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder, recipe(*WORLD))
    second_stage.build(folder, NAME, groups=3, pairs=2)
    return folder


@pytest.fixture(scope="module")
def scenes(world) -> dict:
    logs = NavsimLogs(world, "test")
    found = SecondStageScenes(world / NAME, logs)
    return {scene.token: scene for _, scenes in found.logs() for scene in scenes}


@pytest.fixture(scope="module")
def run(world):
    _, manifest = second_stage.read_world(world)
    index = next(record.index for record in manifest.ordered() if record.part == "test")
    return recipe(*WORLD).run(index)


def test_the_same_driver_goes_on_as_it_was_recorded(run):
    begin, steps = run.first + 3 * FRAME_STEPS, 30
    went = go_on(run, begin, steps, Temper())
    for field in ("pose", "speed", "acceleration", "s", "waiting"):
        recorded = getattr(run.motion, field)[: begin + steps + 1]
        np.testing.assert_allclose(getattr(went, field), recorded, rtol=0.0, atol=1e-9)


def test_another_driver_leaves_the_past_alone_and_is_reacted_to(run):
    begin = run.first
    steps = len(run.motion.pose) - 1 - begin
    slow = go_on(run, begin, steps, Temper(pace=0.5))
    np.testing.assert_array_equal(slow.pose[: begin + 1], run.motion.pose[: begin + 1])
    assert slow.s[-1, 0] <= run.motion.s[-1, 0]
    assert usable(run, run.motion, begin, begin + steps)  # an expert's drive touches nobody
    on_somebody = slow.pose.copy()
    on_somebody[begin + 2, 0] = on_somebody[begin + 2, 1]
    assert not usable(run, type(slow)(on_somebody, *list(vars(slow).values())[1:]), begin, begin + steps)


def test_a_car_moves_aside_only_while_it_moves_on():
    u = np.linspace(0.0, 2.0 * SHIFT_OVER_M, 200)
    line = np.column_stack([u, np.zeros_like(u), np.zeros_like(u)])
    went = beside(line, u, 0.5)
    np.testing.assert_allclose(went[0], line[0])
    np.testing.assert_allclose(went[-1], line[-1] + [0.0, 0.5, 0.0], atol=1e-12)
    rear = went[:, :2] - 1.461 * np.column_stack([np.cos(went[:, 2]), np.sin(went[:, 2])])
    direction = np.arctan2(*np.flip(np.diff(rear, axis=0), axis=1).T)
    np.testing.assert_allclose(direction, 0.5 * (went[1:, 2] + went[:-1, 2]), atol=5e-4)  # it drives where it looks
    np.testing.assert_allclose(beside(line, np.zeros_like(u), 0.5), line, atol=1e-12)


def test_who_has_left_its_path_is_no_longer_told_of(run):
    motion = go_on(run, run.first, 20, Temper())
    motion.s[-1, 1:] = 1e6
    there = on_their_way(run, motion, -1)
    assert there[0]
    assert not any(there[i] for i, path in enumerate(run.cast.paths) if i and path is not None)


def test_split_names_what_is_there_and_the_scenes_continue_the_recorded_ones(world, scenes):
    split = read_split(world / "train_test_split" / f"{NAME}.yaml")
    assert len(split.groups) == 3
    assert not any(group.problem for group in split.groups)
    assert sorted(split.second_stage_tokens) == sorted(scenes)
    first = NavsimLogs(world, "test", scene_filter=split.scene_filter)
    recorded = {scene.token: scene for _, part in first.logs() for scene in part}
    assert sorted(recorded) == sorted(split.first_stage_tokens)
    for group in split.groups:
        now, prev = recorded[group.now], recorded[group.prev]
        assert now.timestamps_us[3] - prev.timestamps_us[3] == 500_000
        for pair in group.pairs:
            for token, original in zip(pair, (now, prev)):
                scene = scenes[token]
                assert scene.original_token == original.token
                assert scene.log_name == original.log_name
                assert scene.timestamps_us[3] == original.timestamps_us[11]  # 4 s later
                assert len(scene.later_objects) == len(scene.later_lights) == 8
                assert scene.map_location == original.map_location
                assert scene.roadblock_ids
                assert (world / NAME / "sensor_blobs" / scene.cameras["CAM_F0"].path).is_file()
            np.testing.assert_array_equal(scenes[pair[0]].ego_global[:3], scenes[pair[1]].ego_global[1:])
        starts = np.stack([scenes[pair[0]].ego_global[3, :2] for pair in group.pairs])
        assert np.hypot(*(starts[0] - starts[1])) > 0.05  # other drivers come elsewhere


def test_later_objects_go_on_from_the_last_frame(scenes):
    moved = 0
    for scene in scenes.values():
        annotations = scene.annotations[3]
        boxes = annotations.boxes[:, [0, 1, 6]].astype(float)
        here = dict(zip(annotations.track_tokens, to_global(boxes, scene.ego_global[3])[:, :2]))
        for token, pose, velocity in zip(
            scene.later_objects[0].track_tokens, scene.later_objects[0].poses, scene.later_objects[0].velocities
        ):
            if token in here:
                step = np.hypot(*(pose[:2] - here[token]))
                assert step < 0.5 * np.hypot(*velocity) + 1.5
                moved += step > 0.1
    assert moved


def fields_of(value, found: dict) -> None:
    """{class: names of its attributes} of everything in a second-stage pickle."""
    if isinstance(value, Holder):
        found.setdefault(value.kind, set()).update(value.fields)
        value = list(value.fields.values())
    if isinstance(value, dict):
        found.setdefault("keys", set()).update(map(str, value))
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            fields_of(entry, found)


def test_pickles_hold_what_navsims_own_hold(world):
    golden = sorted(
        reference_path("golden/navsim_two_stage/dataset/navhard_two_stage/synthetic_scene_pickles").glob("*")
    )
    theirs: dict = {}
    mine: dict = {}
    for path in golden:
        fields_of(_load(path), theirs)
    for path in (world / NAME / "synthetic_scene_pickles").glob("*.pkl"):
        fields_of(_load(path), mine)
    assert {"Agent", "TrafficLightStatusData", "keys"} <= mine.keys() <= theirs.keys()
    for kind in mine:
        assert mine[kind] == theirs[kind], kind


def test_everything_can_be_scored(world, tmp_path):
    split_config = world / "train_test_split" / f"{NAME}.yaml"
    cache_build.build(BuildSettings.two_stage(str(world), str(split_config), str(tmp_path / "cache")))
    split, cache = read_split(split_config), MetricCache(tmp_path / "cache")
    tokens = [*split.first_stage_tokens, *split.second_stage_tokens]
    poses = [np.column_stack([np.arange(1, 9) * 0.01, np.zeros(8), np.zeros(8)]) for _ in tokens]
    for traffic in ("reactive", "log_replay"):
        result = evaluate(Trajectories(tokens, poses, [0.5] * len(tokens)), split, cache, traffic=traffic, threads=1)
        assert result.complete
        assert 0.0 <= result.combined <= 1.0
        assert result.rows["valid"].all()
        assert result.rows["score"].notna().all()


def test_broken_pickles_cost_their_groups_and_no_other_scene(world, tmp_path):
    """Another class, a camera without its key, no objects after now: named and counted, the third group stands."""
    broken = tmp_path / "world"
    shutil.copytree(world, broken, symlinks=True)
    split_config = broken / "train_test_split" / f"{NAME}.yaml"
    split = read_split(split_config)
    files = {_load(path)["scene_metadata"]["initial_token"]: path for path in (broken / NAME).glob("*/*.pkl")}
    foreign, keyless = split.groups[0].pairs[0]
    silent = split.groups[1].pairs[1][1]
    contents = {token: dict(_load(files[token])) for token in (foreign, keyless, silent)}
    for content in contents.values():  # what is left has no object of the devkit
        content |= {"extended_detections_tracks": None, "extended_traffic_light_data": None}
    contents[foreign]["surprise"] = np.random.default_rng(0)
    del contents[keyless]["frames"][3]["camera_dict"]["cam_b0"]
    for token, content in contents.items():
        files[token].write_bytes(pickle.dumps(content))
    scan.cache_clear()
    report = cache_build.build(BuildSettings.two_stage(str(broken), str(split_config), str(tmp_path / "cache")))
    cache = MetricCache(tmp_path / "cache")
    assert report["counts"] == {"RefusedObject": 1, "DataError": 2, "MissingError": 1}  # the first tells no token
    reasons = {token: cache.why_missing(token) for token in (foreign, keyless, silent)}
    assert "1 of its files cannot be read" in reasons[foreign]
    assert "numpy.random" in reasons[foreign]
    assert "cam_b0" in reasons[keyless]
    assert "0 instants after now are known" in reasons[silent]
    tokens = [*split.first_stage_tokens, *split.second_stage_tokens]
    poses = [np.column_stack([np.arange(1, 9) * 0.01, np.zeros(8), np.zeros(8)]) for _ in tokens]
    result = evaluate(Trajectories(tokens, poses, [0.5] * len(tokens)), split, cache, threads=1)
    assert result.groups["valid"].tolist() == [False, False, True]
    assert foreign in result.groups["reason"][0] or keyless in result.groups["reason"][0]
    assert silent in result.groups["reason"][1]
    assert (~result.rows["valid"]).sum() == 3
    assert result.combined == result.groups["combined"][2]
    content = yaml.safe_load(split_config.read_text())
    content["reactive_all_mapping"][1][2].append(content["reactive_all_mapping"][0][2][1])
    split_config.write_text(yaml.safe_dump(content))  # a pair in two groups: both are lost, and it is said why
    again = evaluate(Trajectories(tokens, poses, [0.5] * len(tokens)), read_split(split_config), cache, threads=1)
    assert again.groups["valid"].tolist() == [False, False, True]
    assert again.combined == result.combined


def index_of(world: Path, folder: Path, *, second: bool) -> Path:
    split = read_split(world / "train_test_split" / f"{NAME}.yaml")
    logs = NavsimLogs(world, "test", scene_filter=split.scene_filter)
    source = SecondStageScenes(world / NAME, NavsimLogs(world, "test"), scene_filter=SceneFilter(num_future=0))
    build_index(source if second else logs, folder, cameras=("CAM_F0",))
    return folder


def test_a_planner_drives_both_stages_by_the_command_beside_blind_probes(world, tmp_path):
    split_config = world / "train_test_split" / f"{NAME}.yaml"
    cache_build.build(BuildSettings.two_stage(str(world), str(split_config), str(tmp_path / "cache")))
    indices = [index_of(world, tmp_path / name, second=name == "second") for name in ("first", "second")]
    options = [
        "protocol=two_stage", "planner=constant_velocity", f"data.split_config={split_config}", "probes=true",
        f"data.index={indices[0]}", f"data.second_stage={indices[1]}", f"metric_cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    output = tmp_path / "scores"
    cfg = compose("score", [*options, f"output_dir={output}"])
    results = score_two_stages(cfg, Console(file=io.StringIO()))
    assert results["constant_velocity"].complete
    assert results["probe_constant_velocity"].combined == results["constant_velocity"].combined
    again = read_planners(output / "trajectories.parquet")
    split, cache = read_split(split_config), MetricCache(tmp_path / "cache")
    assert evaluate(again["constant_velocity"], split, cache).combined == results["constant_velocity"].combined
    summary = json.loads((output / "two_stage.json").read_text())
    assert len(summary["planners"]) == 6
    assert "constant_velocity" in summary["verdicts"][0]
    assert all(len(row["cells"]) == 4 for row in summary_rows(summary))
    assert "two_stage" in Fingerprint.load(output).kind
    with pytest.raises(MissingError, match="second_stage"):
        score_two_stages(compose("score", [*options, "data.second_stage=null", "output_dir=x"]), Console())
    with pytest.raises(DataError, match="holds none of the"):
        score_two_stages(compose("score", [*options, f"data.second_stage={indices[0]}", "output_dir=x"]), Console())


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".pkl", ".jpg", ".json")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_half_made_stage_is_finished_to_the_same_bytes_and_other_options_are_refused(world):
    before = digests(world / NAME)
    groups = sorted((world / NAME / "groups").glob("*.json"))
    lost = json.loads(groups[1].read_text())["pairs"][0][0]
    groups[1].unlink()  # killed in the middle of this group
    (world / NAME / "synthetic_scene_pickles" / f"{lost}.pkl").unlink()
    assert second_stage.build(world, NAME, groups=3, pairs=2) == 3
    assert digests(world / NAME) == before
    with pytest.raises(FingerprintMismatch, match="pairs"):
        second_stage.build(world, NAME, groups=3, pairs=3)
    assert second_stage.build(world, NAME, groups=2, pairs=2) == 2
    assert len(read_split(world / "train_test_split" / f"{NAME}.yaml").groups) == 2
    assert len(list((world / NAME / "synthetic_scene_pickles").glob("*.pkl"))) == 8
    second_stage.build(world, NAME, groups=3, pairs=2)
    assert digests(world / NAME) == before


def test_what_is_no_world_is_named(tmp_path):
    with pytest.raises(MissingError, match="no synthetic world"):
        second_stage.build(tmp_path, NAME)
    alone = tmp_path / "alone"
    build(alone, recipe("scenes=3", "recipe.cameras=[]", "recipe.qa=false", "recipe.scenes_per_log=1"))
    with pytest.raises(DataError, match="no two neighbouring windows in test"):
        second_stage.build(alone, "other")
