"""Group statistics, and which groups teach anything.

Legend: N trajectories, M groups; ``valid`` [N] bool: the reward is a real one (a failed score is not a low score).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from navsim_ext.errors import DataError


class Groups(NamedTuple):
    """Per-trajectory statistics of its group, over valid members; [N] each."""

    mean: Tensor
    std: Tensor  # Bessel's correction; 0 for a group with one valid member
    size: Tensor  # valid members


def group_statistics(reward: Tensor, group: Tensor, valid: Tensor) -> Groups:
    """mean_g = sum r / n_g,  std_g = sqrt(sum (r - mean_g)^2 / (n_g - 1)), spread back to the members [N]."""
    if not reward.shape == group.shape == valid.shape:
        raise DataError(
            f"reward {tuple(reward.shape)}, group {tuple(group.shape)} and valid {tuple(valid.shape)} must be [N] alike"
        )
    _, member = torch.unique(group, return_inverse=True)
    count = int(member.max()) + 1 if len(member) else 0
    weight = valid.to(reward.dtype)
    value = reward.masked_fill(~valid, 0.0)
    zeros = reward.new_zeros(count)
    size = zeros.index_add(0, member, weight)
    mean = zeros.index_add(0, member, value) / size.clamp_min(1)
    deviation = (value - mean[member]) * weight
    std = torch.sqrt(zeros.index_add(0, member, deviation**2) / (size - 1).clamp_min(1))
    return Groups(mean[member], std[member], size[member])


def spread_mask(
    reward: Float[Tensor, " N"], group: Int64[Tensor, " N"], valid: Bool[Tensor, " N"], minimum: float = 0.0
) -> Bool[Tensor, " N"]:
    """[N] bool: valid members of groups with std_g > minimum. The others have advantage 0 and only dilute the mean."""
    groups = group_statistics(reward, group, valid)
    return valid & (groups.std > minimum)
