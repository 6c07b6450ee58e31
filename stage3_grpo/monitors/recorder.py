"""The flight recorder: CSV tables beside the checkpoints, one row per rollout, and one per epoch.

    rewards.csv        reward, every sub-score, judge, the reference's, gains, invalid rate, time for scoring
    kl_divergence.csv  KL and metres to the reference, KL to the sampling policy, ratios, clip fraction, BC, weights
    advantages.csv     advantages, groups without spread, gradient norm, learning rate
    epochs.csv         means of all of it

``step`` is the optimizer step at which the rollout was drawn; after a resume the tables go on without a gap.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from navsim_ext.runtime.csv_log import CsvLog

KL_KEYS = ("kl_reference", "kl_loss", "beta", "drift_m", "approx_kl", "ratio_mean", "clip_fraction", "bc_loss",
           "bc_weight", "policy_loss", "value_loss", "loss")  # fmt: skip
ADVANTAGE_KEYS = ("advantage_mean", "advantage_std", "advantage_max", "advantage_used", "zero_spread_groups",
                  "gradient_norm", "learning_rate", "updates")  # fmt: skip


class FlightRecorder(Callback):
    """Writes what ``pl_module.record`` holds after each step; the first process writes, all log to the loggers."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._sums: dict[str, tuple[float, int]] = {}
        self._tables: dict[str, CsvLog] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        record = dict(pl_module.record)
        if not record:
            return
        measured = {f"train/{name}": value for name, value in record.items() if math.isfinite(value)}
        pl_module.log_dict(measured, batch_size=1, logger=False)
        batches = trainer.fit_loop.total_batch_idx
        if (batches + 1) % trainer.log_every_n_steps == 0:  # Lightning would repeat what is not measured in every step
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": trainer.current_epoch, **measured}, step=batches)
        for name, value in record.items():
            if math.isfinite(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
        if trainer.is_global_zero:
            head = {"step": pl_module.drawn_at, "rollout": pl_module.rollout_number, "epoch": trainer.current_epoch}
            elsewhere = {*KL_KEYS, *ADVANTAGE_KEYS}
            self._write("rewards", head | {name: value for name, value in record.items() if name not in elsewhere})
            self._write("kl_divergence", head | {name: record[name] for name in KL_KEYS if name in record})
            self._write("advantages", head | {name: record[name] for name in ADVANTAGE_KEYS if name in record})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        held_out = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if trainer.is_global_zero and means:
            self._write("epochs", {"step": pl_module.drawn_at, "epoch": trainer.current_epoch} | means | held_out)
        self._sums = {}

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if name not in self._tables:
            one = "epoch" if name == "epochs" else "rollout"  # those that moved no weight share a step
            self._tables[name] = CsvLog(self.run_dir / f"{name}.csv", identified_by=(one,))
        self._tables[name].write({key: rounded(value) for key, value in row.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: list(pair) for name, pair in self._sums.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = {name: (pair[0], pair[1]) for name, pair in state_dict["sums"].items()}


def rounded(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value
