"""A test server's split, from its files to a submission: frames without objects and future, five for two scenes."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scene_worlds import make_frame, token

from navsim_ext import dataset
from navsim_ext.dataset import SceneDataset
from navsim_ext.devkit import submission
from navsim_ext.errors import DataError, MissingError
from navsim_ext.evaluation import score
from navsim_ext.evaluation.plan_only import plan_stages
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.readers import NavsimLogs, SceneFilter, read_split, second_stage_folder
from navsim_ext.readers.hidden_scenes import META_FOLDER, is_cut, read_hidden_scene
from navsim_ext.readers.second_stage import scan
from navsim_ext.runtime.config import compose

NAME, SPLIT = "private_test_hard_two_stage", "private_test_hard"
TEAM = ["team.name=a", "team.authors=b", "team.email=c", "team.institution=d", "team.country=e"]


def drive(name: str, first: int, *, second_stage: bool = False) -> list[dict]:
    """Five frames that hide their objects."""
    frames = []
    for i in range(5):
        frame = make_frame(first + i, log=name, scene_token=name, frame_idx=10 + i)
        del frame["anns"]
        frame["token"] += "7" if second_stage else ""
        for camera in frame["cams"].values():
            camera["data_path"] = f"{name}/{camera['data_path'].split('/')[1]}/{first + i}.jpg"
        frames.append(frame)
    return frames


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two recorded drives in one shuffled log, a pair of second-stage scenes for each, both YAML files, pictures."""
    first = [drive("drive-a", 0), drive("drive-b", 40)]
    second = [drive("drive-a", 8, second_stage=True), drive("drive-b", 48, second_stage=True)]
    log = [frame for pair in zip(*first) for frame in pair][::-1]  # neither by drive nor by time
    files = {f"navsim_logs/{SPLIT}/everything.pkl": log}
    files |= {f"{NAME}/{META_FOLDER}/{i}.pkl": frames for i, frames in enumerate(second)}
    for name, frames in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(frames))
    sensors = ((f"sensor_blobs/{SPLIT}", first), (f"{NAME}/sensor_blobs", second))
    for folder, drives in sensors:
        for frame in (frame for frames in drives for frame in frames):
            picture = tmp_path / folder / frame["cams"]["CAM_F0"]["data_path"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.touch()
    config = tmp_path / "train_test_split"
    (config / "scene_filter").mkdir(parents=True)
    listed = [[frame["token"] for frames in stage for frame in frames[3:]] for stage in (first, second)]
    (config / f"scene_filter/{NAME}.yaml").write_text(
        json.dumps(
            {"num_history_frames": 4, "num_future_frames": 8, "frame_interval": 1, "has_route": True, "log_names": None,
             "include_synthetic_scenes": True, "tokens": listed[0], "reactive_synthetic_initial_tokens": listed[1]}
        )
    )  # fmt: skip
    content = {"defaults": [{"scene_filter": NAME}], "data_split": SPLIT, "reactive_all_mapping": None}
    (config / f"{NAME}.yaml").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """Runs a command with its options."""

    def call(main, *options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["command", *options])
        main()

    return call


def indices(run, root: Path) -> list[str]:
    """Index folders of both stages, by the command."""
    common = [f"data.root={root}", f"data.split={SPLIT}", "data.maps_root=null",
              f"data.scene_filter={root}/train_test_split/scene_filter/{NAME}.yaml"]  # fmt: skip
    run(dataset.main, *common, f"output_dir={root}/first")
    run(dataset.main, *common, f"data.second_stage={root}/{NAME}", f"output_dir={root}/second")
    return [f"data.index={root}/first", f"data.second_stage={root}/second"]


def test_from_the_files_to_a_submission(root, run):
    data = [*indices(run, root), f"data.split_config={root}/train_test_split/{NAME}.yaml"]
    split = read_split(root / f"train_test_split/{NAME}.yaml")
    stages = [SceneDataset(root / name, horizon=None) for name in ("first", "second")]
    assert sorted(stages[0].tokens) == sorted(split.first_stage_tokens)
    assert sorted(stages[1].tokens) == sorted(split.second_stage_tokens)
    for stage in stages:
        for i in range(4):
            sample = stage[i]
            assert sample.target is None
            assert (stage.sensor_root / sample.cameras[0]["CAM_F0"]).is_file()
            assert sample.history[0, 3].abs().max() == 0.0
            away = sample.history[0, :, :2].norm(dim=1)  # m before now: the frames of one drive, in the order of time
            np.testing.assert_allclose(away, [6.0, 4.0, 2.0, 0.0], atol=1e-3)
    options = ["protocol=plan", "planner=constant_velocity", *data, f"output_dir={root}/planned"]
    plan_stages(compose("score", options), Console(file=io.StringIO()))
    table = pd.read_parquet(root / "planned/trajectories.parquet")
    assert sorted(table["token"]) == sorted((*split.first_stage_tokens, *split.second_stage_tokens))
    written = [f"trajectories={root}/planned/trajectories.parquet", f"output={root}/submission.pkl"]
    run(submission.main, *written, *TEAM, f"split_config={root}/train_test_split/{NAME}.yaml")
    found = submission.read_submission(root / "submission.pkl")
    assert [set(stage) for stage in found.stages] == [set(split.first_stage_tokens), set(split.second_stage_tokens)]


def test_scoring_says_why_it_cannot(root, run, capsys):
    config = root / f"train_test_split/{NAME}.yaml"
    with pytest.raises(DataError, match="only the server can score them"):
        BuildSettings.two_stage(str(root), str(config), str(root / "cache"))
    options = ["protocol=two_stage", *indices(run, root), f"data.split_config={config}", f"output_dir={root}/scores"]
    with pytest.raises(SystemExit):
        run(score.main, *options)
    assert "only the evaluation server knows" in capsys.readouterr().err
    with pytest.raises(DataError, match="metric_cache belong to scoring"):
        plan_stages(compose("score", [*options, "protocol=plan", "metric_cache=x"]), Console())
    with pytest.raises(MissingError, match="second index"):
        plan_stages(compose("score", [*options, "protocol=plan", "data.second_stage=null"]), Console())


def test_one_stage_is_planned_alone(root, run):
    """As private_test_e2e: no groups, one index, a submission of one stage."""
    options = ["protocol=plan", "planner=constant_velocity", indices(run, root)[0], f"output_dir={root}/planned"]
    table = plan_stages(compose("score", options), Console(file=io.StringIO()))
    poses = {row.token: np.asarray(row.poses).reshape(8, 3) for row in table.itertuples()}
    assert len(poses) == 4
    submission.write_submission(root / "s.pkl", poses, {key.split("=")[0][5:]: "x" for key in TEAM}, version="v1.1")


def test_what_is_broken_is_named_and_no_other_scene_lost(root):
    path = root / NAME / META_FOLDER / "1.pkl"
    frames = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(frames[:4]))
    (path.parent / "torn.pkl").write_bytes(path.read_bytes()[:300])
    found, bad = scan(str(path.parent))
    assert len(found) == 2
    assert ["1.pkl", "torn.pkl"] == [Path(name).name for name, _ in bad]
    assert "5 frame dictionaries" in str(bad[0][1])
    short = [dict(frames[4], token="c0ffee"), *frames[1:]]
    path.write_bytes(pickle.dumps([*short[1:], short[0]]))
    with pytest.raises(DataError, match="6 characters"):
        read_hidden_scene(path, 1)
    log = root / "navsim_logs" / SPLIT / "everything.pkl"
    frames = pickle.loads(log.read_bytes())
    log.write_bytes(pickle.dumps(frames[1:]))  # a drive of four frames, which NAVSIM leaves out in silence
    with pytest.raises(DataError, match="drive-b: 4 frames; 5 were expected"):
        NavsimLogs(root, SPLIT).scenes_of("everything")
    source = NavsimLogs(root, SPLIT, skip_bad=True)
    assert [scene.token for scene in source.scenes_of("everything")] == [token(3, "drive-a"), token(4, "drive-a")]
    assert source.report.counts == {"DataError": 1}
    frames[0]["frame_idx"] = "last"
    log.write_bytes(pickle.dumps(frames))
    with pytest.raises(DataError, match="frame_idx"):
        NavsimLogs(root, SPLIT).scenes_of("everything")
    with pytest.raises(DataError, match="set num_history_frames to 4"):
        NavsimLogs(root, SPLIT, scene_filter=SceneFilter(num_history=3)).scenes_of("everything")


def test_a_recorded_log_is_not_cut():
    frames = [make_frame(i, frame_idx=i) for i in range(5)]
    assert not is_cut(frames)
    assert not is_cut([*drive("a", 0), dict(drive("a", 5)[0])])  # six frames of one drive
    assert is_cut(drive("a", 0))
    with pytest.raises(MissingError, match=META_FOLDER):
        second_stage_folder("/nowhere", NAME)
