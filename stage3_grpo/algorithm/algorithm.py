"""An algorithm of stage 3 as a composition: advantage, surrogate, KL, filter, each a small class with its own settings.

A setting exists only with the class that reads it, so none can be written that has no effect. Nothing here knows a kind
of policy: how a policy explores belongs to the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stage3_grpo.algorithm.advantage import Advantage, GroupStandardised
from stage3_grpo.algorithm.errors import AlgorithmError
from stage3_grpo.algorithm.filters import RowFilter
from stage3_grpo.algorithm.kl import KlPenalty
from stage3_grpo.algorithm.schedule import Schedule
from stage3_grpo.algorithm.surrogate import Reinforce, Surrogate
from stage3_grpo.core import Objective
from stage3_grpo.policy import Needs


@dataclass(frozen=True)
class Algorithm:
    """All settings of an update.

    ``group_size`` G samples of every start. ``keep``: which rows are learned from (None: all). ``kl``: pull to the
    frozen reference. ``bc_weight``: cloning of the teacher's samples. ``averaging``: one mean over all decisions
    ("token"), or of the means over each row's decisions ("sequence"). ``by_part``: the parts of a reward are turned
    into advantages one by one and added with their weights (GDPO), not added first.
    """

    name: str
    group_size: int = 8
    advantage: Advantage = field(default_factory=GroupStandardised)
    surrogate: Surrogate = field(default_factory=Reinforce)
    kl: KlPenalty | None = None
    keep: RowFilter | None = None
    bc_weight: Schedule = field(default_factory=lambda: Schedule(0.1))
    averaging: Literal["token", "sequence"] = "token"
    by_part: bool = False

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise AlgorithmError(f"{self.name}: group_size is {self.group_size}; 1 or more was expected")
        if self.averaging not in ("token", "sequence"):
            raise AlgorithmError(f"{self.name}: averaging {self.averaging!r} does not exist; one of token, sequence")
        comparing = [each for each in (self.advantage, self.keep) if each is not None and each.compares]
        if comparing and self.group_size < 2:
            what = type(comparing[0]).__name__
            raise AlgorithmError(
                f"{self.name}: {what} compares the members of a group, group_size is {self.group_size}: use 2 or more "
                "(published: 8), or advantage=gae or constant"
            )
        if self.keep is not None and not self.advantage.compares:
            raise AlgorithmError(
                f"{self.name}: {type(self.keep).__name__} looks at groups, {type(self.advantage).__name__} does not: "
                "take a group advantage, or set keep to null"
            )

    @property
    def objective(self) -> Objective:
        return self.surrogate.objective(self.averaging)

    @property
    def needs_value(self) -> bool:
        return self.advantage.needs_value

    @property
    def value_weight(self) -> float:
        return self.advantage.value_weight if self.needs_value else 0.0

    @property
    def once(self) -> bool:
        """One update of all rows per rollout."""
        return self.surrogate.inner_epochs == 1 and self.surrogate.minibatches == 1

    def needs(self, *, drift: bool, teach: bool = True) -> Needs:
        """What a rollout must bring; ``drift``: the record wants the KL to the reference too; ``teach``: the weight of
        cloning is not 0."""
        whole = self.surrogate.minibatches == 1
        return Needs(old=not self.once, reference=self.kl is not None or drift, value=self.needs_value, once=whole,
                     teach=teach)  # fmt: skip
