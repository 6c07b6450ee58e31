"""A traffic model as a policy of stage 3."""

from stage3_grpo.policies.traffic.policy import TrafficPolicy
from stage3_grpo.policies.traffic.reference import Drift, TrafficReference

__all__ = ["Drift", "TrafficPolicy", "TrafficReference"]
