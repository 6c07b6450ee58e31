"""Reinforcement learning of the planner: the Lightning module of stage 3.

One training step is one rollout of the batch's scenes and the updates that follow from it:

    collect   G chains per scene, the reference's chain, scores            (collector.py)
    credit    advantages over the global batch, discounted                 (update.py, core/)
    update    mu passes x M minibatches of L = L_policy + beta KL + w_bc L_bc + w_v L_v

What holds before the first step is checked before the first step: the reference, the scorer, coverage, the sampler.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import require_states
from navsim_ext.runtime.checkpoints import BestCheckpoints, resume_point
from navsim_ext.runtime.collectives import share_of_count
from navsim_ext.runtime.optimizer import OptimizerSettings, adamw
from navsim_ext.runtime.schedules import total_steps
from navsim_ext.scene import SceneBatch
from stage2_dit import (
    DiffusionPlanner,
    NoDensity,
    Process,
    WrongProcess,
    build_process,
    load_planner,
    not_finite_loss,
    planner_record,
    require_hidden,
)
from stage3_grpo.algorithm import Algorithm, AlgorithmError
from stage3_grpo.collector import Collector, Experience
from stage3_grpo.held_out import HeldOut
from stage3_grpo.monitors.statistics import rollout_statistics
from stage3_grpo.reference import ReferenceMismatch, ReferencePolicy
from stage3_grpo.rewards import Reward
from stage3_grpo.update import Credit, Losses, Updater, assign_credit, minibatches
from stage3_grpo.value import ValueHead

if TYPE_CHECKING:
    from navsim_ext.metric_cache.scorer import PdmScorer

log = logging.getLogger(__name__)

RECORDED = {"total": "loss", "policy": "policy_loss", "kl": "kl_loss", "cloning": "bc_loss", "value": "value_loss"}
MAX_LISTED = 8
PROBED_SCENES = 4


class NoValidReward(TriviumError):
    """Nothing of a batch could be scored."""


class StoppedByAlarm(TriviumError):
    """An alarm ended the run; ``checkpoint`` is the best one (without held-out scenes the last)."""

    exit_code = 3

    def __init__(self, message: str, checkpoint: Path | None = None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class PolicyOptimizerSettings(OptimizerSettings):
    """AdamW with cosine decay per rollout; published defaults. ``value_lr`` of the value head."""

    min_lr: float = 0.0
    warmup_share: float = 0.0
    gradient_clip: float = 1.0
    value_lr: float = 1e-3


class GrpoModule(pl.LightningModule):
    """Trains the planner in ``init`` against ``reward``; ``reference`` None: the planner that training starts from.

    ``drift_every``: rollouts between measurements of the KL to the reference where no KL term needs it.
    ``max_invalid_batches``: so many batches in a row without one valid reward end the run.
    """

    def __init__(
        self,
        init: str,
        algorithm: Algorithm,
        reward: Reward,
        scorer: PdmScorer,
        *,
        reference: str | None = None,
        optimizer: PolicyOptimizerSettings | None = None,
        seed: int = 0,
        allow_hidden_mismatch: bool = False,
        drift_every: int = 10,
        max_invalid_batches: int = 10,
        validation_seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.init, self.reference_path = init, reference or init
        self.algorithm, self.reward, self.scorer = algorithm, reward, scorer
        self.optimizer_settings = optimizer or PolicyOptimizerSettings()
        self.seed, self.allow_hidden_mismatch = seed, allow_hidden_mismatch
        self.drift_every, self.max_invalid_batches = drift_every, max_invalid_batches
        self.validation_seed = validation_seed
        self.planner: DiffusionPlanner | None = None
        self.value_head: ValueHead | None = None
        self.reference: ReferencePolicy | None = None
        self.hidden_fingerprint: Fingerprint | None = None
        self.rollouts = 0  # drawn so far
        self.bc_boost = 0.0  # added to the weight of behaviour cloning by an alarm
        self.invalid_batches = 0  # in a row
        self.stopped_by_alarm = False
        self.record: dict[str, float] = {}  # of the last step
        self.drawn_at = 0  # optimizer step at which the last rollout was drawn
        self.held_out: HeldOut | None = None

    # ---- before the first step

    def configure_model(self) -> None:
        """Loads policy and reference, and checks that they, the sampler and the hidden states belong together."""
        if self.planner is not None:
            return
        source = self.trainer.datamodule.hidden
        if source is None:
            raise MissingError("stage 3 needs hidden states: set data.hidden_cache")
        self.hidden_fingerprint = source.fingerprint
        loaded = load_planner(self.init)
        require_hidden(loaded, source.fingerprint, allow_mismatch=self.allow_hidden_mismatch)
        require_states(source.fingerprint, self.trainer.datamodule.hidden_eval.fingerprint,
                       allow_other=self.allow_hidden_mismatch)  # fmt: skip
        self.reference = ReferencePolicy.load(
            self.reference_path, loaded.planner.config, source.fingerprint, allow_mismatch=self.allow_hidden_mismatch
        )
        process = rollout_process(loaded.planner, self.algorithm)
        if self.algorithm.needs_value:
            self.value_head = ValueHead(loaded.planner.config, process.num_steps)
        self.planner = loaded.planner
        self.process = process  # a module without parameters: moves with this one
        self.collector = Collector(self.algorithm, process, self.reward, self.scorer, self.seed)
        self.updater = Updater(self.algorithm, process)

    def on_fit_start(self) -> None:
        self.reference.to(self.device)
        dataset = self.trainer.datamodule.dataset("train")
        self.scorer.require_coverage(dataset.tokens)
        global_batch = self.trainer.datamodule.batch_size * self.trainer.world_size
        if global_batch < self.algorithm.minibatches:
            raise AlgorithmError(f"{self.algorithm.minibatches} minibatches cannot be made of {global_batch} scenes: "
                                 "raise datamodule.batch_size or lower algorithm.minibatches")  # fmt: skip
        self._probe(dataset)
        self.held_out = self.held_out or HeldOut(self.reward, self.scorer, self.validation_seed)

    def _probe(self, dataset: Any) -> None:
        """Scores a few recorded drives: a scorer that cannot do that will not score a policy either."""
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

    # ---- training

    def training_step(self, batch: tuple[SceneBatch, Any], batch_idx: int) -> None:
        scenes, hidden, mask = checked(batch)
        self._scenes = scenes, hidden
        self.planner.eval()  # dropout of the ego state would make old and new log-probabilities those of other policies
        self.drawn_at, self.record = self.global_step, {}
        number = self.rollouts
        with_drift = self.drift_every > 0 and number % self.drift_every == 0
        experience = self.collector.collect(
            self.planner, self.value_head, self.reference, scenes, hidden, mask, rollout=number, with_drift=with_drift
        )
        self.rollouts += 1
        credit = assign_credit(self.algorithm, experience)
        record = rollout_statistics(experience, credit)
        counted = float(share_of_count(credit.mask))
        self._count_invalid(record, experience)
        losses = self._update(experience, credit, number) if counted else []
        record |= self._loss_record(losses, number)
        self.record = record
        self.lr_schedulers().step()
        shown = {name: record[name] for name in ("reward", "reward_gain") if math.isfinite(record[name])}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)

    def _update(self, experience: Experience, credit: Credit, number: int) -> list[Losses]:
        """All gradient steps of a rollout; fewer when ``target_kl`` is passed."""
        optimizer, algorithm = self.optimizers(), self.algorithm
        beta = algorithm.kl_weight(number) if algorithm.kl_weight else 0.0
        done: list[Losses] = []
        for epoch in range(algorithm.inner_epochs):
            parts: list[list[int] | None] = [None]
            if algorithm.minibatches > 1:
                parts = minibatches(experience.scenes.token, algorithm.minibatches, seed=self.seed, rollout=number,
                                    epoch=epoch, device=self.device)  # fmt: skip
            for part in parts:
                losses = self.updater.losses(
                    self.planner, self.value_head, experience, credit, part,
                    beta=beta, bc_weight=self.bc_weight(number),
                    conditioning=experience.conditioning if not done and part is None else None,
                )  # fmt: skip
                if algorithm.target_kl is not None and self._mean(losses.approx_kl) > algorithm.target_kl:
                    return done
                self._require_finite("loss", losses.total)  # before the backward pass: no weight has seen it
                if not float(losses.counted) and not self.bc_weight(number):
                    continue
                optimizer.zero_grad()
                self.manual_backward(losses.total)
                optimizer.step()
                done.append(losses)
        return done

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips here, where half-precision gradients are unscaled already; keeps the norm for the record."""
        weights = [weight for weight in self.parameters() if weight.grad is not None]
        self._gradient_norm = torch.nn.utils.clip_grad_norm_(weights, self.optimizer_settings.gradient_clip)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler leaves such a step out itself
            self._require_finite("norm of the gradient", self._gradient_norm)

    def _require_finite(self, what: str, value: Tensor) -> None:
        """Ends the run on all processes when the value is NaN or infinite on one of them."""
        good = bool(torch.isfinite(value.detach()))
        if not self.trainer.strategy.reduce_boolean_decision(good, all=True):
            scenes, hidden = self._scenes
            raise not_finite_loss(what, float(value), self.trainer, scenes, hidden)

    def bc_weight(self, number: int) -> float:
        return self.algorithm.bc_weight(number) + self.bc_boost

    @property
    def rollout_number(self) -> int:
        """Of the last rollout."""
        return self.rollouts - 1

    def _mean(self, value: Tensor) -> float:
        """Mean over processes of a loss term that was divided by the global count."""
        return float(self.trainer.strategy.reduce(value.detach(), reduce_op="mean"))

    def _loss_record(self, losses: list[Losses], number: int) -> dict[str, float]:
        record = {"bc_weight": self.bc_weight(number), "updates": float(len(losses))}
        record["learning_rate"] = self.optimizers().param_groups[0]["lr"]
        if self.algorithm.kl_weight:
            record["beta"] = self.algorithm.kl_weight(number)
        if losses:
            record |= {RECORDED.get(name, name): self._mean(value) for name, value in mean_losses(losses).items()}
            record["gradient_norm"] = float(self._gradient_norm)
        return record

    def _count_invalid(self, record: dict[str, float], experience: Experience) -> None:
        self.invalid_batches = self.invalid_batches + 1 if record["invalid_rate"] == 1.0 else 0
        if self.invalid_batches >= self.max_invalid_batches:
            raise NoValidReward(
                f"{self.invalid_batches} batches in a row had no valid reward, the last of tokens "
                f"{experience.scenes.token[:MAX_LISTED]} ({experience.scores.reasons[0]}): rebuild the metric cache"
            )

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.optimizer_settings
        groups = [{"params": list(self.planner.parameters()), "lr": settings.lr}]
        if self.value_head is not None:
            groups.append({"params": list(self.value_head.parameters()), "lr": settings.value_lr})
        return adamw(groups, settings, total=total_steps(self.trainer))

    # ---- held-out scenes

    def on_validation_epoch_start(self) -> None:
        self.held_out = self.held_out or HeldOut(self.reward, self.scorer, self.validation_seed)
        self.held_out.start()

    def validation_step(self, batch: tuple[SceneBatch, Any], batch_idx: int) -> None:
        scenes, hidden, mask = checked(batch)
        self.held_out.add(self.planner.eval(), self.reference, scenes, hidden, mask)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.held_out.finish(self.trainer).items():
            if math.isfinite(value):
                self.log(f"val/{name}", value, prog_bar=name == "pdm_score", rank_zero_only=False)

    def stopped(self, what: str) -> StoppedByAlarm:
        """The error of a run that an alarm ended, with the checkpoint that it leaves."""
        folder = Path(self.trainer.default_root_dir)
        best = [each.link_path for each in self.trainer.checkpoint_callbacks if isinstance(each, BestCheckpoints)]
        left = next((path for path in best if path is not None and path.exists()), None)
        return StoppedByAlarm(
            f"{what}: see {folder / 'alarms.csv'}. Change the reward or the algorithm and start afresh with "
            "resume=never; to go on in spite of it: alarms=warn resume_ignore=[callbacks.alarms]",
            left or resume_point(folder / "checkpoints"),
        )

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["planner"] = planner_record(self.planner, self.hidden_fingerprint)
        checkpoint["stage3"] = {
            "rollouts": self.rollouts,
            "bc_boost": self.bc_boost,
            "invalid_batches": self.invalid_batches,
            "stopped_by_alarm": self.stopped_by_alarm,
            "reference": self.reference.fingerprint.to_json(),
            "scorer": self.scorer.fingerprint.to_json(),
            "traffic": self.reward.traffic,
            "algorithm": self.algorithm.name,
            "held_out": self.held_out.state_dict() if self.held_out else {},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues only with the reference and the scorer of the checkpoint."""
        state = checkpoint["stage3"]
        then = Fingerprint.from_json(state["reference"])
        if then.digest != self.reference.fingerprint.digest:
            listed = "\n  ".join(then.differences(self.reference.fingerprint))
            raise ReferenceMismatch(f"the checkpoint was trained against another reference (then | now):\n  {listed}")
        Fingerprint.from_json(state["scorer"]).require_equal(
            self.scorer.fingerprint, mine="the scorer of the checkpoint", theirs="the scorer now",
            remedy="use the metric cache that the run began with, or start afresh with resume=never",
        )  # fmt: skip
        if state["stopped_by_alarm"] and any(getattr(each, "can_stop", False) for each in self.trainer.callbacks):
            raise self.stopped("an alarm stopped this run, and it does not go on of itself")
        before = state.get("traffic", "log_replay")
        if before != self.reward.traffic:
            raise AlgorithmError(
                f"the checkpoint was rewarded in traffic {before}, this run is in {self.reward.traffic}: set "
                f"reward.traffic={before}, or start afresh with resume=never"
            )
        self.rollouts, self.bc_boost = int(state["rollouts"]), float(state["bc_boost"])
        self.invalid_batches = int(state["invalid_batches"])
        self.held_out = HeldOut(self.reward, self.scorer, self.validation_seed)
        self.held_out.load_state_dict(state["held_out"])


def mean_losses(losses: list[Losses]) -> dict[str, Tensor]:
    """Means over the updates of a rollout.

    The policy's terms have no value in an update that counts no decision; what was not asked for (a NaN KL) is left
    out.
    """
    counted = [each for each in losses if float(each.counted)]
    means = {}
    for name in Losses._fields:
        chosen = losses if name in ("total", "cloning") else counted
        if chosen and name != "counted":
            means[name] = torch.stack([getattr(each, name).detach() for each in chosen]).mean()
    if "kl_reference" in means and bool(means["kl_reference"].isnan()):
        del means["kl_reference"]
    return means


def rollout_process(planner: DiffusionPlanner, algorithm: Algorithm) -> Process:
    """The sampler of rollouts; raises WrongProcess or NoDensity when it cannot serve this planner."""
    if algorithm.process is None and algorithm.num_steps is None:
        process = planner.process
    else:
        process = build_process(algorithm.process or planner.process.name, algorithm.num_steps)
    if process.prediction != planner.process.prediction:
        raise WrongProcess(
            f"algorithm {algorithm.name} samples with {process.name}, which needs a planner that predicts "
            f"{process.prediction}; this one was trained with {planner.process.name} and predicts "
            f"{planner.process.prediction}: train stage 2 with planner.process={process.name}, or choose another "
            "algorithm"
        )
    if not process.has_density:
        raise NoDensity(
            f"algorithm {algorithm.name} would sample with {process.name}, whose steps have no density: set "
            "algorithm.process to ddim, or to flow_sde or flow_cps for a flow planner"
        )
    process.require_read(algorithm.exploration)
    return process


def checked(batch: tuple[SceneBatch, Any]) -> tuple[SceneBatch, Tensor, Tensor | None]:
    """A batch that keeps its contract; raises MissingError or DataError naming tokens otherwise."""
    scenes, hidden = batch
    if hidden is None:
        raise MissingError(f"tokens {scenes.token[:MAX_LISTED]} came without hidden states: set data.hidden_cache")
    if len(hidden.hidden) != len(scenes):
        raise DataError(f"{len(hidden.hidden)} hidden states came with {len(scenes)} scenes")
    return scenes, hidden.hidden, hidden.mask
