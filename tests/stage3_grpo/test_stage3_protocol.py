"""One bandit told as denoising steps, as words and as motion tokens: one core, the same advantages and losses.

The bandit: in each of S starts two decisions d_1, d_2 in {0, 1} with p(d_k = 1) = sigmoid(theta_k); the reward is a
table of (start, d_1, d_2). Everything below has an answer on paper.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from stage3_grpo.algorithm import (
    AdaptiveWeight,
    Algorithm,
    AlgorithmError,
    BatchStandardised,
    ClippedRatio,
    ConstantBaseline,
    Gae,
    GroupStandardised,
    KlPenalty,
    LeaveOneOut,
    Reinforce,
    Returns,
    ScaledRewardToGo,
    Schedule,
    ZeroSpread,
)
from stage3_grpo.credit import assign_credit
from stage3_grpo.policy import DecisionScores, Key, Needs, PolicyRollout, RewardPart, WrongPolicy
from stage3_grpo.update import Updater, taught_by

REWARD = torch.tensor([[[0.0, 1.0], [0.3, 0.6]], [[1.0, 0.2], [0.5, 0.5]]])  # [S,2,2]
DRAWN = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])  # every outcome once: a group of 4
KINDS = ("steps", "words", "tokens")


class Bandit(nn.Module):
    """A policy of stage 3: ``kind`` steps (K = 2, no padding), words (padded to 5, rows in another order), tokens (a
    reward of each decision, all of it at the last; one more row per start that counts nowhere)."""

    name = "bandit"

    def __init__(self, kind: str, rows_at_once: int | None = None) -> None:
        super().__init__()
        self.kind, self.rows_at_once = kind, rows_at_once
        self.theta = nn.Parameter(torch.tensor([0.4, -0.3], dtype=torch.float64))
        self.head = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.reference = torch.tensor([0.1, 0.2], dtype=torch.float64)

    def roll(self, batch: int, group_size: int, key: Key, needs: Needs) -> PolicyRollout:
        assert group_size == len(DRAWN)
        start = torch.arange(batch).repeat_interleave(group_size)
        drawn = DRAWN.repeat(batch, 1)
        reward = REWARD[start, drawn[:, 0], drawn[:, 1]]
        mask = torch.ones_like(drawn, dtype=torch.bool)
        valid = torch.ones_like(start, dtype=torch.bool)
        if self.kind == "words":
            order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])[: len(start)]
            start, reward = start[order], reward[order]
            drawn = torch.nn.functional.pad(drawn[order], (0, 3))
            mask = torch.nn.functional.pad(mask, (0, 3))
        elif self.kind == "tokens":
            reward = torch.stack([torch.zeros_like(reward), reward], dim=1)
            extra = torch.arange(batch)
            start, drawn = torch.cat([start, extra]), torch.cat([drawn, DRAWN[:batch]])
            reward = torch.cat([reward, torch.full((batch, 2), 9.0)])
            mask = torch.cat([mask, torch.zeros(batch, 2, dtype=torch.bool)])
            valid = torch.cat([valid, torch.zeros(batch, dtype=torch.bool)])
        made = PolicyRollout(
            names=[f"s{i}" for i in range(batch)], start=start, group=start, mask=mask, reward=reward, valid=valid,
            own=drawn, taught=torch.ones(batch, 2, dtype=torch.bool), teaches=torch.arange(batch),
        )  # fmt: skip
        with torch.no_grad():
            logp = self.logp(drawn, self.theta)
            value = self.head.expand(len(start), 2) if needs.value else None
        if value is not None and self.kind == "words":
            value = torch.nn.functional.pad(value, (0, 3))
        reference = self.logp(drawn, self.reference) if needs.reference else None
        return replace(made, logp_old=logp if needs.old else None, logp_ref=reference, value_old=value)

    def logp(self, drawn: Tensor, theta: Tensor) -> Tensor:
        made = torch.where(drawn[:, :2] == 1, 1.0, -1.0) * theta
        return torch.nn.functional.pad(torch.nn.functional.logsigmoid(made), (0, drawn.shape[1] - 2))

    def decide(self, rollout: PolicyRollout, rows: Tensor, *, teach: bool) -> DecisionScores:
        drawn = rollout.own[rows]
        teacher = self.logp(torch.ones(len(taught_by(rollout, rows)), 2), self.theta) if teach else None
        value = torch.nn.functional.pad(self.head.expand(len(rows), 2), (0, drawn.shape[1] - 2))
        return DecisionScores(self.logp(drawn, self.theta), value, teacher)


def told(policy: Bandit, algorithm: Algorithm, starts=None) -> dict[str, Tensor]:
    """Advantages of the bandit's outcomes, losses, and the gradient, in an order that no kind decides."""
    rollout = policy.roll(2, 4, Key(0, 0), algorithm.needs(drift=True))
    credit = assign_credit(algorithm, rollout)
    beta = algorithm.kl.weight(0) if algorithm.kl else 0.0
    policy.zero_grad()
    parts = list(Updater(algorithm).parts(policy, {"bandit": policy}, rollout, credit, starts, beta=beta,
                                          bc_weight=algorithm.bc_weight(0)))  # fmt: skip
    for part in parts:
        part.total.backward()
    outcome = rollout.start * 4 + rollout.own[:, 0] * 2 + rollout.own[:, 1]
    counted = rollout.valid
    order = torch.argsort(outcome[counted])
    losses = Updater(algorithm).losses(policy, {"bandit": policy}, rollout, credit, starts, beta=beta,
                                       bc_weight=algorithm.bc_weight(0))  # fmt: skip
    values = {name: getattr(losses, name).detach().double() for name in losses._fields}
    values["advantage"] = credit.advantage[counted][order][:, :2].double()
    values["gradient"] = torch.cat([policy.theta.grad, policy.head.grad if policy.head.grad is not None
                                    else torch.zeros(2, dtype=torch.float64)])  # fmt: skip
    return values


ALGORITHMS = {
    "grpo": Algorithm("grpo", 4, GroupStandardised()),
    "rloo": Algorithm("rloo", 4, LeaveOneOut(), keep=ZeroSpread()),
    "batch": Algorithm("batch", 4, BatchStandardised()),
    "constant": Algorithm("constant", 4, ConstantBaseline(0.5)),
    "ppo": Algorithm("ppo", 4, Gae(0.9, 0.8, 0.5), ClippedRatio(0.2, 0.2, inner_epochs=2)),
    "returns": Algorithm("returns", 4, Returns(0.9, "time_step")),
    "group_returns": Algorithm("group_returns", 4, Returns(0.9, "group")),
    "trajectory": Algorithm("trajectory", 4, GroupStandardised(), ClippedRatio(0.2, 0.28, "trajectory")),
    "sequence": Algorithm("sequence", 4, LeaveOneOut(), kl=KlPenalty("k3", Schedule(0.3)), averaging="sequence"),
    "k1": Algorithm("k1", 4, LeaveOneOut(), kl=KlPenalty("k1", Schedule(0.3))),
    "adaptive": Algorithm("adaptive", 4, LeaveOneOut(), kl=KlPenalty("k3", Schedule(0.2)), bc_weight=Schedule(0.0)),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_bandit_in_three_kinds_of_trace(name):
    one, *others = (told(Bandit(kind), ALGORITHMS[name]) for kind in KINDS)
    for other, key in itertools.product(others, one):
        torch.testing.assert_close(other[key], one[key], atol=1e-6, rtol=1e-6, equal_nan=True, msg=f"{name}: {key}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_those_on_paper(kind):
    """Each outcome once: RLOO's A = 4/3 (r - mean); L = - mean over 8 rows and 2 decisions of A logp."""
    values = told(Bandit(kind), replace(ALGORITHMS["rloo"], bc_weight=Schedule(0.0)))
    reward = REWARD.flatten(1).double()
    advantage = (reward - reward.mean(dim=1, keepdim=True)) * 4 / 3
    torch.testing.assert_close(values["advantage"], advantage.flatten()[:, None].expand(-1, 2), atol=1e-6, rtol=1e-6)
    p = torch.sigmoid(torch.tensor([0.4, -0.3], dtype=torch.float64))
    logp = torch.where(DRAWN == 1, p.log(), (1 - p).log())
    loss = -(advantage.flatten()[:, None] * logp.repeat(2, 1)).mean()
    assert float(values["policy"]) == pytest.approx(float(loss), abs=1e-7)
    score = (DRAWN - p).repeat(2, 1)  # d logp / d theta of a Bernoulli
    gradient = -(advantage.flatten()[:, None] * score).sum(dim=0) / 16
    torch.testing.assert_close(values["gradient"][:2], gradient, atol=1e-7, rtol=1e-6)
    reference = torch.sigmoid(torch.tensor([0.1, 0.2], dtype=torch.float64))
    d = torch.where(DRAWN == 1, (reference / p).log(), ((1 - reference) / (1 - p)).log())
    assert float(values["kl_reference"]) == pytest.approx(float((d.exp() - d - 1).mean()), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ppo", "sequence", "trajectory"])
def test_losses_of_parts_add_up(kind, name):
    """However few rows a policy takes at once, losses and gradients are those of all of them."""
    whole = told(Bandit(kind), ALGORITHMS[name])
    for count in (1, 3):
        parts = told(Bandit(kind, rows_at_once=count), ALGORITHMS[name])
        for key in whole:
            torch.testing.assert_close(parts[key], whole[key], atol=1e-6, rtol=1e-6, equal_nan=True, msg=key)


def test_minibatches_of_starts_count_their_own_rows():
    algorithm = ALGORITHMS["rloo"]
    halves = [told(Bandit("words"), algorithm, starts=[i]) for i in (0, 1)]
    whole = told(Bandit("words"), algorithm)
    for key in ("policy", "cloning", "gradient"):
        torch.testing.assert_close((halves[0][key] + halves[1][key]) / 2, whole[key], atol=1e-6, rtol=1e-6)


def test_sequences_of_unequal_length_are_averaged_as_asked():
    """Token averaging weighs a long row more; sequence averaging weighs rows alike."""
    policy = Bandit("words")
    rollout = policy.roll(2, 4, Key(0, 0), ALGORITHMS["grpo"].needs(drift=False))
    mask = rollout.mask.clone()
    mask[::2, 1] = False  # every second row has one decision
    rollout = replace(rollout, mask=mask)
    found = {}
    for averaging in ("token", "sequence"):
        algorithm = Algorithm("x", 4, LeaveOneOut(), averaging=averaging, bc_weight=Schedule(0.0))
        credit = assign_credit(algorithm, rollout)
        losses = Updater(algorithm).losses(policy, {}, rollout, credit, None, beta=0.0, bc_weight=0.0)
        found[averaging] = float(losses.policy), credit.advantage
    logp = policy.logp(rollout.own, policy.theta).detach()
    terms = (found["token"][1] * logp).masked_fill(~mask, 0.0)
    assert found["token"][0] == pytest.approx(-float(terms.sum() / mask.sum()), abs=1e-6)
    assert found["sequence"][0] == pytest.approx(-float((terms.sum(1) / mask.sum(1)).mean()), abs=1e-6)
    assert found["token"][0] != pytest.approx(found["sequence"][0], abs=1e-4)


def test_parts_of_a_reward_are_credited_to_their_own_decisions():
    """by_part: the first decision is paid by one part, the second by another, each against its own group."""
    policy, algorithm = Bandit("steps"), Algorithm("gdpo", 4, LeaveOneOut(), by_part=True, bc_weight=Schedule(0.0))
    rollout = policy.roll(2, 4, Key(0, 0), algorithm.needs(drift=False))
    first, second = rollout.own[:, 0].float(), 2.0 * rollout.own[:, 1].float()
    scope = torch.tensor([True, False]).expand(8, 2)
    parts = (RewardPart("first", first, 1.0, scope), RewardPart("second", second, 0.5, ~scope))
    credit = assign_credit(algorithm, replace(rollout, parts=parts))
    alone = {name: assign_credit(replace(algorithm, by_part=False), replace(rollout, reward=reward)).advantage
             for name, reward in (("first", first), ("second", second))}  # fmt: skip
    torch.testing.assert_close(credit.advantage[:, 0], alone["first"][:, 0])
    torch.testing.assert_close(credit.advantage[:, 1], 0.5 * alone["second"][:, 1])
    with pytest.raises(AlgorithmError, match="several parts"):
        assign_credit(algorithm, rollout)


def test_plan_r1s_advantages_on_paper():
    """(r - mean of the group over members and time) / 0.1, summed to the end."""
    policy = Bandit("tokens")
    rollout = policy.roll(2, 4, Key(0, 0), ALGORITHMS["grpo"].needs(drift=False))
    credit = assign_credit(Algorithm("r1", 4, ScaledRewardToGo(0.1)), rollout)
    for start in range(2):
        rows = (rollout.start == start) & rollout.valid
        relative = (rollout.reward[rows] - rollout.reward[rows].mean()) / 0.1
        torch.testing.assert_close(credit.advantage[rows], relative.flip(1).cumsum(1).flip(1), atol=1e-5, rtol=1e-5)
    with pytest.raises(AlgorithmError, match="a reward of every decision"):
        assign_credit(Algorithm("r1", 4, ScaledRewardToGo()), Bandit("steps").roll(2, 4, Key(0, 0), _no_needs()))


def test_what_a_policy_cannot_give_is_named():
    policy = Bandit("steps")
    rollout = replace(policy.roll(2, 4, Key(0, 0), _no_needs()), taught=None, teaches=None)
    algorithm = Algorithm("clone", 4, LeaveOneOut(), bc_weight=Schedule(0.1))
    with pytest.raises(WrongPolicy, match="no teacher to clone"):
        Updater(algorithm).losses(policy, {}, rollout, assign_credit(algorithm, rollout), None, beta=0.0, bc_weight=0.1)
    exact = Algorithm("exact", 4, LeaveOneOut(), kl=KlPenalty("exact", Schedule(0.1)), bc_weight=Schedule(0.0))
    with pytest.raises(AlgorithmError, match="computes no exact KL"):
        told(policy, exact)


def test_nothing_that_counts_is_cloning_only():
    policy, algorithm = Bandit("steps"), Algorithm("grpo", 4, bc_weight=Schedule(0.1))
    rollout = policy.roll(2, 4, Key(0, 0), _no_needs())
    rollout = replace(rollout, valid=torch.zeros_like(rollout.valid), reward=torch.zeros_like(rollout.reward))
    losses = Updater(algorithm).losses(policy, {}, rollout, assign_credit(algorithm, rollout), None, beta=0.0,
                                       bc_weight=0.1)  # fmt: skip
    assert float(losses.counted) == float(losses.policy) == 0.0
    assert float(losses.total) == pytest.approx(0.1 * float(losses.cloning))
    assert float(losses.cloning) > 0


def test_an_adaptive_weight_approaches_its_target():
    weight = AdaptiveWeight(start=0.01, target=0.01, horizon=5.0)
    assert weight.following(0.01, 0.01) == pytest.approx(0.01)
    assert weight.following(0.01, 1.0) == pytest.approx(0.01 * (1 + 0.2 / 5))
    assert weight.following(0.01, 0.0) == pytest.approx(0.01 * (1 - 0.2 / 5))
    assert weight.following(1e-3, 0.0) == 1e-3
    assert weight.following(0.02, float("nan")) == 0.02


def test_settings_that_contradict_each_other_are_named():
    for make, message in (
        (lambda: Algorithm("x", 1, LeaveOneOut()), "group_size is 1"),
        (lambda: Algorithm("x", 1, Returns(normalise="group")), "group_size is 1"),
        (lambda: Algorithm("x", 8, ConstantBaseline(0.0), keep=ZeroSpread()), "looks at groups"),
        (lambda: Algorithm("x", averaging="median"), "token, sequence"),
        (lambda: Returns(normalise="none of these"), "one of batch"),
        (lambda: Gae(gamma=1.5), r"in \[0, 1\]"),
        (lambda: ClippedRatio(0.0, 0.2), "0 < low < 1"),
        (lambda: Reinforce("everything"), "one of step, trajectory"),
        (lambda: AdaptiveWeight(0.1, 0.0), "target > 0"),
    ):
        with pytest.raises(AlgorithmError, match=message):
            make()
    assert Algorithm("x", 1, Returns()).needs(drift=False) == _no_needs()


def _no_needs() -> Needs:
    return Needs(old=False, reference=False, value=False, once=True)
