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
from stage2_dit import Exploration, load_planner
from stage3_grpo.algorithm import Algorithm, Schedule
from stage3_grpo.collector import Collector
from stage3_grpo.module import PolicyOptimizerSettings, rollout_process
from stage3_grpo.monitors import Alarms
from stage3_grpo.reference import ReferencePolicy
from stage3_grpo.rewards import ExtendedComfortProxy, Feasibility, PdmTerm, ReverseMotion, Reward
from stage3_grpo.rewards.kinematics import motion, reverses, stands
from stage3_grpo.rollout import LogProb
from stage3_grpo.update import Updater, assign_credit, minibatches
from stage3_grpo.value import ValueHead


@pytest.fixture(scope="module")
def planners(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("planners")
    return {"ddim": make_planner(folder), "flow": make_planner(folder, "flow", process="flow_ode")}


# per algorithm: overrides that its base needs to make an option matter, and the options with another value
CLIP = {"surrogate": "clip", "clip_low": 1e-6, "clip_high": 1e-6, "inner_epochs": 2}
KL = {"kl": "k3", "kl_weight": {"_target_": "stage3_grpo.algorithm.Schedule", "start": 0.5}}
GAE = {"advantage": "gae", "gae_gamma": 0.9, "gae_lambda": 0.8, "value_weight": 0.5}
FLIPS = [
    ({}, {"group_size": 3}),
    ({}, {"advantage": "leave_one_out"}),
    ({}, {"advantage": "batch"}),
    ({}, {"advantage": "constant", "baseline": 0.2}),
    ({"advantage": "constant", "baseline": 0.2}, {"baseline": 0.5}),
    ({}, GAE),
    (GAE, {"gae_gamma": 0.5}),
    (GAE, {"gae_lambda": 0.3}),
    (GAE, {"value_weight": 0.9}),
    ({}, {"discount": 0.9}),
    ({"drop_zero_spread": True}, {"drop_zero_spread": False}),
    ({"drop_zero_spread": True}, {"min_spread": 0.39}),
    ({}, {"surrogate": "clip", "clip_low": 0.2, "clip_high": 0.2}),
    (CLIP, {"ratio_level": "trajectory"}),
    (CLIP, {"clip_low": 0.5}),
    (CLIP, {"clip_high": 0.5}),
    (CLIP, {"inner_epochs": 3}),
    (CLIP, {"minibatches": 2}),
    (CLIP, {"target_kl": 1e-9}),
    ({}, KL),
    (KL, {"kl": "k1"}),
    (KL, {"kl": "gaussian"}),
    (KL, {"kl_weight": {"_target_": "stage3_grpo.algorithm.Schedule", "start": 0.1}}),
    ({}, {"bc_weight": {"_target_": "stage3_grpo.algorithm.Schedule", "start": 0.3}}),
    ({}, {"log_prob": {"clamp": None}}),
    ({}, {"log_prob": {"clamp_at": "step"}}),
    ({}, {"log_prob": {"reduction": "sum"}}),
    ({}, {"exploration": {"eta": 0.5}}),
    ({"flow": True}, {"exploration": {"noise_level": 0.3}}),
    ({}, {"exploration": {"sampling_std_floor": 0.2}}),
    ({}, {"exploration": {"log_prob_std_floor": 0.3}}),
    ({}, {"exploration": {"noise_clip": 0.5}}),
    ({}, {"exploration": {"final_clip": 0.5}}),
    ({}, {"exploration": {"last_step_noise": False}}),
    ({"flow": True}, {"process": "flow_cps"}),
    ({}, {"num_steps": 4}),
]


def step(planners: dict[str, str], choices: dict) -> np.ndarray:
    """All that one rollout and its updates leave: chain, losses, and the weights after plain gradient steps."""
    choices = dict(choices)
    flow = choices.pop("flow", False)
    init = planners["flow" if flow else "ddim"]
    node = config(init, "unused").algorithm
    if flow:
        choices.setdefault("process", "flow_sde")
    algorithm: Algorithm = instantiate(OmegaConf.merge(node, choices))
    planner = load_planner(init).planner
    with torch.no_grad():  # not the reference: a policy that has learned something
        planner.action_decoder.fc2.weight.mul_(1.3)
    reference = ReferencePolicy.load(init, planner.config, None, allow_mismatch=False)
    process = rollout_process(planner, algorithm)
    torch.manual_seed(0)
    head = ValueHead(planner.config, process.num_steps) if algorithm.needs_value else None
    scorer = ToyScorer()
    scorer.score = spread_in_some_scenes(scorer.score)
    data = ToyData()
    scenes, hidden = data.join([data.dataset("train")[i] for i in range(4)])
    collector = Collector(algorithm, process, Reward(PdmTerm()), scorer, seed=0)
    experience = collector.collect(
        planner, head, reference, scenes, hidden.hidden, hidden.mask, rollout=0, with_drift=False
    )
    credit = assign_credit(algorithm, experience)
    updater = Updater(algorithm, process)
    numbers = [experience.chain.states.double().flatten(), credit.advantage.double().flatten()]
    modules = [planner] if head is None else [planner, head]
    weights = [weight for module in modules for weight in module.parameters()]
    for epoch in range(algorithm.inner_epochs):
        parts = minibatches(scenes.token, algorithm.minibatches, seed=0, rollout=0, epoch=epoch, device="cpu")
        for part in parts:
            beta = algorithm.kl_weight(0) if algorithm.kl_weight else 0.0
            losses = updater.losses(
                planner, head, experience, credit, part, beta=beta, bc_weight=algorithm.bc_weight(0)
            )
            if algorithm.target_kl is not None and losses.approx_kl > algorithm.target_kl:
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


@pytest.mark.parametrize(("base", "flip"), FLIPS, ids=lambda value: str(sorted(value)))
def test_flipping_an_option_changes_the_step(planners, base, flip):
    if str(base) not in BASES:
        BASES[str(base)] = step(planners, base)
    one, two = BASES[str(base)], step(planners, OmegaConf.to_container(OmegaConf.merge(base, flip)))
    assert len(one) != len(two) or np.abs(one - two).max() > 1e-6


def test_the_same_configuration_gives_the_same_step(planners):
    assert np.array_equal(step(planners, CLIP), step(planners, CLIP))


def test_every_option_is_among_the_flips():
    """A new field of these classes needs its line in FLIPS."""
    flipped = {key for _, flip in FLIPS for key in flip}
    for cls, prefix in ((Algorithm, None), (LogProb, "log_prob"), (Exploration, "exploration")):
        fields = {field.name for field in dataclasses.fields(cls)}
        inner = {key for _, flip in FLIPS for key in (flip if prefix is None else flip.get(prefix, {}))}
        left = fields - inner - {"name", "deterministic", "log_prob", "exploration"}
        assert not left, f"{cls.__name__}: {left}"
    assert {"log_prob", "exploration"} <= flipped


@pytest.mark.parametrize("name", ["pdms", "published", "epdms", "guarded"])
def test_reward_configurations_compose(name):
    reward = instantiate(compose("stage3", [f"reward={name}"]).reward)
    assert reward.score.column == {"epdms": "epdms_v2_nofilter"}.get(name, "reward")
    assert reward.judge == {"epdms": "pdms_v1"}.get(name, "epdms_v2_nofilter")
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
    algorithm = instantiate(config(planners["ddim"], "unused").algorithm)
    planner = load_planner(planners["ddim"]).planner
    reference = ReferencePolicy.load(planners["ddim"], planner.config, None, allow_mismatch=False)
    data = ToyData()
    scenes, hidden = data.join([data.dataset("train")[i] for i in range(4)])
    collector = Collector(algorithm, planner.process, Reward(PdmTerm()), ToyScorer(), seed=0)
    experience = collector.collect(
        planner, None, reference, scenes, hidden.hidden, hidden.mask, rollout=0, with_drift=True
    )
    assert not experience.chain.states.requires_grad
    credit, updater = assign_credit(algorithm, experience), Updater(algorithm, planner.process)
    gradients = []
    for conditioning in (experience.conditioning, None):
        losses = updater.losses(
            planner, None, experience, credit, None, beta=0.0, bc_weight=0.1, conditioning=conditioning
        )
        gradients.append(torch.autograd.grad(losses.total, list(planner.parameters())))
        assert losses.kl_reference.item() == pytest.approx(0.0, abs=1e-6)
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-5)
