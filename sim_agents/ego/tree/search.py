"""Batched tree search over a learned (or exact) model: PUCT, or Gumbel root selection.

Legend: B roots, A actions, M nodes of a tree (one a simulation, and the root), F numbers of a node's state, g discount.

Edges hold visits N(s,a) and the mean return Q(s,a) of what was found below: reward + g (value of the child) at first.

  PUCT      a* = argmax_a Qn(s,a) + c P(s,a) sqrt(sum_b N(s,b)) / (1 + N(s,a)), everywhere. Qn is Q scaled to [0, 1]
            by the least and greatest Q of the tree; an action that was not tried counts as the node's own value.
            The action is the most visited one. Source: MuZero (Schrittwieser et al. 2020).
  Gumbel    at the root m actions without replacement (the greatest of G(a) + logits(a), G Gumbel noise), halved again
            and again by G + logits + sigma(Qc) while the simulations are spread evenly over those that are left; below
            the root a* = argmax_a pi'(a) - N(a) / (1 + sum_b N(b)), pi' = softmax(logits + sigma(Qc)). Qc is Q, or the
            node's mixed value for actions that were not tried; sigma(q) = (50 + max_b N(b)) c_scale q on Q scaled to
            [0, 1]. If values are right, the choice is never worse than the prior's. Source: Danihelka et al. 2022.

Chosen here: c is one number (MuZero's grows with the logarithm of visits, by 0.05 at 1000 of them). All roots are
searched in step, as tensors; a tree of one root costs what Python and small tensors cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from navsim_ext.errors import DataError

METHODS = ("puct", "gumbel")
VISIT_OFFSET = 50.0


@dataclass(frozen=True)
class SearchSettings:
    """``discount`` of one action; ``considered`` is m and ``noise`` scales the Gumbel noise (0: the search is a
    function of the scene), of gumbel alone."""

    simulations: int = 32
    method: str = "puct"
    exploration: float = 1.25  # c
    discount: float = 0.9
    considered: int = 8
    scale: float = 0.1  # c_scale
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.simulations < 1:
            raise DataError(f"simulations={self.simulations}: a search needs at least 1; search=null takes the prior")
        if self.method not in METHODS:
            raise DataError(f"method={self.method}: one of {', '.join(METHODS)} was expected")
        if not 0.0 < self.discount <= 1.0 or self.considered < 1 or self.noise < 0.0 or self.exploration < 0.0:
            raise DataError(f"{self}: 0 < discount <= 1, considered >= 1, noise >= 0, exploration >= 0 were expected")


class TreeNode(NamedTuple):
    """What the model says of states: ``state`` [B,F], ``logits`` [B,A] of the prior (-inf: cannot be done), ``value``
    [B]."""

    state: Tensor
    logits: Tensor
    value: Tensor


class SearchModel(Protocol):
    """The world as the search imagines it."""

    def step(self, state: Tensor, action: Tensor) -> tuple[Tensor, TreeNode]:
        """(reward [B], what comes) of actions [B] in states [B,F]."""
        ...


@dataclass
class Tree:
    """The result: statistics of every node, the root being node 0."""

    visits: Tensor  # [B,M,A]
    total: Tensor  # [B,M,A] sum of returns
    reward: Tensor  # [B,M,A]
    child: Tensor  # [B,M,A] int64, -1: none
    logits: Tensor  # [B,M,A]
    value: Tensor  # [B,M] the model's own
    state: Tensor  # [B,M,F]
    action: Tensor  # [B] that the search would take

    def q(self) -> Tensor:
        """[B,M,A] mean returns, 0 where nothing was tried."""
        return self.total / self.visits.clamp_min(1.0)

    def principal(self) -> list[tuple[Tensor, Tensor]]:
        """(action [B], still inside the tree [B] bool) from the root on: the search's action, then the most visited
        ones; ends where no tree goes on."""
        rows = torch.arange(len(self.action), device=self.action.device)
        inside = torch.ones_like(self.action, dtype=torch.bool)
        node, action = torch.zeros_like(self.action), self.action
        line = []
        while bool(inside.any()):
            line.append((action, inside))
            child = self.child[rows, node, action]
            inside = inside & (child >= 0)
            node = child.clamp_min(0)
            visits = self.visits[rows, node]
            inside = inside & (visits.amax(dim=-1) > 0)
            action = visits.argmax(dim=-1)
        return line


@torch.no_grad()
def search(
    root: TreeNode, model: SearchModel, settings: SearchSettings, generator: torch.Generator | None = None
) -> Tree:
    """Searches from B roots at once."""
    B, A = root.logits.shape
    M, device = settings.simulations + 1, root.value.device
    rows = torch.arange(B, device=device)
    zeros = lambda *shape: torch.zeros(B, M, *shape, device=device)  # noqa: E731
    tree = Tree(
        visits=zeros(A), total=zeros(A), reward=zeros(A),
        child=torch.full((B, M, A), -1, dtype=torch.int64, device=device),
        logits=zeros(A), value=zeros(), state=zeros(root.state.shape[1]),
        action=torch.zeros(B, dtype=torch.int64, device=device),
    )  # fmt: skip
    tree.state[:, 0], tree.logits[:, 0], tree.value[:, 0] = root.state, root.logits, root.value
    noise = _gumbel(root.logits, settings.noise, generator)
    halvings = halving(min(settings.considered, A), settings.simulations) if settings.method == "gumbel" else None
    for number in range(settings.simulations):
        low, high = _range(tree)
        node = torch.zeros(B, dtype=torch.int64, device=device)
        path: list[tuple[Tensor, Tensor, Tensor]] = []  # node, action, still going
        going = torch.ones(B, dtype=torch.bool, device=device)
        last_node, last_action = node, node
        depth = 0
        while True:
            if halvings is not None and depth == 0:
                action = _gumbel_root(tree, noise, halvings[number], low, high, settings)
            elif halvings is not None:
                action = _gumbel_inside(tree, rows, node, low, high, settings)
            else:
                action = _puct(tree, rows, node, low, high, settings)
            path.append((node, action, going))
            last_node = torch.where(going, node, last_node)
            last_action = torch.where(going, action, last_action)
            child = tree.child[rows, node, action]
            going = going & (child >= 0)
            if not bool(going.any()):
                break
            node = torch.where(going, child, node)
            depth += 1
        reward, found = model.step(tree.state[rows, last_node], last_action)
        new = number + 1
        tree.child[rows, last_node, last_action] = new
        tree.reward[rows, last_node, last_action] = reward
        tree.state[:, new], tree.logits[:, new], tree.value[:, new] = found
        returns = found.value
        for node, action, here in reversed(path):
            returns = torch.where(here, tree.reward[rows, node, action] + settings.discount * returns, returns)
            tree.visits[rows, node, action] += here.float()
            tree.total[rows, node, action] += torch.where(here, returns, 0.0)
    if halvings is None:
        tree.action = tree.visits[:, 0].argmax(dim=-1)
    else:
        low, high = _range(tree)
        most = tree.visits[:, 0] == tree.visits[:, 0].amax(dim=-1, keepdim=True)
        score = noise + root.logits + _sigma(tree, rows, torch.zeros_like(tree.action), low, high, settings)
        tree.action = score.masked_fill(~most, -torch.inf).argmax(dim=-1)
    return tree


def improved(tree: Tree, settings: SearchSettings) -> Tensor:
    """[B,A] what the search teaches the prior: shares of visits (PUCT), or softmax(logits + sigma(Qc)) (Gumbel)."""
    if settings.method == "puct":
        return tree.visits[:, 0] / tree.visits[:, 0].sum(dim=-1, keepdim=True)
    rows = torch.arange(len(tree.action), device=tree.action.device)
    low, high = _range(tree)
    sigma = _sigma(tree, rows, torch.zeros_like(tree.action), low, high, settings)
    return (tree.logits[:, 0] + sigma).softmax(dim=-1)


def halving(considered: int, simulations: int) -> list[int]:
    """For each simulation at a Gumbel root: how often the action that it tries has been tried before.

    The simulations fall into log2(m) rounds of equal length; in each the actions that are left are tried equally often,
    at least once, then half of them stay. The last two share what remains."""
    result: list[int] = []
    if considered == 1:
        return list(range(simulations))
    rounds, left, tried = math.ceil(math.log2(considered)), considered, 0
    while len(result) < simulations:
        each = max(1, simulations // (rounds * left))
        for _ in range(each):
            result += [tried] * left
            tried += 1
        left = max(2, left // 2)
    return result[:simulations]


def _range(tree: Tree) -> tuple[Tensor, Tensor]:
    """(least, greatest) [B,1] of the returns that were found and of the root's own value."""
    q, tried = tree.q().flatten(1), tree.visits.flatten(1) > 0
    low = torch.minimum(q.masked_fill(~tried, torch.inf).amin(dim=1), tree.value[:, 0])
    high = torch.maximum(q.masked_fill(~tried, -torch.inf).amax(dim=1), tree.value[:, 0])
    return low[:, None], high[:, None]


def _scaled(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (q - low) / (high - low).clamp_min(1e-6)


def _statistics(tree: Tree, rows: Tensor, node: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(visits, Q [B,A], logits [B,A], own value [B,1]) of one node a root."""
    visits = tree.visits[rows, node]
    q = tree.total[rows, node] / visits.clamp_min(1.0)
    return visits, q, tree.logits[rows, node], tree.value[rows, node][:, None]


def _puct(tree: Tree, rows: Tensor, node: Tensor, low: Tensor, high: Tensor, settings: SearchSettings) -> Tensor:
    visits, q, logits, value = _statistics(tree, rows, node)
    q = _scaled(torch.where(visits > 0, q, value), low, high).clamp(0.0, 1.0)
    total = visits.sum(dim=-1, keepdim=True)
    bonus = settings.exploration * logits.softmax(dim=-1) * total.clamp_min(1.0).sqrt() / (1.0 + visits)
    return (q + bonus).masked_fill(logits == -torch.inf, -torch.inf).argmax(dim=-1)


def _sigma(tree: Tree, rows: Tensor, node: Tensor, low: Tensor, high: Tensor, settings: SearchSettings) -> Tensor:
    """sigma of the completed returns [B,A]; the mixed value of a node is

    v = (v_own + sum_b N(b) * sum_{b tried} P(b) Q(b) / sum_{b tried} P(b)) / (1 + sum_b N(b)).
    """
    visits, q, logits, value = _statistics(tree, rows, node)
    tried, prior = visits > 0, logits.softmax(dim=-1)
    total = visits.sum(dim=-1, keepdim=True)
    weight = torch.where(tried, prior.clamp_min(1e-9), 0.0)
    mean = (weight * q).sum(dim=-1, keepdim=True) / weight.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    mixed = (value + total * mean) / (1.0 + total)
    completed = _scaled(torch.where(tried, q, mixed), low, high)
    return (VISIT_OFFSET + visits.amax(dim=-1, keepdim=True)) * settings.scale * completed


def _gumbel_root(
    tree: Tree, noise: Tensor, tried_before: int, low: Tensor, high: Tensor, settings: SearchSettings
) -> Tensor:
    rows = torch.arange(len(noise), device=noise.device)
    visits, logits = tree.visits[:, 0], tree.logits[:, 0]
    score = noise + logits + _sigma(tree, rows, torch.zeros_like(rows), low, high, settings)
    # Until anything was tried sigma is the same for all: the m greatest of noise + logits come first.
    possible = (visits == tried_before) & (logits > -torch.inf)
    some = possible.any(dim=-1, keepdim=True)
    return score.masked_fill(~torch.where(some, possible, logits > -torch.inf), -torch.inf).argmax(dim=-1)


def _gumbel_inside(
    tree: Tree, rows: Tensor, node: Tensor, low: Tensor, high: Tensor, settings: SearchSettings
) -> Tensor:
    visits, _, logits, _ = _statistics(tree, rows, node)
    policy = (logits + _sigma(tree, rows, node, low, high, settings)).softmax(dim=-1)
    score = policy - visits / (1.0 + visits.sum(dim=-1, keepdim=True))
    return score.masked_fill(logits == -torch.inf, -torch.inf).argmax(dim=-1)


def _gumbel(logits: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
    if scale == 0.0:
        return torch.zeros_like(logits)
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1.0 - 1e-9).to(logits.device)
    return scale * -torch.log(-torch.log(uniform))
