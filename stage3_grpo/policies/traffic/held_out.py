"""Figures of driven traffic on held-out scenes, beside those of the reference and of the log.

Legend: S scenes, R rollouts of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from navsim_ext.traffic.scene import TrafficScene
from stage3_grpo.policies.traffic.statistics import Means, drive_figures, realism_figures
from stage3_grpo.rewards.realism import rolled_scenes

if TYPE_CHECKING:
    from sim_agents import NextTokenNetwork
    from stage3_grpo.policies.traffic.policy import TrafficPolicy


class TrafficHeldOut:
    """Drives ``validation_rollouts`` rollouts of every held-out scene, with the same random numbers in every epoch.

    ``realism``, which chooses the best checkpoint, is the meta-metric of the 2025 rules on these rollouts (scenes that
    the rules do not admit are left out, ``judged_scenes`` says how many were judged). Where none can be judged,
    ``score`` is 1 - contact rate; else it is the realism. The reference drives once, in the first epoch. With several
    processes the scenes that fill up the last batch count twice.
    """

    def __init__(self, policy: TrafficPolicy) -> None:
        self.policy = policy
        self.reference_means: dict[str, float] = {}
        self._mine, self._reference = Means(), Means()

    def start(self) -> None:
        self._mine, self._reference = Means(), Means()

    def add(self, batch: Sequence[TrafficScene]) -> None:
        scenes = list(batch)
        self._drive(scenes, self.policy.network.eval(), self._mine)
        if not self.reference_means:
            self._drive(scenes, self.policy.reference.network, self._reference)

    def _drive(self, scenes: list[TrafficScene], network: NextTokenNetwork, means: Means) -> None:
        policy = self.policy
        _, driven = policy.drive(scenes, policy.validation_rollouts, policy.validation_seed, network)
        made = policy.made(driven)
        drive_figures(driven, made, means)
        for scene in rolled_scenes(driven.state, scenes):
            judged = not isinstance(scene, str)
            means.add("judged_scenes", judged, 1)
            if judged:
                for name, value in realism_figures([scene]).items():
                    means.add(name, value, 1)

    def finish(self, trainer: pl.Trainer) -> dict[str, float]:
        means, reference = self._mine.read(), self._reference.read()
        if not trainer.sanity_checking:  # which sees a few batches only
            self.reference_means = self.reference_means or reference
        theirs = self.reference_means or reference
        told = means | {f"reference_{name}": value for name, value in theirs.items()}
        told["score"] = self._score(means)
        told["gain"] = told["score"] - self._score(theirs)
        return told

    @staticmethod
    def _score(means: Mapping[str, float]) -> float:
        return means.get("realism", 1.0 - means.get("contact_rate", math.nan))

    def state_dict(self) -> dict[str, Any]:
        return {"reference_means": dict(self.reference_means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference_means = dict(state.get("reference_means", {}))
