"""Losses over tokens: cross entropy with smoothed labels.

Legend: D decisions, V tokens of a class (padded), C classes.

    q_j = (1 - epsilon) [j = target] + epsilon w_j / sum_i w_i,     loss = - sum_j q_j ln p_j

Spatial smoothing (TrajTok, arXiv 2506.21618): w_j = 1 / distance(end of j, end of target)^2 over the other tokens,
so that a token that leads nearly to the same place costs little. Uniform smoothing: w_j = 1. None: epsilon = 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from navsim_ext.errors import DataError
from sim_agents.vocabulary.motion import MotionVocabulary

SMOOTHINGS = ("spatial", "uniform", "none")
CLOSEST_M = 0.01
"""Distances below this count as this: two tokens may end at the same place."""


class SmoothedCrossEntropy(nn.Module):
    """Cross entropy against labels smoothed with ``epsilon`` by ``smoothing``; tokens that a class does not have get
    none."""

    def __init__(self, vocabulary: MotionVocabulary, *, smoothing: str = "spatial", epsilon: float = 0.1) -> None:
        super().__init__()
        if smoothing not in SMOOTHINGS:
            raise DataError(f"smoothing={smoothing}: one of {', '.join(SMOOTHINGS)} was expected")
        if not 0.0 <= epsilon < 1.0:
            raise DataError(f"epsilon={epsilon}: 0 <= epsilon < 1 was expected")
        self.epsilon = 0.0 if smoothing == "none" else epsilon
        spread = vocabulary.spread()
        present = torch.arange(spread.shape[-1]) < vocabulary.counts[:, None]
        self.register_buffer("present", present, persistent=False)
        weight = torch.ones_like(spread) if smoothing == "uniform" else spread.clamp_min(CLOSEST_M) ** -2.0
        weight = torch.where(present[:, None] & present[:, :, None], weight, 0.0)
        weight.diagonal(dim1=1, dim2=2).zero_()
        total = weight.sum(dim=-1, keepdim=True)
        self.register_buffer("smooth", weight / total.clamp_min(torch.finfo(weight.dtype).tiny), persistent=False)

    def mask(self, logits: Float[Tensor, "*any V"], classes: Int64[Tensor, "*any"]) -> Float[Tensor, "*any V"]:
        """Logits [..., V] with -inf for the tokens that the classes [...] do not have."""
        return logits.masked_fill(~self.present[classes], -torch.inf)

    def forward(
        self, logits: Float[Tensor, "D V"], targets: Int64[Tensor, " D"], classes: Int64[Tensor, " D"]
    ) -> Float[Tensor, " D"]:
        """[D] nats of logits [D, V] for target tokens [D] and class rows [D]."""
        logp = self.mask(logits, classes).log_softmax(dim=-1)
        hard = -logp.gather(-1, targets[:, None])[:, 0]
        if self.epsilon == 0.0:
            return hard
        soft = -(self.smooth[classes, targets] * logp.masked_fill(~self.present[classes], 0.0)).sum(dim=-1)
        # A class with a single token has nobody to share with.
        alone = self.present.sum(dim=-1)[classes] < 2
        return torch.where(alone, hard, (1.0 - self.epsilon) * hard + self.epsilon * soft)
