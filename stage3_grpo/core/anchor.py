"""What holds the policy to known good behaviour, and the value head to the returns."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from stage3_grpo.core.reduce import masked_mean


def behaviour_cloning(
    logp_teacher: Float[Tensor, "M L"], mask: Bool[Tensor, "M L"], count: Tensor | float | None = None
) -> Float[Tensor, ""]:
    """L_bc = - mean(logp of the teacher's trajectories under the policy), []; ``logp_teacher`` [M,K].

    The teacher is the frozen reference; its samples are drawn afresh in every step.
    """
    return -masked_mean(logp_teacher, mask, count)


def value_error(
    value: Float[Tensor, "N K"],
    target: Float[Tensor, "N K"],
    mask: Bool[Tensor, "N K"],
    count: Tensor | float | None = None,
) -> Float[Tensor, ""]:
    """L_v = 1/2 mean((V - R)^2), []; ``value``, ``target`` [N,K]."""
    return 0.5 * masked_mean((value - target.detach()) ** 2, mask, count)
