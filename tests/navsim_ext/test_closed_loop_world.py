"""The world's invariants: batch, order, rigid motion, far agents, who is there, what is known, and every event once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from navsim_ext.closed_loop.events import EVENTS
from navsim_ext.closed_loop.moves import BadMoves, Moves
from navsim_ext.closed_loop.policies import ConstantVelocity, Idm, Replay
from navsim_ext.closed_loop.policy import Mixed
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.tracks import INTERPOLATED, OBSERVED, upsample
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from tests.navsim_ext.closed_loop_worlds import Car, crowd, road


def drive(scenes, policy, **options):
    world = World(**options)
    state = world.reset(scenes)
    policy.start(state, state.scenes.sources)
    while state.steps_left >= 5:
        state = world.step(state, policy.act(state))
    return world, state, world.events(state, 0, state.step)


def booleans(events, B=None, N=None):
    names = [name for name in EVENTS if name != "time_to_contact"]
    return {name: (getattr(events, name).value, getattr(events, name).valid) for name in names}


@pytest.mark.parametrize("policy", [ConstantVelocity, Replay, Idm])
def test_a_scene_alone_equals_the_same_scene_in_a_batch_bit_for_bit(policy):
    scenes = [
        crowd(1, 12, "a"),
        crowd(2, 40, "b"),
        road([Car(0, -1.75, speed=9), Car(30, -1.75, speed=3)], red=True, id="c"),
    ]
    _, together, events = drive(scenes, policy(), rollouts=2)
    for s, scene in enumerate(scenes):
        _, alone, own = drive([scene], policy(), rollouts=1)
        n = scene.num_agents
        for b in (2 * s, 2 * s + 1):
            assert torch.equal(together.poses[b, :n], alone.poses[0, :n])
            assert not together.there[b, n:].any()
            for name in EVENTS:
                mine, theirs = getattr(own, name), getattr(events, name)
                assert torch.equal(mine.value[0, :n], theirs.value[b, :n]), name
                assert torch.equal(mine.valid[0, :n], theirs.valid[b, :n]), name


def test_events_asked_once_at_the_end_are_those_of_every_token():
    world = World()
    state = world.reset([crowd(4), crowd(5, 17)])
    policy, parts = ConstantVelocity(), []
    for _ in range(6):
        state = world.step(state, policy.act(state))
        parts.append(world.events(state))
    whole = world.events(state, 0, state.step)
    assert whole.contact.value.any()
    for name in EVENTS:
        assert torch.equal(torch.cat([getattr(p, name).value for p in parts], -1), getattr(whole, name).value), name
    pairs = torch.cat([part.contact_pairs for part in parts]).tolist()
    assert sorted(pairs) == sorted(whole.contact_pairs.tolist())


def test_moving_the_whole_scene_rigidly_changes_nothing_but_rounding():
    _, here, events = drive([crowd(7)], ConstantVelocity())
    _, there, moved = drive([crowd(7, move=(812.0, -455.0, 2.1))], ConstantVelocity())
    assert torch.allclose(here.poses, there.poses, atol=5e-3)
    for name, (value, valid) in booleans(events).items():
        other = getattr(moved, name)
        assert (value != other.value).float().mean() < 2e-3, name
        assert (valid != other.valid).float().mean() < 2e-3, name


def test_removing_a_far_agent_changes_nothing():
    cars = [Car(0, -1.75, speed=9), Car(25, -1.75, speed=4), Car(8, 1.75, math.pi, 7)]
    _, state, events = drive([road([*cars, Car(180, 1.75, math.pi, 0)])], Idm())
    _, without, fewer = drive([road(cars)], Idm())
    assert torch.equal(state.poses[:, :3], without.poses[:, :3])
    for name in EVENTS:
        assert torch.equal(getattr(events, name).value[:, :3], getattr(fewer, name).value[:, :3]), name


def test_replay_drives_the_record_exactly_and_gaps_stay_marked():
    scene = road(
        [Car(0, -1.75, speed=8), Car(20, -5.25, speed=5, seen=(0, 40)), Car(-60, -5.25, speed=5, seen=(33, 90))]
    )
    _, state, _ = drive([scene], Replay())
    log = state.scenes
    ego = state.poses[0, 0, : log.log_pose.shape[2]]
    assert torch.equal(ego, log.log_pose[0, 0])
    assert state.removed_at[0, :3].tolist() == [-1, 35, -1]  # column 40 is step 30; its token ends at 35 ...
    assert state.entered_at[0, :3].tolist() == [0, 0, 25]  # ... and who is first seen in step 23 enters at 25
    assert not state.there[0, 1, log.now + 36 :].any()
    assert torch.equal(state.poses[0, 2, log.now + 25 :], log.log_pose[0, 2, log.now + 25 :])
    _, stays, _ = drive([scene], Replay(at_end="stay"))
    assert stays.there[0, 1].all()
    assert torch.equal(stays.poses[0, 1, -1], log.log_pose[0, 1, 40])
    _, never, _ = drive([scene], Replay(), enter="never")
    assert never.entered_at[0, 2] == -1
    assert not never.there[0, 2].any()


def test_logs_at_two_hertz_are_bridged_by_cubics_and_marked():
    fine = road([Car(0, -1.75, speed=6, acceleration=1.0)], steps=81, now=10)
    coarse = road([Car(0, -1.75, speed=6, acceleration=1.0)], steps=17, now=2, dt=0.5)
    poses, state = upsample(coarse)
    assert poses.shape[1] == 81
    assert (state[0, ::5] == OBSERVED).all()
    assert (state[0] == INTERPOLATED).sum() == 64
    assert np.abs(poses[0, :, 0] - fine.pose[0, :, 0]).max() < 0.03  # one-sided speeds at both ends
    assert np.abs(poses[0, 6:75, 0] - fine.pose[0, 6:75, 0]).max() < 1e-3
    with pytest.raises(DataError, match="multiples"):
        WorldScenes.build([road([Car(0, 0)], dt=0.25)])


def test_a_road_user_that_has_reached_its_goal_is_still_seen_and_hit():
    goal = np.array([[np.nan, np.nan], [20.0, -1.75]])
    scene = road([Car(0, -1.75, speed=8), Car(20, -1.75, speed=0)], goal=goal)
    _, state, events = drive([scene], ConstantVelocity())
    assert events.goal.value[0, 1].all()
    assert state.there[0, 1].all()
    assert events.contact.any()[0, :2].tolist() == [True, True]
    first = int(events.contact.value[0, 0].float().argmax()) + 1
    assert first == math.ceil((20 - 4.6) / 8 / 0.1)
    assert not events.goal.valid[0, 0].any()


def test_off_road_red_light_and_wrong_way_where_they_happen_and_only_where_they_are_known():
    cars = [
        Car(0, -1.75, speed=8),  # crosses the light at x = 40
        Car(0, -5.25, speed=8, heading=-0.1),  # leaves the road
        Car(-20, 1.75, speed=8),  # on the lane of oncoming traffic
        Car(10, -1.75, heading=math.pi, speed=8),  # wrong way through the light's lane: no red light for it
        Car(0, -9.0, kind=1, size=(0.7, 0.7, 1.7), speed=1),  # a pedestrian beside the road
    ]
    for areas in (False, True):
        _, _, events = drive([road(cars, red=True, areas=areas)], ConstantVelocity())
        assert events.red_light.any()[0, :4].tolist() == [True, False, False, False]
        crossed = int(events.red_light.value[0, 0].float().argmax()) + 1
        assert crossed == math.ceil((40 - 2.3) / 0.8)
        assert events.off_road.any()[0, :3].tolist() == [False, True, False]
        assert not events.off_road.valid[0, 4].any()
        left = int(events.off_road.value[0, 1].float().argmax()) + 1
        corner = 0.95 * math.cos(0.1) + 2.3 * math.sin(0.1)  # the front right corner below the centre
        assert abs(left * 0.8 * math.sin(0.1) - (1.75 - corner)) < 0.1 + 0.08
        assert events.wrong_way.any()[0, :4].tolist() == [False, False, True, True]
    _, _, green = drive([road(cars, red=False)], ConstantVelocity())
    assert not green.red_light.any().any()
    _, _, unknown = drive([road(cars)], ConstantVelocity())
    assert not unknown.red_light.valid.any()


def test_comfort_and_time_to_contact_of_known_motions():
    cars = [Car(0, -1.75, speed=15, acceleration=-6.0), Car(0, -5.25, speed=10), Car(24.6, -5.25, speed=0)]
    _, _, events = drive([road(cars)], Replay())
    assert not events.comfort.value[0, 0, :10].any()
    assert events.comfort.value[0, 1].all()
    assert abs(float(events.time_to_contact.value[0, 1, 0]) - (20.0 / 10 - 0.1)) < 1e-3
    assert events.time_to_contact.value[0, 0].isinf().all()


def test_all_four_forms_of_moves_agree_on_straight_motion():
    scene = [road([Car(0, -1.75, speed=8), Car(9, 1.75, math.pi, 5)])]
    ends = []
    for form in ("tokens", "poses", "accelerations", "bicycle"):
        world = World(horizon_s=2.0)
        state = world.reset(scene)
        for _ in range(4):
            token = ConstantVelocity().act(state)
            zero = torch.zeros(1, 16)
            moves = {
                "tokens": token, "poses": Moves.poses(token.resolve(state).values),
                "accelerations": Moves.accelerations(torch.zeros(1, 16, 2)), "bicycle": Moves.bicycle(zero, zero),
            }[form]  # fmt: skip
            state = world.step(state, moves)
        ends.append(state.pose[0, :2])
    for end in ends[1:]:
        assert torch.allclose(end, ends[0], atol=1e-3)


def test_bad_moves_are_refused_before_anything_moves():
    world = World()
    state = world.reset([road([Car(0, -1.75, speed=8)], id="broken")])
    before = state.poses.clone()
    bad = torch.zeros(1, 16, 5, 3)
    bad[0, 0, 2, 1] = torch.nan
    with pytest.raises(BadMoves, match="broken row 0"):
        world.step(state, Moves.tokens(bad))
    with pytest.raises(BadMoves, match="shape"):
        world.step(state, Moves.tokens(bad[:, :, :4]))
    assert state.step == 0
    assert torch.equal(state.poses, before)
    bad[0, 0], bad[0, 3] = 0.0, torch.inf  # a row that is nobody's
    world.step(state, Moves.tokens(bad))
    with pytest.raises(DataError, match="0 scenes"):
        world.reset([])
    with pytest.raises(DataError, match="horizon"):
        drive([road([Car(0, 0)])], ConstantVelocity(), horizon_s=1.0)[0].step(
            drive([road([Car(0, 0)])], ConstantVelocity(), horizon_s=1.0)[1], Moves.tokens(torch.zeros(1, 16, 5, 3))
        )
    with pytest.raises(DataError, match="not observed"):
        world.reset([road([Car(0, 0, seen=(0, 3)), Car(9, 0)])])


def test_mixture_moves_each_by_its_own_policy_and_a_fork_goes_its_own_way():
    scene = road([Car(0, -1.75, speed=8, acceleration=-2), Car(20, -5.25, speed=5, acceleration=1.0)])
    _, state, _ = drive([scene], Mixed({"all": Replay(), "ego": ConstantVelocity()}))
    assert torch.equal(state.poses[0, 1, :91], state.scenes.log_pose[0, 1])
    assert abs(float(state.poses[0, 0, 90, 0]) - 8.0 * 8.0) < 0.9
    with pytest.raises(DataError, match="without a driver"):
        drive([scene], Mixed({"ego": Replay()}))
    world = World()
    state = world.reset([scene])
    other = state.fork()
    world.step(state, ConstantVelocity().act(state))
    world.step(other, Replay().act(other))
    assert other.step == state.step == 5
    assert not torch.equal(other.pose, state.pose)


@pytest.mark.parametrize("seed", range(6))
def test_idm_does_not_run_into_a_leader_that_brakes_to_a_stop(seed):
    random = np.random.default_rng(seed)
    speed, lead = float(random.uniform(3, 18)), float(random.uniform(3, 18))
    gap = 3.0 + speed * 1.2 + max(0.0, speed**2 - lead**2) / 4.0
    cars = [
        Car(0, -1.75, speed=speed),
        Car(4.6 + gap, -1.75, speed=lead, acceleration=-float(random.uniform(1.0, 4.0))),
    ]
    _, state, events = drive([road(cars, steps=151)], Mixed({"all": Replay(), "ego": Idm()}))
    assert not events.contact.any().any()
    end = state.pose[0, :2, 0]
    assert 0.5 < float(end[1] - end[0]) - 4.6 < 12.0  # and comes up behind it


def test_idm_stops_at_red_and_goes_at_green():
    _, red, events = drive([road([Car(0, -1.75, speed=8)], red=True, steps=151)], Idm())
    assert not events.red_light.any().any()
    assert 34.0 < float(red.pose[0, 0, 0]) + 2.3 < 40.0
    _, green, _ = drive([road([Car(0, -1.75, speed=8)], red=False, steps=151)], Idm())
    assert float(green.pose[0, 0, 0]) > 80.0
