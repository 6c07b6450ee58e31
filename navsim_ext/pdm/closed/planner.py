"""PDM-Closed as a planner: the trajectory that the metric cache holds of each scene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_FUTURE_POSES, to_local
from navsim_ext.pdm.version import VERSIONS
from navsim_ext.scene import SceneBatch

if TYPE_CHECKING:
    from navsim_ext.hidden_cache.schema import HiddenBatch
    from navsim_ext.pdm.resident import SceneRecords

CLOSED_STEPS_PER_POSE = 5  # PDM-Closed's trajectory has a pose every 0.1 s


class PdmClosed:
    """NAVSIM's rule-based planner, as the metric cache holds it; it knows map and traffic, so it is no fair rival but
    the reference of the progress score. ``version`` "v1" or "v2": its choice depends on the scorer."""

    def __init__(self, metric_cache: SceneRecords, version: str = "v1") -> None:
        if version not in VERSIONS:
            raise DataError(f"pdm_closed: version is {version!r}; one of {VERSIONS} was expected")
        self.name = f"pdm_closed_{version}"
        self._cache, self._row = metric_cache, VERSIONS.index(version)

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        """Raises MissingError for a token without a metric cache."""
        return torch.stack([self.trajectory(token) for token in batch.token]).to(batch.status.device)

    def trajectory(self, token: str) -> Tensor:
        """[8,3] float32 poses of one scene."""
        record = self._cache.load(token)
        last = NUM_FUTURE_POSES * CLOSED_STEPS_PER_POSE
        poses = record.pdm_closed[self._row, CLOSED_STEPS_PER_POSE : last + 1 : CLOSED_STEPS_PER_POSE]
        return torch.from_numpy(to_local(poses, record.ego_state[:3]).astype(np.float32))
