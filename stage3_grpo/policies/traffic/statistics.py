"""Numbers of driven traffic, beside what the log does in the same half seconds.

Rates are shares of credited road users to whom it happened at any time of the drive, among those of whom it is known.
``standing``: share of half seconds with less than 0.1 m driven; ``log_standing`` the recording's, over the same ones.

Legend: B worlds, N road users, K decisions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from navsim_ext.closed_loop.events import Event
from navsim_ext.closed_loop.kinematics import TOKEN_S, TOKEN_STEPS
from navsim_ext.runtime.collectives import world
from stage3_grpo.rewards.realism import mean_metrics
from stage3_grpo.rewards.traffic_terms import Driven

if TYPE_CHECKING:
    from stage3_grpo.policies.traffic.policy import Drives

STANDING_M = 0.1


class Means:
    """Sums and counts by name, added over all processes when they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, value: Tensor | float, count: Tensor | float) -> None:
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0] += float(value)
        total[1] += float(count)

    def of(self, name: str, values: Tensor, known: Tensor) -> None:
        """The mean of ``values`` where ``known``."""
        self.add(name, values.masked_fill(~known, 0.0).double().sum(), known.sum())

    def read(self) -> dict[str, float]:
        """Means of what is known anywhere. Collective."""
        names = sorted(self.sums)
        totals = [self.sums[name] for name in names]
        if world()[1] > 1:
            parts: list = [None] * world()[1]
            torch.distributed.all_gather_object(parts, self.sums)
            names = sorted(set().union(*parts))
            totals = [[sum(part.get(name, [0.0, 0.0])[i] for part in parts) for i in range(2)] for name in names]
        return {name: total / count for name, (total, count) in zip(names, totals) if count}


def drive_figures(driven: Driven, made: Tensor, means: Means) -> None:
    """Adds what happened to the road users with decisions ``made`` [B,N,K]."""
    credited = made.any(dim=-1)
    for name in ("contact", "off_road", "red_light"):
        event: Event = getattr(driven.events, name)
        means.of(f"{name}_rate", event.any().float(), event.valid.any(dim=-1) & credited)
    log, seen = driven.log
    ends = slice(None, None, TOKEN_STEPS)
    poses, log, seen = driven.poses[:, :, ends, :2], log[:, :, ends, :2], seen[:, :, ends]
    apart = torch.linalg.vector_norm(poses[:, :, 1:] - log[:, :, 1:], dim=-1)
    means.of("displacement_m", apart, seen[:, :, 1:] & made)
    both = seen[:, :, 1:] & seen[:, :, :-1] & made
    moved, recorded = (torch.linalg.vector_norm(each.diff(dim=2), dim=-1) for each in (poses, log))
    for name, lengths in (("", moved), ("log_", recorded)):
        means.of(f"{name}speed_mps", lengths / TOKEN_S, both)
        means.of(f"{name}standing", (lengths < STANDING_M).float(), both)
    metres = [each.masked_fill(~both, 0.0).double().sum() for each in (moved, recorded)]
    if float(metres[1]) > 0:
        means.add("progress", metres[0], metres[1])  # metres driven over metres recorded


def drive_statistics(drives: Drives) -> dict[str, float]:
    """The record of a rollout. Collective."""
    means = Means()
    drive_figures(drives.driven, drives.made, means)
    for name, (value, known) in drives.reward.terms.items():
        means.of(f"term_{name}", value, known)
    there = drives.driven.state.there[..., drives.driven.state.scenes.now]
    means.of("credited_share", drives.made.any(dim=-1).float(), there)
    for name, value in drives.updated.items():
        means.add(name, value, 1.0)
    for name, value in drives.realism.items():
        means.add(name, value, 1.0)
    for name, value in drives.seconds.items():
        means.add(f"seconds_{name}", value, 1.0)
    means.add("seconds_rollout", sum(drives.seconds.values()), 1.0)
    return means.read()


def realism_figures(rolled: list) -> dict[str, float]:
    """The meta-metric and the displacements of the rules, where they were computed."""
    told = mean_metrics(rolled)
    names = {
        "metametric": "realism",
        "average_displacement_error": "ade_m",
        "min_average_displacement_error": "min_ade_m",
    }
    return {short: told[name] for name, short in names.items() if name in told}
