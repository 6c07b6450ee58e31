"""A few small logs, their scene index and a hidden cache that tells where the ego will go; also a program.

python planner_world.py FOLDER [key=value ...] trains the tiny planner there; {"signal", "epoch", "batch", "rank"} in
PLANNER_TROUBLE makes the process signal itself in that batch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "navsim_ext"))
from scene_worlds import make_frame, write_log

from navsim_ext.dataset import SceneDataset, build_index
from navsim_ext.errors import TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import HiddenBatch, HiddenCacheWriter, states_fingerprint
from navsim_ext.readers import open_source
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.scene import SceneBatch

WIDTH = 12
VLM = Fingerprint("vlm", {"weights": "toy"})
TROUBLE = json.loads(os.environ.get("PLANNER_TROUBLE", "{}"))


def build_world(folder: Path, logs: int = 3, frames: int = 30) -> Path:
    """Index at ``folder/index``, hidden states at ``folder/hidden``; each log turns in its own way."""
    for number in range(logs):
        name = f"log-{number}"
        speed, turn = 2.0 + 2.0 * number, 0.05 * (number - 1)
        heading, position, made = 0.0, np.zeros(2), []
        for i in range(frames):
            made.append(
                make_frame(
                    i, name,
                    ego2global_translation=np.array([*(331000.0 + position[:1]), 4690000.0 + position[1], 5.0]),
                    ego2global_rotation=np.array([np.cos(heading / 2), 0.0, 0.0, np.sin(heading / 2)]),
                    ego_dynamic_state=[2 * speed, 0.0, 0.0, 0.0],
                )
            )  # fmt: skip
            heading += turn
            position = position + speed * np.array([np.cos(heading), np.sin(heading)])
        write_log(folder / "data", made, name)
    build_index(open_source(folder / "data", "mini"), folder / "index", cameras=())
    dataset = SceneDataset(folder / "index", cameras=())
    with HiddenCacheWriter(folder / "hidden", VLM) as writer:
        for i in range(len(dataset)):
            writer.put(dataset.tokens[i], hidden_states(dataset[i].target[0].numpy(), i))
    return folder


def hidden_states(target: np.ndarray, index: int) -> np.ndarray:
    """[L,D]: the final pose stands in the first columns of every token, lengths vary."""
    states = np.random.default_rng(index).normal(size=(4 + index % 3, WIDTH)).astype(np.float32) * 0.1
    states[:, :3] += target[-1] / 20.0
    return states


def config(world: Path, output: Path, *overrides: str):
    return compose("stage2", [
        "experiment=demo", f"output_dir={output}", f"data.train={world}/index", f"data.val={world}/index",
        f"data.hidden_cache={world}/hidden", "callbacks=[default,best,ema]", "callbacks.ema.decay=0.9",
        "callbacks.checkpoint.every_n_steps=2", "~callbacks.progress", "trainer.max_epochs=2",
        "+trainer.enable_progress_bar=false", "trainer.check_val_every_n_epoch=1", "trainer.num_sanity_val_steps=0",
        "trainer.log_every_n_steps=1", "planner.num_layers=2", "planner.encoder_width=32", "datamodule.batch_size=8",
        *overrides,
    ])  # fmt: skip


class Watcher(torch.nn.Module):
    """A backbone that learns: 3 tokens from the ego status."""

    hidden_width = 6
    fingerprint = states_fingerprint(Fingerprint("vlm", {"weights": "watcher", "trained": True}))

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 3 * self.hidden_width)

    def forward(self, scenes: SceneBatch) -> HiddenBatch:
        hidden = self.layer(scenes.status).unflatten(1, (3, self.hidden_width))
        return HiddenBatch(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))


class BlindSpot(Watcher):
    """Gives NaN for the second sample of every batch."""

    def forward(self, scenes: SceneBatch) -> HiddenBatch:
        batch = super().forward(scenes)
        spoiled = torch.zeros(len(scenes), 1, 1)
        spoiled[1] = float("nan")
        return HiddenBatch(batch.hidden + spoiled, batch.mask)


def interrupt_in(epoch: int, batch: int, name: str) -> None:
    """Makes the module signal its own process in one training batch."""
    from stage2_dit.module import PlannerModule

    original = PlannerModule.training_step

    def step(self, content, batch_idx):
        if self.trainer.current_epoch == epoch and batch_idx == batch:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, content, batch_idx)

    PlannerModule.training_step = step


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = Path(sys.argv[1])
    if TROUBLE and int(os.environ.get("RANK", 0)) == TROUBLE.get("rank", 0):
        interrupt_in(TROUBLE["epoch"], TROUBLE["batch"], TROUBLE["signal"])
    try:
        run(config(world, Path(sys.argv[2]), *sys.argv[3:]))
    except TriviumError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(getattr(error, "exit_code", 2))
