"""Reinforcement learning on log-probabilities: pure functions that know no model, no scene and no reward.

The same functions serve a diffusion policy (decisions are denoising steps), a language policy (tokens) and an agent
policy (motion tokens). Everything is given as tensors:

    logp, logp_old, logp_ref  [N,K]  log-probability of K decisions of N trajectories; old: when they were sampled,
                                     ref: under the frozen reference policy
    reward                    [N]    one number per finished trajectory, or [N,K] one per decision
    mask                      [N,K]  bool: decisions that count (padding, invalid rewards and dropped groups do not)
    group                     [N]    int64: trajectories of one group share a start (a scene, a prompt)
"""

from stage3_grpo.core.advantages import (
    batch_standardised,
    constant_baseline,
    denoising_discount,
    gae,
    group_standardised,
    leave_one_out,
)
from stage3_grpo.core.anchor import behaviour_cloning, value_error
from stage3_grpo.core.filters import Groups, group_statistics, spread_mask
from stage3_grpo.core.kl import gaussian_kl, k1, k3
from stage3_grpo.core.objective import Objective, sampled_kl
from stage3_grpo.core.reduce import ZeroMask, masked_mean, sequence_mean
from stage3_grpo.core.returns import at_last_decision, centred, discounted_returns
from stage3_grpo.core.surrogates import PolicyTerm, clipped_ratio, reinforce

__all__ = [
    "Groups",
    "Objective",
    "PolicyTerm",
    "ZeroMask",
    "at_last_decision",
    "batch_standardised",
    "behaviour_cloning",
    "centred",
    "clipped_ratio",
    "constant_baseline",
    "denoising_discount",
    "discounted_returns",
    "gae",
    "gaussian_kl",
    "group_standardised",
    "group_statistics",
    "k1",
    "k3",
    "leave_one_out",
    "masked_mean",
    "reinforce",
    "sampled_kl",
    "sequence_mean",
    "spread_mask",
    "value_error",
]
