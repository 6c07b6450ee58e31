"""Algorithms by composition: what stands here is chosen by name in configs/stage3."""

from stage3_grpo.algorithm.advantage import (
    Advantage,
    BatchStandardised,
    ConstantBaseline,
    Credited,
    Gae,
    GroupStandardised,
    LeaveOneOut,
    Returns,
    ScaledRewardToGo,
)
from stage3_grpo.algorithm.algorithm import Algorithm
from stage3_grpo.algorithm.errors import AlgorithmError
from stage3_grpo.algorithm.filters import RowFilter, ZeroSpread
from stage3_grpo.algorithm.kl import KlPenalty
from stage3_grpo.algorithm.schedule import AdaptiveWeight, Schedule
from stage3_grpo.algorithm.surrogate import ClippedRatio, Reinforce, Surrogate

__all__ = [
    "AdaptiveWeight",
    "Advantage",
    "Algorithm",
    "AlgorithmError",
    "BatchStandardised",
    "ClippedRatio",
    "ConstantBaseline",
    "Credited",
    "Gae",
    "GroupStandardised",
    "KlPenalty",
    "LeaveOneOut",
    "Reinforce",
    "Returns",
    "RowFilter",
    "ScaledRewardToGo",
    "Schedule",
    "Surrogate",
    "ZeroSpread",
]
