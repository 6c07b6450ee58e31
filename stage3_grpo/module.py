"""Reinforcement learning of a policy: the Lightning module of stage 3.

One training step is one rollout of the batch's starts and the updates that follow from it:

    roll       G samples per start, the reference's, scores                (policy.py, policies/)
    credit     advantages over the global batch, weighted                  (credit.py, algorithm/, core/)
    update     mu passes x M minibatches of L = L_policy + beta KL + w_bc L_bc + w_v L_v    (update.py)

What holds before the first step is checked before the first step: the policy looks to its reference, scorer and data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from navsim_ext.errors import TriviumError
from navsim_ext.runtime.checkpoint_folder import resume_point
from navsim_ext.runtime.checkpoints import BestCheckpoints
from navsim_ext.runtime.collectives import share_of_count
from navsim_ext.runtime.learning_rate import total_steps
from navsim_ext.runtime.optimizer import OptimizerSettings, adamw
from navsim_ext.runtime.sharding import ShardedStrategy, whole
from stage3_grpo.algorithm import AdaptiveWeight, Algorithm, AlgorithmError
from stage3_grpo.credit import Credit, assign_credit
from stage3_grpo.monitors.statistics import credit_statistics
from stage3_grpo.policy import HeldOut, Key, NoValidReward, Policy, PolicyRollout
from stage3_grpo.update import Losses, Updater, added, minibatches

log = logging.getLogger(__name__)

RECORDED = {"total": "loss", "policy": "policy_loss", "kl": "kl_loss", "cloning": "bc_loss", "value": "value_loss"}
MAX_LISTED = 8


class StoppedByAlarm(TriviumError):
    """An alarm ended the run; ``checkpoint`` is the best one (without held-out starts the last)."""

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
    """Trains ``policy`` by ``algorithm``.

    ``drift_every``: rollouts between measurements of the KL to the reference where no KL term needs it.
    ``max_invalid_batches``: so many batches in a row without one valid reward end the run.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        *,
        optimizer: PolicyOptimizerSettings | None = None,
        seed: int = 0,
        drift_every: int = 10,
        max_invalid_batches: int = 10,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.algorithm, self.updater = policy, algorithm, Updater(algorithm)
        self.optimizer_settings = optimizer or PolicyOptimizerSettings()
        self.seed = seed
        self.drift_every, self.max_invalid_batches = drift_every, max_invalid_batches
        self.learned: Mapping[str, nn.Module] | None = None  # registered by their names in checkpoints
        self.rollouts = 0  # drawn so far
        self.bc_boost = 0.0  # added to the weight of behaviour cloning by an alarm
        self.invalid_batches = 0  # in a row
        weight = algorithm.kl.weight if algorithm.kl else None
        self.adapted = weight.start if isinstance(weight, AdaptiveWeight) else None  # the present adaptive KL weight
        self.stopped_by_alarm = False
        self.record: dict[str, float] = {}  # of the last step
        self.drawn_at = 0  # optimizer step at which the last rollout was drawn
        self.held_out: HeldOut | None = None

    # ---- before the first step

    def configure_model(self) -> None:
        """Lets the policy load what it consists of, and checks that it belongs together."""
        if self.learned is not None:
            return
        self.learned = self.policy.build(self.trainer.datamodule, self.algorithm, self.seed)
        if isinstance(self.trainer.strategy, ShardedStrategy):
            if not hasattr(self.policy, "shard"):
                raise AlgorithmError(f"policy {self.policy.name} cannot be cut among processes: use trainer=ddp")
            self.policy.shard(self.device_mesh["data_parallel"])
        for name, module in self.learned.items():
            self.add_module(name, module)
        self.held_out = self.policy.held_out()

    def on_fit_start(self) -> None:
        datamodule = self.trainer.datamodule
        global_batch = datamodule.batch_size * self.trainer.world_size
        if global_batch < self.algorithm.surrogate.minibatches:
            raise AlgorithmError(
                f"{self.algorithm.surrogate.minibatches} minibatches cannot be made of {global_batch} scenes: raise "
                "datamodule.batch_size or lower surrogate.minibatches"
            )
        self.policy.begin(datamodule, self.device)

    # ---- training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.drawn_at, self.record = self.global_step, {}
        number = self.rollouts
        drift = self.drift_every > 0 and number % self.drift_every == 0
        rollout = self.policy.roll(
            batch, self.algorithm.group_size, Key(self.seed, number),
            self.algorithm.needs(drift=drift, teach=self.bc_weight(number) > 0),
        )  # fmt: skip
        self._rollout = rollout
        self.rollouts += 1
        credit = assign_credit(self.algorithm, rollout)
        record = credit_statistics(rollout, credit)
        self._count_invalid(record, rollout)
        beta = self.beta(number)
        losses = self._update(rollout, credit, number, beta) if float(share_of_count(credit.mask)) else []
        self._rollout = None
        record |= self.policy.statistics(rollout)
        record |= self._loss_record(losses, number, beta)
        if self.adapted is not None:
            self.adapted = self.algorithm.kl.weight.following(self.adapted, record.get("kl_reference", math.nan))
        self.policy.after_update(self.rollouts)
        self.record = record
        self.lr_schedulers().step()
        shown = {name: record[name] for name in ("reward", "reward_gain") if math.isfinite(record.get(name, math.nan))}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)

    def _update(self, rollout: PolicyRollout, credit: Credit, number: int, beta: float) -> list[Losses]:
        """All gradient steps of a rollout; fewer when ``target_kl`` is passed."""
        optimizer, surrogate = self.optimizers(), self.algorithm.surrogate
        done: list[Losses] = []
        for epoch in range(surrogate.inner_epochs):
            chosen: list[list[int] | None] = [None]
            if surrogate.minibatches > 1:
                chosen = minibatches(rollout.names, surrogate.minibatches, seed=self.seed, rollout=number,
                                     epoch=epoch, device=self.device)  # fmt: skip
            for starts in chosen:
                optimizer.zero_grad()
                losses = self._backward(rollout, credit, starts, number, beta)
                if surrogate.target_kl is not None and self._mean(losses.approx_kl) > surrogate.target_kl:
                    optimizer.zero_grad()
                    return done
                if not float(losses.counted) and not self.bc_weight(number):
                    continue
                optimizer.step()
                done.append(losses)
        return done

    def _backward(
        self, rollout: PolicyRollout, credit: Credit, starts: list[int] | None, number: int, beta: float
    ) -> Losses:
        """The losses of one update, without graphs; their gradients stand in the weights. Losses that are not finite
        end the run before a weight has seen them."""
        parts = []
        for part in self.updater.parts(
            self.policy, self.learned, rollout, credit, starts, beta=beta, bc_weight=self.bc_weight(number)
        ):
            self._require_finite("loss", part.total)
            self.manual_backward(part.total)
            parts.append(part._replace(total=part.total.detach()))
        return added(parts)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips here, where half-precision gradients are unscaled already; keeps the norm for the record."""
        weights = [weight for weight in self.parameters() if weight.grad is not None]
        self._gradient_norm = whole(torch.nn.utils.clip_grad_norm_(weights, self.optimizer_settings.gradient_clip))
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # a scaler leaves such a step out itself
            self._require_finite("norm of the gradient", self._gradient_norm)

    def _require_finite(self, what: str, value: Tensor) -> None:
        """Ends the run on all processes when the value is NaN or infinite on one of them."""
        good = bool(torch.isfinite(value.detach()))
        if not self.trainer.strategy.reduce_boolean_decision(good, all=True):
            raise self.policy.not_finite(what, float(value), self.trainer, self._rollout)

    def bc_weight(self, number: int) -> float:
        return self.algorithm.bc_weight(number) + self.bc_boost

    def beta(self, number: int) -> float:
        """Weight of the KL to the reference at a rollout."""
        if self.algorithm.kl is None:
            return 0.0
        return self.algorithm.kl.weight(number) if self.adapted is None else self.adapted

    @property
    def rollout_number(self) -> int:
        """Of the last rollout."""
        return self.rollouts - 1

    def _mean(self, value: Tensor) -> float:
        """Mean over processes of a loss term that was divided by the global count."""
        return float(self.trainer.strategy.reduce(value.detach(), reduce_op="mean"))

    def _loss_record(self, losses: list[Losses], number: int, beta: float) -> dict[str, float]:
        record = {"bc_weight": self.bc_weight(number), "updates": float(len(losses))}
        record["learning_rate"] = self.optimizers().param_groups[0]["lr"]
        if self.algorithm.kl:
            record["beta"] = beta
        if losses:
            record |= {RECORDED.get(name, name): self._mean(value) for name, value in mean_losses(losses).items()}
            record["gradient_norm"] = float(self._gradient_norm)
        return record

    def _count_invalid(self, record: dict[str, float], rollout: PolicyRollout) -> None:
        self.invalid_batches = self.invalid_batches + 1 if record["invalid_rate"] == 1.0 else 0
        if self.invalid_batches >= self.max_invalid_batches:
            why = f" ({rollout.reasons[0]})" if rollout.reasons else ""
            raise NoValidReward(
                f"{self.invalid_batches} batches in a row had no valid reward, the last of tokens "
                f"{list(rollout.names)[:MAX_LISTED]}{why}: check the data of the reward (rebuild the metric cache)"
            )

    def configure_optimizers(self) -> dict[str, Any]:
        settings, learned = self.optimizer_settings, self.policy.parameters()
        groups = [{"params": list(learned["policy"]), "lr": settings.lr}]
        if "value" in learned:
            groups.append({"params": list(learned["value"]), "lr": settings.value_lr})
        return adamw(groups, settings, total=total_steps(self.trainer))

    # ---- held-out starts

    def on_validation_epoch_start(self) -> None:
        self.held_out.start()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.held_out.add(batch)

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
        records, identity = self.policy.save()
        checkpoint.update(records)
        checkpoint["stage3"] = identity | {
            "rollouts": self.rollouts,
            "bc_boost": self.bc_boost,
            "kl_weight": self.adapted,
            "invalid_batches": self.invalid_batches,
            "stopped_by_alarm": self.stopped_by_alarm,
            "algorithm": self.algorithm.name,
            "policy": self.policy.name,
            "held_out": self.held_out.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues only with the policy, reference and scorer of the checkpoint."""
        state = checkpoint["stage3"]
        if state.get("policy", self.policy.name) != self.policy.name:
            raise AlgorithmError(f"the checkpoint is of a policy {state['policy']}, this run's is {self.policy.name}")
        self.policy.require_same(state)
        if state["stopped_by_alarm"] and any(getattr(each, "can_stop", False) for each in self.trainer.callbacks):
            raise self.stopped("an alarm stopped this run, and it does not go on of itself")
        self.rollouts, self.bc_boost = int(state["rollouts"]), float(state["bc_boost"])
        self.invalid_batches = int(state["invalid_batches"])
        if self.adapted is not None:
            self.adapted = float(state["kl_weight"])
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
