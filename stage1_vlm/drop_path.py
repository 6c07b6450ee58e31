"""Stochastic depth for a vision tower that has none of its own (transformers' native InternViT).

    block l of N:  h = h + d_l(attention(h)),  h = h + d_l(mlp(h)),   d_l(x) = x b / (1 - p_l),  b ~ Bernoulli(1 - p_l)

with one b per picture tile and p_l growing linearly from 0 to the rate (Huang et al., arXiv:1603.09382; the values
of InternViT's training code). It is applied by forward hooks on the two branches, before InternViT's layer scale,
which commutes with the mask; state dict and evaluation stay untouched.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from navsim_ext.errors import DataError
from stage1_vlm.backbone import VisionLanguageBackbone


def drop_path(branch: Tensor, probability: float) -> Tensor:
    """``branch`` [T,...] with whole rows dropped with that probability and the others scaled to keep the mean."""
    keep = 1.0 - probability
    mask = torch.empty(branch.shape[0], *[1] * (branch.ndim - 1), dtype=branch.dtype, device=branch.device)
    return branch * mask.bernoulli_(keep).div_(keep)


def add_drop_path(backbone: VisionLanguageBackbone, rate: float) -> list[RemovableHandle]:
    """Hooks stochastic depth onto the vision tower; it acts while the module is in training mode.

    Raises DataError for a family whose vision blocks do not see one picture a row.
    """
    if rate == 0.0:
        return []
    blocks = backbone.vision_blocks
    if not blocks:
        raise DataError(f"{type(backbone).__name__} has no per-picture vision blocks: set module.drop_path=0")
    rates = torch.linspace(0.0, rate, len(blocks)).tolist()
    return [
        branch.register_forward_hook(partial(_drop, probability=probability))
        for (attention, feed_forward), probability in zip(blocks, rates)
        for branch in (attention, feed_forward)
        if probability > 0.0
    ]


def _drop(module: nn.Module, inputs: Any, output: Any, probability: float) -> Any:
    if not module.training:
        return None
    if isinstance(output, tuple):  # attention: (output, weights)
        return (drop_path(output[0], probability), *output[1:])
    return drop_path(output, probability)
