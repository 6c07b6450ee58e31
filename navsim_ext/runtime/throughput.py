"""What a training run tells while it runs: samples per second, and how much of the time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Sized
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``samples_per_s`` (all processes) and ``data_wait`` (share of the time spent waiting for the loader).

    Both are means over ``window`` batches and stand in the progress bar; a data_wait near 0 means that the device is
    the limit, near 1 that the loader is.
    """

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self._reset()

    def _reset(self) -> None:
        self._mark = time.perf_counter()
        self._samples, self._batches = 0, 0
        self._waited_s, self._worked_s = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self._waited_s += now - self._mark
        self._mark = now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._worked_s += now - self._mark
        self._mark = now
        self._samples += count_samples(batch)
        self._batches += 1
        if self._batches >= self.window:
            total_s = self._waited_s + self._worked_s
            rate = self._samples * trainer.world_size / total_s
            pl_module.log("samples_per_s", rate, prog_bar=True, batch_size=1, rank_zero_only=True)
            pl_module.log("data_wait", self._waited_s / total_s, prog_bar=True, batch_size=1, rank_zero_only=True)
            self._reset()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.perf_counter()  # validation is neither waiting nor work of the training step


def count_samples(batch: Any) -> int:
    """Samples of a batch: the length of the first sized thing in it (scene batch, tensor, or a container's first)."""
    if isinstance(batch, list | tuple):
        return count_samples(batch[0]) if batch else 0
    if isinstance(batch, dict):
        return count_samples(next(iter(batch.values()))) if batch else 0
    return len(batch) if isinstance(batch, Sized) else 1
