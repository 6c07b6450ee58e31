"""Imitation learning of the planner: the Lightning module of stage 2.

Legend: B samples, F poses, K denoising steps. A batch is ``(SceneBatch, HiddenBatch)``.

    x0 = normalise(target), t and eps drawn, x_t = corrupt(x0, eps, t), loss = mean (prediction - its target)^2

The hidden states' fingerprint and the planner's configuration travel in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import require_states
from navsim_ext.runtime.collectives import gather_by_token
from navsim_ext.runtime.learning_rate import total_steps
from navsim_ext.runtime.optimizer import adamw, scheduled
from navsim_ext.runtime.sharding import ShardedStrategy, shard_whole
from navsim_ext.scene import SceneBatch
from stage2_dit.checkpoint import RECORD, load_planner, planner_record, require_hidden
from stage2_dit.inference import PlannerRunner
from stage2_dit.metrics import displacement, pdm_means
from stage2_dit.normaliser import fit_bounds
from stage2_dit.not_finite import not_finite_loss
from stage2_dit.optimizer import MuonWithAdamW, PlannerOptimizerSettings, block_matrices
from stage2_dit.planner import POSE_CHANNELS, SHARDED_METHODS, DiffusionPlanner, PlannerConfig
from stage2_dit.published import CheckpointMismatch

log = logging.getLogger(__name__)

MAX_LISTED = 8


@dataclass(frozen=True)
class FitBounds:
    """Fit the normaliser to the training targets instead of taking constants; ``margin`` widens each side."""

    target: str = "waypoint"
    margin: float = 0.05


class PlannerModule(pl.LightningModule):
    """Trains ``planner`` (a PlannerConfig; ``hidden_width`` 0 takes the width of the hidden states).

    ``fit_bounds`` replaces the configured normaliser; ``init_from`` starts from a planner checkpoint of the same
    configuration; ``allow_hidden_mismatch`` permits, loudly, hidden states of another origin than its own;
    ``metric_cache`` adds PDM scores to validation; ``compile`` compiles the training loss.

    ``backbone`` trains the VLM as well, in place of ``datamodule.hidden``: a module whose ``forward(scenes)`` gives a
    HiddenBatch with gradients, with ``hidden_width`` and ``fingerprint``; ``backbone_lr`` is its rate.
    """

    def __init__(
        self,
        planner: PlannerConfig,
        optimizer: PlannerOptimizerSettings | None = None,
        *,
        fit_bounds: FitBounds | None = None,
        init_from: str | None = None,
        allow_hidden_mismatch: bool = False,
        metric_cache: str | None = None,
        compile: bool = False,
        validation_seed: int = 0,
        backbone: nn.Module | None = None,
        backbone_lr: float = 1e-5,
    ) -> None:
        super().__init__()
        self.backbone, self.backbone_lr = backbone, backbone_lr
        self.planner_config = planner
        self.optimizer_settings = optimizer or PlannerOptimizerSettings()
        self.fit_bounds, self.init_from, self.metric_cache = fit_bounds, init_from, metric_cache
        self.allow_hidden_mismatch, self.validation_seed = allow_hidden_mismatch, validation_seed
        self.planner: DiffusionPlanner | None = None
        self.hidden_fingerprint: Fingerprint | None = None
        self._loss = torch.compile(self.loss) if compile else self.loss
        self._targets, self._outside = 0, torch.zeros((), dtype=torch.int64)
        self._validated: dict[str, tuple[dict[str, float], Tensor]] = {}

    def configure_model(self) -> None:
        """Builds the planner once the data is known: width, fitted bounds, fingerprint of the hidden states."""
        if self.planner is not None:
            return
        datamodule = self.trainer.datamodule
        config = self.planner_config
        self.hidden_fingerprint, width = self._origin(datamodule)
        if config.hidden_width == 0:
            config = dataclasses.replace(config, hidden_width=width)
        if self.fit_bounds is not None:
            config = dataclasses.replace(config, normaliser=self._fit(datamodule.dataset("train")))
        planner = DiffusionPlanner(config)
        if self.init_from is not None:
            self._initialise(planner, self.init_from)
        self.planner = planner
        self.planner_config = config
        if isinstance(self.trainer.strategy, ShardedStrategy):
            self._shard()

    def _shard(self) -> None:
        """Raises DataError for what needs whole weights on every process."""
        if self.backbone is not None:
            raise DataError("strategy=fsdp2 shards the planner alone: with module.backbone use trainer=ddp")
        if self.optimizer_settings.matrices == "muon":
            raise DataError("Muon orthogonalises whole matrices, strategy=fsdp2 cuts them: use trainer=ddp or adamw")
        shard_whole(self.planner, self.device_mesh["data_parallel"], SHARDED_METHODS)

    def _origin(self, datamodule: Any) -> tuple[Fingerprint, int]:
        """Fingerprint and width of the hidden states, cached or live."""
        source = datamodule.hidden
        if (source is None) == (self.backbone is None):
            raise MissingError(
                "stage 2 needs hidden states from one place: set datamodule.hidden (a hidden cache or a live VLM) or "
                "module.backbone (a VLM that is trained too), not both"
            )
        if self.backbone is not None:
            return self.backbone.fingerprint, self.backbone.hidden_width
        offered = datamodule.hidden_eval.fingerprint
        require_states(source.fingerprint, offered, allow_other=self.allow_hidden_mismatch)
        states = source.fetch(datamodule.dataset("train").tokens[:1]).to("cpu").hidden
        return source.fingerprint, states.shape[-1]

    def _fit(self, dataset: Any):
        targets = (dataset[i].validate().target for i in range(len(dataset)))  # names a token that is not finite
        bounds = fit_bounds(targets, self.fit_bounds.target, margin=self.fit_bounds.margin)
        log.info("normaliser %s: low %s, high %s", bounds.source, bounds.low, bounds.high)
        return bounds

    def _initialise(self, planner: DiffusionPlanner, path: str | os.PathLike[str]) -> None:
        loaded = load_planner(path)
        require_hidden(loaded, self.hidden_fingerprint, allow_mismatch=self.allow_hidden_mismatch)
        mine, theirs = planner.config.to_json(), loaded.planner.config.to_json()
        wrong = [
            f"{key}: {theirs[key]!r} in {path} | {mine[key]!r} configured" for key in mine if mine[key] != theirs[key]
        ]
        if wrong:
            raise CheckpointMismatch("the checkpoint is of another architecture:\n  " + "\n  ".join(wrong))
        planner.load_state_dict(loaded.planner.state_dict(), strict=True)

    # ---- training

    def loss(self, scenes: SceneBatch, hidden: Tensor, mask: Tensor | None, noise: Tensor, time: Tensor) -> Tensor:
        conditioning = self.planner.condition(
            hidden, mask, scenes.history, scenes.status, queries_per_scene=self.planner.config.horizon
        )
        return self.planner.training_loss(conditioning, scenes.target, noise, time)

    def training_step(self, batch: tuple[SceneBatch, Any], batch_idx: int) -> Tensor:
        scenes, hidden, mask = self.checked(batch)
        noise, time = self.draw(len(scenes))
        loss = self._loss(scenes, hidden, mask, noise, time)
        if not torch.isfinite(loss):  # before the backward pass, so that no weight has seen it
            raise not_finite_loss("loss", loss.item(), self.trainer, scenes, hidden)
        self._targets += len(scenes)
        self._outside = self._outside.to(loss.device) + self.planner.normaliser.outside(scenes.target).sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(scenes))
        return loss

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Noise [B,F,3] and times [B] from torch's CPU generator, which the run seeds anew for every batch."""
        noise = torch.randn(rows, self.planner.config.horizon, POSE_CHANNELS)
        time = self.planner.process.draw_times(rows)
        return noise.to(self.device), time.to(self.device)

    def checked(self, batch: tuple[SceneBatch, Any]) -> tuple[SceneBatch, Tensor, Tensor | None]:
        """A batch that keeps its contract; raises DataError naming tokens otherwise."""
        scenes, hidden = batch
        if self.backbone is not None:
            hidden = self.backbone(scenes)
        if hidden is None:
            raise MissingError(f"tokens {scenes.token[:MAX_LISTED]} came without hidden states: set datamodule.hidden")
        if scenes.target is None:
            raise DataError(f"tokens {scenes.token[:MAX_LISTED]} have no target: training needs future poses")
        horizon = self.planner.config.horizon
        if scenes.target.shape[1] != horizon:
            raise DataError(f"targets have {scenes.target.shape[1]} poses, the planner's horizon is {horizon}")
        if hidden.hidden.shape[0] != len(scenes):
            raise DataError(f"{hidden.hidden.shape[0]} hidden states came with {len(scenes)} scenes")
        return scenes, hidden.hidden, hidden.mask

    def on_train_epoch_end(self) -> None:
        outside = int(self._outside)
        if outside:
            log.warning(
                "%d of %d targets lie outside the normaliser's bounds (%s) and can never be produced: fit the bounds "
                "or widen them", outside, self._targets, self.planner.config.normaliser,
            )  # fmt: skip
        self.log("train/outside_bounds", float(outside))
        self._targets, self._outside = 0, torch.zeros_like(self._outside)

    def configure_optimizers(self) -> dict[str, Any]:
        settings, fused = self.optimizer_settings, self.device.type == "cuda"
        matrices = block_matrices(self.planner) if settings.matrices == "muon" else []
        apart = {id(weight) for weight in matrices}
        groups: list[dict[str, Any]] = [{"params": [w for w in self.planner.parameters() if id(w) not in apart]}]
        if self.backbone is not None:
            learning = [weight for weight in self.backbone.parameters() if weight.requires_grad]
            groups.append({"params": learning, "lr": self.backbone_lr})
        total = total_steps(self.trainer)
        if matrices:
            return scheduled(MuonWithAdamW(matrices, groups, settings, fused=fused), settings, total=total)
        return adamw(groups, settings, total=total, fused=fused)

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        self._validated = {}
        self._runner = PlannerRunner(self.planner, seed=self.validation_seed)

    def validation_step(self, batch: tuple[SceneBatch, Any], batch_idx: int) -> None:
        scenes, hidden, mask = self.checked(batch)
        trajectory = self._runner.plan(hidden, mask, scenes.history, scenes.status, scenes.token)
        errors = displacement(trajectory, scenes.target.cpu())
        for i, token in enumerate(scenes.token):
            self._validated[token] = ({name: value[i].item() for name, value in errors.items()}, trajectory[i])

    def on_validation_epoch_end(self) -> None:
        """Means over all tokens of all processes, each counted once."""
        everything = gather_by_token(self._validated)
        tokens = sorted(everything)
        for name in ("ade", "fde", "heading_error"):
            mean = sum(everything[token][0][name] for token in tokens) / len(tokens)
            self.log(f"val/{name}", mean, prog_bar=name == "ade", rank_zero_only=False)
        if self.metric_cache is not None and not self.trainer.sanity_checking:
            scores: dict[str, float] = {}
            if self.trainer.is_global_zero:
                from navsim_ext.metric_cache.scorer import PdmScorer  # loads kernels: only runs that score pay for it

                trajectories = torch.stack([everything[token][1] for token in tokens]).numpy()
                scores = pdm_means(PdmScorer(self.metric_cache).score(tokens, trajectories))
            for name, value in self.trainer.strategy.broadcast(scores).items():
                self.log(f"val/{name}", value, prog_bar=name == "pdms_v1")

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = planner_record(self.planner, self.hidden_fingerprint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to continue on hidden states, or with a planner, other than those of the checkpoint."""
        record = checkpoint[RECORD]
        then = PlannerConfig.from_json(record["config"])
        if then != self.planner_config:
            raise CheckpointMismatch(f"the checkpoint's planner is {then}, the configured one {self.planner_config}")
        if record["hidden"]:
            then_hidden = Fingerprint.from_json(record["hidden"])
            require_states(then_hidden, self.hidden_fingerprint, allow_other=self.allow_hidden_mismatch)
