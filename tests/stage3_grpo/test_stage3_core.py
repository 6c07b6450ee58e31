"""Laws of the core, and toy problems with known answers solved by every algorithm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from navsim_ext.errors import DataError
from stage3_grpo.core import (
    Objective,
    ZeroMask,
    batch_standardised,
    behaviour_cloning,
    clipped_ratio,
    constant_baseline,
    denoising_discount,
    gae,
    gaussian_kl,
    group_standardised,
    group_statistics,
    k1,
    k3,
    leave_one_out,
    masked_mean,
    reinforce,
    sampled_kl,
    spread_mask,
    value_error,
)

ALL = lambda like: torch.ones_like(like, dtype=torch.bool)  # noqa: E731


@st.composite
def batches(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    reward = torch.rand(groups * size, generator=generator, dtype=torch.float64)
    valid = torch.rand(groups * size, generator=generator) < 0.8
    group = torch.arange(groups).repeat_interleave(size)
    return reward, group, valid


@settings(max_examples=60, deadline=None)
@given(batches())
def test_group_statistics_equal_a_loop(batch):
    reward, group, valid = batch
    statistics = group_statistics(reward, group, valid)
    for i in range(len(reward)):
        members = reward[(group == group[i]) & valid]
        mean = members.mean() if len(members) else torch.zeros(())
        std = members.std() if len(members) > 1 else torch.zeros(())
        assert statistics.size[i] == len(members)
        torch.testing.assert_close(statistics.mean[i], mean, check_dtype=False)
        torch.testing.assert_close(statistics.std[i], std, check_dtype=False)


@settings(max_examples=60, deadline=None)
@given(batches(), st.floats(0.1, 5.0), st.floats(-3.0, 3.0))
def test_advantages_are_invariant_as_they_should_be(batch, scale, shift):
    reward, group, valid = batch
    grouped = group_standardised(reward, group, valid)
    spread = spread_mask(reward, group, valid)
    torch.testing.assert_close(grouped[spread], group_standardised(scale * reward + shift, group, valid)[spread],
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    one_out = leave_one_out(reward, group, valid)
    torch.testing.assert_close(leave_one_out(scale * reward + shift, group, valid), scale * one_out)
    for advantage in (grouped, one_out, batch_standardised(reward, group, valid)):
        assert (advantage[~valid] == 0).all()
        sums = torch.zeros(5, dtype=advantage.dtype).index_add(0, group, advantage)
        torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-6, rtol=0)
        changed = reward.masked_fill(~valid, float("nan"))  # what a failed score says does not matter
        torch.testing.assert_close(leave_one_out(changed, group, valid), one_out)
    size = group_statistics(reward, group, valid).size
    std = group_statistics(reward, group, valid).std
    expected = (grouped * (std + 1e-8) * size / (size - 1).clamp_min(1)).masked_fill(size < 2, 0.0)
    torch.testing.assert_close(one_out, expected)  # r - mean of the others = (r - mean) n / (n - 1)


def test_one_group_without_spread_teaches_nothing():
    reward = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.2, 0.4])
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    valid = torch.tensor([True, True, True, True, True, False])
    assert spread_mask(reward, group, valid).tolist() == [False, False, True, True, False, False]
    assert spread_mask(reward, group, valid, minimum=0.8).sum() == 0
    assert group_standardised(reward, group, valid)[[0, 1, 4, 5]].abs().max() == 0
    assert constant_baseline(reward, valid, 0.25).tolist() == pytest.approx([0.75, 0.75, -0.25, 0.75, -0.05, 0.0])
    with pytest.raises(DataError, match="alike"):
        group_statistics(reward, group[:5], valid)


def test_gae_against_its_definition():
    torch.manual_seed(0)
    reward, value = torch.randn(3), torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    gamma, lam = 0.9, 0.7
    advantage, target = gae(reward, value, mask, gamma=gamma, lam=lam)
    for i, length in enumerate(mask.sum(1).tolist()):
        padded = torch.cat([value[i, :length], torch.zeros(1)])
        r = torch.zeros(length)
        r[-1] = reward[i]
        delta = r + gamma * padded[1:] - padded[:-1]
        for k in range(length):
            expected = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, length))
            assert advantage[i, k] == pytest.approx(float(expected), abs=1e-6)
        assert (advantage[i, length:] == 0).all()
    torch.testing.assert_close(target, (advantage + value).masked_fill(~mask, 0.0))
    monte_carlo, _ = gae(reward, value, ALL(value), gamma=1.0, lam=1.0)
    torch.testing.assert_close(monte_carlo, reward[:, None] - value)
    perfect, _ = gae(reward, reward[:, None].expand(3, 4), ALL(value), gamma=1.0, lam=0.5)
    torch.testing.assert_close(perfect, torch.zeros(3, 4))


def test_discount_counts_from_the_end():
    torch.testing.assert_close(denoising_discount(4, 0.5), torch.tensor([0.125, 0.25, 0.5, 1.0]))


def test_masked_mean_splits_among_processes():
    torch.manual_seed(0)
    value, mask = torch.randn(6, 4), torch.rand(6, 4) < 0.6
    whole = masked_mean(value, mask)
    assert whole == pytest.approx(float(value[mask].mean()))
    count = mask.sum() / 2
    parts = [masked_mean(value[half], mask[half], count) for half in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(sum(parts) / 2, whole)
    poisoned = value.masked_fill(~mask, float("nan"))
    torch.testing.assert_close(masked_mean(poisoned, mask), whole)
    with pytest.raises(ZeroMask, match="0 decisions"):
        masked_mean(value, torch.zeros_like(mask))


def test_on_policy_ratio_has_the_gradient_of_reinforce():
    torch.manual_seed(0)
    logp, advantage = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    mask = torch.rand(5, 3) < 0.7
    term = clipped_ratio(logp, logp.detach(), advantage, mask, clip_low=0.2, clip_high=0.2)
    (one,) = torch.autograd.grad(term.loss, logp)
    (two,) = torch.autograd.grad(reinforce(logp, advantage, mask).loss, logp)
    torch.testing.assert_close(one, two)
    assert term.loss.item() == pytest.approx(-advantage[mask].mean().item())
    assert (term.clip_fraction.item(), term.ratio_mean.item(), term.approx_kl.item()) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(("log_ratio", "advantage", "moves"), [
    (0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False),
    (math.log(1.25), 1.0, True), (math.log(0.79), -1.0, False),
])  # fmt: skip
def test_clip_is_one_sided_and_asymmetric(log_ratio, advantage, moves):
    """Beyond the bound only the direction back is left; low 0.2, high 0.28 (DAPO)."""
    logp = torch.tensor([[log_ratio]], requires_grad=True)
    term = clipped_ratio(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), ALL(logp), clip_low=0.2, clip_high=0.28)
    (gradient,) = torch.autograd.grad(term.loss, logp)
    assert (gradient.abs().item() > 0) == moves
    assert bool(term.clip_fraction) == (not 0.8 <= math.exp(log_ratio) <= 1.28)


def test_kl_estimators_agree_with_the_exact_value():
    torch.manual_seed(0)
    mean, std, mean_ref, std_ref = (torch.tensor(x) for x in (0.3, 0.5, 0.1, 0.6))
    exact = gaussian_kl(mean, std, mean_ref, std_ref)
    policy, reference = torch.distributions.Normal(mean, std), torch.distributions.Normal(mean_ref, std_ref)
    assert exact == pytest.approx(float(torch.distributions.kl_divergence(policy, reference)), abs=1e-6)
    x = policy.sample((400_000,))
    logp, logp_ref = policy.log_prob(x), reference.log_prob(x)
    assert k1(logp, logp_ref).mean() == pytest.approx(float(exact), abs=3e-3)
    assert k3(logp, logp_ref).mean() == pytest.approx(float(exact), abs=3e-3)
    assert (k3(logp, logp_ref) >= 0).all()
    near = torch.distributions.Normal(torch.tensor(0.28), std).log_prob(x)
    assert k3(logp, near).std() < 0.1 * k1(logp, near).std()  # near the reference its variance is far lower
    assert gaussian_kl(mean, std, mean, std) == pytest.approx(0.0, abs=1e-7)


def test_leave_one_out_follows_the_mean_reward_where_standardised_groups_do_not():
    """x ~ N(m, s) in four scenes; the reward rises by 0.1 x in three, where only progress differs, and falls by x in
    the fourth, where going on collides. Expected gradients in m: of the mean reward (3 * 0.1 - 1) / 4 = -0.175; of
    groups divided by their spread |slope| s: (3 - 1) / (4 s), uphill into the collision.
    """
    torch.manual_seed(0)
    m, s, size = nn.Parameter(torch.tensor(0.0)), 0.5, 20_000
    group = torch.arange(4).repeat_interleave(size)
    slope = torch.tensor([0.1, 0.1, 0.1, -1.0])[group]
    x = m.detach() + s * torch.randn(len(group))
    logp = torch.distributions.Normal(m, s).log_prob(x)[:, None]
    gradient = {}
    for function in (leave_one_out, group_standardised):
        advantage = function(slope * x, group, ALL(x))[:, None]
        (descent,) = torch.autograd.grad(reinforce(logp, advantage, ALL(logp)).loss, m, retain_graph=True)
        gradient[function] = -descent.item()
    assert gradient[leave_one_out] == pytest.approx(-0.175, abs=0.01)
    assert gradient[group_standardised] == pytest.approx(0.5 / s, abs=0.02)


# --- toy problems -------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "diffgrpo": {"advantage": "group", "objective": Objective()},
    "diffgrpo_clip": {"advantage": "group", "objective": Objective("clip"), "inner": 3},
    "fork_clip": {"advantage": "group", "objective": Objective("clip", "trajectory"), "inner": 2},
    "dapo": {"advantage": "group", "objective": Objective("clip", clip_high=0.28), "inner": 2, "filter": True},
    "reinforce_pp": {"advantage": "batch", "objective": Objective()},
    "rloo": {"advantage": "leave_one_out", "objective": Objective()},
    "ppo": {"advantage": "gae", "objective": Objective("clip"), "inner": 3},
}


def advantages(settings, reward, group, value):
    valid = ALL(reward)
    if settings["advantage"] == "gae":
        advantage, target = gae(reward, value, ALL(value), gamma=1.0, lam=0.95)
        return advantage / (advantage.std() + 1e-8), target
    function = {"group": group_standardised, "batch": batch_standardised, "leave_one_out": leave_one_out}
    return function[settings["advantage"]](reward, group, valid)[:, None].expand_as(value), None


def improve(settings, optimizer, log_prob, value_of, reward, group, steps):
    """Inner iterations over one rollout; ``log_prob()`` [N,K] and ``value_of()`` [N,K] under the present weights."""
    with torch.no_grad():
        old, value = log_prob(), value_of()
    advantage, target = advantages(settings, reward, group, value)
    mask = ALL(old)
    if settings.get("filter"):
        mask = mask & spread_mask(reward, group, ALL(reward))[:, None]
        if not mask.any():
            return
    for _ in range(settings.get("inner", 1)):
        loss = settings["objective"].policy(log_prob(), old, advantage, mask).loss
        if target is not None:
            loss = loss + 0.5 * value_error(value_of(), target, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_bandit_finds_the_best_arm(name):
    """Two scenes with opposite best arms out of four; the best arm's probability goes to 1."""
    torch.manual_seed(0)
    means = torch.tensor([[0.2, 0.9, 0.5, 0.1], [0.8, 0.1, 0.4, 0.6]])
    logits, critic = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([logits, critic], lr=0.1)
    group = torch.arange(2).repeat_interleave(16)
    for _ in range(120):
        arm = torch.distributions.Categorical(logits=logits.detach()[group]).sample()
        reward = means[group, arm] + 0.1 * torch.randn(32)
        improve(
            ALGORITHMS[name],
            optimizer,
            lambda arm=arm: torch.log_softmax(logits, 1)[group, arm][:, None],
            lambda: critic[group][:, None],
            reward,
            group,
            1,
        )
    probability = logits.softmax(1)[torch.arange(2), means.argmax(1)]
    assert probability.min() > 0.95


class ChainPolicy(nn.Module):
    """x_{k+1} ~ N(a_k x_k + b_k, s^2), K steps from N(0, 1): a diffusion policy on the line.

    With reward -(x_K - c)^2 the best last step is a = 0, b = c whatever came before: expected reward -s^2.
    """

    def __init__(self, steps: int = 3, std: float = 0.2) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((steps,), 0.7)), nn.Parameter(torch.zeros(steps))
        self.critic = nn.Parameter(torch.zeros(steps))
        self.std = std

    @torch.no_grad()
    def sample(self, rows: int) -> torch.Tensor:
        x = [torch.randn(rows)]
        for a, b in zip(self.a, self.b):
            x.append(a * x[-1] + b + self.std * torch.randn(rows))
        return torch.stack(x, dim=1)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(self.a * x[:, :-1] + self.b, self.std).log_prob(x[:, 1:])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_diffusion_on_the_line_reaches_its_optimum(name):
    torch.manual_seed(1)
    policy, target = ChainPolicy(), 1.5
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    group = torch.arange(8).repeat_interleave(16)
    for _ in range(300):
        x = policy.sample(128)
        reward = -((x[:, -1] - target) ** 2)
        improve(ALGORITHMS[name], optimizer, lambda x=x: policy.log_prob(x),
                lambda: policy.critic.expand(128, -1), reward, group, 3)  # fmt: skip
    final = policy.sample(20_000)[:, -1]
    assert final.mean() == pytest.approx(target, abs=0.1)
    achieved = -((final - target) ** 2).mean()
    start = -((ChainPolicy().sample(20_000)[:, -1] - target) ** 2).mean()
    optimum = -(policy.std**2)
    assert achieved > optimum - 0.06 > start + 1.5


@pytest.mark.parametrize("form", ["k3", "gaussian", "bc"])
def test_regularised_optimum_is_the_analytic_one(form):
    """One Gaussian step with mean m, reward -(x - c)^2, KL or cloning towards m_0:

    KL: maximise -(m - c)^2 - beta (m - m_0)^2 / (2 s^2)  ->  m = (2 c + beta m_0 / s^2) / (2 + beta / s^2)
    cloning with weight w of teacher samples: the same with beta = w.
    """
    torch.manual_seed(2)
    c, m0, s, weight = 1.0, 0.0, 0.3, 0.18
    m = nn.Parameter(torch.tensor(0.3))
    optimizer = torch.optim.SGD([m], lr=0.02)
    late = []
    for step in range(1500):
        x = (m.detach() + s * torch.randn(256))[:, None]
        logp = torch.distributions.Normal(m, s).log_prob(x)
        reward = -((x[:, 0] - c) ** 2)
        loss = reinforce(logp, (reward - reward.mean())[:, None], ALL(logp)).loss
        if form == "k3":
            loss = loss + weight * sampled_kl("k3", logp, torch.distributions.Normal(m0, s).log_prob(x), ALL(logp))
        elif form == "gaussian":
            loss = loss + weight * gaussian_kl(m, torch.tensor(s), torch.tensor(m0), torch.tensor(s))
        else:
            teacher = (m0 + s * torch.randn(256))[:, None]
            cloning = torch.distributions.Normal(m, s).log_prob(teacher)
            loss = loss + weight * behaviour_cloning(cloning, ALL(cloning))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 750:
            late.append(m.item())
    expected = (2 * c + weight * m0 / s**2) / (2 + weight / s**2)
    assert sum(late) / len(late) == pytest.approx(expected, abs=0.04)
    assert expected == pytest.approx(0.5)


def test_k1_in_the_loss_pulls_nowhere_but_k3_does():
    """The gradient of k1 is that of mean(logp), with expectation 0; that of k3 is (m - m_0) / s^2 here."""
    torch.manual_seed(3)
    m, s, m0 = nn.Parameter(torch.tensor(1.0)), 0.3, 0.9
    x = (m.detach() + s * torch.randn(400_000))[:, None]
    logp, logp_ref = (torch.distributions.Normal(mean, s).log_prob(x) for mean in (m, torch.tensor(m0)))
    pull = {}
    for form in ("k1", "k3"):
        (pull[form],) = torch.autograd.grad(sampled_kl(form, logp, logp_ref, ALL(logp)), m, retain_graph=True)
    assert pull["k1"].item() == pytest.approx(0.0, abs=0.02)
    assert pull["k3"].item() == pytest.approx((1.0 - m0) / s**2, rel=0.03)
