"""Learning rate over optimizer steps: linear warm-up, then a cosine down to a minimum, which then stays.

    s < W:  lr (s + 1) / W            else:  min + (lr - min) / 2 (1 + cos(pi p)),  p = min(1, (s - W) / (S - W))

Deviation from the published planner: it stepped once per epoch and its cosine assumed 200 epochs whatever was run,
so that a run of 100 stopped at half the rate. Here S is the number of steps that this run will make.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine_factor(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Factor on the base rate at optimizer step ``step``; ``floor`` is min / lr."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1.0 - floor) / 2.0 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, *, warmup: int, total: int, floor: float) -> LambdaLR:
    """Scheduler to be stepped after every optimizer step."""
    return LambdaLR(optimizer, lambda step: warmup_cosine_factor(step, warmup=warmup, total=total, floor=floor))
