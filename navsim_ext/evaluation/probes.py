"""Blind probes beside a planner: what standing, braking or driving straight on would have scored on the same scenes.

Scores of single scenes can be had without sight: under NAVSIM 2.2's single stage a policy that ignores where the route
goes has been reported to outrank the human drives. So a score says little until it is held against policies that see
nothing: ``probes=true`` plans them on the same scenes, and the table says when a planner does not beat the best one.

PDM-Closed is among them although it is not blind: it knows map and traffic, and is the reference of the progress score.
The planner itself with zeroed hidden states tells what its own sight is worth to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from navsim_ext.bootstrap import Estimate, bootstrap_mean
from navsim_ext.evaluation.planning import planner_fingerprint
from navsim_ext.evaluation.table import PROBE_PREFIX
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.schema import HiddenBatch
from navsim_ext.pdm.closed.planner import PdmClosed
from navsim_ext.pdm.resident import SceneRecords
from navsim_ext.planners import ConstantDeceleration, ConstantVelocityAgent, Planner, StandingStill, StraightOn
from navsim_ext.scene import SceneBatch

ZEROED = f"{PROBE_PREFIX}zeroed_hidden_of_"


class Probe:
    """A planner under a name that tells it from those that are rated."""

    def __init__(self, planner: Planner) -> None:
        self.name, self._planner = PROBE_PREFIX + planner.name, planner
        self.fingerprint = Fingerprint("planner", {"name": self.name}, {"planner": planner_fingerprint(planner)})

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        return self._planner.plan(batch, None)


class ZeroedHidden:
    """A planner that gets zeros where its hidden states would be, as many and as long."""

    def __init__(self, planner: Planner, name: str | None = None) -> None:
        self.name, self._planner = ZEROED + (name or planner.name), planner
        self.fingerprint = Fingerprint("planner", {"name": self.name}, {"planner": planner_fingerprint(planner)})

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        blind = None if hidden is None else HiddenBatch(torch.zeros_like(hidden.hidden), hidden.mask)
        return self._planner.plan(batch, blind)


def probes_of(planner: Planner, name: str | None, *, sees: bool, cache: SceneRecords, version: str) -> list[Planner]:
    """The probes of a planner that tables call ``name``; ``sees``: it uses hidden states. ``version`` of PDM-Closed's
    choice: "v1" or "v2"."""
    blind: list[Planner] = [StandingStill(), ConstantDeceleration(), ConstantVelocityAgent(), StraightOn()]
    probes: list[Planner] = [Probe(one) for one in (*blind, PdmClosed(cache, version))]
    return [*probes, ZeroedHidden(planner, name)] if sees else probes


@dataclass(frozen=True)
class Verdict:
    """A planner against the best probe in one score: ``difference`` paired, over what both have."""

    planner: str
    probe: str
    score: str
    difference: Estimate

    @property
    def beaten(self) -> bool:
        """Whether the planner is better for certain: the interval of the difference is above 0."""
        low = self.difference.mean if np.isnan(self.difference.low) else self.difference.low
        return bool(low > 0.0)

    def line(self, title: str) -> str:
        d = self.difference
        interval = "" if np.isnan(d.low) else f" [{d.low * 100:+.1f}, {d.high * 100:+.1f}]"
        verb = "beats" if self.beaten else "DOES NOT BEAT"
        return f"{title}: {self.planner} {verb} its best probe {self.probe}: {d.mean * 100:+.1f}{interval}"


def verdicts(values: pd.DataFrame, groups: Sequence[str], score: str) -> list[Verdict]:
    """One verdict per planner that is no probe. ``values``: a column per planner, a row per scene (or group of scenes),
    NaN where there is none; ``groups`` [n]: what the intervals are drawn over (logs)."""
    means: Mapping[str, float] = values.mean().to_dict()
    probes = [name for name in values if name.startswith(PROBE_PREFIX) and not np.isnan(means[name])]
    if not probes:
        return []
    best = max(probes, key=lambda name: means[name])
    rated = [name for name in values if not name.startswith(PROBE_PREFIX) and not np.isnan(means[name])]
    return [
        Verdict(name, best, score, bootstrap_mean((values[name] - values[best]).to_numpy(float), list(groups)))
        for name in rated
    ]


def table_verdicts(scores: pd.DataFrame, score: str) -> list[Verdict]:
    """:func:`verdicts` of a table with a row per planner and scene."""
    if score not in scores:
        return []
    valid = scores[scores["valid"]]
    values = valid.pivot(index=["log_name", "token"], columns="name", values=score)
    values = values[list(dict.fromkeys(valid["name"]))]
    return verdicts(values.reset_index(drop=True), values.index.get_level_values("log_name").tolist(), score)
