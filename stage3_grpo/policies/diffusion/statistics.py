"""Numbers of a rollout of the planner: scores beside the reference's, drift, time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from navsim_ext.runtime.collectives import gather_rows
from stage3_grpo.monitors.statistics import rewards_of

if TYPE_CHECKING:
    from stage3_grpo.policies.diffusion.policy import Chains


def rollout_statistics(chains: Chains) -> dict[str, float]:
    """``drift_m``: metres between samples of equal noise; ``seconds_x``: durations, ``seconds_rollout`` all of them."""
    chain = chains.chain
    statistics = rewards_of(chains.scores, chains.teacher_scores, chain.group_size, chain.states.device)
    statistics["drift_m"] = gather_rows(chains.drift_m.float()).mean().item()
    statistics |= {f"seconds_{name}": value for name, value in chains.seconds.items()}
    statistics["seconds_rollout"] = sum(value for name, value in chains.seconds.items() if name != "score")
    return statistics
