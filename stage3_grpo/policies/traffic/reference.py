"""The cloned model that reinforced traffic is held to: it stays, or drifts slowly after the policy."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from navsim_ext.errors import DataError
from navsim_ext.fingerprint import Fingerprint
from sim_agents import LoadedAgents, NextTokenNetwork, load_agents

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drift:
    """theta_ref <- theta_ref + share (theta - theta_ref), once every ``every`` rollouts (RLFTSim: 0.005 every 500)."""

    share: float = 0.005
    every: int = 500

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0 or self.every < 1:
            raise DataError(f"{self}: 0 < share <= 1 and every >= 1 were expected; reference_drift=null: it stays")


@dataclass
class TrafficReference:
    """A network without gradients; ``fingerprint`` of what was loaded (a drift does not change it)."""

    network: NextTokenNetwork
    fingerprint: Fingerprint
    drift: Drift | None

    @classmethod
    def load(cls, path: str | os.PathLike[str], policy: LoadedAgents, drift: Drift | None) -> TrafficReference:
        """Reads a checkpoint; raises DataError for one of another network or vocabulary than the policy's."""
        loaded = load_agents(path)
        theirs, mine = loaded.fingerprint.parents["vocabulary"], policy.fingerprint.parents["vocabulary"]
        theirs.require_equal(
            mine, mine=f"the vocabulary of the reference {path}", theirs="that of the policy in training",
            remedy="take the checkpoint that training starts from, or one over the same vocabulary",
        )  # fmt: skip
        if loaded.network.settings != policy.network.settings:
            raise DataError(
                f"the reference {path} has the network {loaded.network.settings}, the policy in training has "
                f"{policy.network.settings}: take the checkpoint that training starts from"
            )
        log.info("reference traffic %s (%s)", path, loaded.fingerprint.digest[:12])
        return cls(loaded.network.eval().requires_grad_(False), loaded.fingerprint, drift)

    @torch.no_grad()
    def follow(self, network: NextTokenNetwork, rollouts: int) -> None:
        """Drifts towards the policy when its time has come."""
        if self.drift is not None and rollouts % self.drift.every == 0:
            for mine, theirs in zip(self.network.parameters(), network.parameters(), strict=True):
                mine.lerp_(theirs.detach(), self.drift.share)
