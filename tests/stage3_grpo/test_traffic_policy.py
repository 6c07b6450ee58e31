"""Traffic as a policy of stage 3: the same choices scored again, rewards, groups, realism, whole runs, bad input."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import signal
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import traffic_toy
from grpo_toy import make_planner
from traffic_toy import CHECKPOINT, config, make_world

from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.tracks import from_frame
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError, TriviumError
from navsim_ext.realism.metric import realism
from navsim_ext.realism.rollouts import Rollouts
from navsim_ext.runtime.checkpoint_file import load_checkpoint
from navsim_ext.runtime.checkpoint_folder import newest_complete
from navsim_ext.runtime.run import make, run
from navsim_ext.traffic.store import TrafficStore
from sim_agents.training.checkpoint import load_agents
from stage3_grpo.core import at_last_decision, discounted_returns
from stage3_grpo.credit import assign_credit
from stage3_grpo.policies.traffic import Drift, TrafficReference
from stage3_grpo.policies.traffic.driver import RememberingDriver
from stage3_grpo.policy import Key, Needs
from stage3_grpo.rewards.realism import RealismTerm, rolled_scenes
from stage3_grpo.rewards.traffic_terms import Driven, GoalReached, LogDistance, LogProgress, require_known
from stage3_grpo.update import Updater

ALL = Needs(old=True, reference=True, value=False, once=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("traffic"))


@pytest.fixture(scope="module")
def scenes(world):
    return list(TrafficStore(world / "scenes"))


def made(world: Path, *overrides: str):
    """The algorithm and the policy of a configuration, loaded."""
    cfg = config(world, "unused", *overrides)
    algorithm, policy = make(cfg.algorithm), make(cfg.policy)
    loaded = load_agents(policy.init)
    with torch.no_grad():  # not the reference: a policy that has learned something
        for weight in loaded.network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    modules = policy.adopt(loaded, TrafficReference.load(policy.init, loaded, None), algorithm)
    return algorithm, policy, modules


def rolled(policy, scenes, count: int = 2):
    return policy.roll(scenes[:count], 2, Key(0, 0), ALL)


def rows(output: Path, name: str) -> list[dict[str, str]]:
    with open(output / "version_0" / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_scoring_again_gives_the_log_probabilities_of_sampling(world, scenes, monkeypatch):
    _, policy, _ = made(world)
    told = []
    act = RememberingDriver.act

    def listened(self, state):
        moves = act(self, state)
        told.append(moves.log_probability)
        return moves

    monkeypatch.setattr(RememberingDriver, "act", listened)
    rollout = rolled(policy, scenes)
    users = rollout.own.seen.tokens.shape[1]
    sampled = torch.stack(told, dim=2)[:, :users].flatten(0, 1)
    rescored = policy.decide(rollout, torch.arange(rollout.num_rows), teach=False).logp
    assert rollout.mask.any(dim=1).sum() == 2 * 2 * 5
    torch.testing.assert_close(rescored[rollout.mask], sampled[rollout.mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.logp_old, rescored.detach())
    assert not torch.allclose(rollout.logp_ref[rollout.mask], rescored[rollout.mask], atol=1e-3)


def test_the_kl_is_zero_while_the_two_are_one(world, scenes):
    algorithm, policy, _ = made(world, "kl=exact")
    modules = policy.adopt(
        loaded := load_agents(policy.init), TrafficReference.load(policy.init, loaded, None), algorithm
    )
    rollout = rolled(policy, scenes)
    losses = Updater(algorithm).losses(policy, modules, rollout, assign_credit(algorithm, rollout), None, beta=1.0,
                                       bc_weight=0.0)  # fmt: skip
    assert abs(float(losses.kl)) < 1e-6
    torch.testing.assert_close(rollout.logp_ref, rollout.logp_old)


def test_a_part_of_the_rows_is_scored_as_in_the_whole(world, scenes):
    _, policy, _ = made(world, "kl=exact")
    rollout = rolled(policy, scenes, 3)
    whole = policy.decide(rollout, torch.arange(rollout.num_rows), teach=False)
    rows = (rollout.start == 1).nonzero()[:, 0]
    part = policy.decide(rollout, rows, teach=True)
    torch.testing.assert_close(part.logp, whole.logp[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.kl_exact, whole.kl_exact[rows], atol=1e-5, rtol=1e-4)
    assert (whole.kl_exact[rollout.mask] > 0).all()
    assert part.teacher_logp.shape == rollout.taught[rollout.teaches == 1].shape
    k3 = torch.expm1(rollout.logp_ref - whole.logp) - (rollout.logp_ref - whole.logp)
    mean = lambda values: float(values[rollout.mask].mean())  # noqa: E731
    assert mean(k3) == pytest.approx(mean(whole.kl_exact), rel=1.0)  # an estimate of it


def test_rollouts_depend_on_their_key_alone(world, scenes):
    _, policy, _ = made(world)
    one, two = policy.roll(scenes[:2], 2, Key(0, 3), ALL), policy.roll(scenes[1:2], 2, Key(0, 3), ALL)
    assert torch.equal(one.own.seen.tokens[2:], two.own.seen.tokens)
    other = policy.roll(scenes[1:2], 2, Key(0, 4), ALL)
    assert not torch.equal(other.own.seen.tokens, two.own.seen.tokens)


def test_the_reward_is_the_distance_to_the_log_less_lambda_contacts(world, scenes):
    _, policy, _ = made(world)
    rollout = rolled(policy, scenes)
    state = rollout.own.driven.state
    now, users = state.scenes.now, rollout.own.seen.tokens.shape[1]
    for row in rollout.mask.any(dim=1).nonzero()[:, 0].tolist():
        b, n = divmod(row, users)
        scene = b // 2
        for k in range(4):
            end = now + 5 * (k + 1)
            apart = (state.poses[b, n, end, :2] - state.scenes.log_pose[scene, n, end, :2]).norm()
            touched = rollout.own.driven.events.contact.value[b, n, 5 * k : 5 * k + 5].any()
            assert float(rollout.reward[row, k]) == pytest.approx(-float(apart) - 2.0 * float(touched), abs=1e-4)


def test_groups_are_rollouts_of_one_road_user(world, scenes):
    _, policy, _ = made(world)
    rollout = rolled(policy, scenes)
    users = rollout.own.seen.tokens.shape[1]
    for group in rollout.group.unique().tolist():
        members = (rollout.group == group).nonzero()[:, 0]
        assert len(members) == 2
        assert {int(row) % users for row in members} == {group % users}
        assert {int(rollout.start[row]) for row in members} == {group // users}


@pytest.mark.parametrize("normalise", ["batch", "time_step", "group", "none"])
def test_returns_are_credited_as_written_by_hand(world, scenes, normalise):
    algorithm, policy, _ = made(world, f"advantage.normalise={normalise}")
    rollout = rolled(policy, scenes)
    credit = assign_credit(algorithm, rollout)
    G = np.zeros(rollout.mask.shape)
    reward, mask = rollout.reward.double().numpy(), rollout.mask.numpy()
    for k in reversed(range(mask.shape[1])):
        G[:, k] = reward[:, k] + (0.95 * G[:, k + 1] if k + 1 < mask.shape[1] else 0.0)
    expected = np.zeros_like(G)
    if normalise == "batch":
        expected[mask] = (G[mask] - G[mask].mean()) / G[mask].std(ddof=1)
    elif normalise == "none":
        expected[mask] = G[mask]
    for k in range(mask.shape[1]):
        here = mask[:, k]
        if normalise == "time_step":
            expected[here, k] = (G[here, k] - G[here, k].mean()) / G[here, k].std(ddof=1)
        for row in np.flatnonzero(here) if normalise == "group" else ():
            others = (rollout.group.numpy() == int(rollout.group[row])) & here
            others[row] = False
            expected[row, k] = G[row, k] - G[others, k].mean()
    np.testing.assert_allclose(credit.advantage.numpy(), expected, atol=2e-4)


def test_leaving_one_out_is_the_metric_of_the_others(world, scenes):
    _, policy, _ = made(world, "policy.horizon_s=8.0", "reward=realism")
    scene = admitted(scenes[0])
    _, driven = policy.drive([scene], 3, 0, policy.network)
    told, known = RealismTerm().value(rolled_scenes(driven.state, [scene]), 3)
    assert known.all()
    now = driven.state.scenes.now
    poses = from_frame(driven.state.poses[:, :5, now + 1 :].double().numpy(), driven.state.scenes.frame[0])

    def meta(kept: list[int]) -> float:
        return realism(scene, Rollouts(scene.agent_id, poses[kept].astype(np.float32)), expected=None).metrics[
            "metametric"
        ]

    without = np.array([meta([1, 2]), meta([0, 2]), meta([0, 1])])
    np.testing.assert_allclose(told, without.mean() - without, atol=1e-9)
    alone, _ = RealismTerm(credit="alone").value(rolled_scenes(driven.state, [scene]), 3)
    np.testing.assert_allclose(alone, [meta([0]), meta([1]), meta([2])], atol=1e-9)


def admitted(scene):
    """The scene as the rules of realism take it: the toy's is one already."""
    assert scene.num_steps == 91
    assert scene.now == 10
    return scene


def test_goals_and_progress_by_hand(scenes):
    scene = dataclasses.replace(scenes[0], goal=scenes[0].pose[:, 40, :2].copy())
    world = World(rollouts=1, horizon_s=4.0, enter="never", events=("goal", "contact"))
    state = world.reset([scene])
    policy = Replay()
    policy.start(state, [scene])
    while state.steps_left > 0:
        state = world.step(state, policy.act(state))
    driven = Driven(state, world.events(state, 0, state.step))
    apart, known = LogDistance().value(driven)
    assert known[0, :5].all()
    assert float(apart[0, :5].abs().max()) < 1e-4  # the recording is where the recording is
    reached, _ = GoalReached().value(driven)
    assert reached[0, :5].sum(dim=-1).tolist() == [1.0] * 5  # once
    length, known = LogProgress().value(driven)
    steps = np.linalg.norm(np.diff(scene.pose[:, 10:51:5, :2], axis=1), axis=-1)
    np.testing.assert_allclose(length[0, :5].numpy(), steps, atol=1e-3)
    with pytest.raises(DataError, match=r"reward term goal .* nobody's goal is known"):
        require_known({"goal": GoalReached()}, scenes[:2])


def test_a_reward_at_the_end_and_returns_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert at_last_decision(torch.tensor([2.0, 3.0]), mask).tolist() == [[0, 2, 0], [3, 0, 0]]
    returns = discounted_returns(torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), mask, 0.5)
    assert returns.tolist() == [[2.0, 2.0, 0.0], [4.0, 0.0, 0.0]]


def test_losses_move_the_choices_towards_what_paid(world, scenes):
    """One step of plain gradient descent makes the advantageous decisions more probable, on the same rollout."""
    algorithm, policy, modules = made(world, "kl=none")
    rollout = rolled(policy, scenes, 4)
    credit = assign_credit(algorithm, rollout)
    everything = torch.arange(rollout.num_rows)
    before = policy.decide(rollout, everything, teach=False).logp.detach()
    losses = Updater(algorithm).losses(policy, modules, rollout, credit, None, beta=0.0, bc_weight=0.0)
    assert float(losses.policy) == pytest.approx(-float((credit.advantage * before)[credit.mask].mean()), rel=1e-4)
    losses.total.backward()
    with torch.no_grad():
        for weight in policy.network.parameters():
            if weight.grad is not None:
                weight -= 0.05 * weight.grad
    after = policy.decide(rollout, everything, teach=False).logp.detach()
    assert float((credit.advantage * (after - before))[credit.mask].mean()) > 0


def test_a_reference_drifts_only_when_it_is_told_to(world):
    loaded = load_agents(world / CHECKPOINT)
    stays, drifts = (TrafficReference.load(world / CHECKPOINT, loaded, drift) for drift in (None, Drift(0.25, 2)))
    with torch.no_grad():
        for weight in loaded.network.parameters():
            weight += 1.0
    first = next(stays.network.parameters()).clone()
    for rollouts in (1, 2, 3):
        stays.follow(loaded.network, rollouts)
        drifts.follow(loaded.network, rollouts)
    torch.testing.assert_close(next(stays.network.parameters()), first)
    torch.testing.assert_close(next(drifts.network.parameters()), first + 0.25)


@pytest.fixture(scope="module")
def whole(world) -> Path:
    output = world / "whole"
    run(config(world, output, "algorithm=traffic_ppo", "callbacks.checkpoint.every_n_steps=1"))
    return output


def test_a_run_leaves_traffic_that_drives_and_its_record(world, whole):
    newest = newest_complete(whole / "version_0/checkpoints")
    agents = load_agents(newest)
    before = load_agents(world / CHECKPOINT).network.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in agents.network.state_dict().items())
    told = rows(whole, "rewards")
    assert len(told) == 4
    for name in ("contact_rate", "off_road_rate", "displacement_m", "progress", "standing", "log_standing", "speed_mps",
                 "log_speed_mps", "entropy", "credited_share", "term_log_distance", "term_contact"):  # fmt: skip
        assert np.isfinite(float(told[0][name])), name
    assert 0.0 <= float(rows(whole, "kl_divergence")[0]["kl_reference"]) < 0.1
    assert float(rows(whole, "kl_divergence")[0]["ratio_mean"]) == pytest.approx(1.0, abs=0.2)
    assert (whole / "version_0/checkpoints/best_score.ckpt").exists()


def test_a_killed_run_ends_with_the_same_weights(world, whole, tmp_path):
    command = [traffic_toy.__file__, world, tmp_path, "algorithm=traffic_ppo", "callbacks.checkpoint.every_n_steps=1"]
    killed = forked.run(*command, environment={"TOY_KILL": "3", "CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run(config(world, tmp_path, "algorithm=traffic_ppo", "callbacks.checkpoint.every_n_steps=1"))
    one, two = (load_checkpoint(newest_complete(folder / "version_0/checkpoints"))["state_dict"]
                for folder in (whole, tmp_path))  # fmt: skip
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=traffic_dapo", "algorithm.group_size=1"], "group_size is 1"),
        (["algorithm=traffic_rlftsim", "reward=realism", "algorithm.group_size=1"], "realism by leaving one out"),
        (["+reward.terms.goal={_target_: stage3_grpo.rewards.traffic_terms.GoalReached}"], "nobody's goal is known"),
        (["reward=traffic_log", "reward.terms.log_distance=null"], "a reward of 0 terms"),
        (["reward.terms.contact.weight=0"], "weight 0 and no effect"),
        (["policy.credited=everybody"], "one of driven, scored"),
        (["policy.sampling.temperature=0"], "temperature 0"),
        (["kl=adaptive", "kl.weight.target=0"], "target > 0"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(world, tmp_path, overrides, message):
    with pytest.raises(TriviumError, match=message):
        run(config(world, tmp_path, *overrides))
    assert not (tmp_path / "version_0/rewards.csv").exists()


def test_a_reference_of_another_vocabulary_is_refused(world, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_world(other, tokens=20)
    with pytest.raises(TriviumError, match="vocabulary of the reference"):
        run(config(world, tmp_path / "run", f"reference={other / CHECKPOINT}"))
    shutil.rmtree(other)


def test_what_has_no_log_probabilities_is_no_policy(world, tmp_path):
    with pytest.raises(TriviumError):
        run(config(world, tmp_path / "run", f"init={make_planner(tmp_path)}"))


def test_alarms_of_traffic_ring_for_standing_drift_and_collapse(world, tmp_path):
    """Traffic that stands has no contacts: what rings compares it with the log, not with the reward."""
    alarms = make(config(world, tmp_path).alarms)
    assert sorted(alarms.rules) == ["collapse", "drift", "invalid", "progress", "standing"]
    driving = {"standing": 0.3, "log_standing": 0.3, "progress": 1.0, "kl_reference": 0.01, "entropy": 3.0,
               "invalid_rate": 0.0}  # fmt: skip
    assert not any(rule.rings(rule.value(driving)) for rule in alarms.rules.values())
    for name, change in (("standing", {"standing": 0.6}), ("progress", {"progress": 0.5}),
                         ("drift", {"kl_reference": 1.0}), ("collapse", {"entropy": 0.01})):  # fmt: skip
        ringing = [key for key, rule in alarms.rules.items() if rule.rings(rule.value(driving | change))]
        assert ringing == [name]


def test_cloning_of_the_log_joins_when_an_alarm_asks_for_it(world, tmp_path):
    """The teacher is built when its weight is above 0: from the start, or once an alarm has raised it."""
    rule = "{_target_: stage3_grpo.monitors.AlarmRule, metric: reward, below: 1.0e9}"
    run(config(world, tmp_path, f"+alarms.rules.always={rule}", "alarms.window=1", "alarms.escalation=[raise_bc]"))
    told = rows(tmp_path, "kl_divergence")
    assert float(told[0]["bc_weight"]) == 0.0
    assert float(told[0]["bc_loss"]) == 0.0
    assert float(told[1]["bc_weight"]) > 0.0
    assert float(told[1]["bc_loss"]) > 0.0
