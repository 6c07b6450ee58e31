"""Ending a run whose loss is NaN or infinite, with what is needed to look at the batch."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from navsim_ext.errors import NotFiniteLoss
from navsim_ext.runtime.not_finite import loss_not_finite
from navsim_ext.scene import SceneBatch

MAX_LISTED = 8


def not_finite_loss(what: str, value: float, trainer: pl.Trainer, scenes: SceneBatch, hidden: Tensor) -> NotFiniteLoss:
    """The error to raise; writes the batch's tokens, and which inputs are not finite, into the run's folder."""
    inputs = {"hidden": hidden, "target": scenes.target, "history": scenes.history, "status": scenes.status}
    bad = {}
    for name, values in inputs.items():
        if values is not None:
            finite = torch.isfinite(values).flatten(1).all(1).tolist()
            bad[name] = [token for token, good in zip(scenes.token, finite) if not good]
    named = {name: tokens[:MAX_LISTED] for name, tokens in bad.items() if tokens}
    reason = f"not finite in the data: {named}" if named else "all inputs are finite: lower the rate or use float32"
    return loss_not_finite(what, value, trainer, {"tokens": scenes.token, "not_finite": bad}, reason=reason)
