"""From a rollout and its credit to losses: minibatches, and the loss of each.

Legend: S starts, N rows, K decisions, n rows of a part, M minibatches, W processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from navsim_ext.runtime.collectives import gather_rows, own_rows, share_of_count, world
from navsim_ext.runtime.rng import derive_seed
from navsim_ext.runtime.sharding import is_sharded
from stage3_grpo.algorithm import Algorithm, AlgorithmError
from stage3_grpo.core import behaviour_cloning, masked_mean, sampled_kl, sequence_mean, value_error
from stage3_grpo.credit import Credit
from stage3_grpo.policy import DecisionScores, Policy, PolicyRollout, WrongPolicy


class Losses(NamedTuple):
    """Terms of one update (or of a part of it: they add up), all []: ``total`` carries the gradient.

    ``counted``: decisions that count in the policy's terms, over all processes, divided by their number; with 0 those
    terms say nothing, and with ``cloning`` 0 as well there is nothing to learn.
    """

    total: Tensor
    policy: Tensor
    kl: Tensor  # the term that beta weighs
    kl_reference: Tensor  # KL to the reference, exact where the policy can compute it; NaN where it was not asked for
    cloning: Tensor
    value: Tensor
    clip_fraction: Tensor
    ratio_mean: Tensor
    approx_kl: Tensor
    counted: Tensor


def minibatches(names: Sequence[str], count: int, *, seed: int, rollout: int, epoch: int, device) -> list[list[int]]:
    """Own starts of each of M minibatches of the global batch, drawn without regard to which process has a start.

    Starts are ordered by a hash of (seed, rollout, inner epoch, name); minibatch j takes the j-th part of that
    order. So W processes make the same M updates as one with all the starts.
    """
    keys = torch.tensor([derive_seed(seed, rollout, epoch, name) for name in names], device=device)
    whole = gather_rows(keys)
    place = torch.empty_like(whole)
    place[torch.argsort(whole, stable=True)] = torch.arange(len(whole), device=device)
    part = own_rows(place * count // len(whole)).tolist()
    return [[i for i, own in enumerate(part) if own == j] for j in range(count)]


class Denominators(NamedTuple):
    """Denominators of the means of one update, over all processes."""

    decisions: Tensor
    level: Tensor  # of the policy's term: decisions or rows
    taught: Tensor


@dataclass(frozen=True)
class Updater:
    """Losses of (parts of) a rollout under the present weights."""

    algorithm: Algorithm

    def parts(
        self,
        policy: Policy,
        modules: Mapping[str, nn.Module],
        rollout: PolicyRollout,
        credit: Credit,
        starts: Sequence[int] | None,
        *,
        beta: float,
        bc_weight: float,
    ) -> Iterator[Losses]:
        """Losses of the minibatch of the own ``starts`` (None: all; empty: only takes part in the collectives), in
        parts of at most ``policy.rows_at_once`` rows: their gradients add up to that of the whole."""
        rows = self._rows(rollout, starts)
        counts = self._counts(rollout, credit, starts, rows, bc_weight)
        pieces = [rows] if policy.rows_at_once is None else list(rows.split(policy.rows_at_once))
        for number in range(_most(len(pieces), rows.device)):
            piece = pieces[number] if number < len(pieces) else rows[:0]
            if len(piece) == 0:
                yield self._nothing(policy, modules, rollout, counts, teach=bc_weight > 0)
            else:
                yield self._losses(policy, rollout, credit, piece, counts, beta, bc_weight)

    def losses(
        self, policy: Policy, modules: Mapping[str, nn.Module], rollout: PolicyRollout, credit: Credit,
        starts: Sequence[int] | None, *, beta: float, bc_weight: float,
    ) -> Losses:  # fmt: skip
        """All parts added."""
        return added(list(self.parts(policy, modules, rollout, credit, starts, beta=beta, bc_weight=bc_weight)))

    def _rows(self, rollout: PolicyRollout, starts: Sequence[int] | None) -> Tensor:
        if starts is None:
            return torch.arange(rollout.num_rows, device=rollout.mask.device)
        chosen = torch.tensor(list(starts), dtype=torch.int64, device=rollout.start.device)
        return torch.isin(rollout.start, chosen).nonzero()[:, 0]

    def _counts(
        self, rollout: PolicyRollout, credit: Credit, starts: Sequence[int] | None, rows: Tensor, bc_weight: float
    ) -> Denominators:
        mask = credit.mask[rows]
        decisions = share_of_count(mask)
        level = share_of_count(mask.any(dim=1)) if self.algorithm.objective.counts_rows else decisions
        taught = torch.zeros_like(decisions)
        if bc_weight > 0:
            if rollout.taught is None:
                raise WrongPolicy(
                    f"{self.algorithm.name}: this policy has no teacher to clone: set algorithm.bc_weight.start to 0"
                )
            own = rollout.taught
            if starts is not None:
                own = own[torch.isin(rollout.teaches, rollout.start.new_tensor(list(starts)))]
            taught = share_of_count(own)
        return Denominators(decisions, level, taught)

    def _losses(
        self, policy: Policy, rollout: PolicyRollout, credit: Credit, rows: Tensor, counts: Denominators, beta: float,
        bc_weight: float,
    ) -> Losses:  # fmt: skip
        algorithm, mask = self.algorithm, credit.mask[rows]
        made = policy.decide(rollout, rows, teach=bc_weight > 0)
        logp = made.logp
        zero = torch.zeros((), device=logp.device)
        old = logp.detach() if rollout.logp_old is None else rollout.logp_old[rows]
        term = algorithm.objective.policy(logp, old, credit.advantage[rows], mask, counts.level)
        kl, told = self._kl(made, rollout, rows, mask, counts)
        cloning = zero
        if made.teacher_logp is not None:
            cloning = behaviour_cloning(made.teacher_logp, self._taught(rollout, rows), counts.taught)
        value = zero
        if algorithm.needs_value:
            if made.value is None:
                raise WrongPolicy(f"{algorithm.name} needs a value head, which policy {policy.name} has not")
            value = value_error(made.value, credit.target[rows], mask, counts.decisions)
        total = term.loss + beta * kl + bc_weight * cloning + algorithm.value_weight * value
        terms = (total, term.loss, kl, told, cloning, value, term.clip_fraction, term.ratio_mean, term.approx_kl,
                 counts.decisions)  # fmt: skip
        return Losses(terms[0], *(each.detach() for each in terms[1:]))

    def _taught(self, rollout: PolicyRollout, rows: Tensor) -> Tensor:
        """[m,L] of the teacher's rows that :meth:`Policy.decide` scores beside ``rows``."""
        return rollout.taught[taught_by(rollout, rows)]

    def _kl(
        self, made: DecisionScores, rollout: PolicyRollout, rows: Tensor, mask: Tensor, counts: Denominators
    ) -> tuple[Tensor, Tensor]:
        """The term of the configured form (0 for none), and the KL for the record."""
        algorithm = self.algorithm
        zero = torch.zeros((), device=mask.device)
        sequence = algorithm.averaging == "sequence"
        count = counts.level if sequence else counts.decisions
        told = torch.full_like(zero, torch.nan)
        if made.kl_exact is not None:
            told = masked_mean(made.kl_exact, mask, counts.decisions)
        elif rollout.logp_ref is not None:
            told = sampled_kl("k3", made.logp.detach(), rollout.logp_ref[rows], mask, counts.decisions)
        if algorithm.kl is None:
            return zero, told
        if algorithm.kl.form == "exact":
            if made.kl_exact is None:
                raise AlgorithmError(f"{algorithm.name}: this policy computes no exact KL: take kl=k3")
            return (sequence_mean(made.kl_exact, mask, count) if sequence else told), told
        estimate = sampled_kl(algorithm.kl.form, made.logp, rollout.logp_ref[rows], mask, count, algorithm.averaging)
        return estimate, told

    def _nothing(
        self, policy: Policy, modules: Mapping[str, nn.Module], rollout: PolicyRollout, counts: Denominators, *,
        teach: bool,
    ) -> Losses:  # fmt: skip
        """Zero with zero gradients for every weight: the other processes wait for them. Sharded weights are gathered
        by passes of all processes, so one start is passed through and weighs nothing."""
        if any(map(is_sharded, modules.values())):
            made = policy.decide(rollout, (rollout.start == rollout.start[0]).nonzero()[:, 0], teach=teach)
            told = (made.logp, made.value, made.teacher_logp)
            total = sum(each.nan_to_num().sum() * 0.0 for each in told if each is not None)
        else:
            total = sum(weight.sum() * 0.0 for module in modules.values() for weight in module.parameters())
        zeros = (torch.zeros((), device=total.device) for _ in range(len(Losses._fields) - 2))
        return Losses(total, *zeros, counted=counts.decisions)


def taught_by(rollout: PolicyRollout, rows: Tensor) -> Tensor:
    """[m] rows of the teacher whose start has its first row among ``rows``: each is scored once, however the rows of a
    minibatch are cut into parts."""
    first = torch.full((len(rollout.names),), rollout.num_rows, dtype=torch.int64, device=rows.device)
    first = first.scatter_reduce(0, rollout.start, torch.arange(rollout.num_rows, device=rows.device), "amin")
    chosen = torch.isin(first, rows).nonzero()[:, 0]
    return torch.isin(rollout.teaches, chosen).nonzero()[:, 0]


def added(parts: Sequence[Losses]) -> Losses:
    """The losses of an update from those of its parts: means over a common count add up."""
    if len(parts) == 1:
        return parts[0]
    sums = (torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for name in Losses._fields[:-1])
    return Losses(*sums, counted=parts[0].counted)


def _most(pieces: int, device: torch.device) -> int:
    """The largest number of parts that a process has: all take part in as many collectives."""
    if world()[1] == 1:
        return pieces
    most = torch.tensor(pieces, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)
