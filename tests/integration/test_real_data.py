"""Real recordings: nuScenes scenes through rendering, metric cache and scores; all three stages by the script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from navsim_ext.dataset import SceneDataset
from navsim_ext.evaluation.score import score_planner
from navsim_ext.metric_cache.build import build, settings_from
from navsim_ext.rendering.render import render
from navsim_ext.runtime.config import compose

ROOT = Path(__file__).resolve().parents[2]
SCENE = "scene-0061"  # turns at a junction among many pedestrians


@pytest.fixture(scope="module")
def recorded(reference, tmp_path_factory):
    """One nuScenes scene with rendered pictures, index and metric cache."""
    source = reference("real/nuscenes_mini") / f"{SCENE}.pkl"
    folder = tmp_path_factory.mktemp("real")
    (folder / "scenes" / "test").mkdir(parents=True)
    (folder / "scenes" / "test" / source.name).symlink_to(source)
    data = [f"data.root={folder}/scenes", "data.split=test"]
    render(compose("render", [*data, "image_size=[160,90]", f"output_dir={folder}/world"]))
    options = [*data, f"output_dir={folder}/metric_cache"]
    build(settings_from(compose("metric_cache", options)))
    return folder


def test_every_window_has_a_picture_of_its_own(recorded):
    dataset = SceneDataset(recorded / "world" / "index")
    assert len(dataset) > 20
    pictures = [dataset.sensor_root / dataset[i].cameras[0]["CAM_F0"] for i in range(len(dataset))]
    arrays = [np.asarray(Image.open(path)) for path in pictures]
    assert {array.shape for array in arrays} == {(90, 160, 3)}
    assert all(array.std() > 20 for array in arrays)
    assert len({path.read_bytes() for path in pictures}) > len(pictures) // 2  # a car that waits sees the same twice


@pytest.fixture(scope="module")
def scores(recorded):
    """Score tables of three planners."""
    tables = {}
    for planner in ("human", "constant_velocity", "pdm_closed"):
        options = [
            f"planner={planner}", f"data.index={recorded}/world/index", f"metric_cache={recorded}/metric_cache",
            "data.split=nuscenes_mini", f"output_dir={recorded}/scores/{planner}",
        ]  # fmt: skip
        tables[planner] = score_planner(compose("score", options), Console(quiet=True))
    return tables


def test_scores_of_rebuilt_maps_say_so(recorded, scores):
    for planner, table in scores.items():
        assert table["valid"].all(), table["reason"].unique()
        assert set(table["map_label"]) == {"approx"}
        identity = json.loads((recorded / "scores" / planner / "aggregate.json").read_text())["identity"]
        assert identity["map_labels"] == ["approx"]


def test_the_human_keeps_to_the_rebuilt_road(scores):
    """Windows that do not were left out when they were read; the simulated drive stays inside too."""
    assert scores["human"]["v1_dac"].mean() > 0.95


def test_who_knows_the_road_beats_who_goes_straight_on(scores):
    """Where the road turns; in scenes of waiting cars constant velocity is as good as the human."""
    means = {planner: table["pdms_v1"].mean() for planner, table in scores.items()}
    assert means["human"] > means["constant_velocity"] + 0.5
    assert means["pdm_closed"] > means["constant_velocity"] + 0.5


def run_script(output: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON_BIN": sys.executable, "OUTPUT_DIR": str(output), **variables}
    command = ["bash", str(ROOT / "scripts" / "real_data.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("name", "value"), [("DRIVELM", "nowhere.json"), ("SCENARIOS", "nowhere"), ("TEST_SCENES", "scene-0")]
)
def test_script_says_what_is_missing(tmp_path, name, value):
    (tmp_path / "drivelm.json").touch()
    (tmp_path / "scenes").mkdir()
    good = {"DRIVELM": str(tmp_path / "drivelm.json"), "SCENARIOS": str(tmp_path / "scenes")}
    ended = run_script(tmp_path / "out", **good | {name: value})
    assert ended.returncode == 2
    assert name in ended.stderr
    assert value in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_three_stages_on_real_recordings(reference, tmp_path):
    drivelm, scenarios = reference("real/drivelm/train_sample.json"), reference("real/nuscenes_mini")
    ended = run_script(tmp_path, DRIVELM=str(drivelm), SCENARIOS=str(scenarios), STEPS="2")
    assert ended.returncode == 0, ended.stderr[-4000:]
    table = ended.stdout.rpartition("== all planners")[2]
    for planner in ("human", "constant_velocity", "pdm_closed", "diffusion_il", "diffusion_rl"):
        assert planner in table
    assert "approx" in table
    report = json.loads((tmp_path / "stage1" / "metrics.json").read_text())
    assert report["global_step"] == 2
    train, test = (SceneDataset(tmp_path / "world" / part / "index").index.logs for part in ("train", "test"))
    assert not set(train) & set(test)
    assert len(train) + len(test) == len(list(scenarios.glob("*.pkl")))
