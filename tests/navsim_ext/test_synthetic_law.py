"""The synthetic law as a policy: the recording comes out of it again, and its drivers react to another ego."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from navsim_ext.closed_loop.moves import Moves
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.closed_loop.policy import Mixed
from navsim_ext.closed_loop.scenes import WorldScenes
from navsim_ext.closed_loop.tracks import to_frame
from navsim_ext.closed_loop.world import World
from navsim_ext.errors import DataError
from navsim_ext.synthetic import traffic
from navsim_ext.synthetic.law import SyntheticLaw
from navsim_ext.synthetic.paths import SPACING
from navsim_ext.synthetic.traffic_scenes import SyntheticTraffic
from tests.navsim_ext.closed_loop_worlds import Car, road

MIX = {"queue": 1.0, "leader": 1.0, "turn": 1.0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    source = SyntheticTraffic(scenes=2, maps_root=str(tmp_path_factory.mktemp("maps")), seed=3, mix=MIX, horizon_s=10.0)
    source.prepare(tmp_path_factory.mktemp("out"))
    return WorldScenes.build([scene for unit in source.units() for _, scene in source.read(unit)])


def drive(scenes, policy):
    world = World()
    state = world.reset(scenes)
    policy.start(state, scenes.sources)
    while state.steps_left >= 5:
        world.step(state, policy.act(state))
    return world, state


def test_the_law_goes_on_from_the_present_and_the_recording_comes_out(scenes):
    for policy in (SyntheticLaw("all"), Mixed({"all": SyntheticLaw(), "ego": Replay()})):
        _, state = drive(scenes, policy)
        steps = scenes.log_pose.shape[2]
        gap = (state.poses[:, :, :steps] - scenes.log_pose)[..., :2].norm(dim=-1).amax()
        assert float(gap) < 0.05
        turn = (state.poses[:, :, :steps] - scenes.log_pose)[..., 2].abs().amax()
        assert float(turn) < 0.02


class Blocks:
    """Puts each ego across the path of the fastest driver, 40 m ahead of it, and leaves it there."""

    name = "blocks"

    def start(self, state, scenes):
        self.follower, self.places = [], []
        for s, scene in enumerate(scenes):
            law = scene.law
            speed = np.where(law["user_kind"] == traffic.VEHICLE, law["state_speed"][1], -1.0)
            speed[scene.ego] = -1.0
            row = int(speed.argmax())
            at = law["path_start"][row] + int((law["state_s"][1, row] + 40.0) / SPACING)
            at = min(at, law["path_start"][row + 1] - 1)
            self.follower.append(row)
            self.places.append(to_frame(law["path_pose"][at], state.scenes.frame[s]))

    def act(self, state):
        poses = state.pose[:, :, None].expand(-1, -1, 5, -1).clone()
        worlds, ego = state.ego_index()
        poses[worlds, ego] = torch.tensor(np.array(self.places), dtype=torch.float32)[:, None]
        return Moves.poses(poses)


def test_a_driver_stops_for_an_ego_that_was_never_there_and_replay_does_not(scenes):
    blocks = Blocks()
    world, state = drive(scenes, Mixed({"all": SyntheticLaw(), "ego": blocks}))
    _, replayed = drive(scenes, Mixed({"all": Replay(), "ego": blocks}))
    hits = world.events(state, 0, state.step).contact_pairs.tolist()
    for b, row in enumerate(blocks.follower):
        ego = int(scenes.ego[b])
        assert float(state.speed[b, row]) < 0.3
        gap = float((state.pose[b, row, :2] - state.pose[b, ego, :2]).norm())
        assert 4.0 < gap < 16.0
        assert not any(pair[:3] == [b, row, ego] for pair in hits)
        assert float((replayed.pose[b, row, :2] - state.pose[b, row, :2]).norm()) > 1.0


def test_scenes_without_a_law_are_refused():
    state = World().reset([road([Car(0, 0)])])
    with pytest.raises(DataError, match="agents=idm"):
        SyntheticLaw().start(state, state.scenes.sources)
    with pytest.raises(DataError, match="others, all"):
        SyntheticLaw("some")
    assert np.isfinite(state.poses.numpy()).all()
