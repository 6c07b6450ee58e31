"""Reward hacking on real PDM scores: an unguarded reward rings the alarm of divergence, a guarded one does not.

No verdict hangs on a training run: the policies are given. Each drives the recorded path faster and more jerkily than
the one before, as a reward for progress alone allows. What is tested is what decides: scores, rewards, statistics and
alarms.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "navsim_ext"))
from golden_scenes import unpack_small

from navsim_ext.dataset import SceneDataset, build_index
from navsim_ext.metric_cache.build import BuildSettings, build
from navsim_ext.metric_cache.scorer import PdmScorer
from navsim_ext.readers import SceneFilter, open_source
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import make
from navsim_ext.scene import collate_scenes
from stage3_grpo.monitors.statistics import compared

TURNING_LOG = "2021.01.19.12.09.11_veh-35_00009_00309"  # at 5 m/s; the other one waits at a red light
FASTER = 0.4  # of the recorded speed, added by the last policy
JERK_M = 1.5  # by which its poses lie in front of and behind their places, in turns
POLICIES = 40
PROGRESS = ["reward.score.progress=1", "reward.score.ttc=0", "reward.score.comfort=0"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The committed scenes of a turn: their batch and a scorer of them."""
    folder = tmp_path_factory.mktemp("scenes")
    data = unpack_small(folder) / "dataset"
    turning = SceneFilter(log_names=[TURNING_LOG])
    build_index(open_source(data, "trainval", scene_filter=turning), folder / "index", cameras=())
    build(BuildSettings(str(data), "trainval", str(folder / "cache")))
    dataset = SceneDataset(folder / "index", cameras=())
    batch = collate_scenes([dataset[i] for i in range(len(dataset))])
    return batch, PdmScorer(folder / "cache")


def driven(target: np.ndarray, boldness: float) -> np.ndarray:
    """The recorded path [N,8,3] driven faster and more jerkily by ``boldness`` in [0, 1]; after its end straight on."""
    factor = 1.0 + FASTER * boldness
    start = np.zeros_like(target[:, :1])
    path = np.concatenate([start, target], axis=1)
    result = np.empty_like(target)
    for k in range(target.shape[1]):
        place = (k + 1) * factor
        i = min(int(place), path.shape[1] - 2)
        result[:, k] = path[:, i] + (place - i) * (path[:, i + 1] - path[:, i])
    ahead = JERK_M * boldness * np.where(np.arange(target.shape[1]) % 2 == 0, 1.0, -1.0)
    result[..., 0] += ahead * np.cos(result[..., 2])
    result[..., 1] += ahead * np.sin(result[..., 2])
    return result


def follow(scenes, *overrides: str) -> tuple[list[str], list[dict[str, float]]]:
    """Actions of the alarm of divergence while policies get bolder, and what was recorded of each."""
    batch, scorer = scenes
    cfg = compose("stage3", ["output_dir=x", "init=x", "data.train=x", "data.hidden_cache=x", "data.metric_cache=x",
                             "alarms.window=10", "alarms.escalation=[warn,stop]", *overrides])  # fmt: skip
    reward, alarms = make(cfg.reward), make(cfg.alarms)
    rows = [each.double().numpy() for each in (batch.history, batch.status)]
    target = batch.target.double().numpy()

    def scored(boldness: float):
        return reward.submit(scorer, batch.token, driven(target, boldness), *rows).result()

    reference = scored(0.0)
    module = SimpleNamespace(bc_boost=0.0, stopped_by_alarm=False, drawn_at=0, rollout_number=0, record={})
    trainer = SimpleNamespace(is_global_zero=False, should_stop=False)
    records = []
    for boldness in np.linspace(0.0, 1.0, POLICIES):
        module.record = compared(scored(boldness), reference)
        records.append(module.record)
        alarms.rules = {"divergence": alarms.rules["divergence"]}
        alarms.on_train_batch_end(trainer, module, None, None, 0)
    return [entry["action"] for entry in alarms.actions], records


def test_a_reward_for_progress_alone_is_caught(scenes):
    """It rises with the speed, whatever TTC and comfort say; EPDMS, which is not part of it, falls."""
    told, records = follow(scenes, *PROGRESS)
    assert told[:2] == ["warn", "stop"]
    assert records[-1]["reward_gain"] > 0.1
    assert records[-1]["judge_gain"] < -0.05
    assert records[0]["divergence"] == 0.0


def test_a_guarded_reward_does_not_pay_for_it(scenes):
    told, records = follow(scenes, "reward=guarded")
    assert told == []
    assert records[-1]["reward_gain"] < -0.2
