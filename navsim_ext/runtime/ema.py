"""Exponential moving average of the trainable weights, kept outside the model so that every strategy saves it.

    e_k = d_k e_{k-1} + (1 - d_k) w_k,   e_0 = w_0,   d_k = decay, or min(decay, (1 + k) / (10 + k)) with warm-up

Lightning's own EMA puts the average into ``state_dict``, which DeepSpeed drops from the checkpoint; here it is part of
this callback's state, in float32 whatever the weights are. Persistent buffers are not averaged: the live ones serve.
Of weights that are cut among processes (FSDP2) each process averages its part; checkpoints hold the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from navsim_ext.errors import TriviumError
from navsim_ext.runtime.sharding import cut_like, own_part, whole


class EmaError(TriviumError):
    """The average cannot be kept or restored with this model or strategy."""


class EMA(Callback):
    """Averages after every optimizer step; validation sees the averaged weights when ``evaluate`` is set."""

    def __init__(self, decay: float = 0.999, *, warmup: bool = False, evaluate: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise EmaError(f"EMA decay is {decay}, a number in [0, 1) was expected")
        self.decay, self.warmup, self.evaluate = decay, warmup, evaluate
        self.updates = 0
        self.shadow: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._seen_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        sharded = isinstance(trainer.strategy, FSDPStrategy)
        if sharded or (isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.strategy.zero_stage_3):
            raise EmaError(
                f"EMA needs whole weights on every process; {type(trainer.strategy).__name__} shards them: use "
                "ddp, fsdp2 or ZeRO stage 1 or 2, or drop callbacks.ema"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready(pl_module)
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen_step:  # not in the middle of an accumulation
            self._seen_step = trainer.global_step
            self.update(pl_module)

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """One step of the recursion in the header."""
        self._ready(module)
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        weights = [own_part(weight.detach()).float() for _, weight in averaged(module)]
        torch._foreach_lerp_([own_part(self.shadow[name]) for name, _ in averaged(module)], weights, 1.0 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.evaluate:
            self.swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.swap_out(pl_module)

    @torch.no_grad()
    def swap_in(self, module: torch.nn.Module) -> None:
        """Puts the average into the model, keeping the live weights aside."""
        self._ready(module)
        self._live = {name: own_part(weight.detach()).clone() for name, weight in averaged(module)}
        for name, weight in averaged(module):
            own_part(weight).copy_(own_part(self.shadow[name]))

    @torch.no_grad()
    def swap_out(self, module: torch.nn.Module) -> None:
        """Brings the live weights back, bit for bit; does nothing when they are in place."""
        if self._live:
            for name, weight in averaged(module):
                own_part(weight).copy_(self._live[name])
        self._live = {}

    @torch.no_grad()
    def _ready(self, module: torch.nn.Module) -> None:
        weights = dict(averaged(module))
        if not self.shadow:
            self.shadow = {name: weight.detach().float().clone() for name, weight in weights.items()}
        if self.shadow.keys() != weights.keys():
            raise EmaError(
                f"the average has {sorted(self.shadow.keys() - weights.keys())[:4]} that the model lacks and lacks "
                f"{sorted(weights.keys() - self.shadow.keys())[:4]}: resume with the model it was made for"
            )
        for name, weight in weights.items():
            if self.shadow[name].device != weight.device or type(self.shadow[name]) is not type(weight.detach()):
                self.shadow[name] = cut_like(self.shadow[name], weight)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """All processes must ask: the parts are put together."""
        return {
            "decay": self.decay, "updates": self.updates,
            "shadow": {name: whole(average) for name, average in self.shadow.items()},
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = int(state_dict["updates"])
        self.shadow = {name: weight.clone() for name, weight in state_dict["shadow"].items()}


def averaged(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Names and weights that are averaged: floating point and trainable, in the model's order."""
    return [
        (name, weight)
        for name, weight in module.named_parameters()
        if weight.requires_grad and weight.is_floating_point()
    ]
