"""How far a planned trajectory is from the driven one, and how it scores: what validation reports.

Legend: B samples, F poses at 0.5 s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from stage2_dit.normaliser import wrap

if TYPE_CHECKING:
    from navsim_ext.pdm import PdmResult


def displacement(trajectory: Float[Tensor, "B F 3"], target: Float[Tensor, "B F 3"]) -> dict[str, Float[Tensor, " B"]]:
    """Per sample [B]: ``ade`` mean and ``fde`` final distance [m], ``heading_error`` mean absolute angle [rad]."""
    distance = torch.linalg.vector_norm(trajectory[..., :2] - target[..., :2], dim=-1)
    angle = wrap(trajectory[..., 2] - target[..., 2]).abs()
    return {"ade": distance.mean(dim=1), "fde": distance[:, -1], "heading_error": angle.mean(dim=1)}


def pdm_means(result: PdmResult) -> dict[str, float]:
    """Means of ``pdms_v1`` and ``epdms_v2_no_ec`` over valid scenes [0, 1], and ``scored`` and ``unscored`` counts.

    Scenes are scored one by one, so EPDMS is without two-frame extended comfort, and says so by its name.
    """
    means = {"scored": float(result.valid.sum()), "unscored": float(result.num_invalid)}
    for column in ("pdms_v1", "epdms_v2_no_ec"):
        known = result[column][result.valid_for(column)]
        if len(known):
            means[column] = float(known.mean())
    return means
