"""The planner's optimizer: AdamW, or Muon for the weight matrices of the transformer blocks and AdamW for the rest.

Muon (K. Jordan and others, 2024; torch.optim.Muon) orthogonalises the momentum of a matrix before it steps:

    M <- mu M + (1 - mu) G,   U = NewtonSchulz((1 - mu) G + mu M),
    W <- W - lr (0.2 sqrt(max(rows, columns)) U + lambda W),   mu = 0.95

The factor (arXiv:2502.16982, section 2.2) gives U the size of AdamW's step, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from navsim_ext.errors import DataError
from navsim_ext.runtime.optimizer import OptimizerSettings


@dataclass(frozen=True)
class PlannerOptimizerSettings(OptimizerSettings):
    """``matrices``: what trains the weight matrices of the transformer blocks, ``adamw`` or ``muon``."""

    matrices: str = "adamw"

    def __post_init__(self) -> None:
        if self.matrices not in ("adamw", "muon"):
            raise DataError(f"optimizer.matrices={self.matrices!r:.60}: adamw or muon was expected")


def block_matrices(planner: nn.Module) -> list[nn.Parameter]:
    """Weight matrices inside the transformer blocks; embeddings, encoders of inputs and the output head are none."""
    named = planner.named_parameters()
    return [weight for name, weight in named if ".transformer_blocks." in f".{name}" and weight.ndim == 2]


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one optimizer: ``matrices`` by Muon, ``groups`` by AdamW. State and groups are those of the two."""

    def __init__(
        self, matrices: Sequence[nn.Parameter], groups: Sequence[dict[str, Any]], settings: PlannerOptimizerSettings,
        *, fused: bool | None = None,
    ) -> None:  # fmt: skip
        muon = torch.optim.Muon(
            list(matrices), lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(
            list(groups), lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps,
            weight_decay=settings.weight_decay, fused=fused,
        )  # fmt: skip
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.parts = (muon, adamw)
        self._share()

    def _share(self) -> None:
        """Groups and state are one and the same objects here and in the two."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            self.state.update(part.state)
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Groups and state of both; the order of the groups tells whose they are."""
        super().load_state_dict(state_dict)
        split = len(self.parts[0].param_groups)
        for part, groups in zip(self.parts, (self.param_groups[:split], self.param_groups[split:])):
            part.param_groups, part.state = groups, self.state
