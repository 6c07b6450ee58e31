"""Planners of the ego in the moving world as policies of stage 3."""

from stage3_grpo.policies.ego.policy import EgoDriving

__all__ = ["EgoDriving"]
