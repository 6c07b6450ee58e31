"""Named errors of the realism metric."""

from __future__ import annotations

from navsim_ext.errors import TriviumError


class RealismError(TriviumError):
    """Scenes, rollouts or settings that the sim-agents rules do not admit."""
