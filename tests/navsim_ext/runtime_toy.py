"""A small model with everything that makes exact resume hard; also run as a program that a test can kill.

python runtime_toy.py OUTPUT [key=value ...] trains it; {"kill_at": n} in TOY_TROUBLE makes it kill itself in batch n.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from navsim_ext.errors import TriviumError
from navsim_ext.runtime.run import run
from navsim_ext.runtime.sampler import PositionSampler, ResumableLoader

TROUBLE = json.loads(os.environ.get("TOY_TROUBLE", "{}"))


class Noisy(torch.utils.data.Dataset):
    """Items with random augmentation from all three generators."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.x[index] + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002


class ToyData(pl.LightningDataModule):
    def __init__(self, size: int = 48, batch_size: int = 2, seed: int = 3, num_workers: int = 0) -> None:
        super().__init__()
        self.size, self.batch_size, self.seed, self.num_workers = size, batch_size, seed, num_workers

    def train_dataloader(self):
        data = Noisy(self.size)
        sampler = PositionSampler(len(data), self.batch_size, seed=self.seed)
        return ResumableLoader(data, sampler, num_workers=self.num_workers)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(Noisy(8), batch_size=4)


class Toy(pl.LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.01, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual  # by hand: a step every other batch
        self.net = nn.Sequential(nn.Linear(6, width), nn.GELU(), nn.Dropout(0.3), nn.Linear(width, 1))
        self.lr = self.learning_rate = lr
        self.weight_decay, self.betas, self.epsilon = 0.01, (0.9, 0.999), 1e-8  # of AdamW, as ZeRO is told them
        self.register_buffer("seen", torch.zeros(()))

    def setup(self, stage: str) -> None:
        if TROUBLE.get("setup"):
            os.kill(os.getpid(), getattr(signal, TROUBLE["signal"]))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.trainer.current_epoch == TROUBLE.get("epoch") and batch_idx == TROUBLE.get("batch"):
            os.kill(0 if TROUBLE.get("group") else os.getpid(), getattr(signal, TROUBLE["signal"]))
        self.seen += batch.double().sum().float()
        loss = (self.net(batch) - batch.prod(dim=1, keepdim=True)).square().mean()
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
                self.lr_schedulers().step()
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch) + torch.randn(())).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def config(output_dir: str | Path, overrides: list[str]):
    shared = Path(__file__).resolve().parents[2] / "configs" / "shared"
    trainer = OmegaConf.load(shared / "trainer/cpu.yaml")
    callbacks = OmegaConf.merge(OmegaConf.load(shared / "callbacks/default.yaml"),
                                OmegaConf.load(shared / "callbacks/ema.yaml"))  # fmt: skip
    del callbacks.progress
    base = OmegaConf.create(
        {
            "output_dir": str(output_dir), "seed": 5, "resume": "auto", "resume_ignore": [],
            "module": {"_target_": "runtime_toy.Toy", "width": 8, "lr": 0.01},
            "datamodule": {"_target_": "runtime_toy.ToyData", "size": 48, "num_workers": 0},
            "trainer": trainer, "callbacks": callbacks,
            "logger": OmegaConf.load(shared / "logger/default.yaml"),
        }
    )  # fmt: skip
    base.trainer.update({"max_epochs": 3, "accumulate_grad_batches": 2, "log_every_n_steps": 1})
    base.trainer.enable_progress_bar = False
    base.callbacks.checkpoint.every_n_steps = 5
    base.callbacks.ema.decay = 0.9
    return OmegaConf.merge(base, OmegaConf.from_dotlist(overrides))


if __name__ == "__main__":
    sys.modules["runtime_toy"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    try:
        result = run(config(sys.argv[1], sys.argv[2:]))
    except TriviumError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
    assert not torch.distributed.is_initialized()  # its threads may abort a Python that ends
