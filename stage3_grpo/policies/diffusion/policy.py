"""The diffusion planner as a policy: its decisions are denoising steps.

Legend: S scenes, G trajectories of each, N = S G rows (scene by scene), K denoising steps, F poses.

    the scene's keys and values are projected once and shared by all chains and steps
    with one update per rollout that projection also serves the update (it carries gradients, sampling detaches it)
    scores are computed on the CPU while the reference runs
    the reference's chain has the noise of the group's sample 0: what differs between the two is policy, not luck
    the policy's and the teacher's chains go through the network together
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from navsim_ext.errors import MissingError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import require_states
from navsim_ext.runtime.sharding import shard_whole
from navsim_ext.scene import SceneBatch
from stage2_dit import (
    SHARDED_METHODS,
    Chain,
    Conditioning,
    DiffusionPlanner,
    Process,
    Steps,
    load_planner,
    not_finite_loss,
    planner_record,
    require_hidden,
    sample_chain,
    step_distributions,
)
from stage3_grpo.algorithm import Algorithm, AlgorithmError
from stage3_grpo.core import denoising_discount
from stage3_grpo.policies.diffusion.batch import checked
from stage3_grpo.policies.diffusion.held_out import DiffusionHeldOut
from stage3_grpo.policies.diffusion.log_prob import LogProb
from stage3_grpo.policies.diffusion.reference import ReferencePolicy, require_same_reference
from stage3_grpo.policies.diffusion.sampler import OwnSampler
from stage3_grpo.policies.diffusion.statistics import rollout_statistics
from stage3_grpo.policies.diffusion.value_head import ValueHead
from stage3_grpo.policy import DecisionScores, Key, Needs, NoValidReward, PolicyRollout
from stage3_grpo.rewards.reward import Reward, Scores

if TYPE_CHECKING:
    from navsim_ext.metric_cache.scorer import PdmScorer

PROBED_SCENES = 4


@dataclass
class Chains:
    """What a rollout of the planner leaves besides its trace.

    ``conditioning``: of the policy, with gradients, until an update has used it. ``reference_steps``: the reference's
    step distributions along the policy's chain. ``teacher``: the reference's own chain, one per scene. ``drift_m``
    [S]: mean distance between the group's sample 0 and the teacher. ``seconds``: durations by part; ``score_wait`` is
    what scoring cost beyond the device's work.
    """

    scenes: SceneBatch
    hidden: Tensor
    hidden_mask: Tensor | None
    chain: Chain
    teacher: Chain
    scores: Scores
    teacher_scores: Scores
    drift_m: Tensor
    conditioning: Conditioning | None
    reference_steps: Steps | None
    seconds: dict[str, float]


class DiffusionPolicy:
    """Trains the planner in ``init`` against ``reward``; ``reference`` None: the planner that training starts from.

    ``sampler``: how rollouts explore. ``discount``: weight gamma^(K-1-k) of denoising step k (the noisiest decides
    least). ``validation_seed``: of the plans of held-out scenes.
    """

    name = "diffusion"
    rows_at_once = None

    def __init__(
        self,
        init: str,
        reward: Reward,
        scorer: PdmScorer,
        *,
        reference: str | None = None,
        sampler: OwnSampler | None = None,
        log_prob: LogProb | None = None,
        discount: float = 0.6,
        allow_hidden_mismatch: bool = False,
        validation_seed: int = 0,
    ) -> None:
        if not 0.0 <= discount <= 1.0:
            raise AlgorithmError(f"discount is {discount}; a number in [0, 1] was expected")
        self.init, self.reference_path = init, reference or init
        self.reward, self.scorer = reward, scorer
        self.sampler, self.log_prob, self.discount = sampler or OwnSampler(), log_prob or LogProb(), discount
        self.allow_hidden_mismatch, self.validation_seed = allow_hidden_mismatch, validation_seed
        self.planner: DiffusionPlanner | None = None
        self.value_head: ValueHead | None = None
        self.reference: ReferencePolicy | None = None
        self.process: Process | None = None
        self.hidden_fingerprint: Fingerprint | None = None

    # ---- before the first step

    def build(self, datamodule: Any, algorithm: Algorithm, seed: int) -> dict[str, nn.Module]:
        """Loads policy and reference, and checks that they, the sampler and the hidden states belong together."""
        source = datamodule.hidden
        if source is None:
            raise MissingError("stage 3 needs hidden states: set data.hidden_cache")
        loaded = load_planner(self.init)
        require_hidden(loaded, source.fingerprint, allow_mismatch=self.allow_hidden_mismatch)
        require_states(source.fingerprint, datamodule.hidden_eval.fingerprint, allow_other=self.allow_hidden_mismatch)
        reference = ReferencePolicy.load(
            self.reference_path, loaded.planner.config, source.fingerprint, allow_mismatch=self.allow_hidden_mismatch
        )
        return self.adopt(loaded.planner, reference, algorithm, hidden=source.fingerprint)

    def adopt(
        self, planner: DiffusionPlanner, reference: ReferencePolicy, algorithm: Algorithm,
        hidden: Fingerprint | None = None,
    ) -> dict[str, nn.Module]:  # fmt: skip
        """Takes a planner and a reference that are in memory already."""
        self.planner, self.reference, self.hidden_fingerprint = planner, reference, hidden
        self.process = self.sampler.build(planner)  # a module without parameters
        modules: dict[str, nn.Module] = {}
        if algorithm.needs_value:
            self.value_head = modules["value_head"] = ValueHead(planner.config, self.process.num_steps)
        return modules | {"planner": planner, "process": self.process}

    def shard(self, mesh: Any) -> None:
        """Cuts what is trained among the processes (strategy=fsdp2); the reference stays whole on each."""
        shard_whole(self.planner, mesh, SHARDED_METHODS)
        if self.value_head is not None:
            shard_whole(self.value_head, mesh)

    def parameters(self) -> dict[str, Sequence[nn.Parameter]]:
        learned: dict[str, Sequence[nn.Parameter]] = {"policy": list(self.planner.parameters())}
        if self.value_head is not None:
            learned["value"] = list(self.value_head.parameters())
        return learned

    def begin(self, datamodule: Any, device: torch.device) -> None:
        """Checks coverage, and scores a few recorded drives: a scorer that cannot do that will not score a policy."""
        self.reference.to(device)
        dataset = datamodule.dataset("train")
        self.scorer.require_coverage(dataset.tokens)
        known = [i for i, token in enumerate(dataset.tokens) if token in self.scorer.known]
        samples = [dataset[i] for i in known[:: max(len(known) // PROBED_SCENES, 1)][:PROBED_SCENES]]
        targets = [sample for sample in samples if sample.target is not None]
        if not targets:
            raise NoValidReward("no training scene has both a metric cache and a recorded drive to try the scorer on")
        trajectories = torch.cat([sample.target for sample in targets]).double().numpy()
        tokens = [sample.token[0] for sample in targets]
        weights = self.reward.score.weights if self.reward.score else None
        scores = self.scorer.score(tokens, trajectories, weights, **self.reward.scoring)
        if not scores.valid.any():
            raise NoValidReward(
                f"none of the recorded drives of {tokens} could be scored ({scores.reason[0]}): check with "
                "python -m navsim_ext.doctor and rebuild data.metric_cache"
            )

    # ---- a rollout and its decisions

    def roll(self, batch: tuple[SceneBatch, Any], group_size: int, key: Key, needs: Needs) -> PolicyRollout:
        """Chains of the policy and of the reference, and their scores, with as little computing as there can be.

        The planner is in eval mode throughout: dropout of the ego state would make the old and the new
        log-probabilities those of different policies.
        """
        scenes, hidden, mask = checked(batch)
        planner = self.planner.eval()
        start = time.perf_counter()
        with torch.set_grad_enabled(needs.once):
            conditioning = planner.condition(hidden, mask, scenes.history, scenes.status)
        fixed = conditioning.detach()
        sampling = {"tokens": scenes.token, "seed": key.seed, "step": key.rollout, "process": self.process,
                    "exploration": self.sampler.exploration}  # fmt: skip
        with torch.no_grad():
            chain = sample_chain(planner, fixed, group_size=group_size, **sampling)
            trajectories = planner.trajectories(chain)
        sampled = time.perf_counter()
        pending = self._submit(scenes, trajectories, group_size)
        with torch.no_grad():
            chains_asked = 1 + group_size * needs.reference
            reference_conditioning = self.reference.condition(
                hidden, mask, scenes.history, scenes.status,
                queries_per_scene=chains_asked * self.process.num_steps * planner.config.horizon,
            )  # fmt: skip
            teacher = sample_chain(self.reference.planner, reference_conditioning, group_size=1, **sampling)
            teacher_trajectories = self.reference.planner.trajectories(teacher)
            teacher_pending = self._submit(scenes, teacher_trajectories, 1)
            reference_steps = logp_ref = logp_old = value_old = None
            if needs.reference:
                reference_steps = self.reference.steps(reference_conditioning, chain, self.process)
                logp_ref = self.log_prob.of(chain, reference_steps)
            if needs.old:
                own_steps = step_distributions(planner, fixed, chain, process=self.process)
                logp_old = self.log_prob.of(chain, own_steps)
            if needs.value:
                value_old = self.value_head(fixed, chain)
            drift = drift_m(trajectories, teacher_trajectories, group_size)
        referenced = time.perf_counter()
        scores, teacher_scores = pending.result(), teacher_pending.result()
        end = time.perf_counter()
        seconds = {"sample": sampled - start, "reference": referenced - sampled, "score_wait": end - referenced,
                   "score": scores.seconds + teacher_scores.seconds}  # fmt: skip
        own = Chains(scenes, hidden, mask, chain, teacher, scores, teacher_scores, drift,
                     conditioning if needs.once else None, reference_steps, seconds)  # fmt: skip
        return self.trace(own, logp_old, logp_ref, value_old)

    def trace(
        self, own: Chains, logp_old: Tensor | None, logp_ref: Tensor | None, value_old: Tensor | None
    ) -> PolicyRollout:
        """The chains in the core's form."""
        chain, device = own.chain, own.chain.states.device
        scenes, group_size, steps = chain.num_scenes, chain.group_size, len(chain.times)
        valid = torch.as_tensor(own.scores.valid, device=device)
        reward = torch.as_tensor(own.scores.reward, device=device, dtype=torch.float32).masked_fill(~valid, 0.0)
        start = torch.arange(scenes, device=device).repeat_interleave(group_size)
        decided = torch.ones(len(chain), steps, dtype=torch.bool, device=device)
        return PolicyRollout(
            names=own.scenes.token, start=start, group=start, mask=decided, reward=reward, valid=valid, own=own,
            logp_old=logp_old, logp_ref=logp_ref, value_old=value_old,
            weight=denoising_discount(steps, self.discount, device=device),
            taught=decided[:scenes], teaches=torch.arange(scenes, device=device), reasons=own.scores.reasons,
        )  # fmt: skip

    def decide(self, rollout: PolicyRollout, rows: Tensor, *, teach: bool) -> DecisionScores:
        own: Chains = rollout.own
        group, scenes = own.chain.group_size, own.chain.num_scenes
        chosen = rows[::group] // group
        conditioning = own.conditioning if len(chosen) == scenes else None
        own.conditioning = None  # its graph serves one update
        if conditioning is None:
            mask = None if own.hidden_mask is None else own.hidden_mask[chosen]
            conditioning = self.planner.condition(
                own.hidden[chosen], mask, own.scenes.history[chosen], own.scenes.status[chosen]
            )
        chain = own.chain.select(chosen)
        joined = join(chain, own.teacher.select(chosen)) if teach else chain
        steps = step_distributions(self.planner, conditioning, joined, process=self.process)
        logp = self.log_prob.of(joined, steps).unflatten(0, (len(chosen), -1))
        exact = None
        if own.reference_steps is not None:
            reference = Steps(*(each[rows] for each in own.reference_steps))
            mine = Steps(*(each.unflatten(0, (len(chosen), -1))[:, :group].flatten(0, 1) for each in steps))
            exact = self.log_prob.kl(mine, reference)
        value = None if self.value_head is None else self.value_head(conditioning, chain)
        return DecisionScores(logp[:, :group].flatten(0, 1), value, logp[:, group] if teach else None, exact)

    def _submit(self, scenes: SceneBatch, trajectories: Tensor, count: int):
        per_row = [np.repeat(each.detach().cpu().double().numpy(), count, axis=0)
                   for each in (scenes.history, scenes.status)]  # fmt: skip
        tokens = [token for token in scenes.token for _ in range(count)]
        return self.reward.submit(self.scorer, tokens, trajectories.detach().cpu().double().numpy(), *per_row)

    # ---- records

    def statistics(self, rollout: PolicyRollout) -> dict[str, float]:
        return rollout_statistics(rollout.own)

    def after_update(self, updates: int) -> None:
        """The reference stays as it is."""

    def held_out(self) -> DiffusionHeldOut:
        return DiffusionHeldOut(self, self.reward, self.scorer, self.validation_seed)

    def not_finite(self, what: str, value: float, trainer: pl.Trainer, rollout: PolicyRollout) -> TriviumError:
        return not_finite_loss(what, value, trainer, rollout.own.scenes, rollout.own.hidden)

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        records = {"planner": planner_record(self.planner, self.hidden_fingerprint)}
        return records, {
            "reference": self.reference.fingerprint.to_json(),
            "scorer": self.scorer.fingerprint.to_json(),
            "traffic": self.reward.traffic,
        }

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Continues only with the reference, the scorer and the traffic of the checkpoint."""
        require_same_reference(Fingerprint.from_json(state["reference"]), self.reference.fingerprint)
        Fingerprint.from_json(state["scorer"]).require_equal(
            self.scorer.fingerprint, mine="the scorer of the checkpoint", theirs="the scorer now",
            remedy="use the metric cache that the run began with, or start afresh with resume=never",
        )  # fmt: skip
        before = state.get("traffic", "log_replay")
        if before != self.reward.traffic:
            raise AlgorithmError(
                f"the checkpoint was rewarded in traffic {before}, this run is in {self.reward.traffic}: set "
                f"reward.traffic={before}, or start afresh with resume=never"
            )


def join(chain: Chain, teacher: Chain) -> Chain:
    """Groups of G + 1: the policy's chains of a scene, then the teacher's."""
    states = torch.cat([chain.states.unflatten(0, (-1, chain.group_size)), teacher.states[:, None]], dim=1)
    return dataclasses.replace(chain, states=states.flatten(0, 1), group_size=chain.group_size + 1)


def drift_m(trajectories: Tensor, reference: Tensor, group_size: int) -> Tensor:
    """[S] mean distance over the poses between sample 0 of each group and the reference's sample of equal noise."""
    first = trajectories[::group_size]
    return torch.linalg.vector_norm(first[..., :2] - reference[..., :2], dim=-1).mean(dim=1)
