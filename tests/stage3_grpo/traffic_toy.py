"""A tiny traffic model, its street scenes and its checkpoint, for tests of reinforced traffic; also run as a program.

python traffic_toy.py FOLDER OUTPUT [overrides ...]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "sim_agents"))
from agent_scenes import street

from navsim_ext.errors import TriviumError
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from sim_agents.vocabulary import save_vocabulary
from sim_agents.vocabulary.build import VocabularySettings, make_vocabulary
from sim_agents.vocabulary.store import vocabulary_fingerprint

CHECKPOINT = "bc/version_0/checkpoints/last.ckpt"


def make_world(folder: Path, *, tokens: int = 24, name: str = "bc") -> Path:
    """Scenes, a vocabulary of them and a model that was trained for one step."""
    scenes = [street(f"s{number:02d}", seed=number) for number in range(8)]
    if not (folder / "scenes").exists():
        write_scenes(folder / "scenes", iter(scenes), fingerprint_of({"test": 1}))
    vocabulary, _ = make_vocabulary(VocabularySettings("k_disks", tokens), scenes)
    save_vocabulary(folder / f"vocabulary_{name}", vocabulary, vocabulary_fingerprint({"tokens": tokens}, None))
    cfg = compose("sim_agents", [
        f"data.train={folder}/scenes", f"vocabulary={folder}/vocabulary_{name}", f"output_dir={folder}/{name}",
        "network.width=16", "network.heads=2", "network.blocks=1", "datamodule.bounds.pieces=48", "logger=csv",
        "callbacks.progress=null", "trainer.max_epochs=1",
    ])  # fmt: skip
    run(cfg)
    return folder


def config(folder: Path, output: Path | str, *overrides: str):
    """The configuration of a short run: 4 rollouts of 4 scenes x 2 samples of 2 s."""
    return compose("stage3", [
        "experiment=traffic_demo", f"init={folder}/{CHECKPOINT}", f"data.train={folder}/scenes",
        f"data.val={folder}/scenes", f"output_dir={output}", "logger=csv", "policy.horizon_s=2.0",
        "policy.validation_rollouts=2", "algorithm.group_size=2", "datamodule.batch_size=4", "trainer.max_epochs=2",
        "callbacks.progress=null", "module.optimizer.lr=1e-3", *overrides,
    ])  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    if kill_at := os.environ.get("TOY_KILL"):
        from stage3_grpo.policies.traffic import TrafficPolicy

        roll = TrafficPolicy.roll

        def dies(self, batch, group_size, key, needs):
            if key.rollout == int(kill_at):
                os.kill(os.getpid(), signal.SIGKILL)
            return roll(self, batch, group_size, key, needs)

        TrafficPolicy.roll = dies
    try:
        run(config(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]))
    except TriviumError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
