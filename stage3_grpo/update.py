"""From a rollout to losses: advantages, minibatches, and the loss of each.

Legend: S scenes, G trajectories of each, N = S G rows, K denoising steps, M minibatches, W processes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from navsim_ext.runtime.collectives import gather_rows, own_rows, share_of_count, world
from navsim_ext.runtime.rng import derive_seed
from stage2_dit import Chain, Conditioning, DiffusionPlanner, Process, Steps, step_distributions
from stage3_grpo.algorithm import Algorithm
from stage3_grpo.collector import Experience
from stage3_grpo.core import (
    batch_standardised,
    behaviour_cloning,
    constant_baseline,
    denoising_discount,
    gae,
    group_standardised,
    group_statistics,
    leave_one_out,
    masked_mean,
    sampled_kl,
    spread_mask,
    value_error,
)
from stage3_grpo.value import ValueHead

EPSILON = 1e-8


class Credit(NamedTuple):
    """``advantage`` [N,K] discounted; ``mask`` [N,K]; ``target`` of the value head; ``zero_spread`` share of groups."""

    advantage: Tensor
    mask: Tensor
    target: Tensor | None
    zero_spread: Tensor


class Losses(NamedTuple):
    """Terms of one update, all []: ``total`` carries the gradient.

    ``counted``: decisions that count in the policy's terms, over all processes, divided by their number; with 0 those
    terms say nothing, and with ``cloning`` 0 as well there is nothing to learn.
    """

    total: Tensor
    policy: Tensor
    kl: Tensor  # the term that beta weighs
    kl_reference: Tensor  # exact KL of the step distributions to the reference's; NaN where it was not asked for
    cloning: Tensor
    value: Tensor
    clip_fraction: Tensor
    ratio_mean: Tensor
    approx_kl: Tensor
    counted: Tensor


def assign_credit(algorithm: Algorithm, experience: Experience) -> Credit:
    """Advantages over the global batch; rows without a valid reward do not count anywhere."""
    device, steps = experience.chain.states.device, len(experience.chain.times)
    valid = torch.as_tensor(experience.scores.valid, device=device)
    reward = torch.as_tensor(experience.scores.reward, device=device, dtype=torch.float32).masked_fill(~valid, 0.0)
    rank, _ = world()
    group = torch.arange(experience.chain.num_scenes, device=device).repeat_interleave(algorithm.group_size)
    group = group + rank * experience.chain.num_scenes
    whole = [gather_rows(each) for each in (reward, group, valid)]
    statistics = group_statistics(*whole)
    zero_spread = (statistics.std[whole[2]] <= algorithm.min_spread).float().mean()
    mask = valid[:, None].expand(-1, steps)
    if algorithm.drop_zero_spread:
        mask = mask & own_rows(spread_mask(*whole, algorithm.min_spread))[:, None]
    target = None
    if algorithm.advantage == "gae":
        advantage, target = gae(reward, experience.value_old, mask, gamma=algorithm.gae_gamma, lam=algorithm.gae_lambda)
        everything, counts = gather_rows(advantage), gather_rows(mask)
        chosen = everything[counts]
        if len(chosen) > 1:
            advantage = ((advantage - chosen.mean()) / (chosen.std() + EPSILON)).masked_fill(~mask, 0.0)
    else:
        functions = {
            "group": lambda: group_standardised(*whole),
            "leave_one_out": lambda: leave_one_out(*whole),
            "batch": lambda: batch_standardised(*whole),
            "constant": lambda: constant_baseline(whole[0], whole[2], algorithm.baseline),
        }
        advantage = own_rows(functions[algorithm.advantage]())[:, None].expand(-1, steps)
    discount = denoising_discount(steps, algorithm.discount, device=device)
    return Credit(advantage * discount, mask, target, zero_spread)


def minibatches(tokens: list[str], count: int, *, seed: int, rollout: int, epoch: int, device) -> list[list[int]]:
    """Own scenes of each of M minibatches of the global batch, drawn without regard to which process has a scene.

    Scenes are ordered by a hash of (seed, rollout, inner epoch, token); minibatch j takes the j-th part of that
    order. So W processes make the same M updates as one with all the scenes.
    """
    keys = torch.tensor([derive_seed(seed, rollout, epoch, token) for token in tokens], device=device)
    whole = gather_rows(keys)
    place = torch.empty_like(whole)
    place[torch.argsort(whole, stable=True)] = torch.arange(len(whole), device=device)
    part = own_rows(place * count // len(whole)).tolist()
    return [[i for i, own in enumerate(part) if own == j] for j in range(count)]


@dataclass(frozen=True)
class Updater:
    """Losses of (parts of) a rollout under the present weights."""

    algorithm: Algorithm
    process: Process

    def losses(
        self,
        planner: DiffusionPlanner,
        value_head: ValueHead | None,
        experience: Experience,
        credit: Credit,
        scenes: list[int] | None,
        *,
        beta: float,
        bc_weight: float,
        conditioning: Conditioning | None = None,
    ) -> Losses:
        """``scenes``: the own scenes of the minibatch (None: all; empty: only takes part in the collectives).

        The policy's and the teacher's chains go through the network together.
        """
        everything = list(range(experience.chain.num_scenes))
        chosen = torch.tensor(everything if scenes is None else scenes, dtype=torch.long)
        chosen = chosen.to(experience.chain.states.device)
        group, steps = self.algorithm.group_size, len(experience.chain.times)
        rows = (chosen[:, None] * group + torch.arange(group, device=chosen.device)).flatten()
        mask = credit.mask[rows]
        count = share_of_count(mask)
        level = share_of_count(mask.any(dim=1)) if self.algorithm.ratio_level == "trajectory" else count
        taught = share_of_count(torch.ones(len(chosen), steps, device=mask.device))
        if len(chosen) == 0:
            return self._nothing(planner, value_head, count)
        if conditioning is None:
            conditioning = self._condition(planner, experience, chosen)
        chain, with_teacher = experience.chain.select(chosen), bc_weight > 0
        joined = join(chain, experience.teacher.select(chosen)) if with_teacher else chain
        distribution = step_distributions(planner, conditioning, joined, process=self.process)
        logp_all = self.algorithm.log_prob.of(joined, distribution).unflatten(0, (len(chosen), -1))
        logp = logp_all[:, :group].flatten(0, 1)
        zero = torch.zeros((), device=logp.device)
        old = logp.detach() if experience.logp_old is None else experience.logp_old[rows]
        term = self.algorithm.objective.policy(logp, old, credit.advantage[rows], mask, level)
        kl, exact = zero, torch.full_like(zero, torch.nan)
        if experience.reference_steps is not None:
            kl, exact = self._kl(chain, distribution, logp, experience, rows, mask, count)
        cloning = zero
        if with_teacher:
            cloning = behaviour_cloning(
                logp_all[:, group], torch.ones_like(logp_all[:, group], dtype=torch.bool), taught
            )
        value = zero
        if value_head is not None:
            value = value_error(value_head(conditioning, chain), credit.target[rows], mask, count)
        total = term.loss + beta * kl + bc_weight * cloning + (self.algorithm.value_weight or 0.0) * value
        terms = (total, term.loss, kl, exact, cloning, value, term.clip_fraction, term.ratio_mean, term.approx_kl,
                 count)  # fmt: skip
        return Losses(terms[0], *(each.detach() for each in terms[1:]))

    def _condition(self, planner: DiffusionPlanner, experience: Experience, chosen: Tensor) -> Conditioning:
        mask = None if experience.mask is None else experience.mask[chosen]
        scenes = experience.scenes
        return planner.condition(experience.hidden[chosen], mask, scenes.history[chosen], scenes.status[chosen])

    def _kl(
        self,
        chain: Chain,
        joined: Steps,
        logp: Tensor,
        experience: Experience,
        rows: Tensor,
        mask: Tensor,
        count: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The term of the configured form (0 for none), and the exact KL for the record."""
        log_prob, group = self.algorithm.log_prob, self.algorithm.group_size
        reference = Steps(*(each[rows] for each in experience.reference_steps))
        own = Steps(*(each.unflatten(0, (chain.num_scenes, -1))[:, :group].flatten(0, 1) for each in joined))
        exact = masked_mean(log_prob.kl(own, reference), mask, count)
        if self.algorithm.kl == "gaussian":
            return exact, exact
        if self.algorithm.kl == "none":
            return torch.zeros_like(exact), exact
        return sampled_kl(self.algorithm.kl, logp, log_prob.of(chain, reference), mask, count), exact

    def _nothing(self, planner: DiffusionPlanner, value_head: ValueHead | None, count: Tensor) -> Losses:
        """Zero with zero gradients for every weight: the other processes wait for them."""
        modules = [planner] if value_head is None else [planner, value_head]
        total = sum(weight.sum() * 0.0 for module in modules for weight in module.parameters())
        zeros = (torch.zeros((), device=total.device) for _ in range(len(Losses._fields) - 2))
        return Losses(total, *zeros, counted=count)


def join(chain: Chain, teacher: Chain) -> Chain:
    """Groups of G + 1: the policy's chains of a scene, then the teacher's."""
    states = torch.cat([chain.states.unflatten(0, (-1, chain.group_size)), teacher.states[:, None]], dim=1)
    return dataclasses.replace(chain, states=states.flatten(0, 1), group_size=chain.group_size + 1)
