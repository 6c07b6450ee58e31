"""The frozen policy that stage 3 starts from and is held to."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_ext.errors import TriviumError
from navsim_ext.fingerprint import Fingerprint
from stage2_dit import (
    Chain,
    Conditioning,
    DiffusionPlanner,
    PlannerConfig,
    Process,
    Steps,
    load_planner,
    require_hidden,
    step_distributions,
)

log = logging.getLogger(__name__)


class ReferenceMismatch(TriviumError):
    """The reference is a planner of another kind than the one in training."""


@dataclass
class ReferencePolicy:
    """A planner without gradients, kept out of the module tree: it is no part of checkpoints, its identity is."""

    planner: DiffusionPlanner
    fingerprint: Fingerprint

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: PlannerConfig, hidden: Fingerprint | None, *, allow_mismatch: bool
    ) -> ReferencePolicy:
        """Reads a checkpoint; every failure is an error (MissingError, CheckpointMismatch, ReferenceMismatch)."""
        loaded = load_planner(path)
        require_same_planner(loaded.planner.config, config, str(path))
        if hidden is not None:
            require_hidden(loaded, hidden, allow_mismatch=allow_mismatch)
        planner = loaded.planner.eval().requires_grad_(False)
        log.info("reference policy %s (%s)", path, loaded.fingerprint.digest[:12])
        return cls(planner, loaded.fingerprint)

    def to(self, device: torch.device) -> ReferencePolicy:
        self.planner.to(device)
        return self

    @torch.no_grad()
    def condition(
        self, hidden: Tensor, mask: Tensor | None, history: Tensor, status: Tensor, *, queries_per_scene: int
    ) -> Conditioning:
        """See :meth:`DiffusionPlanner.condition`: the teacher alone asks so little that values can wait."""
        return self.planner.condition(hidden, mask, history, status, queries_per_scene=queries_per_scene)

    @torch.no_grad()
    def steps(self, conditioning: Conditioning, chain: Chain, process: Process) -> Steps:
        return step_distributions(self.planner, conditioning, chain, process=process)


def require_same_planner(reference: PlannerConfig, actor: PlannerConfig, path: str) -> None:
    """Raises ReferenceMismatch listing each setting (architecture, normaliser, what is predicted) that differs."""
    theirs, mine = reference.to_json(), actor.to_json()
    lines = [f"{key}: {theirs[key]!r} | {mine[key]!r}" for key in mine if theirs[key] != mine[key]]
    if lines:
        listed = "\n  ".join(lines)
        raise ReferenceMismatch(
            f"the reference {path} and the planner in training differ (reference | planner):\n  {listed}\nuse the "
            "checkpoint that training starts from, or one of the same architecture and normaliser"
        )


def require_same_reference(then: Fingerprint, now: Fingerprint) -> None:
    """Raises ReferenceMismatch with every difference unless a resumed run has the reference that it began with."""
    if then.digest != now.digest:
        listed = "\n  ".join(then.differences(now))
        raise ReferenceMismatch(f"the checkpoint was trained against another reference (then | now):\n  {listed}")
