"""What a training run will cost: disk and memory before its first step, hours from its first steps."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from navsim_ext.runtime.preflight import preflight

log = logging.getLogger(__name__)

BYTES_PER_LEARNING_WEIGHT = 16  # of a checkpoint: weight, two moments of AdamW, average or published copy; float32
BYTES_PER_FROZEN_WEIGHT = 4
BYTES_TO_COME_PER_WEIGHT = 12  # of memory, beyond the weights that are there: gradient and two moments


class TellCost(Callback):
    """Refuses a run whose checkpoints or optimizer cannot fit, and says early how long it will take.

    Time is that of ``measured`` batches after ``warm_up`` of them (compilation, caches), validation not counted. Memory
    is checked on the CPU alone; activations come on top of it.
    """

    def __init__(self, warm_up: int = 2, measured: int = 5) -> None:
        self.warm_up, self.measured = warm_up, measured
        self._seen, self._mark, self._validation = 0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen, self._mark = 0, time.perf_counter()
        if not trainer.is_global_zero:
            return
        sizes = [
            (getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in pl_module.parameters()
        ]
        learning = sum(size for size, learns in sizes if learns)
        frozen = sum(size for size, learns in sizes if not learns)
        kept = max(sum(getattr(each, "keep", 0) for each in trainer.checkpoint_callbacks), 1)
        batches = batches_to_go(trainer)
        log.info(
            "%.2f million weights learn, %.2f million are frozen; %s batches", learning / 1e6, frozen / 1e6, batches
        )
        preflight(
            output_dir=trainer.default_root_dir,
            items=kept,
            bytes_per_item=BYTES_PER_LEARNING_WEIGHT * learning + BYTES_PER_FROZEN_WEIGHT * frozen,
            memory_bytes=BYTES_TO_COME_PER_WEIGHT * learning if pl_module.device.type == "cpu" else 0,
            title=f"training: {kept} checkpoints kept, {batches} batches to go",
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seen += 1
        if self._seen == self.warm_up:
            self._mark = time.perf_counter()
        if self._seen != self.warm_up + self.measured or not trainer.is_global_zero:
            return
        seconds = (time.perf_counter() - self._mark) / self.measured
        left = batches_to_go(trainer)
        log.info("%.3g s a batch: about %.2f h for the %s batches to go", seconds, seconds * left / 3600.0, left)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark += time.perf_counter() - self._validation


def batches_to_go(trainer: Trainer) -> float:
    """Training batches of this process until the run ends by epochs or steps; inf where nothing ends it."""
    by_epochs = by_steps = math.inf
    if trainer.max_epochs not in (None, -1):
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        by_epochs = (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches - done
    if trainer.max_steps != -1:
        by_steps = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
    return max(min(by_epochs, by_steps), 0)
