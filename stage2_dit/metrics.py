"""How far a planned trajectory is from the driven one, and how it scores: what validation reports.

Legend: B samples, F poses at 0.5 s.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stage2_dit.normaliser import wrap


def displacement(trajectory: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Per sample [B]: ``ade`` mean and ``fde`` final distance [m], ``heading_error`` mean absolute angle [rad]."""
    distance = torch.linalg.vector_norm(trajectory[..., :2] - target[..., :2], dim=-1)
    angle = wrap(trajectory[..., 2] - target[..., 2]).abs()
    return {"ade": distance.mean(dim=1), "fde": distance[:, -1], "heading_error": angle.mean(dim=1)}


class PdmScorer:
    """PDM scores of planned trajectories against one metric cache; scenes that cannot be scored are counted."""

    def __init__(self, metric_cache: str | os.PathLike[str]) -> None:
        # the scorer compiles kernels on import: only runs that score pay for it
        from navsim_ext.metric_cache.schema import MetricCache

        self.cache = MetricCache(metric_cache)
        self.known = set(self.cache.tokens)

    def score(self, tokens: Sequence[str], trajectories: np.ndarray) -> dict[str, float]:
        """Means of ``pdms_v1`` and ``epdms_v2`` over valid scenes [0, 1], and ``scored`` and ``unscored`` counts."""
        from navsim_ext.pdm import score

        chosen = [i for i, token in enumerate(tokens) if token in self.known]
        result: dict[str, float] = {"unscored": float(len(tokens) - len(chosen)), "scored": 0.0}
        if chosen:
            table = score([tokens[i] for i in chosen], trajectories[chosen].astype(np.float64), self.cache).to_frame()
            valid = table[table["valid"]]
            result["scored"] = float(len(valid))
            result["unscored"] += float(len(table) - len(valid))
            for column in ("pdms_v1", "epdms_v2"):
                if column in valid and len(valid):
                    result[column] = float(valid[column].mean())
        return result
