"""The callback that gives every batch of every rank its own seed (see :mod:`navsim_ext.runtime.rng`)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from navsim_ext.runtime.rng import ResumeMismatch, derive_seed, seed_all


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
