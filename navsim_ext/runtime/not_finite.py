"""Ending a run whose loss is NaN or infinite, with a file that names the batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from navsim_ext.errors import NotFiniteLoss
from navsim_ext.files import write_json_atomic

if TYPE_CHECKING:
    import lightning.pytorch as pl

LOWER_RATE = "lower module.optimizer.lr"


def loss_not_finite(
    what: str, value: float, trainer: pl.Trainer, batch: Mapping[str, Any], *, reason: str = LOWER_RATE
) -> NotFiniteLoss:
    """The error to raise; writes ``batch`` (names of what was in it, first) into the run's folder."""
    step = trainer.global_step
    path = Path(trainer.default_root_dir) / f"not_finite_loss_step{step}_rank{trainer.global_rank}.json"
    write_json_atomic(path, {"step": step, what: str(value), **batch})
    return NotFiniteLoss(
        f"the {what} is {value} at step {step}; {reason}; the batch's {next(iter(batch))} are in {path}"
    )
