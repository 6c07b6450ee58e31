"""Learning rate over optimizer steps: linear warm-up, then a cosine down to a minimum, which then stays.

    s < W:  lr (s + 1) / W            else:  min + (lr - min) / 2 (1 + cos(pi p)),  p = min(1, (s - W) / (S - W))

Deviation from the published planner: it stepped once per epoch and its cosine assumed 200 epochs whatever was run,
so that a run of 100 stopped at half the rate. Here S is the number of steps that this run will make.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from navsim_ext.errors import DataError

if TYPE_CHECKING:
    import lightning.pytorch as pl


def warmup_cosine_factor(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Factor on the base rate at optimizer step ``step``; ``floor`` is min / lr."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1.0 - floor) / 2.0 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, *, warmup: int, total: int, floor: float) -> LambdaLR:
    """Scheduler to be stepped after every optimizer step."""
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, warmup=warmup, total=total, floor=floor))


def total_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps of the whole run.

    (``trainer.estimated_stepping_batches`` would set up the training loader before a checkpoint's loop state is
    loaded, and Lightning then forgets to give the loader its place back: a resumed epoch began again.)
    """
    batches = len(trainer.datamodule.train_dataloader())
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    by_epochs = math.inf if trainer.max_epochs in (None, -1) else per_epoch * trainer.max_epochs
    by_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    total = min(by_epochs, by_steps)
    if total == math.inf:
        raise DataError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    return int(total)
