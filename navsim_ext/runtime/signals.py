"""SIGTERM (a scheduler's notice) and Ctrl-C become a checkpoint at the present step and a clean end.

Lightning alone stops without saving, and answers the signal with a collective call from inside the handler. Here the
handler only sets a flag; the processes agree on it after each optimizer step, save, and stop together.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from navsim_ext.errors import TriviumError
from navsim_ext.runtime.checkpoints import Checkpoints, resumable_after


class Interrupted(TriviumError):
    """The run was asked to stop and has saved its state; the same command continues it."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # so that a pipeline does not go on with half a model


class SaveOnSignal(Checkpoint):  # a Checkpoint, so that Lightning calls it after every other callback
    """Raises Interrupted after saving, at the first optimizer step that ends after one of ``signals`` arrived.

    A signal during validation is answered after it; a second one ends the process at once.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")) -> None:
        self.signals = tuple(signal.Signals[name] for name in signals)
        self._received: signal.Signals | None = None
        self._stopping = False
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saver(trainer)
        self._previous = {number: signal.signal(number, self._handle) for number in self.signals}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received = signal.Signals(number)
        if number == signal.SIGINT:  # somebody sits there and waits
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if resumable_after(trainer, batch_idx):
            self._save_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_asked(trainer)

    # only at these moments has the step that was saved been logged

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)

    def _save_if_asked(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            self._saver(trainer).save_now(trainer)
            self._stopping = True

    def _stop(self, trainer: Trainer) -> None:
        if self._stopping:
            name = self._received.name if self._received else "a signal on another process"
            raise Interrupted(
                f"stopped by {name} after step {trainer.global_step}; saved in {self._saver(trainer).dirpath}: the "
                "same command continues from there",
                self._received or signal.SIGTERM,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @staticmethod
    def _saver(trainer: Trainer) -> Checkpoints:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                return callback
        raise TriviumError("SaveOnSignal has nothing to save with: add callbacks.checkpoint (Checkpoints)")
