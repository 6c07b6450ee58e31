"""One rollout: chains of the policy and of the reference, and their scores, with as little computing as there can be.

Legend: S scenes, G trajectories of each, N = S G rows, K denoising steps, F poses.

    the scene's keys and values are projected once and shared by all chains and steps
    with one update per rollout that projection also serves the update (it carries gradients, sampling detaches it)
    scores are computed on the CPU while the reference runs
    the reference's chain has the noise of the group's sample 0: what differs between the two is policy, not luck
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from navsim_ext.scene import SceneBatch
from stage2_dit import Chain, Conditioning, DiffusionPlanner, Process, Steps, sample_chain, step_distributions
from stage3_grpo.algorithm import Algorithm
from stage3_grpo.reference import ReferencePolicy
from stage3_grpo.rewards.reward import Reward, Scorer, Scores
from stage3_grpo.value import ValueHead


@dataclass(frozen=True)
class Experience:
    """A rollout and everything that updates and records need of it.

    ``conditioning``: of the policy, with gradients, when the first update may use it. ``logp_old`` [N,K] is None when
    the only update is on-policy. ``reference_steps``: the reference's step distributions along the policy's chain.
    ``teacher``: the reference's own chain, one per scene. ``drift_m`` [S]: mean distance between the group's sample 0
    and the teacher. ``seconds``: durations by part; ``score_wait`` is what scoring cost beyond the device's work.
    """

    scenes: SceneBatch
    hidden: Tensor
    mask: Tensor | None
    chain: Chain
    teacher: Chain
    scores: Scores
    teacher_scores: Scores
    drift_m: Tensor
    conditioning: Conditioning | None
    logp_old: Tensor | None
    value_old: Tensor | None
    reference_steps: Steps | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Collector:
    """``seed`` keys all noise together with the rollout's number, the scene's token and the sample's index."""

    algorithm: Algorithm
    process: Process
    reward: Reward
    scorer: Scorer
    seed: int

    def collect(
        self,
        planner: DiffusionPlanner,
        value_head: ValueHead | None,
        reference: ReferencePolicy,
        scenes: SceneBatch,
        hidden: Tensor,
        mask: Tensor | None,
        *,
        rollout: int,
        with_drift: bool,
    ) -> Experience:
        """Rollout number ``rollout`` of a batch. ``with_drift`` asks for the reference's step distributions even
        where no KL term needs them."""
        start = time.perf_counter()
        once = self.algorithm.minibatches == 1
        with torch.set_grad_enabled(once):
            conditioning = planner.condition(hidden, mask, scenes.history, scenes.status)
        fixed = conditioning.detach()
        sampling = {"tokens": scenes.token, "seed": self.seed, "step": rollout, "process": self.process,
                    "exploration": self.algorithm.exploration}  # fmt: skip
        with torch.no_grad():
            chain = sample_chain(planner, fixed, group_size=self.algorithm.group_size, **sampling)
            trajectories = planner.trajectories(chain)
        sampled = time.perf_counter()
        pending = self._submit(scenes, trajectories, self.algorithm.group_size)
        steps_asked = self.algorithm.kl != "none" or with_drift
        chains_asked = 1 + self.algorithm.group_size * steps_asked
        with torch.no_grad():
            reference_conditioning = reference.condition(
                hidden, mask, scenes.history, scenes.status,
                queries_per_scene=chains_asked * self.process.num_steps * planner.config.horizon,
            )  # fmt: skip
            teacher = sample_chain(reference.planner, reference_conditioning, group_size=1, **sampling)
            teacher_trajectories = reference.planner.trajectories(teacher)
            teacher_pending = self._submit(scenes, teacher_trajectories, 1)
            reference_steps = None
            if steps_asked:
                reference_steps = reference.steps(reference_conditioning, chain, self.process)
            logp_old = value_old = None
            if self.algorithm.inner_epochs > 1 or not once:
                own_steps = step_distributions(planner, fixed, chain, process=self.process)
                logp_old = self.algorithm.log_prob.of(chain, own_steps)
            if value_head is not None:
                value_old = value_head(fixed, chain)
            drift = drift_m(trajectories, teacher_trajectories, self.algorithm.group_size)
        referenced = time.perf_counter()
        scores, teacher_scores = pending.result(), teacher_pending.result()
        end = time.perf_counter()
        seconds = {"sample": sampled - start, "reference": referenced - sampled, "score_wait": end - referenced,
                   "score": scores.seconds + teacher_scores.seconds}  # fmt: skip
        return Experience(
            scenes, hidden, mask, chain, teacher, scores, teacher_scores, drift, conditioning if once else None,
            logp_old, value_old, reference_steps, seconds,
        )  # fmt: skip

    def _submit(self, scenes: SceneBatch, trajectories: Tensor, count: int):
        per_row = [np.repeat(each.detach().cpu().double().numpy(), count, axis=0)
                   for each in (scenes.history, scenes.status)]  # fmt: skip
        tokens = [token for token in scenes.token for _ in range(count)]
        return self.reward.submit(self.scorer, tokens, trajectories.detach().cpu().double().numpy(), *per_row)


def drift_m(trajectories: Tensor, reference: Tensor, group_size: int) -> Tensor:
    """[S] mean distance over the poses between sample 0 of each group and the reference's sample of equal noise."""
    first = trajectories[::group_size]
    return torch.linalg.vector_norm(first[..., :2] - reference[..., :2], dim=-1).mean(dim=1)
