"""Imitation training of the path planner.

Legend: B examples, W waypoints.

    L = mean over known waypoints of w_j |waypoint_j - target_j|_huber,   w_j = 1 / (1 + |target_j| / 10 m)

Far waypoints are farther off for the same mistake in speed; the weight keeps the near ones, which are driven, from
drowning. Targets lead back to the record from wherever an example begins (``ego/recorded.py``).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from navsim_ext.errors import DataError, NotFiniteLoss
from navsim_ext.frames import NUM_FUTURE_POSES, POSE_INTERVAL_S
from navsim_ext.runtime.learning_rate import total_steps
from navsim_ext.runtime.optimizer import OptimizerSettings, adamw
from sim_agents.ego.checkpoint import RECORD, fill, planner_record, read_planner, read_record
from sim_agents.ego.motion import local_point
from sim_agents.ego.observation import EgoObservation, observe
from sim_agents.ego.path.network import PathNetwork, PathSettings
from sim_agents.ego.path.policy import KIND
from sim_agents.ego.policy import ego_state
from sim_agents.ego.recorded import Disturbance, EgoExample, assemble, begin

HORIZON_S = NUM_FUTURE_POSES * POSE_INTERVAL_S
SMOOTH_M = 0.5  # below it an error counts as its square


class PathModule(pl.LightningModule):
    """``init_from`` is a checkpoint of a path planner of the same sizes."""

    def __init__(
        self, network: PathSettings | None = None, optimizer: OptimizerSettings | None = None, *,
        disturbance: Disturbance | None = None, init_from: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings = network or PathSettings()
        self.network = PathNetwork(self.settings)
        self.optimizer_settings = optimizer or OptimizerSettings(1e-3, 5e-5, 0.01, warmup_share=0.03)
        self.disturbance = disturbance or Disturbance()
        if init_from is not None:
            record, weights, _ = read_planner(init_from, KIND)
            if record["settings"] != json.loads(json.dumps(asdict(self.settings))):
                raise DataError(f"{init_from} has the sizes {record['settings']}, the configured are {self.settings}")
            fill(self.network, weights, init_from)
        self._errors: list[Tensor] = []

    def example(
        self, batch: list[EgoExample], disturbance: Disturbance | None, generator: torch.Generator | None = None
    ) -> tuple[EgoObservation, Tensor, Tensor]:
        """(observation, targets [B,W,2] in the ego's frame, valid [B,W])."""
        _, state, around = assemble(batch, self.device, horizon_s=HORIZON_S)
        targets = begin(state, NUM_FUTURE_POSES, disturbance, generator)
        pose, _, _ = ego_state(state)
        return observe(state, around, self.settings.sight), _seen_from(pose, targets.pose), targets.valid

    def training_step(self, batch: list[EgoExample], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        seen, target, valid = self.example(batch, self.disturbance, generator)
        loss = waypoint_loss(self.network(seen), target, valid)
        if not torch.isfinite(loss):
            raise NotFiniteLoss(f"the loss is {loss.item()} at step {self.global_step}: lower the rate")
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._errors = []

    def validation_step(self, batch: list[EgoExample], batch_idx: int) -> None:
        """Mean and final displacement of the waypoints from the record (m)."""
        seen, target, valid = self.example(batch, None)
        error = (self.network(seen) - target).norm(dim=-1)
        mean = (error * valid).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
        self._errors.append(torch.stack([mean.sum(), error[:, -1].sum(), mean.new_tensor(float(len(mean)))]))

    def on_validation_epoch_end(self) -> None:
        sums = self.all_gather(torch.stack(self._errors).sum(dim=0)).reshape(-1, 3).sum(dim=0)
        self.log("val/ade_m", sums[0] / sums[2], prog_bar=True, rank_zero_only=False)
        self.log("val/fde_m", sums[1] / sums[2], rank_zero_only=False)

    def configure_optimizers(self) -> dict[str, Any]:
        # The critic and the spread of the policy learn by reinforcement alone.
        names = ("encoder.", "head.")
        learning = [weight for name, weight in self.network.named_parameters() if name.startswith(names)]
        return adamw([{"params": learning}], self.optimizer_settings, total=total_steps(self.trainer))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        scenes = self.trainer.datamodule.dataset("train").fingerprint
        checkpoint[RECORD] = planner_record(KIND, asdict(self.settings), scenes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other sizes than the checkpoint's."""
        found = read_record(checkpoint, "the checkpoint")["settings"]
        mine = json.loads(json.dumps(asdict(self.settings)))
        if found != mine:
            raise DataError(f"the checkpoint's sizes are {found}, the configured ones {mine}")


def waypoint_loss(waypoints: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The loss above of waypoints [B,W,2]; raises DataError where no waypoint is known."""
    total = valid.sum()
    if total == 0:
        raise DataError("a batch has no known waypoint: the recordings end at the present")
    error = torch.nn.functional.smooth_l1_loss(waypoints, target, reduction="none", beta=SMOOTH_M).sum(dim=-1)
    weight = 1.0 / (1.0 + target.norm(dim=-1) / 10.0)
    return (error * weight * valid).sum() / total


def _seen_from(pose: Tensor, targets: Tensor) -> Tensor:
    """Places of poses [B,W,3] as seen from poses [B,3]."""
    return local_point(pose[:, None].expand_as(targets), targets[..., :2])
