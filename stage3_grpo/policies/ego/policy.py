"""An ego planner as a policy of stage 3: it drives among others in the moving world, its decisions are half seconds.

Legend: S scenes, G drives of each, N = S G rows (a drive each, scene by scene), K decisions of a drive.

    roll     G drives of each scene with drawn choices; a decision's reward is that of its five steps,
             r = sum_j g^j r_j (semi-Markov); a drive ends with its first failure, and with its goal if
             ``end_at_goal``
    decide   scores the same choices from what the actor remembers

The horizon ends a drive as a failure does: what comes after it is worth nothing. With advantage=gae the discount of a
decision must be g^5: it is checked. The teacher is absent: cloning (bc_weight) teaches nothing here; the pull to the
reference is the KL.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from navsim_ext.closed_loop.kinematics import TOKEN_S, TOKEN_STEPS
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.policy import AgentPolicy, Mixed
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.state import WorldState
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.collectives import gather_rows
from navsim_ext.runtime.not_finite import loss_not_finite
from navsim_ext.runtime.rng import derive_seed
from navsim_ext.traffic.scene import TrafficScene
from sim_agents import EGO_EVENTS, EgoActor, EgoReward, outcome, semi_markov
from stage3_grpo.algorithm import Algorithm, AlgorithmError, Gae
from stage3_grpo.policies.ego.held_out import EgoHeldOut
from stage3_grpo.policy import DecisionScores, Key, Needs, PolicyRollout

GAMMA_SLACK = 1e-3


@dataclass
class EgoDrives:
    """What happened in B drives of K decisions: ``reward`` [B,K], ``mask`` [B,K] (made before the drive's end),
    ``failed`` and ``reached`` [B] (while it counted), ``end`` states, and what the actor remembers."""

    state: WorldState
    reward: Tensor
    mask: Tensor
    failed: Tensor
    reached: Tensor
    has_goal: Tensor
    invalid: dict[int, str]
    memory: Any
    seconds: float


class EgoDriving:
    """Trains the planner in ``init``. ``others`` makes who drives everybody else. ``goal``: what the ego drives to (see
    ``EgoPolicy``)."""

    name = "ego"
    rows_at_once = None

    def __init__(
        self, init: str, actor: EgoActor, reward: EgoReward, *, others: Callable[[], AgentPolicy] = Replay,
        goal: str = "log", horizon_s: float = 8.0,
    ) -> None:  # fmt: skip
        if horizon_s < TOKEN_S:
            raise DataError(f"horizon_s={horizon_s}: at least the {TOKEN_S} s of one decision were expected")
        self.init, self.actor, self.reward, self.others = init, actor, reward, others
        self.goal, self.horizon_s = goal, horizon_s
        self._device = torch.device("cpu")

    # ---- before the first step

    def build(self, datamodule: Any, algorithm: Algorithm, seed: int) -> dict[str, nn.Module]:
        """Loads the planner. Raises AlgorithmError where GAE discounts decisions by another number than g^5."""
        if isinstance(algorithm.advantage, Gae):
            after = self.reward.discount**TOKEN_STEPS
            if abs(algorithm.advantage.gamma - after) > GAMMA_SLACK:
                raise AlgorithmError(
                    f"advantage.gamma is {algorithm.advantage.gamma}, a decision of {TOKEN_STEPS} steps with "
                    f"reward.discount={self.reward.discount} is discounted by {after:.4f}: set "
                    f"advantage.gamma={after:.4f}"
                )
        self.scenes = datamodule.dataset("train").fingerprint
        return self.actor.load(self.init, critic=algorithm.needs_value)

    def parameters(self) -> dict[str, Sequence[nn.Parameter]]:
        return self.actor.parameters()

    def begin(self, datamodule: Any, device: torch.device) -> None:
        self._device = torch.device(device)
        self.actor.reference.to(device)

    # ---- a rollout and its decisions

    @torch.no_grad()
    def drive(
        self, scenes: Sequence[TrafficScene] | WorldScenes, rollouts: int, seed: int, *, best: bool = False
    ) -> EgoDrives:
        """Drives the scenes to the horizon; ``best`` takes the most probable choices."""
        start = time.perf_counter()
        world = World(rollouts=rollouts, horizon_s=self.horizon_s, events=EGO_EVENTS, device=self._device)
        state = world.reset(scenes)
        ego, others = self.actor.driver(seed, best=best, goal=self.goal), self.others()
        policy = Mixed({"all": others, "ego": ego})
        policy.start(state, state.scenes.sources)
        B = len(state.scene)
        going = torch.ones(B, dtype=torch.bool, device=self._device)
        failed, reached = torch.zeros_like(going), torch.zeros_like(going)
        rewards, masks = [], []
        while state.steps_left >= TOKEN_STEPS:
            world.step(state, policy.act(state))
            happened = outcome(world, state, ego.around, self.reward.form)
            earned, _ = semi_markov(happened.steps, self.reward.discount)
            rewards.append(torch.where(happened.failed, earned - self.reward.failure, earned))
            masks.append(going)
            failed |= going & happened.failed
            reached |= going & happened.reached
            going = going & ~happened.failed
            if self.reward.end_at_goal:
                going = going & ~happened.reached
        return EgoDrives(
            state, torch.stack(rewards, dim=1), torch.stack(masks, dim=1), failed, reached,
            ~ego.around.goal[state.scene].isnan().any(dim=-1), dict(ego.failures), self.actor.remember(ego),
            time.perf_counter() - start,
        )  # fmt: skip

    def roll(self, batch: Sequence[TrafficScene], group_size: int, key: Key, needs: Needs) -> PolicyRollout:
        scenes = list(batch)
        drives = self.drive(scenes, group_size, derive_seed(*key))
        rows = torch.arange(len(drives.mask), device=drives.mask.device)
        logp_old = value = logp_ref = None
        with torch.no_grad():
            if needs.old or needs.value:
                scored = self.actor.score(drives.memory, rows)
                logp_old, value = scored.logp if needs.old else None, scored.value
            if needs.reference:
                logp_ref = self.actor.score(drives.memory, rows, reference=True).logp
        start = rows.div(group_size, rounding_mode="floor")
        valid = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        valid[list(drives.invalid)] = False
        return PolicyRollout(
            names=[scene.id for scene in scenes], start=start, group=start, mask=drives.mask,
            reward=drives.reward.masked_fill(~(drives.mask & valid[:, None]), 0.0), valid=valid, own=drives,
            logp_old=logp_old, logp_ref=logp_ref, value_old=value,
            reasons=list(drives.invalid.values())[:1],
        )  # fmt: skip

    def decide(self, rollout: PolicyRollout, rows: Tensor, *, teach: bool) -> DecisionScores:
        scored = self.actor.score(rollout.own.memory, rows)
        return DecisionScores(scored.logp, scored.value)

    # ---- records

    def statistics(self, rollout: PolicyRollout) -> dict[str, float]:
        drives: EgoDrives = rollout.own
        columns = [drives.failed, drives.has_goal, drives.has_goal & drives.reached, drives.mask.sum(dim=1)]
        mean = gather_rows(torch.stack([column.float() for column in columns], dim=1)).mean(dim=0).tolist()
        return {
            "failed": mean[0], "goal_reached": mean[2] / mean[1] if mean[1] else math.nan, "decisions": mean[3],
            "seconds_driving": drives.seconds,
        }  # fmt: skip

    def after_update(self, updates: int) -> None:
        """The reference stays."""

    def held_out(self) -> EgoHeldOut:
        return EgoHeldOut(self)

    def not_finite(self, what: str, value: float, trainer: pl.Trainer, rollout: PolicyRollout) -> TriviumError:
        return loss_not_finite(what, value, trainer, {"scenes": list(rollout.names)})

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.actor.records(self.scenes), {"reference": self.actor.fingerprint.to_json()}

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Continues only from the planner that the run began with."""
        Fingerprint.from_json(state["reference"]).require_equal(
            self.actor.fingerprint, mine="the reference of the checkpoint", theirs="the reference now",
            remedy="give the init that the run began with, or start afresh with resume=never",
        )  # fmt: skip
