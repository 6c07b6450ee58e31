"""Named errors of the realism metric."""

from __future__ import annotations

from navsim_ext.errors import DataError


class RealismError(DataError):
    """Scenes, rollouts or settings that the sim-agents rules do not admit."""
