"""Losses whose gradient is the policy gradient. Legend: N trajectories, K decisions; A advantage [N,K]."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stage3_grpo.core.reduce import masked_mean

Mean = Callable[[Tensor, Tensor, "Tensor | float | None"], Tensor]


class PolicyTerm(NamedTuple):
    """``loss`` [] with gradient; the rest are numbers for the record: [] without gradient."""

    loss: Tensor
    clip_fraction: Tensor  # decisions whose gradient the clip removed or would bound
    ratio_mean: Tensor
    approx_kl: Tensor  # mean(logp_old - logp), first-order KL from the sampling policy


def reinforce(
    logp: Float[Tensor, "N K"],
    advantage: Float[Tensor, "N K"],
    mask: Bool[Tensor, "N K"],
    count: Tensor | float | None = None,
    mean: Mean = masked_mean,
) -> PolicyTerm:
    """loss = - mean(A logp) (Williams 1992). On-policy by assumption: one gradient step per rollout."""
    advantage = advantage.detach()
    loss = -mean(advantage * logp, mask, count)
    zero = torch.zeros((), device=logp.device)
    return PolicyTerm(loss, zero, mean(torch.ones_like(advantage), mask, count), zero)  # rho = 1 where it counts


def clipped_ratio(
    logp: Float[Tensor, "N K"],
    logp_old: Float[Tensor, "N K"],
    advantage: Float[Tensor, "N K"],
    mask: Bool[Tensor, "N K"],
    *,
    clip_low: float,
    clip_high: float,
    count: Tensor | float | None = None,
    mean: Mean = masked_mean,
) -> PolicyTerm:
    """loss = - mean(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)),  rho = exp(logp - logp_old).

    PPO (arXiv 1707.06347); clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476). With logp = logp_old the
    gradient is that of :func:`reinforce`, the value is not (rho = 1, so it is - mean(A)).
    """
    advantage = advantage.detach()
    log_ratio = (logp - logp_old.detach()).masked_fill(~mask, 0.0)
    rho = torch.exp(log_ratio)
    clipped = rho.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -mean(torch.minimum(rho * advantage, clipped * advantage), mask, count)
    outside = ((rho < 1.0 - clip_low) | (rho > 1.0 + clip_high)).float()
    with torch.no_grad():
        return PolicyTerm(
            loss,
            mean(outside, mask, count),
            mean(rho, mask, count),
            mean(-log_ratio, mask, count),
        )
