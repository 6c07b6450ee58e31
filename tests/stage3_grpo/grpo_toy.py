"""A tiny planner, its data and a scorer with a known optimum; also run as a program that a test can kill.

python grpo_toy.py INIT OUTPUT ALGORITHM [dotted=overrides ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from omegaconf import OmegaConf

from navsim_ext.errors import TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.schema import HiddenBatch
from navsim_ext.metric_cache.scorer import PdmScorer
from navsim_ext.pdm import PdmResult
from navsim_ext.pdm.columns import COLUMNS_ALONE
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader
from navsim_ext.scene import SceneBatch, collate_scenes
from stage2_dit import DiffusionPlanner, PlannerConfig, save_planner

WIDTH, TOKENS = 12, 5
KILL_AT = json.loads(os.environ.get("TOY_KILL", "null"))  # {"rollout": n}: while rollout n (from 0) is drawn
SUBMITTED_PER_ROLLOUT = 2  # the policy's chains and the reference's
HIDDEN = Fingerprint("hidden_states", {"toy": 1})


def tiny_config(**changes) -> PlannerConfig:
    sizes = {"num_heads": 2, "head_width": 8, "num_layers": 2, "output_width": 12, "encoder_width": 16}
    return PlannerConfig(**{"hidden_width": WIDTH, **sizes, **changes})


def make_planner(folder: Path, name: str = "init", **changes) -> str:
    """An untrained planner whose blocks do something, saved as a checkpoint."""
    torch.manual_seed(11)
    planner = DiffusionPlanner(tiny_config(**changes))
    for parameter in planner.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return str(save_planner(folder / name, planner, HIDDEN))


def token(number: int) -> str:
    """16 hex characters that no configuration language takes for a number."""
    return f"c{number:015x}"


class Source:
    """Hidden states made from the token."""

    fingerprint = HIDDEN

    def fetch(self, tokens) -> HiddenBatch:
        states = [
            torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(int(t, 16) % 2**31)) for t in tokens
        ]
        return HiddenBatch(torch.stack(states), torch.ones(len(tokens), TOKENS, dtype=torch.bool))


class Scenes(torch.utils.data.Dataset):
    def __init__(self, count: int, first: int) -> None:
        self.tokens = [token(first + i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> SceneBatch:
        generator = torch.Generator().manual_seed(index)
        history = torch.randn(1, 4, 3, generator=generator) * 0.1
        history[:, -1] = 0
        status = torch.tensor([[0.0, 1, 0, 0, 5, 0, 0, 0]])
        target = torch.tensor([[[2.5 * (i + 1), 0.0, 0.0] for i in range(8)]])
        return SceneBatch([self.tokens[index]], [f"log{index % 3}"], history, status, target, [{}])


class ToyData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4, count: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.count, self.seed = batch_size, count, seed
        self.hidden = self.hidden_eval = Source()

    def dataset(self, name: str) -> Scenes:
        return Scenes(self.count, 1) if name == "train" else Scenes(4, 1000)

    def join(self, samples):
        scenes = collate_scenes(samples)
        return scenes, self.hidden.fetch(scenes.token)

    def train_dataloader(self):
        data = self.dataset("train")
        return ResumableLoader(data, PositionSampler(len(data), self.batch_size, seed=self.seed), collate_fn=self.join)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.dataset("val"), batch_size=2, collate_fn=self.join)


class ToyScorer(PdmScorer):
    """Scores that can be reasoned about: pdms_v1 rises with the distance driven up to 55 m; the judge likes order.

    ``mode`` "honest": the judge agrees. "hackable": the reward pays for not arriving, the judge for the opposite.
    ``invalid``: tokens that cannot be scored. ``missing``: without a cache.
    """

    def __init__(self, mode: str = "honest", invalid=(), missing=(), version: str = "toy", min_coverage: float = 0.99):
        self.mode, self.invalid, self.missing = mode, frozenset(invalid), frozenset(missing)
        everything = {token(i) for i in range(2000)}
        self.known = frozenset(everything - self.missing)
        self.folder, self.min_coverage, self.submitted = "toy", min_coverage, 0
        self._fingerprint = Fingerprint("metric_cache", {"scorer": version})

    @property
    def fingerprint(self) -> Fingerprint:
        return self._fingerprint

    def score(self, tokens, trajectories, reward=None) -> PdmResult:
        x = trajectories[:, -1, 0]
        if self.mode == "honest":
            score = np.clip(1.0 - np.abs(x - 55.0) / 60.0, 0.0, 1.0)
            judge = 0.9 * score
        else:
            score = np.clip(1.0 - x / 40.0, 0.0, 1.0)
            judge = 1.0 - score
        names = ("v1_nc", "v1_dac", "v1_ttc", "v1_ep", "v1_comfort", "v2_hc")
        columns = {name: np.ones(len(tokens)) for name in names}
        columns |= {"pdms_v1": score, "epdms_v2_no_ec_nofilter": judge, "epdms_v2_no_ec": judge}
        # as PDM's: its own reward is known in a weighting alone
        columns["reward"] = np.full(len(tokens), np.nan) if reward is None else score * 5.0 / reward.progress
        valid = np.array([token not in self.invalid and token in self.known for token in tokens])
        reasons = np.array(["" if good else "toy: cannot be scored" for good in valid], dtype=object)
        unknown = np.full(len(tokens), np.nan)
        values = np.stack([columns.get(name, unknown) for name in COLUMNS_ALONE], axis=1)
        return PdmResult(tokens, values, valid, reasons, np.full(len(tokens), "toy", dtype=object))

    def submit(self, tokens, trajectories, reward=None) -> Future:
        if KILL_AT and self.submitted == SUBMITTED_PER_ROLLOUT * KILL_AT["rollout"]:
            os.kill(os.getpid(), signal.SIGKILL)
        self.submitted += 1
        future: Future = Future()
        future.set_result(self.score(tokens, trajectories, reward))
        return future


def config(init: str, output: Path | str, overrides: list[str] = (), dotted: list[str] = ()):
    """The real configuration of stage 3 with the toy's data and scorer in place of files."""
    cfg = compose("stage3", ["data.train=x", "data.hidden_cache=x", "data.metric_cache=x", "logger=csv", f"init={init}",
                             f"output_dir={output}", *overrides])  # fmt: skip
    OmegaConf.set_struct(cfg, False)
    cfg.datamodule = {"_target_": "grpo_toy.ToyData", "batch_size": 4, "seed": 0}
    cfg.policy.scorer = {"_target_": "grpo_toy.ToyScorer"}
    cfg.algorithm.group_size = 4
    cfg.trainer.max_epochs = 2
    cfg.trainer.enable_progress_bar = False
    cfg.trainer.log_every_n_steps = 1
    cfg.callbacks.progress = None
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(dotted)))


if __name__ == "__main__":
    sys.modules["grpo_toy"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    try:
        run(config(sys.argv[1], sys.argv[2], [f"algorithm={sys.argv[3]}"], sys.argv[4:]))
    except TriviumError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
