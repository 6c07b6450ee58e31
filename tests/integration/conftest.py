"""A tiny synthetic world with index and metric cache, built once by the same commands that a user runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import forked_commands

from navsim_ext.dataset import SceneDataset
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import CachedHiddenStates, HiddenCacheWriter
from navsim_ext.rendering.render import render
from navsim_ext.runtime.config import compose
from stage1_vlm.tiny import build_tiny_internvl
from stage2_dit import DiffusionPlanner, PlannerConfig, save_planner


@dataclass(frozen=True)
class World:
    root: Path
    index: Path
    metric_cache: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """16 scenes without pictures in four logs, indexed and cached."""
    root = tmp_path_factory.mktemp("world")
    index, metric_cache = root / "index", root / "metric_cache"
    data = [f"data.root={root}", "data.split=trainval"]
    steps = {
        "navsim_ext.synthetic.build": [
            f"output_dir={root}", "scenes=16", "seed=5", "recipe.cameras=[]", "recipe.qa=false",
            "recipe.val_share=0", "recipe.test_share=0.25",
        ],
        "navsim_ext.dataset": [*data, "data.cameras=[]", "check_pictures=false", f"output_dir={index}"],
        "navsim_ext.metric_cache.build": [*data, "workers=sequential", f"output_dir={metric_cache}"],
    }  # fmt: skip
    with forked_commands(steps) as run:
        for module, overrides in steps.items():
            ended = run(module, *overrides)
            assert ended.code == 0, ended.out + ended.err
    return World(root, index, metric_cache)


@dataclass(frozen=True)
class Artefacts:
    """What the stages take and leave, of the smallest size."""

    index: Path  # with pictures of the front camera
    mixture: Path
    vlm: Path
    hidden: Path  # of every scene of the index
    planner: Path


@pytest.fixture(scope="session")
def pictures(world, tmp_path_factory) -> Path:
    """Rendered front pictures of the world's scenes; an index with their paths in ``index``."""
    folder = tmp_path_factory.mktemp("pictures")
    options = [f"data.root={world.root}", "data.split=trainval", "image_size=[160,90]", f"output_dir={folder}"]
    render(compose("render", options))
    return folder


@pytest.fixture(scope="session")
def artefacts(pictures, tmp_path_factory) -> Artefacts:
    """Questions, a tiny VLM, hidden states made from noise and the driven path, and an untrained planner."""
    folder = tmp_path_factory.mktemp("artefacts")
    scenes = SceneDataset(pictures / "index")
    with open(folder / "questions.jsonl", "w") as stream:
        for scene in (scenes[i] for i in range(len(scenes))):
            turns = [("human", "<image>\nHow fast?"), ("gpt", f"{scene.status[0, 4]:.0f} m/s")]
            record = {
                "image": scene.cameras[0]["CAM_F0"],
                "image_size": [160, 90],
                "conversations": [{"from": who, "value": text} for who, text in turns],
            }
            stream.write(json.dumps(record) + "\n")
    entry = {"root": str(pictures / "sensor_blobs"), "annotation": "questions.jsonl", "repeat_time": 1}
    (folder / "mixture.json").write_text(json.dumps({"speed": entry}))
    sizes = {"width": 16, "heads": 2, "vision_width": 16, "vision_heads": 2, "max_tiles": 1, "vocabulary": 400}
    vlm = build_tiny_internvl(folder / "vlm", ["How fast? 5 m/s"] * 50, **sizes)
    with HiddenCacheWriter(folder / "hidden", Fingerprint("vlm", {"weights": "noise"})) as writer:
        for i, token in enumerate(scenes.tokens):
            states = np.random.default_rng(i).normal(size=(4, 12)).astype(np.float32)
            writer.put(token, states + scenes[i].target.numpy()[0, :4].repeat(4, axis=1) / 20.0)
    torch.manual_seed(0)
    config = PlannerConfig(hidden_width=12, num_heads=2, head_width=8, num_layers=2, output_width=12, encoder_width=16)
    origin = CachedHiddenStates(folder / "hidden").fingerprint
    planner = save_planner(folder / "planner", DiffusionPlanner(config), origin)
    return Artefacts(pictures / "index", folder / "mixture.json", vlm, folder / "hidden", planner)
