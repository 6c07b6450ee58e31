"""Advantages: how much better a trajectory was than could be expected.

Legend: N trajectories in groups g of G, K decisions (k = 0 the first), r reward, valid [N] bool.
All return float tensors with 0 where ``valid`` (or ``mask``) is False.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from stage3_grpo.core.filters import group_statistics
from stage3_grpo.core.returns import at_last_decision

EPSILON = 1e-8


def group_standardised(
    reward: Float[Tensor, " N"], group: Int64[Tensor, " N"], valid: Bool[Tensor, " N"], epsilon: float = EPSILON
) -> Float[Tensor, " N"]:
    """A = (r - mean_g) / (std_g + epsilon), [N]; std with Bessel's correction (GRPO, arXiv 2402.03300)."""
    groups = group_statistics(reward, group, valid)
    advantage = (reward - groups.mean) / (groups.std + epsilon)
    return advantage.masked_fill(~valid, 0.0)


def leave_one_out(
    reward: Float[Tensor, " N"], group: Int64[Tensor, " N"], valid: Bool[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """A = r - (sum_{j != i} r_j) / (n_g - 1), [N]; unbiased (RLOO, arXiv 2402.14740). 0 for a group of one."""
    groups = group_statistics(reward, group, valid)
    others = (groups.mean * groups.size - reward) / (groups.size - 1).clamp_min(1)
    return (reward - others).masked_fill(~valid | (groups.size < 2), 0.0)


def batch_standardised(
    reward: Float[Tensor, " N"], group: Int64[Tensor, " N"], valid: Bool[Tensor, " N"], epsilon: float = EPSILON
) -> Float[Tensor, " N"]:
    """A' = r - mean_g,  A = (A' - mean(A')) / (std(A') + epsilon) over the whole batch, [N] (REINFORCE++)."""
    centred = reward - group_statistics(reward, group, valid).mean
    whole = group_statistics(centred, torch.zeros_like(group), valid)
    return ((centred - whole.mean) / (whole.std + epsilon)).masked_fill(~valid, 0.0)


def constant_baseline(reward: Float[Tensor, " N"], valid: Bool[Tensor, " N"], baseline: float) -> Float[Tensor, " N"]:
    """A = r - b, [N] (SMART-R1 takes b = 0.77 of the realism metric)."""
    return (reward - baseline).masked_fill(~valid, 0.0)


def gae(
    reward: Float[Tensor, " N"] | Float[Tensor, "N K"],
    value: Float[Tensor, "N K"],
    mask: Bool[Tensor, "N K"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Generalised advantage estimation (arXiv 1506.02438); a reward [N] comes at the last decision that counts.

    delta_k = r_k + gamma V_{k+1} - V_k,   A_k = delta_k + gamma lambda A_{k+1},   R_k = A_k + V_k
    with V = A = 0 after the end. ``reward`` [N] or [N,K], ``value`` and ``mask`` [N,K] (True
    up to the end of each row).
    Returns the advantages and the value targets, [N,K], without gradients.
    """
    value = value.detach().masked_fill(~mask, 0.0)
    steps = value.shape[1]
    each = at_last_decision(reward, mask)
    advantage = torch.zeros_like(value)
    following = value.new_zeros(len(value))
    for k in reversed(range(steps)):
        next_value = value[:, k + 1] if k + 1 < steps else torch.zeros_like(following)
        delta = each[:, k] + gamma * next_value - value[:, k]
        following = (delta + gamma * lam * following).masked_fill(~mask[:, k], 0.0)
        advantage[:, k] = following
    return advantage, (advantage + value).masked_fill(~mask, 0.0)


def denoising_discount(steps: int, gamma: float, *, device: torch.device | str = "cpu") -> Float[Tensor, " K"]:
    """d_k = gamma^(K - 1 - k), [K]: the noisiest decision (k = 0) decides least (DPPO, arXiv 2409.00588)."""
    return gamma ** torch.arange(steps - 1, -1, -1, dtype=torch.float32, device=device)
