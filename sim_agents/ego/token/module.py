"""The goal stage of the token planner: supervised, between the base model's training and reinforcement.

Legend: S scenes, K + 1 poses half a second apart, V tokens, P poses of a way.

    L = mean CE(pi(. | s_k, goal), token_k) over the ego's recorded tokens from the present to the goal

The goal of an example is where its ego is recorded ``goal_s`` later (hindsight: every recording reaches its own goal),
the way is the path that it was driven along, moved to the side by some decimetres. ``untold`` of the examples have no
goal and ``untold`` no way, so each alone suffices. The base model's weights do not change unless ``train_base``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from navsim_ext.closed_loop.kinematics import TOKEN_S
from navsim_ext.errors import DataError, NotFiniteLoss
from navsim_ext.runtime.learning_rate import total_steps
from navsim_ext.runtime.optimizer import OptimizerSettings, adamw
from sim_agents.data.scene_tokens import SceneTokens
from sim_agents.ego.checkpoint import RECORD, planner_record, read_record
from sim_agents.ego.token.network import GoalNetwork, GoalSettings, told
from sim_agents.model.network import agents_of
from sim_agents.training.checkpoint import agent_record, load_agents
from sim_agents.training.losses import SmoothedCrossEntropy
from sim_agents.vocabulary import class_of, encode

KIND = "token"
WAY_POSES = 160  # P: a way of a window, every metre
ASIDE_M = 0.3  # standard deviation by which a way lies beside what was driven


class GoalModule(pl.LightningModule):
    """``base`` is a checkpoint of ``sim_agents.train``; network and vocabulary are its own."""

    def __init__(
        self, base: str | os.PathLike[str], goal: GoalSettings | None = None,
        optimizer: OptimizerSettings | None = None, *, smoothing: str = "spatial", epsilon: float = 0.1,
        goal_s: tuple[float, float] = (2.0, 8.0), untold: float = 0.15, train_base: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        low, high = goal_s
        if not (0.0 <= untold < 1.0 and TOKEN_S <= low <= high):
            raise DataError(f"untold={untold}, goal_s={list(goal_s)}: a share below 1 and low <= high were expected")
        agents = load_agents(base)
        self.vocabulary = agents.vocabulary
        self.base_fingerprint = agents.fingerprint
        self.goal_settings = goal or GoalSettings()
        self.network = GoalNetwork(agents.network.settings, agents.vocabulary, self.goal_settings)
        weights = agents.network.state_dict()
        self.network.load_state_dict({**self.network.state_dict(), **weights}, strict=True)
        self.train_base, self.untold = train_base, untold
        if not train_base:
            for name, weight in self.network.named_parameters():
                weight.requires_grad = name.startswith("goal_")
        self.goal_steps = (round(low / TOKEN_S), round(high / TOKEN_S))
        self.loss = SmoothedCrossEntropy(self.vocabulary, smoothing=smoothing, epsilon=epsilon)
        self.optimizer_settings = optimizer or OptimizerSettings(1e-3, 5e-5, 0.01, warmup_share=0.03)
        self._sums: list[Tensor] = []

    def training_step(self, batch: SceneTokens, batch_idx: int) -> Tensor:
        now = self.trainer.datamodule.window.now
        S = len(batch.valid)
        last = batch.valid.shape[1:][-1] - 1
        low, high = (min(now + steps, last) for steps in self.goal_steps)
        ends = torch.randint(low, high + 1, (S,)).to(self.device)
        hidden = torch.rand(2, S).to(self.device) < self.untold
        logits, targets, classes = self._decisions(batch, now, ends, hidden)
        if len(targets) == 0:
            raise DataError("a batch has no decision that counts: no ego is recorded for three half seconds in a row")
        loss = self.loss(logits, targets, classes).mean()
        if not torch.isfinite(loss):
            raise NotFiniteLoss(f"the loss is {loss.item()} at step {self.global_step}: lower the rate")
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=S)
        return loss

    def _decisions(
        self, batch: SceneTokens, now: int, ends: Tensor, hidden: Tensor, *, nothing: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [D,V], target tokens [D], class rows [D]) of the egos' decisions from the present to ``ends`` [S];
        ``hidden`` [2,S]: whether goal and way are kept from them."""
        S, _, steps = batch.valid.shape
        rows, ego = torch.arange(S, device=self.device), batch.ego.long().argmax(dim=1)
        pick = lambda name: getattr(batch, name)[rows, ego]  # noqa: E731
        recorded, valid, classes = pick("pose"), pick("valid"), class_of(pick("kind"))
        found = encode(self.vocabulary.to(self.device), classes, recorded, valid, pick("displacement"))
        pose = batch.pose.clone()
        pose[rows, ego] = found.poses
        agents = agents_of(replace(batch, pose=pose))
        goal = torch.where(hidden[0][:, None], torch.nan, recorded[rows, ends, :2])
        way, count = driven_way(recorded[:, now:], valid[:, now:])
        way = way + self._aside(way)
        count = torch.where(hidden[1], 0, count)
        side = self.network.roadside(batch, now)
        if not nothing:
            side = told(side, goal, way, count)
        features = self.network.features(side, agents)[rows, ego][:, :-1]
        moments = torch.arange(steps - 1, device=self.device)
        before = torch.cat([torch.zeros_like(valid[:, :1]), valid[:, :-2]], dim=1)
        counts = found.valid & before & (moments >= now) & (moments < ends[:, None])
        classes = classes[:, None].expand_as(counts)[counts]
        return self.network.logits(features[counts], classes), found.tokens[counts], classes

    def _aside(self, way: Tensor) -> Tensor:
        if not self.training:
            return torch.zeros_like(way)
        heading = way[..., 2]
        normal = torch.stack([-torch.sin(heading), torch.cos(heading), torch.zeros_like(heading)], dim=-1)
        return normal * (torch.randn(len(way), 1, 1) * ASIDE_M).to(way.device)

    # -- validation

    def on_validation_epoch_start(self) -> None:
        self._sums = []

    def validation_step(self, batch: SceneTokens, batch_idx: int) -> None:
        """Negative log-likelihood (nats) of the egos' tokens, told where the recording ends, and told nothing."""
        now = self.trainer.datamodule.window.now
        S, last = len(batch.valid), batch.valid.shape[-1] - 1
        ends = torch.full((S,), last, device=self.device)
        hidden = torch.zeros(2, S, dtype=torch.bool, device=self.device)
        sums = []
        for nothing in (False, True):
            logits, targets, classes = self._decisions(batch, now, ends, hidden, nothing=nothing)
            logp = self.loss.mask(logits, classes).log_softmax(dim=-1)
            sums.append(-logp.gather(-1, targets[:, None]).sum())
        self._sums.append(torch.stack([*sums, sums[0].new_tensor(float(len(targets)))]))

    def on_validation_epoch_end(self) -> None:
        sums = self.all_gather(torch.stack(self._sums).double().sum(dim=0)).reshape(-1, 3).sum(dim=0)
        self.log("val/nll", sums[0] / sums[2], prog_bar=True, rank_zero_only=False)
        self.log("val/nll_told_nothing", sums[1] / sums[2], rank_zero_only=False)

    # -- optimizer and checkpoints

    def configure_optimizers(self) -> dict[str, Any]:
        learning = [weight for weight in self.network.parameters() if weight.requires_grad]
        return adamw([{"params": learning}], self.optimizer_settings, total=total_steps(self.trainer))

    def record(self) -> str:
        vocabulary = self.base_fingerprint.parents["vocabulary"]
        settings = {"network": asdict(self.network.settings), "goal": asdict(self.goal_settings)}
        data = self.trainer.datamodule
        agents = json.loads(agent_record(self.network.settings, self.vocabulary, vocabulary, None, data.bounds))
        more = {name: agents[name] for name in ("tables", "vocabulary", "bounds")}
        more["base"] = self.base_fingerprint.to_json()
        return planner_record(KIND, settings, data.dataset("train").fingerprint, **more)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other sizes, or another base model, than the checkpoint's."""
        found = read_record(checkpoint, "the checkpoint", "vocabulary", "bounds", "base")
        mine = json.loads(self.record())
        for key in ("settings", "vocabulary", "bounds", "base"):
            if found[key] != mine[key]:
                raise DataError(f"the checkpoint's {key} is {found[key]}, the configured one {mine[key]}")


def driven_way(pose: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(way [S,P,3] every metre along what was driven, number of its poses [S]) of poses [S,K,3] up to the first gap."""
    there = valid.cumprod(dim=1).bool()
    step = (pose[:, 1:, :2] - pose[:, :-1, :2]).norm(dim=-1) * there[:, 1:]
    along = torch.cat([torch.zeros_like(step[:, :1]), step.cumsum(dim=1)], dim=1)  # [S,K]
    at = torch.arange(WAY_POSES, device=pose.device, dtype=pose.dtype).expand(len(pose), -1).contiguous()
    high = torch.searchsorted(along.contiguous(), at).clamp(1, pose.shape[1] - 1)
    low = high - 1
    a, b = (pose.gather(1, index[..., None].expand(-1, -1, 3)) for index in (low, high))
    span = (along.gather(1, high) - along.gather(1, low)).clamp_min(1e-6)
    share = ((at - along.gather(1, low)) / span).clamp(0.0, 1.0)[..., None]
    turn = torch.remainder(b[..., 2:] - a[..., 2:] + torch.pi, 2 * torch.pi) - torch.pi
    way = torch.cat([a[..., :2] + share * (b[..., :2] - a[..., :2]), a[..., 2:] + share * turn], dim=-1)
    count = (along[:, -1].floor().long() + 1).clamp_max(WAY_POSES)
    return way, torch.where(along[:, -1] >= 1.0, count, 0)
