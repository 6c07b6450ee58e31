"""Supervised fine-tuning of a vision-language model on driving answers.

    loss = - mean over answer tokens of log p(token | everything before it),

the mean over one micro batch (as transformers' and InternVL's ``token`` reduction; with gradient accumulation the
micro batches count alike, not their tokens). The LM head runs on the positions that are followed by an answer token
only: at 12,288 tokens and a vocabulary of 151,674 full logits would take 7 GB, and almost all would be thrown away.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from navsim_ext.errors import DataError
from navsim_ext.runtime.learning_rate import total_steps
from stage1_vlm.adapters import LoraSettings, add_lora, freeze, trainable_summary
from stage1_vlm.backbone import VisionLanguageBackbone
from stage1_vlm.collate import VisionLanguageBatch
from stage1_vlm.drop_path import add_drop_path
from stage1_vlm.loading import load_backbone
from stage1_vlm.processor import IGNORED_LABEL

_log = logging.getLogger(__name__)


def answer_loss(backbone: VisionLanguageBackbone, batch: VisionLanguageBatch) -> tuple[Tensor, Tensor]:
    """(mean loss over answer tokens, number of answer tokens); raises DataError when there is none."""
    hidden = backbone.last_hidden_states(batch)
    targets = batch.labels[:, 1:]
    answered = targets != IGNORED_LABEL
    count = answered.sum()
    if count == 0:
        raise DataError(f"no answer token in the batch {batch.names}: every answer was cut off")
    logits = backbone.logits(hidden[:, :-1][answered]).float()
    return functional.cross_entropy(logits, targets[answered]), count


class InstructionTuning(pl.LightningModule):
    """Trains the checkpoint folder ``model_path``; learning rate, decay and schedule as in the published recipe."""

    def __init__(
        self,
        model_path: str,
        *,
        learning_rate: float = 4e-5,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        warmup_ratio: float = 0.1,
        frozen: Mapping[str, bool] | None = None,
        lora: Mapping[str, Any] | None = None,
        drop_path: float = 0.1,
        gradient_checkpointing: bool = True,
        compile: bool = False,
        attention: str = "sdpa",
        dtype: str = "float32",
        max_image_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.model_path = model_path
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.betas, self.epsilon, self.warmup_ratio = tuple(betas), epsilon, warmup_ratio
        self.frozen = dict(frozen or {})
        self.lora = LoraSettings(**lora) if lora else None
        self.drop_path, self.gradient_checkpointing, self.compile_blocks = drop_path, gradient_checkpointing, compile
        self.attention, self.dtype_name, self.max_image_tokens = attention, dtype, max_image_tokens
        self.backbone: VisionLanguageBackbone | None = None

    def configure_model(self) -> None:
        """Loads the weights; called by Lightning once the strategy is known (and again by nobody)."""
        if self.backbone is not None:
            return
        backbone = load_backbone(
            self.model_path,
            dtype=self.dtype_name,
            attention=self.attention,
            max_image_tokens=self.max_image_tokens,
            exact=True,
        )
        backbone.model.config.use_cache = False
        freeze(backbone, self.frozen)
        if self.lora is not None:
            backbone.adapter = add_lora(backbone, self.lora)
        backbone.model.train()
        add_drop_path(backbone, self.drop_path)
        if self.gradient_checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile_blocks:
            compile_blocks(backbone.model)
        _log.info("%s: %s", self.model_path, trainable_summary(backbone))
        self.model = backbone.model
        self.backbone = backbone
        if self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(backbone, self.device_mesh["data_parallel"])

    def training_step(self, batch: VisionLanguageBatch, batch_idx: int) -> Tensor:
        loss, answers = answer_loss(self.backbone, batch)
        if not batch.pixels and self._vision_learns():
            # Every process must touch the same parameters: a batch of texts alone would leave the others waiting.
            blank = {k: v.to(self.device) for k, v in self.backbone.blank_pixels().items()}
            loss = loss + 0.0 * self.backbone.image_features(blank).sum()
        size = batch.input_ids.numel()
        self.log("loss", loss.detach(), prog_bar=True, batch_size=1)
        self.log("answer_tokens", answers.float(), batch_size=1)
        self.log("padding", 1.0 - batch.valid_tokens / size, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self.log("gradient_norm", _full(torch.nn.utils.get_total_norm(gradients)), batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: VisionLanguageBatch, batch_idx: int) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) and (norm := strategy.deepspeed_engine.get_global_grad_norm()):
            self.log("gradient_norm", float(norm), batch_size=1)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)

    def validation_step(self, batch: VisionLanguageBatch, batch_idx: int) -> None:
        loss, answers = answer_loss(self.backbone, batch)
        self.log("validation_loss", loss, prog_bar=True, batch_size=int(answers), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, no decay of biases and norms, linear warm-up, cosine to 0 over all optimizer steps."""
        decayed, plain = [], []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty one-dimensional tensor
                (decayed if len(shape) > 1 else plain).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
        )
        steps = total_steps(self.trainer)
        schedule = get_cosine_schedule_with_warmup(optimizer, int(steps * self.warmup_ratio), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def lora_scaling(self) -> float:
        return 0.0 if self.lora is None else self.lora.alpha / self.lora.rank

    def _vision_learns(self) -> bool:
        parts = self.backbone.parts
        return any(p.requires_grad for name in ("vision", "projector") for m in parts[name] for p in m.parameters())


def compile_blocks(model: nn.Module) -> None:
    """torch.compile of norms and feed-forward layers, which memory bounds; attention and heads stay as they are.

    Training of InternVL3-2B on an H100 becomes 1.10 times as fast (benchmarks/RESULTS.md); the first step takes longer.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2].endswith(("norm", "layernorm", "layernorm_before", "layernorm_after", "mlp")):
            module.compile(dynamic=True)


def shard(backbone: VisionLanguageBackbone, mesh: Any) -> None:
    """FSDP2: every block, the core model and the LM head become sharded units.

    The LM head is called on its own (see :func:`answer_loss`), so it cannot share a unit, or its weight, with the
    embedding. Raises DataError for tied embeddings.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if backbone.model.config.get_text_config().tie_word_embeddings or backbone.model.config.tie_word_embeddings:
        raise DataError("FSDP2 cannot split tied embeddings: use strategy=zero1, zero2, zero3 or ddp for this model")
    core = backbone.model.model
    blocks: list[nn.Module] = [m for m in core.modules() if type(m).__name__ in backbone.no_split]
    for unit in [*blocks, core, backbone.model.lm_head]:
        fully_shard(unit, mesh=mesh)
    register_fsdp_forward_method(core, "get_image_features")


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
