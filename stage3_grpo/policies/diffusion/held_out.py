"""Scores of deterministic plans on held-out scenes, beside those of the frozen reference on the same scenes.

Legend: B scenes of a batch, F poses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np

from navsim_ext.runtime.collectives import gather_by_token
from navsim_ext.scene import SceneBatch
from stage2_dit import DiffusionPlanner, PlannerRunner
from stage3_grpo.policies.diffusion.batch import checked
from stage3_grpo.rewards import Reward
from stage3_grpo.rewards.kinematics import reverses, stands
from stage3_grpo.rewards.reward import TAIL_INTERVALS

if TYPE_CHECKING:
    from torch import Tensor

    from navsim_ext.metric_cache.scorer import PdmScorer
    from stage3_grpo.policies.diffusion.policy import DiffusionPolicy

SCORES = ("pdms_v1", "epdms_v2_no_ec_nofilter", "epdms_v2_no_ec", "v1_nc", "v1_dac", "v1_ep", "v1_ttc", "v1_comfort",
          "v2_nc", "v2_dac", "v2_ddc", "v2_tlc", "v2_lk", "v2_hc")  # fmt: skip


class DiffusionHeldOut:
    """Collects plans over a validation epoch and scores them on the first process.

    ``pdm_score``, which chooses the best checkpoint, is the standard score of the version that is trained on: the
    training reward may weigh sub-scores otherwise. The reference is planned and scored once, in the first epoch.
    """

    def __init__(self, policy: DiffusionPolicy | None, reward: Reward, scorer: PdmScorer, seed: int) -> None:
        self.policy, self.reward, self.scorer, self.seed = policy, reward, scorer, seed
        version = reward.score.version if reward.score else "v1"
        self.selection = "pdms_v1" if version == "v1" else "epdms_v2_no_ec_nofilter"
        self.reference_means: dict[str, float] = {}
        self._plans: dict[str, np.ndarray] = {}
        self._reference_plans: dict[str, np.ndarray] = {}

    def start(self) -> None:
        self._plans, self._reference_plans = {}, {}

    def add(self, batch: tuple[SceneBatch, Any]) -> None:
        """Plans one batch."""
        scenes, hidden, mask = checked(batch)
        self._plans |= self._plan(self.policy.planner.eval(), scenes, hidden, mask)
        if not self.reference_means:
            self._reference_plans |= self._plan(self.policy.reference.planner, scenes, hidden, mask)

    def _plan(
        self, planner: DiffusionPlanner, scenes: SceneBatch, hidden: Tensor, mask: Tensor | None
    ) -> dict[str, np.ndarray]:
        """Deterministic plan [F,3] float64 of each scene, by token."""
        poses = PlannerRunner(planner, seed=self.seed).plan(hidden, mask, scenes.history, scenes.status, scenes.token)
        return dict(zip(scenes.token, poses.double().numpy()))

    def finish(self, trainer: pl.Trainer) -> dict[str, float]:
        """Means over all held-out scenes, each counted once whatever the number of processes."""
        plans, reference = gather_by_token(self._plans), gather_by_token(self._reference_plans)
        result: dict[str, Any] = {}
        if trainer.is_global_zero:
            means = self.means(plans)
            reference_means = self.reference_means or self.means(reference)
            result = {"means": means, "reference": reference_means}
        result = trainer.strategy.broadcast(result)
        if not trainer.sanity_checking:  # which sees a few batches only
            self.reference_means = result["reference"]
        means = dict(result["means"])
        means["pdm_score"] = means[self.selection]
        for name, value in result["reference"].items():
            means[f"reference_{name}"] = value
        means["gain"] = means["pdm_score"] - result["reference"][self.selection]
        return means

    def means(self, plans: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean of every score over valid scenes; ``invalid_rate`` says how many were not."""
        tokens = sorted(plans)
        trajectories = np.stack([plans[token] for token in tokens])
        scores = self.scorer.score(tokens, trajectories, **self.reward.scoring)
        means = {}
        for name in SCORES:
            values = scores[name][scores.valid_for(name)]
            means[name] = float(values.mean()) if len(values) else math.nan
        means["reverse_tail"] = float(reverses(trajectories, last=TAIL_INTERVALS).mean())
        means["standing"] = float(stands(trajectories).mean())
        means["invalid_rate"] = float(1.0 - scores.valid.mean())
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"reference_means": dict(self.reference_means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference_means = dict(state.get("reference_means", {}))
