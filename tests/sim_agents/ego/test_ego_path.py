"""The path planner: how its car moves, what it learns from, that it trains, resumes, drives and is scored."""

import copy
import math

import numpy as np
import pytest
import torch
from closed_loop_worlds import Car, road
from ego_worlds import reset, store, street

from navsim_ext.closed_loop.drive import drive_batch
from navsim_ext.closed_loop.kinematics import bicycle
from navsim_ext.closed_loop.policies import Replay
from navsim_ext.errors import DataError, MissingError
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.run import run
from navsim_ext.scene import SceneBatch
from navsim_ext.traffic.store import fingerprint_of, write_scenes
from sim_agents.ego.encoder import EncoderSettings
from sim_agents.ego.motion import LATERAL_BOUND, action_towards, bounded, headings_along, local_point, play
from sim_agents.ego.observation import Sight
from sim_agents.ego.open_loop import OpenLoop, rear_axle, until
from sim_agents.ego.path.module import PathModule, waypoint_loss
from sim_agents.ego.path.network import PathNetwork, PathSettings
from sim_agents.ego.path.policy import PathPolicy, load_path_planner
from sim_agents.ego.policy import ego_state
from sim_agents.ego.recorded import Disturbance, EgoDataset, assemble, begin, focused

TINY = PathSettings(Sight(others=4, pieces=8), EncoderSettings(16, 2, 1), EncoderSettings(16, 2, 1))


def tiny(seed: int = 0) -> PathPolicy:
    torch.manual_seed(seed)
    return PathPolicy(PathNetwork(TINY))


# -- motion


def test_an_action_is_carried_out_by_the_worlds_bicycle_and_never_more_than_a_car_can():
    torch.manual_seed(0)
    pose, speed, length = torch.randn(50, 3), torch.rand(50) * 12, torch.full((50,), 5.0)
    asked = torch.randn(50, 2) * torch.tensor([20.0, 1.0])
    action = bounded(speed, asked)
    poses, after = play(pose, speed, length, asked)
    v = (speed + action[:, 0] * 0.5).clamp_min(0.0)
    torch.testing.assert_close(after, v, atol=1e-4, rtol=1e-4)
    turned = (poses[:, -1, 2] - pose[:, 2]).abs()
    fastest = torch.maximum(speed, after)
    assert (turned <= LATERAL_BOUND / fastest.clamp_min(1e-6) * 0.5 + 1e-4)[fastest > 6].all()
    tangent = action[:, 1] * 3.0 / torch.sqrt(1 - (action[:, 1] * 1.5) ** 2)
    same, _ = bicycle(pose, speed, length, torch.atan(tangent), action[:, 0])
    torch.testing.assert_close(poses, same, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("speed", [0.0, 1.0, 5.0, 12.0])
def test_an_action_towards_a_point_that_a_car_can_reach_gets_there(speed):
    length = torch.full((40,), 5.0)
    torch.manual_seed(1)
    actions = bounded(torch.full((40,), speed), torch.randn(40, 2) * torch.tensor([1.5, 0.03]) + torch.tensor([0.5, 0]))
    start, v = torch.zeros(40, 3), torch.full((40,), speed)
    end = play(start, v, length, actions)[0][:, -1]
    again = play(start, v, length, action_towards(end[:, :2], v, length))[0][:, -1]
    assert (again[:, :2] - end[:, :2]).norm(dim=-1).max() < 0.05


def test_a_point_behind_means_braking_and_one_in_place_means_standing():
    v, length = torch.tensor([4.0, 0.0]), torch.full((2,), 5.0)
    action = action_towards(torch.tensor([[-1.0, 0.2], [0.0, 0.0]]), v, length)
    poses, after = play(torch.zeros(2, 3), v, length, action)
    assert action[0, 0] < -8.0
    assert after[1] == 0.0
    assert poses[1].abs().max() < 1e-5


def test_headings_of_a_path_are_its_tangents_and_standing_keeps_them():
    t = torch.arange(1, 9) * 0.1
    circle = torch.stack([10 * torch.sin(t), 10 * (1 - torch.cos(t))], dim=-1)[None]
    torch.testing.assert_close(headings_along(circle)[0, :-1, 2], t[:-1], atol=1e-4, rtol=0)
    assert headings_along(torch.zeros(1, 8, 2)).abs().max() == 0.0


class TowardsTheRecord(PathPolicy):
    """Drives towards where the ego was recorded half a second later: what a perfect path planner would ask for."""

    def drive(self, state):
        pose, speed, length = ego_state(state)
        worlds, ego = state.ego_index()
        wanted = state.scenes.log_pose[worlds, ego, state.column + 5, :2]
        return play(pose, speed, length, action_towards(local_point(pose, wanted), speed, length))[0], None


def test_the_recorded_path_driven_through_the_planners_motion_scores_what_its_replay_scores():
    scene = road([Car(0, -1.75, 0.0, 6.0, 0.4), Car(60, 1.75, np.pi, 5.0)], steps=111)
    x = scene.pose[0, :, 0]
    scene.pose[0, :, 1] += 1.2 * np.sin(0.12 * x)  # a bend to the left, then to the right
    scene.pose[0, :, 2] = np.arctan(1.2 * 0.12 * np.cos(0.12 * x))
    policies = (TowardsTheRecord(PathNetwork(TINY)), Replay())
    rows, driven = zip(*(drive_batch([scene], policy, Replay(), 8.0) for policy in policies))
    mine, replayed = driven[0][0], driven[1][0]
    apart = np.hypot(*(mine.pose[0, mine.now :, :2] - replayed.pose[0, replayed.now :, :2]).T)
    assert apart.max() < 0.15
    assert abs(rows[0][0]["score"] - rows[1][0]["score"]) < 0.02


# -- examples


def test_an_example_begins_anywhere_and_its_targets_are_the_record(tmp_path):
    data = EgoDataset(store(tmp_path / "s", 3), future_s=4.0, random=True)
    np.random.seed(3)  # noqa: NPY002
    examples = [data[i] for i in (0, 1, 2)]
    assert len({example.part.now for example in examples}) > 1
    _, state, around = assemble(examples, horizon_s=4.0)
    targets = begin(state, 8)
    worlds, ego = state.ego_index()
    for b, example in enumerate(examples):
        wanted = example.part.pose[example.part.scene.ego, example.part.now + 5 : example.part.now + 41 : 5]
        np.testing.assert_allclose(targets.pose[b].numpy(), wanted, atol=1e-4)
        here = example.part.pose[example.part.scene.ego, example.part.now]
        np.testing.assert_allclose(state.pose[worlds[b], ego[b]].numpy(), here, atol=1e-4)
    assert targets.valid.all()
    assert around.goal.shape == (3, 2)


def test_a_disturbed_example_leads_back_to_the_record():
    _, state = reset(street(0))
    _, same = reset(street(0))
    generator = torch.Generator().manual_seed(1)
    targets = begin(state, 8, Disturbance(aside_m=1.0, turn_rad=0.2, share=1.0), generator)
    plain = begin(same, 8)
    gap = (targets.pose - plain.pose)[0, :, :2].norm(dim=-1)
    start = (state.pose - same.pose)[0, 0, :2].norm()
    assert start > 0.05
    torch.testing.assert_close(gap, start * torch.exp(-torch.arange(1, 9) * 0.5), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(state.poses[0, 1:], same.poses[0, 1:])  # the others stay


def test_a_focused_scene_keeps_the_ego_and_who_comes_near():
    cars = [Car(0, -1.75, 0.0, 5.0), Car(30.0, 1.75), Car(190.0, 1.75), Car(150.0, -5.25, np.pi, 30.0)]
    near = focused(road(cars), 60.0)
    assert near.agent_id.tolist() == [1, 2, 4]
    assert near.ego == 0
    near.validate()


def test_too_short_scenes_and_empty_stores_are_refused(tmp_path):
    write_scenes(tmp_path / "short", iter([road([Car(0, -1.75, 0.0, 5.0)], steps=31)]), fingerprint_of({"t": 1}))
    with pytest.raises(DataError, match="no moment"):
        EgoDataset(tmp_path / "short", future_s=4.0, random=False)[0]


# -- network, loss


def test_an_untrained_planner_goes_straight_on_and_neighbours_have_no_order():
    policy = tiny()
    _, state = reset(street(2), street(5))
    policy.start(state, state.scenes.sources)
    plan = policy.plan(state)
    speed = state.speed[:, 0]
    torch.testing.assert_close(plan[..., 0], speed[:, None] * torch.arange(1, 9) * 0.5, atol=1e-3, rtol=1e-4)
    network = PathNetwork(TINY).eval()
    torch.nn.init.normal_(network.head[-1].weight)
    one = policy.observe(state)
    order = torch.tensor([2, 0, 3, 1])
    other = copy.copy(one)
    object.__setattr__(other, "others", one.others[:, order])
    object.__setattr__(other, "others_valid", one.others_valid[:, order])
    torch.testing.assert_close(network(one), network(other), atol=1e-5, rtol=1e-5)


def test_unknown_waypoints_do_not_count_and_none_at_all_is_refused():
    a, target = torch.zeros(1, 8, 2), torch.zeros(1, 8, 2)
    target[0, 4:] = 100.0
    valid = torch.arange(8)[None] < 4
    assert waypoint_loss(a, target, valid) == 0.0
    with pytest.raises(DataError, match="no known waypoint"):
        waypoint_loss(a, target, torch.zeros_like(valid))


def test_sampled_actions_have_the_probability_of_the_gaussian():
    policy = tiny()
    policy.sample, policy.generator = True, torch.Generator().manual_seed(0)
    _, state = reset(*[street(s) for s in range(3)], rollouts=50)
    policy.start(state, state.scenes.sources)
    moves = policy.act(state)
    logp = moves.log_probability[:, 0]
    # Mean log-density of a Gaussian: -log std - (1 + log 2 pi) / 2 an axis.
    wanted = -(math.log(0.7) + math.log(0.01)) - (1 + math.log(2 * math.pi))
    assert logp.mean().item() == pytest.approx(wanted, abs=0.25)
    assert (moves.log_probability[:, 1:] == 0).all()


# -- training and driving


def configured(scenes, output, *more):
    sizes = [f"module.network.{part}.{size}" for part in ("actor", "critic") for size in ("width=16", "layers=1")]
    return compose(
        "ego",
        ["experiment=path", f"data.train={scenes}", f"data.val={scenes}", f"output_dir={output}", *sizes,
         "datamodule.batch_size=6", "datamodule.repeat=2", "callbacks.progress=null", "callbacks.throughput=null",
         "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", *more],
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    scenes = store(folder / "scenes")
    return folder, scenes, run(configured(scenes, folder / "run"))


def test_a_batch_is_learned_by_heart(trained):
    _, scenes, result = trained
    data = EgoDataset(scenes, future_s=4.0, random=False)
    torch.manual_seed(0)
    module = PathModule(TINY)
    seen, target, valid = module.example([data[i] for i in range(len(data))], None)
    first = waypoint_loss(module.network(seen), target, valid)
    optimizer = torch.optim.Adam(module.network.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = waypoint_loss(module.network(seen), target, valid)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * first
    assert 0.0 < result["metrics"]["val/ade_m"] < 5.0


def test_a_killed_run_ends_as_an_undisturbed_one(trained, tmp_path):
    _, scenes, _ = trained
    options = ("callbacks.checkpoint.every_n_steps=1",)
    whole = run(configured(scenes, tmp_path / "whole", *options))
    step = PathModule.training_step

    class Killed(Exception):
        pass

    def dies(self, batch, batch_idx):
        if self.global_step == 3:
            raise Killed
        return step(self, batch, batch_idx)

    PathModule.training_step = dies
    try:
        with pytest.raises(Killed):
            run(configured(scenes, tmp_path / "cut", *options))
    finally:
        PathModule.training_step = step
    again = run(configured(scenes, tmp_path / "cut", *options))
    one, other = (torch.load(result["last"], weights_only=True)["state_dict"] for result in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_drives_in_closed_loop_and_says_what_it_is(trained, tmp_path):
    _, scenes, result = trained
    policy = load_path_planner(result["last"])
    rows, drives = drive_batch([street(0), street(1)], policy, Replay(), 3.0)
    assert all(row["valid"] and 0.0 <= row["score"] <= 1.0 for row in rows)
    assert len(drives) == 2
    assert policy.fingerprint.parents["scenes"].kind == "traffic-scenes"
    with pytest.raises(MissingError, match="does not exist"):
        load_path_planner(tmp_path / "nothing.ckpt")
    with pytest.raises(DataError, match="has the sizes"):
        run(configured(scenes, tmp_path / "b", f"module.init_from='{result['last']}'", "module.network.actor.layers=2"))


def test_a_move_that_is_not_finite_makes_its_world_invalid_and_no_other():
    policy = tiny()
    forward = policy.network.forward

    def broken(seen):
        points = forward(seen)
        points[0] = float("nan")
        return points

    policy.network.forward = broken
    rows, _ = drive_batch([street(0), street(1)], policy, Replay(), 2.0)
    assert [row["valid"] for row in rows] == [False, True]
    assert "not finite at 0.0 s" in rows[0]["reason"]


# -- open loop


def test_open_loop_sees_nothing_after_the_present_and_speaks_of_the_rear_axle(trained, tmp_path):
    _, _, result = trained
    frames = tuple(f"{step:016x}" for step in range(91))
    scene = street(0)
    object.__setattr__(scene, "frame_tokens", frames)
    write_scenes(tmp_path / "logs", iter([scene]), fingerprint_of({"t": 2}))
    planner = OpenLoop(load_path_planner(result["last"], goal="none"), tmp_path / "logs")
    batch = SceneBatch([frames[40]], ["log"], torch.zeros(1, 4, 3), torch.zeros(1, 8))
    plan = planner.plan(batch)
    assert plan.shape == (1, 8, 3)
    assert torch.isfinite(plan).all()
    cut = until(scene, 40)
    assert cut.num_steps == 16
    assert cut.now == 15
    assert cut.goal is None
    cut.validate()
    with pytest.raises(MissingError, match="no frame with the token"):
        planner.plan(SceneBatch(["f" * 16], ["log"], torch.zeros(1, 4, 3), torch.zeros(1, 8)))
    with pytest.raises(DataError, match="must not see"):
        OpenLoop(load_path_planner(result["last"]), tmp_path / "logs")


def test_the_rear_axle_of_a_turning_car():
    # The centre moves on a circle of radius 10 around (0, 10); the rear axle 1.5 m behind it.
    angle = torch.tensor([[0.0, 0.3, 0.9]])
    centre = torch.stack([10 * torch.sin(angle), 10 * (1 - torch.cos(angle)), angle], dim=-1)
    rear = rear_axle(centre, torch.tensor([1.5]))
    back = rear[..., :2] + 1.5 * torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1) - torch.tensor([1.5, 0.0])
    torch.testing.assert_close(back, centre[..., :2], atol=1e-5, rtol=0)
    torch.testing.assert_close(rear[0, 0], torch.zeros(3))
