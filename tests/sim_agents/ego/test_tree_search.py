"""The search: what it finds with an exact model, how it spreads its visits, and that batches change nothing."""

import math

import numpy as np
import pytest
import torch

from navsim_ext.errors import DataError
from sim_agents.ego.tree.search import SearchSettings, TreeNode, halving, improved, search

GAMMA = 0.9


class Chain:
    """Places 0 ... 3; action 0 goes left, 1 right, 2 stays. Leaving 0 to the left pays 9, arriving at 3 pays 10; both
    ends are final. Values and priors say nothing."""

    LAST = 3

    def node(self, place):
        return TreeNode(place[:, None], torch.zeros(len(place), 3), torch.zeros(len(place)))

    def step(self, state, action):
        place = state[:, 0]
        ended = (place < 0) | (place >= self.LAST)
        after = place + torch.tensor([-1.0, 1.0, 0.0])[action]
        reward = torch.where(after >= self.LAST, 10.0, torch.where(after < 0, 9.0, 0.0))
        return torch.where(ended, 0.0, reward), self.node(torch.where(ended, place, after))


class Bandit:
    """One decision, rewards known, nothing after it."""

    def __init__(self, rewards, logits=None):
        self.rewards = torch.as_tensor(rewards, dtype=torch.float32)
        self.logits = torch.zeros_like(self.rewards) if logits is None else torch.as_tensor(logits).float()

    def root(self, B=1):
        return TreeNode(torch.zeros(B, 1), self.logits.expand(B, -1), torch.zeros(B))

    def step(self, state, action):
        reward = torch.where(state[:, 0] == 0, self.rewards[action], 0.0)
        return reward, TreeNode(state + 1, self.logits.expand(len(state), -1), torch.zeros(len(state)))


@pytest.mark.parametrize("method", ["puct", "gumbel"])
def test_with_an_exact_model_the_optimum_of_a_chain_is_found(method):
    """From place p going right pays g^(2-p) 10, going left g^p 9: left is best from 0, right from everywhere else."""
    chain = Chain()
    start = torch.arange(0.0, 3.0)
    right, left = GAMMA ** (2 - start) * 10.0, GAMMA**start * 9.0
    optimum = torch.maximum(right, left)
    settings = SearchSettings(simulations=300, method=method, discount=GAMMA, exploration=2.0, considered=3, scale=1.0)
    tree = search(chain.node(start), chain, settings)
    best = torch.where(right > left, 1, 0)
    assert best.tolist() == [0, 1, 1]
    assert tree.action.tolist() == best.tolist()
    q = tree.q()[:, 0].gather(1, tree.action[:, None])[:, 0]
    # The mean return of the best action holds what was explored below it too: near the optimum, never above it.
    assert (q <= optimum + 1e-4).all()
    assert (q >= 0.7 * optimum).all()
    walked = torch.stack([action for action, _ in tree.principal()])
    assert walked[:2, 1].tolist() == [1, 1]  # from place 1 to the end


def puct_by_hand(rewards, priors, simulations, c):
    """Visits of a bandit, in plain numbers."""
    visits, total = np.zeros(len(rewards)), np.zeros(len(rewards))
    for _ in range(simulations):
        tried = visits > 0
        q = np.where(tried, total / np.maximum(visits, 1), 0.0)
        low, high = min([0.0, *q[tried]]), max([0.0, *q[tried]])
        scaled = np.clip((q - low) / max(high - low, 1e-6), 0, 1)
        score = scaled + c * priors * math.sqrt(max(visits.sum(), 1.0)) / (1 + visits)
        a = int(score.argmax())
        visits[a] += 1
        total[a] += rewards[a]
    return visits


def test_visits_of_a_bandit_are_those_of_the_formula():
    rewards, logits = np.array([0.1, 0.9, 0.4, -0.3]), np.array([0.5, -0.5, 0.2, 1.0])
    bandit = Bandit(rewards, logits)
    priors = np.exp(logits) / np.exp(logits).sum()
    for simulations in (1, 5, 40, 250):
        settings = SearchSettings(simulations=simulations, discount=GAMMA, exploration=1.25)
        found = search(bandit.root(), bandit, settings)
        # Below the root nothing pays: an arm that is visited again keeps its return.
        wanted = puct_by_hand(rewards, priors, simulations, 1.25)
        np.testing.assert_array_equal(found.visits[0, 0].numpy(), wanted)
    assert found.action.item() == 1


def test_gumbel_visits_are_spread_by_halving_and_the_best_of_the_last_two_wins():
    assert halving(4, 8) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert halving(1, 3) == [0, 1, 2]
    assert halving(8, 4) == [0, 0, 0, 0]
    assert len(halving(16, 50)) == 50
    bandit = Bandit([0.1, 0.9, 0.4, -0.3])
    settings = SearchSettings(simulations=8, method="gumbel", considered=4, scale=1.0)
    tree = search(bandit.root(), bandit, settings)
    assert sorted(tree.visits[0, 0].tolist()) == [1.0, 1.0, 3.0, 3.0]
    assert tree.visits[0, 0, 1] == 3.0
    assert tree.action.item() == 1


def test_gumbel_noise_draws_actions_as_the_prior_does():
    logits = torch.tensor([0.0, 1.0, -1.0])
    bandit = Bandit([0.0, 0.0, 0.0], logits)
    generator = torch.Generator().manual_seed(0)
    settings = SearchSettings(simulations=1, method="gumbel", considered=1, noise=1.0)
    tree = search(bandit.root(4000), bandit, settings, generator)
    shares = torch.bincount(tree.action, minlength=3) / 4000
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("method", ["puct", "gumbel"])
def test_a_root_finds_the_same_alone_and_in_a_batch(method):
    chain = Chain()
    settings = SearchSettings(simulations=60, method=method, discount=GAMMA)
    whole = search(chain.node(torch.arange(0.0, 3.0)), chain, settings)
    for place in range(3):
        alone = search(chain.node(torch.tensor([float(place)])), chain, settings)
        assert torch.equal(alone.visits[0], whole.visits[place])
        assert alone.action[0] == whole.action[place]


def test_what_cannot_be_done_is_never_tried():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    for method in ("puct", "gumbel"):
        bandit = Bandit([0.0, 9.0, 0.1], logits[0])
        tree = search(bandit.root(), bandit, SearchSettings(simulations=20, method=method, considered=3))
        assert tree.visits[0, 0, 1] == 0
        assert tree.action.item() == 2


def test_a_better_arm_gets_more_of_the_improved_policy():
    bandit = Bandit([0.0, 1.0, 0.2])
    for method in ("puct", "gumbel"):
        settings = SearchSettings(simulations=30, method=method, considered=3)
        policy = improved(search(bandit.root(), bandit, settings), settings)
        assert policy.sum().item() == pytest.approx(1.0, abs=1e-5)
        assert policy[0, 1] == policy.max()


def test_senseless_searches_are_refused():
    for values, words in (({"simulations": 0}, "at least 1"), ({"method": "alpha"}, "one of puct"),
                          ({"discount": 0.0}, "discount"), ({"considered": 0}, "considered")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            SearchSettings(**values)
