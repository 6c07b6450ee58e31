"""The contract of the batches that the diffusion planner is reinforced on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from navsim_ext.errors import DataError, MissingError
from navsim_ext.scene import SceneBatch

MAX_LISTED = 8


def checked(batch: tuple[SceneBatch, Any]) -> tuple[SceneBatch, Tensor, Tensor | None]:
    """A batch that keeps its contract; raises MissingError or DataError naming tokens otherwise."""
    scenes, hidden = batch
    if hidden is None:
        raise MissingError(f"tokens {scenes.token[:MAX_LISTED]} came without hidden states: set data.hidden_cache")
    if len(hidden.hidden) != len(scenes):
        raise DataError(f"{len(hidden.hidden)} hidden states came with {len(scenes)} scenes")
    return scenes, hidden.hidden, hidden.mask
