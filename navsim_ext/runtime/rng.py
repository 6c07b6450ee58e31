"""Randomness that is a pure function of where training stands, so that resuming needs nothing to be restored.

Deviation from the usual callback that stores generator states: a stored state is only right if everything between
saving and the next batch (iterator creation, sanity checks, a validation that is skipped or run again) draws exactly
as often as it did before. Here every batch of every rank starts from its own seed instead:

    seed = SHA-256(base, rank, kind, index)[:63 bits],   kind in {batch, epoch, validation}

so a run that was killed and continued draws the same numbers, with dropout, under DDP and whatever happened between.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from navsim_ext.errors import TriviumError


class ResumeMismatch(TriviumError):
    """A run was about to continue from a checkpoint that another configuration, data set or machine size made."""


def derive_seed(*parts: int | str) -> int:
    """63-bit seed from any integers and strings; different parts give independent streams."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - libraries draw from this legacy global state
    torch.manual_seed(seed)


class RngState(Callback):
    """Seeds each rank's generators from (seed, rank, position); `run` puts it before every other callback."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._world_size = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._world_size = trainer.world_size

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_all(derive_seed(self.seed, trainer.global_rank, "epoch", trainer.current_epoch))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed_all(derive_seed(self.seed, trainer.global_rank, "batch", trainer.current_epoch, batch_idx))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every validation draws the same noise: common random numbers make epochs comparable."""
        seed_all(derive_seed(self.seed, trainer.global_rank, "validation"))

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "world_size": self._world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mine = {"seed": self.seed, "world_size": self._world_size}
        if state_dict != mine:
            raise ResumeMismatch(
                f"the checkpoint's randomness is that of {state_dict}, this run's is {mine}: continue with the same "
                "seed and number of processes, or start afresh with resume=never"
            )
