"""Which weights learn: freeze flags, LoRA adapters, and the plain state dict that an adapted model amounts to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from navsim_ext.errors import DataError
from stage1_vlm.backbone import VisionLanguageBackbone

ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings:
    """``targets`` is a regular expression over full module names: a bare ``q_proj`` would hit the vision tower too.

    Modules named in ``save`` are trained whole beside the adapters; only setting requires_grad on them would train
    but not save them.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    save: Sequence[str] = ("multi_modal_projector",)


def freeze(backbone: VisionLanguageBackbone, parts: Mapping[str, bool]) -> None:
    """Stops learning of the parts marked true (vision, projector, language); raises DataError if nothing is left."""
    unknown = set(parts) - set(backbone.parts)
    if unknown:
        raise DataError(f"cannot freeze {sorted(unknown)}: the parts are {sorted(backbone.parts)}")
    for name, modules in backbone.parts.items():
        for module in modules:
            module.requires_grad_(not parts.get(name, False))
    if not any(p.requires_grad for p in backbone.model.parameters()):
        raise DataError(f"freeze={dict(parts)} leaves nothing to train")


def add_lora(backbone: VisionLanguageBackbone, settings: LoraSettings) -> PeftModel:
    """Puts LoRA adapters into the model in place and freezes the rest; the backbone's model then runs adapted."""
    names = [name for name, _ in backbone.model.named_modules()]
    if not any(re.fullmatch(settings.targets, name) for name in names):
        raise DataError(f"lora.targets={settings.targets!r} matches no module of {type(backbone.model).__name__}")
    absent = [part for part in settings.save if not any(name.split(".")[-1] == part for name in names)]
    if absent:
        raise DataError(f"lora.save={list(settings.save)}: the model has no module {absent}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        modules_to_save=list(settings.save) or None,
    )
    return get_peft_model(backbone.model, config, adapter_name=ADAPTER)


def merged_state_dict(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights of the plain model: W + scaling B A for adapted layers, whole-trained modules in their place.

    ``state`` has the names of the adapted base model. The model in training is not touched: merging into it and out
    again would not give the same bits back.
    """
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        if ".base_layer.weight" in name:
            stem = name.removesuffix(".base_layer.weight")
            a, b = (state[f"{stem}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
            value = (value.float() + scaling * (b @ a)).to(value.dtype)
        merged[plain] = value
    return merged


def has_adapters(state: Mapping[str, Tensor]) -> bool:
    return any(".lora_" in name for name in state)


def trainable_summary(backbone: VisionLanguageBackbone) -> str:
    """One line: trainable and all parameters, in millions."""
    counts = torch.tensor([[p.numel() * p.requires_grad, p.numel()] for p in backbone.model.parameters()]).sum(0)
    return f"{counts[0] / 1e6:.2f}M of {counts[1] / 1e6:.2f}M parameters learn"
