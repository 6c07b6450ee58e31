"""Run by the side environment's Python: an agent through NAVSIM's scene loader, metric caching and scoring.

    python devkit_agent_run.py v1.1|v2.2 DATA_ROOT WORK_FOLDER OUTPUT.npz

Looker and Brightness stand for a planner and its VLM: poses depend on ego states and on the picture's pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.schema import HiddenBatch
from navsim_ext.planners import baseline


class Brightness:
    """[B,1,1] mean of the front picture, 0 to 1."""

    fingerprint = Fingerprint("brightness", {})

    def __call__(self, scenes) -> HiddenBatch:
        means = [np.asarray(Image.open(paths["CAM_F0"])).mean() / 255.0 for paths in scenes.cameras]
        return HiddenBatch(torch.tensor(means)[:, None, None].float(), torch.ones(len(means), 1, dtype=torch.bool))


class Looker:
    """A share of the present speed: the brightness of the picture."""

    name = "looker"

    def plan(self, scenes, hidden=None):
        return baseline("constant_velocity").plan(scenes) * hidden.hidden[:, 0, :, None]


def main(version: str, root: str, work: str, output: str) -> None:
    import navsim
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from navsim.common.dataclasses import Scene, SensorConfig
    from navsim.common.dataloader import SceneFilter, SceneLoader
    from navsim.evaluate.pdm_score import pdm_score
    from navsim.planning.metric_caching.metric_cache_processor import MetricCacheProcessor
    from navsim.planning.scenario_builder.navsim_scenario import NavSimScenario

    from navsim_ext.devkit.agent import TriviumAgent

    agent = TriviumAgent(Looker(), Brightness())
    agent.initialize()
    first = version == "v1.1"
    sensors = {"sensor_blobs_path" if first else "original_sensor_path": Path(root, "sensor_blobs", "trainval")}
    loader = SceneLoader(
        data_path=Path(root, "navsim_logs", "trainval"),
        scene_filter=SceneFilter(num_history_frames=4, num_future_frames=10, frame_interval=1, has_route=True),
        sensor_config=agent.get_sensor_config(),
        **sensors,
    )
    folder = Path(navsim.__path__[0], "planning", "script", "config", "pdm_scoring")
    with initialize_config_dir(str(folder), version_base=None):
        cfg = compose("default_run_pdm_score", ["train_test_split=test", "experiment_name=x", "worker=sequential"])
    simulator, scorer = instantiate(cfg.simulator), instantiate(cfg.scorer)
    options = {} if first else {"proposal_sampling": simulator.proposal_sampling}
    policy = {} if first else {"traffic_agents_policy": instantiate(cfg.traffic_agents_policy.non_reactive,
                                                                    simulator.proposal_sampling)}  # fmt: skip
    poses, scores = [], []
    for token in loader.tokens:
        trajectory = agent.compute_trajectory(loader.get_agent_input_from_token(token))
        frames = loader.scene_frames_dicts[token]
        scene = Scene.from_scene_dict_list(frames, None, 4, 10, SensorConfig.build_no_sensors())
        scenario = NavSimScenario(scene, map_root=str(Path(root, "maps")), map_version="nuplan-maps-v1.0")
        processor = MetricCacheProcessor(work, force_feature_computation=True, **options)
        if first:
            path = processor.compute_metric_cache(scenario).file_name
            from navsim.planning.metric_caching.metric_cache import MetricCache  # noqa: F401  (its pickle names it)

            cache = read(path)
        else:
            cache = processor.compute_metric_cache(scenario)
        result = pdm_score(cache, trajectory, simulator.proposal_sampling, simulator, scorer, **policy)
        # v2.2 leaves the score to its evaluation script; progress tells as much about simulation and reference
        scores.append(result.score if first else result[0]["ego_progress"].iloc[0])
        poses.append(trajectory.poses)
    np.savez(output, tokens=np.array(loader.tokens), poses=np.array(poses), scores=np.array(scores, dtype=float))


def read(path: object):
    """A metric cache that NAVSIM has just written."""
    import lzma
    import pickle

    with lzma.open(path) as stream:
        return pickle.load(stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
