"""Credit: from the rewards of a rollout to an advantage of every decision, over all processes.

Legend: N rows of this process, W processes, K decisions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from navsim_ext.runtime.collectives import gather_rows, own_rows, world
from stage3_grpo.algorithm import Algorithm, AlgorithmError, Credited
from stage3_grpo.core import group_statistics
from stage3_grpo.policy import PolicyRollout


class Credit(NamedTuple):
    """``advantage`` [N,K] weighted; ``mask`` [N,K] what counts; ``target`` of the value head; ``zero_spread`` share of
    the valid rows whose group agrees."""

    advantage: Tensor
    mask: Tensor
    target: Tensor | None
    zero_spread: Tensor


class Padded:
    """Rows of all processes side by side, padded to the most rows and the largest K that any of them has."""

    def __init__(self, mask: Tensor) -> None:
        """``mask`` [N,K] of this process. Collective."""
        self.rows, self.steps = mask.shape
        self.most = (self.rows, self.steps)
        if world()[1] > 1:
            most = torch.tensor(self.most, device=mask.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            self.most = tuple(most.tolist())

    def all(self, value: Tensor) -> Tensor:
        """[N,...] -> [W most,...]; padding is 0 (False). Collective."""
        if world()[1] == 1:
            return value
        missing = [self.most[0] - self.rows, self.most[1] - self.steps if value.dim() > 1 else 0]
        pad = (0, missing[1], 0, missing[0]) if value.dim() > 1 else (0, missing[0])
        return gather_rows(torch.nn.functional.pad(value.contiguous(), pad))

    def own(self, value: Tensor) -> Tensor:
        """The rows and decisions of this process out of what :meth:`all` gave."""
        mine = own_rows(value)[: self.rows]
        return mine if value.dim() == 1 else mine[:, : self.steps]


def assign_credit(algorithm: Algorithm, rollout: PolicyRollout) -> Credit:
    """Advantages over the global batch; rows without a valid reward do not count anywhere. Collective."""
    mask = rollout.mask & rollout.valid[:, None]
    padded = Padded(mask)
    group = rollout.group + world()[0] * padded.most[0]
    value = None if rollout.value_old is None else padded.all(rollout.value_old)
    given = Credited(padded.all(rollout.reward), padded.all(group), padded.all(rollout.valid), padded.all(mask), value)
    statistics = group_statistics(given.whole, given.group, given.valid)
    least = getattr(algorithm.keep, "minimum", 0.0)
    zero_spread = (statistics.std[given.valid] <= least).float().mean()
    if algorithm.keep is not None:
        given = given._replace(mask=given.mask & algorithm.keep(given)[:, None])
    if algorithm.by_part:
        advantage, target = _by_part(algorithm, rollout, given, padded), None
    else:
        advantage, target = algorithm.advantage(given)
        advantage = padded.own(advantage)
    if rollout.weight is not None:
        advantage = advantage * rollout.weight
    return Credit(advantage, padded.own(given.mask), None if target is None else padded.own(target), zero_spread)


def _by_part(algorithm: Algorithm, rollout: PolicyRollout, given: Credited, padded: Padded) -> Tensor:
    """A = sum_i w_i A(r_i) on the decisions that part i is credited to."""
    if not rollout.parts:
        raise AlgorithmError(f"{algorithm.name}: by_part needs a reward of several parts; this one has none")
    if algorithm.needs_value:
        raise AlgorithmError(f"{algorithm.name}: by_part and a value head exclude each other: it has one value a row")
    total = torch.zeros_like(rollout.mask, dtype=torch.float32)
    for part in rollout.parts:
        advantage = padded.own(algorithm.advantage(given._replace(reward=padded.all(part.reward)))[0])
        total = total + part.weight * (advantage if part.scope is None else advantage.masked_fill(~part.scope, 0.0))
    return total
