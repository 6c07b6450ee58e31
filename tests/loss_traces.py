"""Ten steps of training of every stage, tiny, on one CPU thread: the losses that tests/golden/loss_traces keeps.

Each function trains in ``folder`` through the stage's own configuration and data, and returns the loss (or what the
stage logs in its place) of every step.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from navsim_ext.files import read_json
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.traffic.store import fingerprint_of, write_scenes

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden" / "loss_traces"
sys.path[:0] = [str(HERE / name) for name in ("navsim_ext", "sim_agents", "stage2_dit", "stage3_grpo")]

QUIET = ("callbacks.progress=null", "logger=csv", "trainer.max_steps=10")
RELATIVE, ABSOLUTE = 2e-4, 1e-5
"""Kernels of another CPU round otherwise: what ten steps of Adam make of that was a hundredth of this."""


def logged(run_dir: str | Path, table: str, column: str) -> list[float]:
    with open(Path(run_dir) / f"{table}.csv", newline="", encoding="utf-8") as stream:
        return [float(row[column]) for row in csv.DictReader(stream) if row[column]]


def stage1(folder: Path) -> list[float]:
    """Fine-tuning of a random InternVL on 12 questions of a picture each."""
    from stage1_vlm.tiny import build_tiny_internvl
    from stage1_vlm.train import train

    words = ["What does the light show? red green", "Look at the light."] * 20
    model = build_tiny_internvl(folder / "model", words, width=32, heads=2, vision_width=32, vision_heads=2,
                                vocabulary=400)  # fmt: skip
    (folder / "pictures").mkdir()
    lines = []
    for i in range(12):
        coarse = np.random.default_rng(i).integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 54)).save(folder / "pictures" / f"{i}.png")
        question = "<image>\nWhat does the light show?" + " Look." * (i % 3)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red" if i % 2 else "green"}]
        lines.append({"id": i, "image": f"{i}.png", "type": "light", "conversations": turns})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixture = {"seen": {"root": "pictures", "annotation": "questions.jsonl", "repeat_time": 4, "length": 12}}
    (folder / "mixture.json").write_text(json.dumps(mixture))
    cfg = compose("stage1", [
        "trainer=cpu", "strategy=ddp", "module.learning_rate=1e-3", "module.drop_path=0.0", f"model_path={model}",
        f"output_dir={folder}/run", f"data.mixture={folder}/mixture.json", "data.batch_size=2", "global_batch_size=4",
        "data.max_sequence_length=300", "data.max_image_tokens=16", "data.num_workers=0", "data.index_workers=0",
        *QUIET,
    ])  # fmt: skip
    train(cfg)
    return logged(folder / "run" / "version_0", "metrics", "loss")


def stage2(folder: Path) -> list[float]:
    """Imitation of three made-up drives by a planner of two layers."""
    import planner_world

    world = planner_world.build_world(folder)
    quiet = ("logger=csv", "trainer.max_steps=10", "data.val=null")
    result = run(planner_world.config(world, folder / "run", *quiet))
    return logged(result["run_dir"], "metrics", "train/loss")


def sim_agents(folder: Path) -> list[float]:
    """Cloning of eight made-up streets by a next-token network."""
    from agent_scenes import street

    from sim_agents.vocabulary import save_vocabulary
    from sim_agents.vocabulary.build import VocabularySettings, make_vocabulary
    from sim_agents.vocabulary.store import vocabulary_fingerprint

    scenes = [street(f"s{number:02d}", seed=number) for number in range(8)]
    write_scenes(folder / "scenes", iter(scenes), fingerprint_of({"test": 1}))
    vocabulary, _ = make_vocabulary(VocabularySettings("k_disks", 24), scenes)
    save_vocabulary(folder / "vocabulary", vocabulary, vocabulary_fingerprint({"method": "k_disks"}, None))
    result = run(compose("sim_agents", [
        f"data.train={folder}/scenes", f"vocabulary={folder}/vocabulary", f"output_dir={folder}/run",
        "network.width=16", "network.heads=2", "network.blocks=1", "datamodule.batch_size=4",
        "datamodule.bounds.pieces=48", "trainer.max_epochs=5", "trainer.log_every_n_steps=1",
        "module.optimizer.lr=5e-3", *QUIET,
    ]))  # fmt: skip
    return logged(result["run_dir"], "metrics", "train/loss")


def stage3(folder: Path) -> list[float]:
    """Reinforcement of an untrained planner by a toy score: policy and cloning terms of each update."""
    import grpo_toy

    init = grpo_toy.make_planner(folder)
    result = run(grpo_toy.config(init, folder / "run", ["callbacks.progress=null"], ["trainer.max_epochs=5"]))
    return logged(result["run_dir"], "kl_divergence", "loss")


TRACES: dict[str, Callable[[Path], list[float]]] = {
    "stage1": stage1, "stage2": stage2, "sim_agents": sim_agents, "stage3": stage3,
}  # fmt: skip


def trace(name: str, folder: Path) -> list[float]:
    torch.set_num_threads(1)
    return TRACES[name](folder)


def golden(name: str) -> list[float]:
    return read_json(GOLDEN / f"{name}.json")["losses"]


def largest_difference(found: list[float], kept: list[float]) -> float:
    """Of one step, in units of what is tolerated; infinite where the traces differ in length or a loss is no number."""
    if len(found) != len(kept) or not np.isfinite(found).all():
        return float("inf")
    wanted = np.asarray(kept)
    return float((np.abs(np.asarray(found) - wanted) / (ABSOLUTE + RELATIVE * np.abs(wanted))).max())
