"""Training of a next-token model: behaviour cloning, and fine-tuning on states that the model itself has come to.

Legend: S scenes, N road users, K tokens, D decisions, V tokens of the vocabulary.

    cloning     states and targets are the rolling match of the recording:           L = mean CE(pi(. | s_k), token_k)
    closed loop the scene is rolled by ``choice`` first; in the rolled state the target is the token that leads
    nearest to
                the recorded pose. With the nearest of the K most probable tokens this is CAT-K (arXiv 2412.05334), with
                sampled tokens it is fine-tuning on own rollouts; with the nearest of some sampled tokens, which are
                then the targets themselves, it is RoaD's.

A decision counts where the road user was recorded before, at and after it (cloning), or drives and is recorded
after it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from navsim_ext.errors import DataError, NotFiniteLoss
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.learning_rate import total_steps
from navsim_ext.runtime.optimizer import OptimizerSettings, adamw
from navsim_ext.runtime.rng import derive_seed
from sim_agents.data.scene_tokens import Bounds, SceneTokens
from sim_agents.model.network import NextTokenNetwork, agents_of
from sim_agents.model.rolling import Choice, roll
from sim_agents.model.sampling import keyed_uniform
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.training.checkpoint import RECORD, agent_record, initialise, read_record
from sim_agents.training.closed_loop import ClosedLoop, figures
from sim_agents.training.losses import SmoothedCrossEntropy
from sim_agents.vocabulary import MotionState, class_of, closest_tokens, encode, load_vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decisions:
    """What a batch is learned from: states ``pose`` [S, N, K + 1, 3] with ``valid``, ``targets`` [S, N, K] and which
    count."""

    pose: Tensor
    valid: Tensor
    targets: Tensor
    counts: Tensor


class AgentModule(pl.LightningModule):
    """Trains a :class:`NextTokenNetwork` over the vocabulary in the folder ``vocabulary``.

    ``choice`` None clones; a :class:`~sim_agents.model.rolling.Choice` rolls the scenes by it first. ``nearest`` >
    1 draws each cloned state among that many nearest tokens (noisy tokenisation); ``past_dropout`` hides that share
    of earlier moments from a road user's own past. ``init_from`` starts from a checkpoint; ``train_only_attention``
    freezes the embeddings and the map encoder, as CAT-K does. ``closed_loop`` has some validation scenes driven at
    every validation. ``network`` is a NetworkSettings without ``tokens``, which the vocabulary decides.
    """

    def __init__(
        self,
        vocabulary: str,
        network: dict[str, Any] | None = None,
        optimizer: OptimizerSettings | None = None,
        *,
        smoothing: str = "spatial",
        epsilon: float = 0.1,
        nearest: int = 1,
        past_dropout: float = 0.1,
        choice: Choice | None = None,
        init_from: str | None = None,
        train_only_attention: bool = False,
        closed_loop: ClosedLoop | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0.0 <= past_dropout < 1.0 or nearest < 1:
            raise DataError(f"past_dropout={past_dropout}, nearest={nearest}: a share below 1, and at least 1 token")
        self.vocabulary, self.vocabulary_fingerprint = load_vocabulary(vocabulary)
        self.settings = NetworkSettings(tokens=self.vocabulary.size, **(network or {}))
        self.network = NextTokenNetwork(self.settings, self.vocabulary)
        self.loss = SmoothedCrossEntropy(self.vocabulary, smoothing=smoothing, epsilon=epsilon)
        self.optimizer_settings = optimizer or OptimizerSettings(5e-4, 2.5e-5, 0.01, warmup_share=0.03)
        self.nearest, self.past_dropout, self.choice, self.seed = nearest, past_dropout, choice, seed
        self.closed_loop = closed_loop
        if init_from is not None:
            initialise(self.network, init_from, self.settings, self.vocabulary_fingerprint)
        if train_only_attention:
            if init_from is None:
                raise DataError("train_only_attention=true without init_from: there is nothing to be kept")
            for name, weight in self.network.named_parameters():
                weight.requires_grad = name.startswith(("blocks.", "head."))
        self._validated: list[tuple[float, float, float]] = []
        self._told = False

    @property
    def scenes(self) -> Fingerprint:
        """Fingerprint of the scenes that are trained on."""
        return self.trainer.datamodule.dataset("train").fingerprint

    # -- states and targets

    def cloned(self, scenes: SceneTokens, generator: torch.Generator | None = None) -> Decisions:
        """The recording told in tokens; states are where the tokens lead, noisily if ``nearest`` > 1."""
        S, N, _ = scenes.valid.shape
        flat = [getattr(scenes, name).flatten(0, 1) for name in ("pose", "valid", "displacement")]
        classes = class_of(scenes.kind).flatten()
        found = encode(self._on_device(), classes, *flat, nearest=self.nearest if generator is not None else 1,
                       generator=generator)  # fmt: skip
        before = torch.cat([torch.zeros_like(flat[1][:, :1]), flat[1][:, :-2]], dim=1)
        counts = found.valid & before
        unflatten = lambda values: values.unflatten(0, (S, N))  # noqa: E731
        return Decisions(unflatten(found.poses), scenes.valid, unflatten(found.tokens), unflatten(counts))

    def driven(self, scenes: SceneTokens, now: int, key: int) -> Decisions:
        """The scene rolled by ``choice`` from the present; targets are the tokens nearest to the recording from
        there."""
        S, N, steps = scenes.valid.shape
        place = torch.arange(S * N * (steps - 1), device=scenes.valid.device).view(S, N, steps - 1)
        uniform = keyed_uniform(key, place.cpu()).to(place.device)
        vocabulary = self._on_device()
        was_training = self.network.training
        self.network.eval()
        rolled = roll(self.network, vocabulary, self.loss.present, scenes, now, self.choice, uniform)
        self.network.train(was_training)
        displacement = scenes.displacement.clone()
        both = rolled.valid[..., 1:] & rolled.valid[..., :-1]
        moved = torch.diff(rolled.pose[..., :2], dim=2)
        displacement[:, :, 1:] = torch.where(both[..., None], moved, displacement[:, :, 1:])
        classes = class_of(scenes.kind)[..., None].expand(S, N, steps - 1).flatten()
        state = MotionState(rolled.pose[:, :, :-1].flatten(0, 2), displacement[:, :, :-1].flatten(0, 2))
        if self.choice.demonstrates:
            targets = rolled.tokens
        else:
            recorded = scenes.pose[:, :, 1:].flatten(0, 2)
            targets = closest_tokens(vocabulary, state, classes, recorded).view(S, N, steps - 1)
        counts = (rolled.tokens >= 0) & scenes.valid[..., 1:]
        return Decisions(rolled.pose, rolled.valid, targets, counts)

    def _on_device(self):
        return self.vocabulary.to(self.device)

    # -- training

    def training_step(self, batch: SceneTokens, batch_idx: int) -> Tensor:
        now = self.trainer.datamodule.window.now
        if self.choice is None:
            noisy = torch.Generator().manual_seed(int(torch.randint(2**62, ()))) if self.nearest > 1 else None
            decisions = self.cloned(batch, noisy)
        else:
            decisions = self.driven(batch, now, derive_seed(self.seed, self.global_step, self.global_rank))
        loss, accuracy, _ = self._step(batch, decisions, now, hide=self.past_dropout)
        if not torch.isfinite(loss):
            raise NotFiniteLoss(f"the loss is {loss.item()} at step {self.global_step}: lower the rate")
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.valid))
        self.log("train/accuracy", accuracy, batch_size=len(batch.valid))
        return loss

    def _step(
        self, batch: SceneTokens, decisions: Decisions, now: int, *, hide: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mean loss, share of targets that are the most probable token, number of decisions)."""
        states = replace(batch, pose=decisions.pose, valid=decisions.valid)
        agents = agents_of(states)
        hidden = torch.rand(agents.valid.shape, device=agents.valid.device) < hide if hide else None
        features = self.network.features(self.network.roadside(batch, now), agents, hidden)
        counts = decisions.counts
        total = counts.sum()
        if total == 0:
            raise DataError("a batch has no decision that counts: nobody is recorded for three half seconds in a row")
        classes = class_of(batch.kind)[..., None].expand(counts.shape)[counts]
        logits = self.network.logits(features[:, :, :-1][counts], classes)
        targets = decisions.targets[counts]
        loss = self.loss(logits, targets, classes).mean()
        accuracy = (self.loss.mask(logits.detach(), classes).argmax(dim=-1) == targets).float().mean()
        return loss, accuracy, total

    def configure_optimizers(self) -> dict[str, Any]:
        learning = [weight for weight in self.network.parameters() if weight.requires_grad]
        return adamw([{"params": learning}], self.optimizer_settings, total=total_steps(self.trainer))

    # -- validation

    def on_validation_epoch_start(self) -> None:
        self._validated = []

    def validation_step(self, batch: SceneTokens, batch_idx: int) -> None:
        """Unsmoothed negative log-likelihood and accuracy of the recording's tokens."""
        now = self.trainer.datamodule.window.now
        decisions = self.cloned(batch)
        states = replace(batch, pose=decisions.pose)
        logits = self.network(states, now)[:, :, :-1][decisions.counts]
        classes = class_of(batch.kind)[..., None].expand(decisions.counts.shape)[decisions.counts]
        masked = self.loss.mask(logits, classes)
        targets = decisions.targets[decisions.counts]
        nll = -masked.log_softmax(dim=-1).gather(-1, targets[:, None]).sum()
        right = (masked.argmax(dim=-1) == targets).sum()
        self._validated.append((float(nll), float(right), float(len(targets))))

    def on_validation_epoch_end(self) -> None:
        nll, right, count = torch.tensor(self._validated, dtype=torch.float64).sum(dim=0).tolist()
        sums = self.all_gather(torch.tensor([nll, right, count], device=self.device)).reshape(-1, 3).sum(dim=0)
        self.log("val/nll", sums[0] / sums[2], prog_bar=True, rank_zero_only=False)
        self.log("val/accuracy", sums[1] / sums[2], rank_zero_only=False)
        if self.closed_loop is not None and not self.trainer.sanity_checking:
            self._drive()

    def _drive(self) -> None:
        """Drives the fixed scenes, each process its share, and logs minADE (m), contact (share of road users) and
        realism."""
        store = self.trainer.datamodule.dataset("val").store
        ids = self.closed_loop.chosen(store.ids)[self.global_rank :: self.trainer.world_size]
        bounds, vocabulary = self.trainer.datamodule.bounds, self._on_device()

        def policy_of(first: int) -> TokenPolicy:
            return TokenPolicy(self.network, vocabulary, seed=0, first_rollout=first, bounds=bounds)

        total = self.closed_loop.measure(policy_of, store, ids, self.device)
        gathered = self.all_gather(torch.tensor(total, dtype=torch.float32, device=self.device))
        found = figures(gathered.reshape(-1, *total.shape).sum(dim=0).cpu().numpy())
        for name, value in found.items():
            self.log(f"val/{name}", value, rank_zero_only=False)
        if "realism" not in found and not self._told:
            self._told = True
            logger.warning("val/realism is not logged: no validation scene has the steps that the rules ask")

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = agent_record(
            self.settings, self.vocabulary, self.vocabulary_fingerprint, self.scenes, self.trainer.datamodule.bounds
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with another network or vocabulary than the checkpoint's."""
        record = read_record(checkpoint, "the checkpoint")
        mine = json.loads(agent_record(self.settings, self.vocabulary, self.vocabulary_fingerprint, None, Bounds()))
        for key in ("network", "vocabulary"):
            if record[key] != mine[key]:
                raise DataError(f"the checkpoint's {key} is {record[key]}, the configured one {mine[key]}")
