"""Rewards by composition: the PDM score in any weighting, and terms on the trajectory itself."""

from stage3_grpo.rewards.reward import Reward, Scores
from stage3_grpo.rewards.terms import ExtendedComfortProxy, Feasibility, PdmTerm, ReverseMotion

__all__ = [
    "ExtendedComfortProxy",
    "Feasibility",
    "PdmTerm",
    "ReverseMotion",
    "Reward",
    "Scores",
]
