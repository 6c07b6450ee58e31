"""The reward of road users: a weighted sum of terms, decision by decision, and of the realism of whole rollouts.

Legend: B worlds, N road users, K decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from navsim_ext.errors import DataError
from navsim_ext.traffic.scene import TrafficScene
from stage3_grpo.core import at_last_decision
from stage3_grpo.rewards.realism import RealismTerm, RolledScene
from stage3_grpo.rewards.traffic_terms import Driven, TrafficTerm, require_known


@dataclass(frozen=True)
class DrivenReward:
    """``reward`` [B,N,K], ``known`` [B,N,K]: some term knows something; ``terms``: the mean of each where known."""

    reward: Tensor
    known: Tensor
    terms: Mapping[str, tuple[Tensor, Tensor]]


class TrafficReward:
    """``terms`` by name; ``realism`` None: it judges, it is not paid for."""

    def __init__(self, terms: Mapping[str, TrafficTerm | None], realism: RealismTerm | None = None) -> None:
        self.terms = {name: term for name, term in terms.items() if term is not None}
        self.realism = realism
        weighed = {**self.terms, **({"realism": realism} if realism else {})}
        if not weighed:
            raise DataError("a reward of 0 terms pays for nothing: give reward.terms or reward.realism")
        idle = [name for name, term in weighed.items() if term.weight == 0]
        if idle:
            raise DataError(f"reward terms {idle} have weight 0 and no effect: remove them (null) or weigh them")

    @property
    def events(self) -> tuple[str, ...]:
        """What the world must find."""
        return tuple(sorted({term.event for term in self.terms.values() if term.event is not None}))

    def require(self, scenes: Sequence[TrafficScene], group_size: int) -> None:
        """Raises DataError where the scenes lack what a term reads."""
        require_known(self.terms, list(scenes))
        if self.realism is not None:
            self.realism.require(scenes, group_size)

    def of(self, driven: Driven, mask: Tensor, rolled: Sequence[RolledScene | str] | None) -> DrivenReward:
        """Rewards of a drive; ``mask`` [B,N,K]: decisions that were made; ``rolled``: for realism."""
        total = torch.zeros(mask.shape, device=mask.device)
        known = torch.zeros_like(mask)
        values: dict[str, tuple[Tensor, Tensor]] = {}
        for name, term in self.terms.items():
            value, there = term.value(driven)
            there = there & mask
            total = total + term.weight * value.masked_fill(~there, 0.0)
            known |= there
            values[name] = (value, there)
        if self.realism is not None:
            made, there = self.realism.value(rolled, driven.state.rollouts)
            made = torch.from_numpy(made).to(total)[:, None].expand(mask.shape[:2])
            there = torch.from_numpy(there).to(mask.device)[:, None, None] & mask
            at_end = at_last_decision(made.reshape(-1), there.flatten(0, 1)).view_as(total)
            total = total + self.realism.weight * at_end
            known |= there
            values["realism"] = (made[..., None].expand_as(total), there)
        return DrivenReward(total, known, values)
