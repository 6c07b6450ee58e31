"""Advantages as choices: each class is one way of turning the rewards of a rollout into the credit of its decisions.

Legend: N rows of all processes, K decisions; ``reward`` [N] or [N,K]. Each returns the advantage [N,K] (0 where nothing
counts) and, with a value head, its targets. A way that compares whole rows takes the sum of a row's rewards; a way that
discounts puts a reward of the whole row at its last decision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stage3_grpo.algorithm.errors import AlgorithmError
from stage3_grpo.core import (
    batch_standardised,
    centred,
    constant_baseline,
    discounted_returns,
    gae,
    group_standardised,
    leave_one_out,
)

EPSILON = 1e-8
NORMALISATIONS = ("batch", "time_step", "group", "none")


class Credited(NamedTuple):
    """What an advantage is made of, over all processes."""

    reward: Tensor  # [N] or [N,K]
    group: Tensor  # [N] int64
    valid: Tensor  # [N] bool
    mask: Tensor  # [N,K] bool: decisions that count
    value: Tensor | None  # [N,K] of the value head when the rollout was drawn

    @property
    def whole(self) -> Tensor:
        """[N] reward of each row."""
        return self.reward if self.reward.dim() == 1 else self.reward.masked_fill(~self.mask, 0.0).sum(dim=1)


class Advantage(Protocol):
    """``compares``: rows of a group are compared, so groups of one teach nothing. ``needs_value``: of a value head."""

    compares: bool
    needs_value: bool

    def __call__(self, given: Credited) -> tuple[Tensor, Tensor | None]: ...


class OfRows(ABC):
    """One credit for all decisions of a row, from what the whole row earned."""

    compares = True
    needs_value = False

    @abstractmethod
    def of_rows(self, given: Credited) -> Tensor:
        """[N] advantage of each row."""

    def __call__(self, given: Credited) -> tuple[Tensor, Tensor | None]:
        return self.of_rows(given)[:, None].expand(-1, given.mask.shape[1]), None


@dataclass(frozen=True)
class GroupStandardised(OfRows):
    """A = (r - mean_g) / (std_g + eps): GRPO."""

    def of_rows(self, given: Credited) -> Tensor:
        return group_standardised(given.whole, given.group, given.valid)


@dataclass(frozen=True)
class LeaveOneOut(OfRows):
    """A = r - mean of the others of the group: RLOO."""

    def of_rows(self, given: Credited) -> Tensor:
        return leave_one_out(given.whole, given.group, given.valid)


@dataclass(frozen=True)
class BatchStandardised(OfRows):
    """A = r - mean_g, then standardised over the batch: REINFORCE++."""

    def of_rows(self, given: Credited) -> Tensor:
        return batch_standardised(given.whole, given.group, given.valid)


@dataclass(frozen=True)
class ConstantBaseline(OfRows):
    """A = r - baseline. SMART-R1 takes 0.77 of the realism metric; RLFTSim 0, its reward being a difference."""

    baseline: float
    compares = False

    def of_rows(self, given: Credited) -> Tensor:
        return constant_baseline(given.whole, given.valid, self.baseline)


@dataclass(frozen=True)
class Gae:
    """Generalised advantage estimation with a value head, standardised over the batch."""

    gamma: float = 1.0
    lam: float = 0.95
    value_weight: float = 0.5  # of the value error in the loss
    compares = False
    needs_value = True

    def __post_init__(self) -> None:
        _in_unit(self, "gamma", "lam")
        if self.value_weight <= 0:
            raise AlgorithmError(f"value_weight is {self.value_weight}: the value head would not learn")

    def __call__(self, given: Credited) -> tuple[Tensor, Tensor | None]:
        advantage, target = gae(given.reward, given.value, given.mask, gamma=self.gamma, lam=self.lam)
        chosen = advantage[given.mask]
        if len(chosen) > 1:
            advantage = (advantage - chosen.mean()) / (chosen.std() + EPSILON)
        return advantage.masked_fill(~given.mask, 0.0), target


@dataclass(frozen=True)
class Returns:
    """G_k = sum_{j >= k} gamma^(j-k) r_j, then centred and scaled as ``normalise`` says.

    batch: (G - mean) / std over all decisions that count (arXiv 2409.18343). time_step: the same among decisions of
    equal k, which takes out that early returns are sums of more. group: G less the mean of the other members of the
    group at the same k (leave-one-out), not scaled. none: as they are.
    """

    gamma: float = 0.95
    normalise: str = "time_step"
    needs_value = False

    def __post_init__(self) -> None:
        _in_unit(self, "gamma")
        if self.normalise not in NORMALISATIONS:
            raise AlgorithmError(f"normalise={self.normalise}: one of {', '.join(NORMALISATIONS)} was expected")

    @property
    def compares(self) -> bool:
        return self.normalise == "group"

    def __call__(self, given: Credited) -> tuple[Tensor, Tensor | None]:
        returns = discounted_returns(given.reward, given.mask, self.gamma)
        if self.normalise == "none":
            return returns, None
        if self.normalise == "group":
            columns = [leave_one_out(returns[:, k], given.group, given.mask[:, k]) for k in range(returns.shape[1])]
            return torch.stack(columns, dim=1), None
        zero = torch.zeros_like(given.group)[:, None].expand_as(given.mask)
        steps = torch.arange(given.mask.shape[1], device=zero.device)
        together = zero if self.normalise == "batch" else zero + steps
        return centred(returns, together, given.mask, scale=None), None


@dataclass(frozen=True)
class ScaledRewardToGo:
    """A_k = sum_{j >= k} (r_j - mean of the group over members and time) / scale: Plan-R1 (scale 0.1)."""

    scale: float = 0.1
    compares = True
    needs_value = False

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise AlgorithmError(f"scale is {self.scale}: a positive number was expected")

    def __call__(self, given: Credited) -> tuple[Tensor, Tensor | None]:
        if given.reward.dim() == 1:
            raise AlgorithmError("advantage scaled_reward_to_go needs a reward of every decision: this policy gives "
                                 "one of each whole sample; take advantage=group or leave_one_out")  # fmt: skip
        group = given.group[:, None].expand_as(given.mask)
        relative = centred(given.reward, group, given.mask, scale=self.scale)
        return discounted_returns(relative, given.mask, 1.0), None


def _in_unit(settings: object, *names: str) -> None:
    for name in names:
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise AlgorithmError(f"{name} is {getattr(settings, name)}; a number in [0, 1] was expected")
