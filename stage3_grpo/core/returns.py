"""Returns of rewards that come decision by decision, and what they are compared with.

Legend: N rows, K decisions; ``mask`` [N,K] bool: decisions that count.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

EPSILON = 1e-8


def at_last_decision(
    reward: Float[Tensor, " N"] | Float[Tensor, "N K"], mask: Bool[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """[N,K]: the reward [N] of a whole row at its last decision that counts; a reward [N,K] where it counts."""
    if reward.dim() == 2:
        return reward.masked_fill(~mask, 0.0)
    later = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    later = later.flip(1).cummax(dim=1).values.flip(1)  # something after k counts
    return torch.where(mask & ~later, reward[:, None], torch.zeros_like(reward)[:, None])


def discounted_returns(
    reward: Float[Tensor, " N"] | Float[Tensor, "N K"], mask: Bool[Tensor, "N K"], gamma: float
) -> Float[Tensor, "N K"]:
    """G_k = r_k + gamma G_{k+1}, [N,K], over the decisions that count; 0 elsewhere. ``reward`` [N] or [N,K]."""
    each = at_last_decision(reward, mask)
    returns, following = torch.zeros_like(each), torch.zeros_like(each[:, 0])
    for k in reversed(range(each.shape[1])):
        following = torch.where(mask[:, k], each[:, k] + gamma * following, following)
        returns[:, k] = following
    return returns.masked_fill(~mask, 0.0)


def centred(
    value: Float[Tensor, "N K"], together: Int64[Tensor, "N K"], mask: Bool[Tensor, "N K"], *, scale: float | None
) -> Float[Tensor, "N K"]:
    """(x - mean) / scale, [N,K], the mean being over the decisions with an equal number in ``together`` [N,K] int64.

    ``scale`` None: their own standard deviation (Bessel's correction) + 1e-8. 0 where ``mask`` is False.
    """
    _, member = torch.unique(together, return_inverse=True)
    flat, weight = member.flatten(), mask.flatten().to(value.dtype)
    values = value.masked_fill(~mask, 0.0).flatten()
    zeros = value.new_zeros(int(flat.max()) + 1 if len(flat) else 0)
    size = zeros.index_add(0, flat, weight)
    mean = zeros.index_add(0, flat, values) / size.clamp_min(1)
    deviation = (values - mean[flat]) * weight
    if scale is None:
        variance = zeros.index_add(0, flat, deviation**2) / (size - 1).clamp_min(1)
        divisor = (torch.sqrt(variance) + EPSILON)[flat]
    else:
        divisor = torch.full_like(deviation, scale)
    return (deviation / divisor).view_as(value)
