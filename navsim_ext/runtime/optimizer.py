"""AdamW and its learning rate as Lightning wants them: the settings that the planners' trainings share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from navsim_ext.runtime.learning_rate import warmup_cosine


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with warm-up and cosine; defaults are those of the published planner.

    ``lr`` falls to ``min_lr`` over the run; ``warmup_share`` of all optimizer steps is warm-up.
    """

    lr: float = 1e-4
    min_lr: float = 1e-6
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_share: float = 0.015


def adamw(
    groups: Sequence[dict[str, Any]], settings: OptimizerSettings, *, total: int, fused: bool | None = None
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: AdamW over parameter ``groups`` (a group may have a rate of its own), and
    the schedule over ``total`` optimizer steps, stepped after each."""
    optimizer = torch.optim.AdamW(
        list(groups), lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps,
        weight_decay=settings.weight_decay, fused=fused,
    )  # fmt: skip
    return scheduled(optimizer, settings, total=total)


def scheduled(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, *, total: int) -> dict[str, Any]:
    """``optimizer`` with the schedule of its settings over ``total`` optimizer steps, stepped after each."""
    warmup = round(settings.warmup_share * total)
    scheduler = warmup_cosine(optimizer, warmup=warmup, total=total, floor=settings.min_lr / settings.lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
