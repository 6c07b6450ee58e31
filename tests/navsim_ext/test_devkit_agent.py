"""The NAVSIM agent: what NAVSIM hands over becomes the batch that the index gives; and, where the devkit's environment
is, the agent inside NAVSIM itself."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from devkit_agent_run import Brightness, Looker
from PIL import Image

from navsim_ext.dataset import JoinHidden, SceneDataset
from navsim_ext.devkit.agent_input import scene_batch
from navsim_ext.errors import DataError
from navsim_ext.metric_cache.build import build as build_cache
from navsim_ext.metric_cache.schema import MetricCache
from navsim_ext.metric_cache.settings import BuildSettings
from navsim_ext.pdm import score
from navsim_ext.readers.navsim_logs import NavsimLogs
from navsim_ext.runtime.config import compose
from navsim_ext.scene_index import build_index
from navsim_ext.synthetic.build import build, recipe_of

DEVKIT_VARIABLE = "TRIVIUM_DEVKIT"
SPLIT = "trainval"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder, recipe_of(compose("synthetic", ["output_dir=x", "scenes=12", "recipe.qa=false"])))
    build_index(NavsimLogs(folder, SPLIT), folder / "index", cameras=["CAM_F0"])
    return folder


@pytest.fixture(scope="module")
def dataset(world) -> SceneDataset:
    return SceneDataset(world / "index", cameras=["CAM_F0"])


def agent_inputs(world: Path) -> dict[str, SimpleNamespace]:
    """token -> ego states and front picture as NAVSIM's AgentInput holds them, from the logs with other formulas."""
    inputs = {}
    for path in sorted((world / "navsim_logs" / SPLIT).glob("*.pkl")):
        frames = pickle.loads(path.read_bytes())
        places = np.array([complex(*frame["ego2global_translation"][:2]) for frame in frames])
        turns = np.array([np.exp(2j * np.angle(complex(f["ego2global_rotation"][0], f["ego2global_rotation"][3])))
                          for f in frames])  # fmt: skip
        for now in range(3, len(frames)):
            statuses = []
            for i in range(now - 3, now + 1):
                place, heading = (places[i] - places[now]) / turns[now], np.angle(turns[i] / turns[now])
                dynamics = np.array(frames[i]["ego_dynamic_state"], dtype=np.float32)
                statuses.append(
                    SimpleNamespace(
                        ego_pose=np.array([place.real, place.imag, heading], dtype=np.float32),
                        ego_velocity=dynamics[:2],
                        ego_acceleration=dynamics[2:],
                        driving_command=frames[i]["driving_command"],
                    )
                )
            picture = world / "sensor_blobs" / SPLIT / frames[now]["cams"]["CAM_F0"]["data_path"]
            image = np.array(Image.open(picture)) if picture.is_file() else None
            cameras = [SimpleNamespace(cam_f0=SimpleNamespace(image=image))]
            inputs[frames[now]["token"]] = SimpleNamespace(ego_statuses=statuses, cameras=cameras)
    return inputs


def test_an_agent_input_becomes_the_batch_of_the_index(world, dataset, tmp_path):
    inputs, keys = agent_inputs(world), set()
    assert len(dataset) > 4
    for i, token in enumerate(dataset.tokens):
        expected, batch = dataset[i], scene_batch(inputs[token], ["CAM_F0"], tmp_path)
        np.testing.assert_allclose(batch.history[0], np.asarray(expected.history).reshape(4, 3), rtol=0, atol=2e-5)
        np.testing.assert_allclose(batch.status[0], np.asarray(expected.status).reshape(8), rtol=0, atol=1e-6)
        written = np.asarray(Image.open(batch.cameras[0]["CAM_F0"]))
        np.testing.assert_array_equal(written, inputs[token].cameras[-1].cam_f0.image)
        keys |= set(batch.token)
        assert scene_batch(inputs[token], [], tmp_path).token == batch.token
    assert len(keys) == len(dataset)  # one noise for each scene


def test_a_missing_picture_is_named(world, dataset, tmp_path):
    given = agent_inputs(world)[dataset.tokens[0]]
    given.cameras[-1].cam_f0.image = None
    with pytest.raises(DataError, match="CAM_F0"):
        scene_batch(given, ["CAM_F0"], tmp_path)


@pytest.mark.parametrize("version", ["v1.1", "v2.2"])
def test_inside_navsim_an_agent_drives_and_scores_as_here(world, dataset, tmp_path, version):
    """NAVSIM's SceneLoader, agent interface, metric caching and pdm_score against our index, cache and scorer."""
    devkit = os.environ.get(DEVKIT_VARIABLE)
    if not devkit:
        pytest.skip(f"NAVSIM ABSENT: set {DEVKIT_VARIABLE} to the folder of scripts/setup_devkit.sh to run this test")
    devkit = Path(devkit).resolve()
    output = tmp_path / "navsim.npz"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (devkit / f"navsim_{version}", devkit / "nuplan-devkit", REPOSITORY))),
        "OPENSCENE_DATA_ROOT": str(world),
        "NUPLAN_MAPS_ROOT": str(world / "maps"),
        "NAVSIM_EXP_ROOT": str(tmp_path),
    }
    script = Path(__file__).with_name("devkit_agent_run.py")
    command = [devkit / "venv/bin/python", script, version, world, tmp_path / "cache", output]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = np.load(output)
    assert sorted(found["tokens"]) == sorted(dataset.tokens)
    looker, poses = Looker(), {}
    for i, token in enumerate(dataset.tokens):
        scenes, _ = JoinHidden(None)([dataset[i]])
        paths = [{"CAM_F0": str(Path(dataset.sensor_root, scenes.cameras[0]["CAM_F0"]))}]
        poses[token] = looker.plan(scenes, Brightness()(SimpleNamespace(cameras=paths)))[0].numpy()
    expected = np.array([poses[token] for token in found["tokens"]])
    np.testing.assert_allclose(found["poses"], expected, rtol=0, atol=1e-6)

    build_cache(BuildSettings(str(world), SPLIT, str(tmp_path / "ours")))
    result = score(found["tokens"].tolist(), found["poses"], MetricCache(tmp_path / "ours"))
    column = "pdms_v1" if version == "v1.1" else "v2_ep"
    assert len(np.unique(found["scores"])) > 2
    np.testing.assert_allclose(result[column], found["scores"], rtol=0, atol=1e-8)
