"""Reward hacking on real PDM scores: an unguarded reward rings the alarms, a guarded one on these scenes does not."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "navsim_ext"))
from golden_scenes import unpack_small
from grpo_toy import HIDDEN, Source, tiny_config

from navsim_ext.dataset import SceneDataset, build_index
from navsim_ext.metric_cache.build import BuildSettings, build
from navsim_ext.readers import SceneFilter, open_source
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.scene import collate_scenes
from stage2_dit import DiffusionPlanner, save_planner
from stage2_dit.normaliser import fit_bounds

TURNING_LOG = "2021.01.19.12.09.11_veh-35_00009_00309"  # at 5 m/s; the other one waits at a red light
ROLLOUTS = 40
IMITATION_STEPS = 600


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, str]:
    """The committed scenes of NAVSIM's two versions, with index, metric cache and a planner that imitates them."""
    folder = tmp_path_factory.mktemp("scenes")
    data = unpack_small(folder) / "dataset"
    turning = SceneFilter(log_names=[TURNING_LOG])
    build_index(open_source(data, "trainval", scene_filter=turning), folder / "index", cameras=())
    build(BuildSettings(str(data), "trainval", str(folder / "cache")))
    dataset = SceneDataset(folder / "index", cameras=())
    return {"data.train": str(folder / "index"), "data.metric_cache": str(folder / "cache"),
            "init": imitate(dataset, folder / "planner")}  # fmt: skip


def imitate(dataset: SceneDataset, path: Path) -> str:
    torch.manual_seed(0)
    batch = collate_scenes([dataset[i] for i in range(len(dataset))])
    hidden = Source().fetch(batch.token)
    planner = DiffusionPlanner(tiny_config(normaliser=fit_bounds([batch.target], "waypoint", margin=0.5)))
    optimizer = torch.optim.AdamW(planner.parameters(), lr=3e-3)
    repeat = 16
    for _ in range(IMITATION_STEPS):
        conditioning = planner.condition(hidden.hidden, hidden.mask, batch.history, batch.status)
        rows = len(batch) * repeat
        loss = planner.training_loss(conditioning, batch.target.repeat_interleave(repeat, dim=0),
                                     torch.randn(rows, 8, 3), planner.process.draw_times(rows))  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return str(save_planner(path, planner, HIDDEN))


def train(scenes: dict[str, str], output: Path, *overrides: str) -> tuple[dict, list[dict[str, str]]]:
    """The finished run and its alarms."""
    cfg = compose("stage3", [
        f"output_dir={output}", "data.hidden_cache=x", "logger=csv", "~callbacks.progress", "~callbacks.best",
        *(f"{key}='{value}'" for key, value in scenes.items()), f"trainer.max_epochs={ROLLOUTS}",
        "+trainer.enable_progress_bar=false", "datamodule.batch_size=2", "algorithm.group_size=16", "alarms.window=10",
        "alarms.escalation=[warn,stop]", "module.optimizer.lr=5e-4", *overrides,
    ])  # fmt: skip
    OmegaConf.set_struct(cfg, False)
    cfg.datamodule.hidden = {"_target_": "grpo_toy.Source"}
    result = run(cfg)
    path = output / "version_0" / "alarms.csv"
    return result, list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def test_progress_without_comfort_or_anchor_is_caught(scenes, tmp_path):
    """The reward climbs by driving faster than TTC and comfort allow; EPDMS, never trained on, falls meanwhile."""
    progress = ["reward.score.progress=1", "reward.score.ttc=0", "reward.score.comfort=0"]
    result, told = train(scenes, tmp_path, *progress, "algorithm.bc_weight.start=0")
    assert result["module"].stopped_by_alarm
    assert [row["action"] for row in told if row["alarm"] == "divergence"] == ["warn", "stop"]
    assert all(float(row["value"]) > 0.05 for row in told if row["alarm"] == "divergence")
    recorded = list(csv.DictReader((tmp_path / "version_0" / "rewards.csv").open(newline="")))
    gains = [float(row["reward"]) - float(row["reference_reward"]) for row in recorded]
    assert sum(gains[-10:]) / 10 > sum(gains[:5]) / 5 + 0.05  # the reward itself shows nothing but progress


def test_a_guarded_reward_rings_nothing(scenes, tmp_path):
    """The same scenes, rate and alarms under the guarded reward, anchored to the reference."""
    result, told = train(scenes, tmp_path, "reward=guarded", "algorithm.bc_weight.start=1.0")
    assert told == []
    assert result["global_step"] == ROLLOUTS
    assert not result["module"].stopped_by_alarm
