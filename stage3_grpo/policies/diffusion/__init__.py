"""The diffusion planner as a policy of stage 3."""

from stage3_grpo.policies.diffusion.log_prob import LogProb
from stage3_grpo.policies.diffusion.policy import DiffusionPolicy
from stage3_grpo.policies.diffusion.reference import ReferenceMismatch, ReferencePolicy
from stage3_grpo.policies.diffusion.sampler import AncestralSampler, DdimSampler, FlowSampler, OwnSampler
from stage3_grpo.policies.diffusion.value_head import ValueHead

__all__ = [
    "AncestralSampler",
    "DdimSampler",
    "DiffusionPolicy",
    "FlowSampler",
    "LogProb",
    "OwnSampler",
    "ReferenceMismatch",
    "ReferencePolicy",
    "ValueHead",
]
