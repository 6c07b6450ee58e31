"""Whatever a configuration says is used: every option, flipped, changes the chain, the loss or the gradient."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))
from grpo_toy import ToyData, ToyScorer, config, make_planner

from navsim_ext.runtime.config import compose
from stage2_dit import load_planner
from stage3_grpo.algorithm import (
    Algorithm,
    ClippedRatio,
    ConstantBaseline,
    Gae,
    KlPenalty,
    Returns,
    Schedule,
    ZeroSpread,
)
from stage3_grpo.credit import assign_credit
from stage3_grpo.module import PolicyOptimizerSettings
from stage3_grpo.monitors import Alarms
from stage3_grpo.policies.diffusion import (
    AncestralSampler,
    DdimSampler,
    FlowSampler,
    LogProb,
    OwnSampler,
    ReferencePolicy,
)
from stage3_grpo.policy import Key
from stage3_grpo.rewards import ExtendedComfortProxy, Feasibility, PdmTerm, ReverseMotion, Reward
from stage3_grpo.rewards.kinematics import motion, reverses, stands
from stage3_grpo.update import Updater, minibatches


@pytest.fixture(scope="module")
def planners(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("planners")
    return {"ddim": make_planner(folder), "flow": make_planner(folder, "flow", process="flow_ode")}


A = "stage3_grpo.algorithm."
S = "stage3_grpo.policies.diffusion."
# per algorithm: overrides that its base needs to make an option matter, and the options with another value
CLIP = {"surrogate": {"_target_": f"{A}ClippedRatio", "clip_low": 1e-6, "clip_high": 1e-6, "inner_epochs": 2}}
KL = {"kl": {"_target_": f"{A}KlPenalty", "form": "k3", "weight": {"_target_": f"{A}Schedule", "start": 0.5}}}
GAE = {"advantage": {"_target_": f"{A}Gae", "gamma": 0.9, "lam": 0.8, "value_weight": 0.5}}
CONSTANT = {"advantage": {"_target_": f"{A}ConstantBaseline", "baseline": 0.2}}
RETURNS = {"advantage": {"_target_": f"{A}Returns", "gamma": 0.9, "normalise": "batch"}}
SPREAD = {"keep": {"_target_": f"{A}ZeroSpread", "minimum": 0.0}}
DDIM = {"sampler": {"_target_": f"{S}DdimSampler", "eta": 1.0}}
FLOW = {"flow": True, "sampler": {"_target_": f"{S}FlowSampler"}}
FLIPS = [
    ({}, {"group_size": 3}),
    ({}, {"advantage": {"_target_": f"{A}LeaveOneOut"}}),
    ({}, {"advantage": {"_target_": f"{A}BatchStandardised"}}),
    ({}, CONSTANT),
    (CONSTANT, {"advantage": {"baseline": 0.5}}),
    ({}, GAE),
    (GAE, {"advantage": {"gamma": 0.5}}),
    (GAE, {"advantage": {"lam": 0.3}}),
    (GAE, {"advantage": {"value_weight": 0.9}}),
    ({}, RETURNS),
    (RETURNS, {"advantage": {"gamma": 0.5}}),
    (RETURNS, {"advantage": {"normalise": "time_step"}}),
    (RETURNS, {"advantage": {"normalise": "group"}}),
    (RETURNS, {"advantage": {"normalise": "none"}}),
    ({}, {"discount": 0.9}),
    (SPREAD, {"keep": None}),
    (SPREAD, {"keep": {"minimum": 0.39}}),
    ({}, {"surrogate": {"_target_": f"{A}ClippedRatio", "clip_low": 0.2, "clip_high": 0.2}}),
    ({}, {"surrogate": {"level": "trajectory"}}),
    (CLIP, {"surrogate": {"level": "trajectory"}}),
    (CLIP, {"surrogate": {"clip_low": 0.5}}),
    (CLIP, {"surrogate": {"clip_high": 0.5}}),
    (CLIP, {"surrogate": {"inner_epochs": 3}}),
    (CLIP, {"surrogate": {"minibatches": 2}}),
    (CLIP, {"surrogate": {"target_kl": 1e-9}}),
    ({}, KL),
    (KL, {"kl": {"form": "k1"}}),
    (KL, {"kl": {"form": "exact"}}),
    (KL, {"kl": {"weight": {"start": 0.1}}}),
    ({}, {"bc_weight": {"_target_": f"{A}Schedule", "start": 0.3}}),
    ({}, {"log_prob": {"clamp": None}}),
    ({}, {"log_prob": {"clamp_at": "step"}}),
    ({}, {"log_prob": {"reduction": "sum"}}),
    (DDIM, {"sampler": {"eta": 0.5}}),
    (FLOW, {"sampler": {"noise_level": 0.3}}),
    (FLOW, {"sampler": {"kind": "flow_cps"}}),
    ({"sampler": {"_target_": f"{S}AncestralSampler"}}, {"sampler": {"published": True}}),
    ({}, {"sampler": {"sampling_std_floor": 0.2}}),
    ({}, {"sampler": {"log_prob_std_floor": 0.3}}),
    ({}, {"sampler": {"noise_clip": 0.5}}),
    ({}, {"sampler": {"final_clip": 0.5}}),
    ({}, {"sampler": {"last_step_noise": False}}),
    ({}, {"sampler": {"num_steps": 4}}),
]
OF_THE_POLICY = ("discount", "log_prob", "sampler")
REPLACED = ("advantage", "surrogate", "kl", "keep", "bc_weight")  # a choice of another class brings its own settings


def merged(node, choices: dict):
    """A node with choices in it; one with another ``_target_`` takes the place of what was there, but for a sampler,
    whose families share settings."""
    node = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
    for name, choice in choices.items():
        if name in REPLACED and isinstance(choice, dict) and "_target_" in choice:
            node[name] = choice
        else:
            node = OmegaConf.merge(node, {name: choice})
    return node


def built(init: str, base: dict, flip: dict):
    """The algorithm and the policy of a base with an option flipped."""
    cfg = config(init, "unused")
    choices = [{key: value for key, value in each.items() if key != "flow"} for each in (base, flip)]
    algorithm, policy = cfg.algorithm, cfg.policy
    for each in choices:
        algorithm = merged(algorithm, {key: value for key, value in each.items() if key not in OF_THE_POLICY})
        policy = merged(policy, {key: value for key, value in each.items() if key in OF_THE_POLICY})
    return instantiate(algorithm), instantiate(policy)


def step(planners: dict[str, str], base: dict, flip: dict) -> np.ndarray:
    """All that one rollout and its updates leave: chain, losses, and the weights after plain gradient steps."""
    init = planners["flow" if base.get("flow") else "ddim"]
    algorithm, policy = built(init, base, flip)
    planner = load_planner(init).planner
    with torch.no_grad():  # not the reference: a policy that has learned something
        planner.action_decoder.fc2.weight.mul_(1.3)
    reference = ReferencePolicy.load(init, planner.config, None, allow_mismatch=False)
    torch.manual_seed(0)
    modules = policy.adopt(planner, reference, algorithm)
    policy.scorer.score = spread_in_some_scenes(policy.scorer.score)
    data = ToyData()
    batch = data.join([data.dataset("train")[i] for i in range(4)])
    rollout = policy.roll(batch, algorithm.group_size, Key(0, 0), algorithm.needs(drift=False))
    credit = assign_credit(algorithm, rollout)
    updater, surrogate = Updater(algorithm), algorithm.surrogate
    numbers = [rollout.own.chain.states.double().flatten(), credit.advantage.double().flatten()]
    weights = [weight for part in policy.parameters().values() for weight in part]
    for epoch in range(surrogate.inner_epochs):
        parts = minibatches(rollout.names, surrogate.minibatches, seed=0, rollout=0, epoch=epoch, device="cpu")
        for part in parts:
            beta = algorithm.kl.weight(0) if algorithm.kl else 0.0
            losses = updater.losses(policy, modules, rollout, credit, part, beta=beta, bc_weight=algorithm.bc_weight(0))
            if surrogate.target_kl is not None and losses.approx_kl > surrogate.target_kl:
                break
            gradients = torch.autograd.grad(losses.total, weights, allow_unused=True)
            numbers += [losses.total.detach().double().reshape(1)]
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients):
                    if gradient is not None:
                        weight -= 0.05 * gradient
    numbers += [weight.detach().double().flatten() for weight in weights]
    return torch.cat(numbers).numpy()


def spread_in_some_scenes(score):
    """The first scene's rewards agree, so that groups without spread exist."""

    def changed(tokens, trajectories, term):
        scores = score(tokens, trajectories, term)
        for name in ("reward", "pdms_v1"):
            scores.columns[name][np.array([token == tokens[0] for token in tokens])] = 0.5
        return scores

    return changed


BASES: dict[str, np.ndarray] = {}


@pytest.mark.parametrize(("base", "flip"), FLIPS, ids=lambda value: str(value).replace(A, "").replace(S, ""))
def test_flipping_an_option_changes_the_step(planners, base, flip):
    if str(base) not in BASES:
        BASES[str(base)] = step(planners, base, {})
    one, two = BASES[str(base)], step(planners, base, flip)
    assert len(one) != len(two) or np.abs(one - two).max() > 1e-6


def test_the_same_configuration_gives_the_same_step(planners):
    assert np.array_equal(step(planners, CLIP, {}), step(planners, CLIP, {}))


def test_every_option_is_among_the_flips():
    """A new field of these classes needs its line in FLIPS."""
    flipped = {key for _, flip in FLIPS for key in flip}
    inner = {key for _, flip in FLIPS for value in flip.values() if isinstance(value, dict) for key in value}
    tested_elsewhere = {"name", "averaging", "by_part"}  # see test_stage3_protocol.py
    left = {field.name for field in dataclasses.fields(Algorithm)} - flipped - tested_elsewhere
    assert not left
    for cls in (LogProb, ClippedRatio, KlPenalty, Gae, ConstantBaseline, Returns, ZeroSpread, OwnSampler, DdimSampler,
                FlowSampler, AncestralSampler):  # fmt: skip
        left = {field.name for field in dataclasses.fields(cls)} - inner
        assert not left, f"{cls.__name__}: {left}"


@pytest.mark.parametrize("name", ["pdms", "published", "epdms", "guarded"])
def test_reward_configurations_compose(name):
    reward = instantiate(compose("stage3", [f"reward={name}"]).reward)
    assert reward.score.column == {"epdms": "epdms_v2_no_ec_nofilter"}.get(name, "reward")
    assert reward.judge == {"epdms": "pdms_v1"}.get(name, "epdms_v2_no_ec_nofilter")
    assert (reward.score.progress == 10.0) == (name == "published")
    assert sorted(reward.terms) == (["comfort_proxy", "feasible", "reverse"] if name == "guarded" else [])


def test_alarm_configurations_compose():
    cfg = compose("stage3", ["alarms=warn", "output_dir=x"])
    alarms = instantiate(cfg.alarms)
    assert isinstance(alarms, Alarms)
    assert alarms.escalation == ("warn",)
    assert alarms.rules["reverse_tail"].value({"reverse_tail": 0.3, "reference_reverse_tail": 0.1}) == pytest.approx(
        0.2
    )


def straight(speed: float = 5.0, count: int = 1) -> np.ndarray:
    x = speed * 0.5 * np.arange(1, 9)
    return np.tile(np.stack([x, 0 * x, 0 * x], axis=-1), (count, 1, 1))


def still_world(count: int, speed: float = 5.0, yaw_rate: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    history = np.zeros((count, 4, 3))
    history[:, :, 2] = yaw_rate * 0.5 * np.arange(-3, 1)
    status = np.zeros((count, 8))
    status[:, 4] = speed
    return history, status


def test_motion_of_known_curves():
    history, status = still_world(1, 8.0, yaw_rate=0.4)
    angle = 0.2 * np.arange(1, 9)  # a circle of radius 20 m at 8 m/s: 0.4 rad/s
    circle = np.stack([20 * np.sin(angle), 20 * (1 - np.cos(angle)), angle], axis=-1)[None]
    moved = motion(circle, history, status)
    chord = 2 * 20 * np.sin(0.1)
    np.testing.assert_allclose(moved.travel, chord, atol=1e-9)
    np.testing.assert_allclose(moved.slip, 0.0, atol=1e-9)
    np.testing.assert_allclose(moved.yaw_rate, 0.4, atol=1e-9)
    np.testing.assert_allclose(moved.yaw_acceleration, 0.0, atol=1e-9)
    t = 0.5 * np.arange(1, 9)
    braking = np.stack([6 * t - 0.5 * t**2, 0 * t, 0 * t], axis=-1)[None]
    moved = motion(braking, *still_world(1, 6.0))
    np.testing.assert_allclose(moved.acceleration[0, 1:], -1.0, atol=1e-9)


def test_reversing_is_seen_wherever_the_car_points():
    plan = straight()
    assert not reverses(plan).any()
    tail = plan.copy()
    tail[:, -1, 0] = tail[:, -2, 0] - 0.4  # the last waypoint falls back
    assert reverses(tail, last=2).all()
    assert not reverses(tail[:, :], last=2, tolerance_m=0.5).any()
    turned = tail[..., [1, 0, 2]].copy()  # driven towards +y
    turned[..., 2] = np.pi / 2
    assert reverses(turned, last=2).all()
    assert stands(0.02 * plan).all()
    assert not stands(plan).any()
    penalty = ReverseMotion(tolerance_m=0.1, full_m=0.6)
    assert penalty.value(motion(tail, *still_world(1))) == pytest.approx(0.5)
    assert penalty.value(motion(plan, *still_world(1))) == 0.0


def test_feasibility_counts_each_limit():
    fine = Feasibility()
    assert fine.value(motion(straight(), *still_world(1))) == 0.0
    sideways = straight()
    sideways[:, 4:, 1] = 3.0  # one interval moves 3 m sideways
    assert fine.value(motion(sideways, *still_world(1))) == pytest.approx(1 / 8)
    assert Feasibility(slip_m=5.0).value(motion(sideways, *still_world(1))) == 0.0
    assert Feasibility(longitudinal_mps2=0.5).value(motion(straight(), *still_world(1, 3.0))) == pytest.approx(1 / 8)
    spin = straight(2.0)
    spin[..., 2] = np.arange(1, 9) * 0.5
    assert Feasibility(slip_m=9.0, longitudinal_mps2=99.0).value(motion(spin, *still_world(1, 2.0))) > 0.5  # curvature
    assert Feasibility(slip_m=9, longitudinal_mps2=99, curvature_1pm=9, lateral_mps2=1).value(
        motion(spin, *still_world(1, 2.0))) > 0.5  # fmt: skip


@pytest.mark.parametrize("limit", ["acceleration_mps2", "jerk_mps3", "yaw_rate_radps", "yaw_acceleration_radps2"])
def test_comfort_proxy_reads_each_threshold(limit):
    generator = np.random.default_rng(0)
    shaky = straight() + generator.normal(0, 0.05, (1, 8, 3))
    smooth = ExtendedComfortProxy().value(motion(straight(), *still_world(1)))
    assert smooth == 1.0
    limits = ("acceleration_mps2", "jerk_mps3", "yaw_rate_radps", "yaw_acceleration_radps2")
    wide = ExtendedComfortProxy(**dict.fromkeys(limits, 1e3))
    assert wide.value(motion(shaky, *still_world(1))) == 1.0
    tight = dataclasses.replace(wide, **{limit: 1e-3})
    assert tight.value(motion(shaky, *still_world(1))) == pytest.approx(0.75)
    jump = ExtendedComfortProxy().value(motion(straight(9.0), *still_world(1, 5.0)))
    assert jump < smooth  # a plan that does not continue the recorded motion


def test_reward_is_the_weighted_sum_and_keeps_what_is_invalid_out():
    plan = np.concatenate([straight(), straight()])
    plan[1, -1, 0] = 0.0
    reward = Reward(PdmTerm(weight=2.0), {"reverse": ReverseMotion(weight=-0.5), "none": None})
    scorer = ToyScorer(invalid=["c000000000000001"])
    tokens = ["c000000000000000", "c000000000000000", "c000000000000001"]
    plans = np.concatenate([plan, straight()])
    scores = reward.submit(scorer, tokens, plans, *still_world(3)).result()
    base = scorer.score(tokens, plans, PdmTerm().weights)["reward"]
    np.testing.assert_allclose(scores.reward[:2], [2 * base[0], 2 * base[1] - 0.5])
    assert np.isnan(scores.reward[2])
    assert scores.valid.tolist() == [True, True, False]
    assert scores.reasons[2] == "toy: cannot be scored"
    assert scores.columns["reverse_tail"].tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(Exception, match="weight 0"):
        Reward(PdmTerm(), {"reverse": ReverseMotion(weight=0.0)})
    with pytest.raises(Exception, match="at least one"):
        Reward(None)
    with pytest.raises(Exception, match="not finite, first for token c000000000000001"):
        reward.submit(scorer, tokens, plans + np.array([0, 0, np.nan]).reshape(3, 1, 1), *still_world(3))


def test_reward_in_reactive_traffic():
    told = {}

    class Listening(ToyScorer):
        def submit(self, tokens, trajectories, reward=None, **scoring):
            told.update(scoring)
            return super().submit(tokens, trajectories, reward)

    reward = Reward(PdmTerm(version="v2", standard=True), traffic="reactive")
    reward.submit(Listening(), ["c000000000000000"], straight(), *still_world(1))
    assert told == {"traffic": "reactive"}
    told.clear()
    Reward(PdmTerm()).submit(Listening(), ["c000000000000000"], straight(), *still_world(1))
    assert told == {}  # as recorded
    with pytest.raises(Exception, match="has no v2 score"):
        Reward(PdmTerm(), traffic="reactive")
    with pytest.raises(Exception, match="one of log_replay"):
        Reward(PdmTerm(), traffic="fast")


def test_schedules():
    linear, falling = Schedule(0.1, 0.0, 10, "linear"), Schedule(0.1, 0.001, 10, "exponential")
    assert [linear(t) for t in (0, 5, 10, 99)] == pytest.approx([0.1, 0.05, 0.0, 0.0])
    assert [falling(t) for t in (0, 5, 10)] == pytest.approx([0.1, 0.01, 0.001])
    assert Schedule(1.0, 0.0, 4, "cosine")(2) == pytest.approx(0.5)
    assert Schedule(0.3)(1000) == 0.3
    assert PolicyOptimizerSettings().gradient_clip == 1.0


def test_minibatches_share_out_every_scene_once():
    tokens = [f"c{i:015x}" for i in range(10)]
    parts = minibatches(tokens, 3, seed=0, rollout=5, epoch=0, device="cpu")
    assert sorted(itertools.chain(*parts)) == list(range(10))
    assert [len(part) for part in parts] == [4, 3, 3]
    turned = minibatches(tokens[::-1], 3, seed=0, rollout=5, epoch=0, device="cpu")
    assert [{tokens[i] for i in part} for part in parts] == [{tokens[::-1][i] for i in part} for part in turned]
    assert parts != minibatches(tokens, 3, seed=0, rollout=5, epoch=1, device="cpu")


def test_sharing_the_conditioning_changes_nothing(planners):
    """Losses with the rollout's own keys and values equal those with fresh ones; sampling carries no gradients."""
    algorithm, policy = built(planners["ddim"], {}, {})
    planner = load_planner(planners["ddim"]).planner
    reference = ReferencePolicy.load(planners["ddim"], planner.config, None, allow_mismatch=False)
    modules = policy.adopt(planner, reference, algorithm)
    data = ToyData()
    batch = data.join([data.dataset("train")[i] for i in range(4)])
    rollout = policy.roll(batch, algorithm.group_size, Key(0, 0), algorithm.needs(drift=True))
    assert not rollout.own.chain.states.requires_grad
    credit, updater = assign_credit(algorithm, rollout), Updater(algorithm)
    gradients = []
    assert rollout.own.conditioning is not None
    for _ in range(2):  # the first takes the rollout's own, the second makes its own
        losses = updater.losses(policy, modules, rollout, credit, None, beta=0.0, bc_weight=0.1)
        assert rollout.own.conditioning is None
        gradients.append(torch.autograd.grad(losses.total, list(planner.parameters())))
        assert losses.kl_reference.item() == pytest.approx(0.0, abs=1e-6)
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-5)
